"""Federated methods, one file each: the client's half and the server's half in one object.

An algorithm is a frozen dataclass whose fields are its hyperparameters. It holds no state: what a method remembers are
dictionaries of named tensors, kept at the server and at each client, which the engine saves, restores and sends without
knowing what they mean. The defaults of `Algorithm` are federated averaging, so a method overrides what it changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeAlias

import numpy as np

from fedray.lazy import torch
from fedray.seeds import gaussian, generator, secret
from fedray.vector import Layout
from fedray.vector.adapters import Adapters, WeightedSum
from fedray.vector.integers import mean_of

Tensors: TypeAlias = "dict[str, torch.Tensor]"  # by name; "model" [d] float32 is the model
Rows = dict[str, float]  # numbers for the record and for the server


def of_model(name: str) -> bool:
    """Tell whether tensors of that name are the model or, as model.PART, a part of it.

    Those count in means as the plan says, links act on them, and of them differences travel over lossy wires.
    """
    return name.partition(".")[0] == "model"


@dataclass(frozen=True, eq=False)
class Round:
    """A communication round, as server and clients know it before it begins. It has no state.

    number: from 0;  cohort: the clients that are asked, ascending;  clients: how many there are in all;
    weights: of each of the cohort in means of the model, whole numbers from the plan: its examples, or 1;
    expected: how many clients take part on average;  norm: that no update's norm exceeds;  deviation: of the noise on
    their sum, and count_noise: on a count of clients, from the system's randomness if secure_noise;  example_noise: σ
    of clients that hide their own examples;  transcript: hash of what was sent down, of what clients that hide examples
    remember and, once it is known, of who took part;  nonce: new whenever the round is begun.
    """

    number: int
    seed: int
    cohort: tuple[int, ...]
    clients: int
    weights: Mapping[int, int]
    layout: Layout
    adapters: Adapters | None = None  # what the vector means, where it is not a whole model
    expected: float = 0.0
    norm: float = math.inf
    deviation: float = 0.0
    count_noise: float = 0.0
    secure_noise: bool = False
    example_noise: float = 0.0
    transcript: str = ""
    nonce: str = ""

    def weight(self, client: int, name: str) -> int:
        """Return a client's weight in the mean of the tensors of that name: that of the plan for the model, else 1."""
        return self.weights[client] if of_model(name) else 1

    def total(self, name: str) -> int:
        """Return the planned weight of the whole cohort, which failures do not change."""
        return self._of_the_model if of_model(name) else len(self.cohort)

    @cached_property
    def _of_the_model(self) -> int:
        return sum(self.weights.values())

    def rng(self, *key: str | int) -> torch.Generator:
        """Return a generator for one purpose in this round, the same wherever it is used."""
        return generator(self.seed, *key, self.number)

    def secret(self, n: int, *key: str | int) -> np.ndarray:
        """Return n random uint64 for noise: the same only for the same purpose, round and transcript.

        A round that is done again with another model, or other clients, is another release, and needs other noise.
        """
        return secret(n, None if self.secure_noise else self.seed, *key, self.number, self.transcript)

    def noise(self, n: int, *key: str | int) -> torch.Tensor:
        """Return n numbers from N(0, 1), float64, of `secret`."""
        return torch.from_numpy(gaussian(self.secret(n + n % 2, *key))[:n])


@dataclass(eq=False)
class Upload:
    """One client's decoded contribution: tensors, their weights in means, and numbers, by name.

    rows: its examples, steps and loss (the mean that it trained on), and the numbers that its algorithm adds.
    """

    client: int
    tensors: Tensors
    weights: dict[str, int]
    rows: Rows = field(default_factory=dict)


@dataclass(eq=False)
class Folded:
    """The combination of all uploads of a round.

    sums: Σ w x by name, float64;  weights: Σ w;  rows: (client, numbers), ascending by client;  uploads: the uploads
    themselves, ascending by client, where the fold keeps them.
    """

    sums: Tensors
    weights: dict[str, float]
    rows: list[tuple[int, Rows]]
    uploads: list[Upload] = field(default_factory=list)

    @property
    def survivors(self) -> list[int]:
        """The clients that took part."""
        return [client for client, _ in self.rows]

    def mean(self, name: str) -> torch.Tensor:
        """Return the weighted mean of the tensors of that name, float32."""
        return torch.from_numpy(mean_of(self.sums[name].numpy(), self.weights[name]))


class Local(Protocol):
    """One client's training, as its algorithm sees it."""

    client: int
    round: Round
    examples: int
    steps: int  # optimizer steps that it makes in all
    step: int  # how many of them it has made
    total_learning_rate: float  # ‖η a‖₁, of the weights of all gradients in the change: K η of K plain steps of SGD

    @property
    def weights(self) -> torch.Tensor:
        """What is trained, [d] float32, on its device; where clients share only a part of that, a copy of the part."""

    def run(self, correct: Callable[[torch.Tensor], None]) -> None:
        """Train for `steps` steps: `correct` gets the gradient [d] before each is clipped and made."""

    def apart(
        self, start: torch.Tensor, correct: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Train another model from `start` [d], with a fresh optimizer, and leave what is trained as it is.

        `correct` gets the gradient and the weights before each step. Returns the model, and its mean loss.
        """

    def watch(self, stepped: Callable[[], object]) -> None:
        """Call `stepped` after each step."""

    def protect(self, norm: float, multiplier: float) -> None:
        """Have the steps see their examples through gradients that are clipped one by one, and noise on their sum."""

    def gradient(self) -> torch.Tensor:
        """Return the gradient [d] of the mean loss on all of the client's examples, at its weights as they are."""


class Algorithm:
    """A federated method. Derive from it, as a frozen dataclass, and override what differs from federated averaging.

    Arguments of its methods:
        server: the server's state, by name. Never change it in place: return the next one.
        down: what the client received. Never change it in place.
        memory: the client's own copy of what it kept from its last round ({} in its first); changes to it during
            training are its own, and are lost unless `upload` returns them.
    """

    abstract = False  # not to be named by users

    @property
    def hides_examples(self) -> bool:
        """True where noise hides single examples in what a client sends: then the server gets no losses, which have
        none."""
        return self.example_noise is not None

    @property
    def example_noise(self) -> float | None:
        """Multiplier of the noise that hides single examples; None where none does, or where --target-epsilon finds
        it."""
        return None

    @property
    def needs(self) -> Mapping[str, str]:
        """Requirements on the rest of a run: by name, the message for users where it is not met."""
        return {}

    @property
    def offers(self) -> frozenset[str]:
        """Properties that others may require; by default, that the vector and the uploads mean the same every round."""
        return frozenset({"fixed coordinates", "same upload"})

    @property
    def uncounted(self) -> frozenset[str]:
        """Names of tensors that a deployment would not send, and that are not counted."""
        return frozenset()

    @property
    def trains(self) -> Callable[[str], bool] | None:
        """A test of which adapters' parameters are trained, by name; None trains all. The others stay as drawn."""
        return None

    def init(self, model: torch.Tensor, layout: Layout) -> Tensors:
        """Return the server's state before the first round, from the initial model [d]."""
        return {"model": model}

    def broadcast(self, server: Tensors, round: Round) -> Tensors:
        """Return what each client of the cohort receives."""
        return {"model": server["model"]}

    def receive(self, down: Tensors, round: Round) -> Tensors:
        """Return what the hooks below get as `down`, from what `broadcast` sent and the wire delivered."""
        return down

    def start(self, down: Tensors, memory: Tensors) -> torch.Tensor:
        """Return the weights [d] from which a client begins."""
        return down["model"]

    def correct(self, gradient: torch.Tensor, weights: torch.Tensor, down: Tensors, memory: Tensors) -> None:
        """Change a gradient [d] in place, before it is clipped and the optimizer steps."""

    def train(self, local: Local, down: Tensors, memory: Tensors) -> None:
        """Train a client: the whole of it, for methods to which `correct` is not enough."""
        local.run(lambda gradient: self.correct(gradient, local.weights, down, memory))

    def upload(self, local: Local, down: Tensors, memory: Tensors) -> tuple[Tensors, Rows, Tensors]:
        """Return what a client sends, numbers for the record and the server, and what it keeps for its next round."""
        return {"model": local.weights}, {}, {}

    def personal(self, model: torch.Tensor, memory: Tensors) -> torch.Tensor:
        """Return a client's own model [d], given the global one, where the method makes one."""
        return model

    def aggregate(self, server: Tensors, folded: Folded, round: Round) -> Tensors:
        """Return the server's next state."""
        return server | {"model": folded.mean("model")}

    def growth(self, round: Round, rounds: int) -> int:
        """Return the bytes by which the state, and what goes down, have grown after so many rounds like this one."""
        return 0

    def diagnose(self, before: Tensors, after: Tensors, folded: Folded, round: Round) -> Rows:
        """Return numbers about an aggregation for the record: for adapters, the distance of ΔW from the clients' mean.

        ‖ΔW − Σ w_i ΔW_i‖ / ‖Σ w_i ΔW_i‖ (Frobenius), the largest and the mean over layers.
        """
        if round.adapters is None or not folded.uploads:
            return {}
        total = WeightedSum(round.adapters)
        for upload in folded.uploads:
            total.add(upload.tensors["model"], upload.weights["model"])
        errors = total.errors(before.get("base"), after["model"], after.get("base"))
        return {"error_max": errors.max().item(), "error_mean": errors.mean().item()}


class Wrapper(Algorithm):
    """An algorithm around another: it delegates whatever it does not override."""

    abstract = True
    algorithm: Algorithm

    @property
    def hides_examples(self) -> bool:
        return self.algorithm.hides_examples

    @property
    def example_noise(self) -> float | None:
        return self.algorithm.example_noise

    @property
    def needs(self) -> Mapping[str, str]:
        return self.algorithm.needs

    @property
    def offers(self) -> frozenset[str]:
        return self.algorithm.offers

    @property
    def uncounted(self) -> frozenset[str]:
        return self.algorithm.uncounted

    @property
    def trains(self) -> Callable[[str], bool] | None:
        return self.algorithm.trains

    def init(self, model: torch.Tensor, layout: Layout) -> Tensors:
        return self.algorithm.init(model, layout)

    def broadcast(self, server: Tensors, round: Round) -> Tensors:
        return self.algorithm.broadcast(server, round)

    def receive(self, down: Tensors, round: Round) -> Tensors:
        return self.algorithm.receive(down, round)

    def start(self, down: Tensors, memory: Tensors) -> torch.Tensor:
        return self.algorithm.start(down, memory)

    def correct(self, gradient: torch.Tensor, weights: torch.Tensor, down: Tensors, memory: Tensors) -> None:
        self.algorithm.correct(gradient, weights, down, memory)

    def train(self, local: Local, down: Tensors, memory: Tensors) -> None:
        self.algorithm.train(local, down, memory)

    def upload(self, local: Local, down: Tensors, memory: Tensors) -> tuple[Tensors, Rows, Tensors]:
        return self.algorithm.upload(local, down, memory)

    def personal(self, model: torch.Tensor, memory: Tensors) -> torch.Tensor:
        return self.algorithm.personal(model, memory)

    def aggregate(self, server: Tensors, folded: Folded, round: Round) -> Tensors:
        return self.algorithm.aggregate(server, folded, round)

    def growth(self, round: Round, rounds: int) -> int:
        return self.algorithm.growth(round, rounds)

    def diagnose(self, before: Tensors, after: Tensors, folded: Folded, round: Round) -> Rows:
        return self.algorithm.diagnose(before, after, folded, round)


def check_ranges(
    algorithm: Algorithm,
    above_0: Collection[str] = (),
    not_negative: Collection[str] = (),
    below_1: Collection[str] = (),
) -> None:
    """Raise `ValueError` unless these fields are above 0, not negative, or at least 0 and below 1, and finite."""
    ranges = [
        (above_0, lambda value: 0 < value < math.inf, "above 0"),
        (not_negative, lambda value: 0 <= value < math.inf, "not negative"),
        (below_1, lambda value: 0 <= value < 1, "at least 0 and below 1"),
    ]
    for names, fits, must in ranges:
        for name in names:
            if not fits(value := getattr(algorithm, name)):
                raise ValueError(f"{name} is {value}; it must be {must}")
