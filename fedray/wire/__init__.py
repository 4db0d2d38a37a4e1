"""Messages between the server and clients pass through a chain of links; their bytes are counted at the end.

A message is a dictionary of named arrays of any dtype; its bytes are their sum. Without a lossy link, clients send
their tensors as they are. With one, in either direction, links see the difference from what the client received, the
fold adds these up, and the server adds their mean to its own exact model, once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedray.algorithms import Folded, Round, Tensors, of_model
from fedray.lazy import torch
from fedray.vector import as_tensor

Payload = dict[str, np.ndarray]
VALUES = "values"  # of what a link makes, what the next one sees


class Link:
    """One transform of messages, both halves of it. Derive from it, as a frozen dataclass.

    A link acts on the model, and on the other tensors that `tensors` names. What it makes of a vector is a vector of
    any dtype, or a dictionary of them: then the next link sees its "values", and the rest travels beside.
    """

    abstract = False  # not to be named by users
    lossy = False  # what arrives is not what was sent
    uniform = False  # clients must count alike, whatever the number of their examples
    coded = False  # what it makes are codes, not numbers: no link may follow
    sparse = False  # what it makes stands for other coordinates every time
    remembers = False  # its memory is about coordinates: no sparse link may come before
    diverges = False  # what arrives may be longer than what was sent: not to be corrected by feedback
    contracts = False  # what arrives is never longer, in the Euclidean norm, than what was sent
    private = False  # the sum is noisy, and all that the algorithm sees of its clients
    multiplier: float | None = None  # of the bound: standard deviation of that noise; None where it is to be found
    tensors: tuple[str, ...] = ("model",)

    @property
    def needs(self) -> Mapping[str, str]:
        """Requirements on the rest of a run: by name, the message for users where it is not met."""
        return {}

    @property
    def offers(self) -> frozenset[str]:
        """Properties that others may require."""
        return frozenset()

    @property
    def bound(self) -> float | None:
        """The Euclidean norm that no update exceeds that it sends; None where there is no such bound."""
        return None

    @property
    def reports(self) -> tuple[str, ...]:
        """Names of what travels beside its values and is added up, not restored."""
        return ()

    @property
    def hides(self) -> frozenset[str]:
        """Properties that others offer, and that do not hold with this link."""
        return frozenset()

    def send(self, x: torch.Tensor, round: Round) -> torch.Tensor | Tensors:
        """Return the payload that goes down for a tensor [d] of the server's."""
        return x

    def arrive(self, payload: torch.Tensor | Tensors, round: Round) -> torch.Tensor:
        """Return the tensor [d] that a client restores from a payload."""
        assert isinstance(payload, torch.Tensor)
        return payload

    def encode(
        self, x: torch.Tensor, memory: Tensors, round: Round, client: int
    ) -> tuple[torch.Tensor | Tensors, Tensors]:
        """Return the payload that goes up for a client's tensor [d], and the client's next memory of this link."""
        return x, {}

    def decode(self, payload: torch.Tensor | Tensors, round: Round) -> torch.Tensor:
        """Return the tensor [d] to be folded, from a payload that came up."""
        assert isinstance(payload, torch.Tensor)
        return payload

    def noise_on_count(self, round: Round) -> float:
        """Return the standard deviation of the noise on its reports, each of which is at most a half."""
        return 0.0

    def learn(self, told: Tensors, round: Round) -> Tensors:
        """Return what the link keeps at the server ("norm": the next round's bound), from sums of its reports."""
        return {}

    def finish(
        self, total: torch.Tensor, weight: float, round: Round, survivors: list[int]
    ) -> tuple[torch.Tensor, float]:
        """Complete the sum [d] of a round's tensors, float64, and its weight; return both."""
        return total, weight


@dataclass(frozen=True)
class Wire:
    """A chain of links, of which the first acts first; and another for the way down, where it is not the same.

    differences: clients send differences, whatever the links.
    """

    links: tuple[Link, ...] = ()
    down: tuple[Link, ...] | None = None
    differences: bool = False

    @property
    def lossy(self) -> bool:
        """True where clients send differences."""
        return self.differences or any(link.lossy for link in (*self.links, *(self.down or ())))

    @property
    def _down(self) -> tuple[Link, ...]:
        return self.links if self.down is None else self.down

    def send(self, down: Tensors, round: Round) -> Payload:
        """Return the message that goes down to every client."""
        message: Tensors = {}
        for name, x in down.items():
            for index, link in _of(self._down, name):
                x = _pack(message, f"{name}/{index}.", link.send(x, round))
            message[name] = x
        return _arrays(message)

    def arrive(self, payload: Payload, round: Round) -> Tensors:
        """Return what a client receives. It must not be written to."""
        return _unpack(self._down, payload, round, "arrive")

    def encode(self, tensors: Tensors, memory: Tensors, round: Round, client: int) -> tuple[Payload, Tensors]:
        """Return the message that a client sends, and what its links keep.

        Raises:
            FloatingPointError: a link would hide that values are not finite.
        """
        message: Tensors = {}
        kept: Tensors = {}
        for name, x in tensors.items():
            links = _of(self.links, name)
            if links and x.numel() and not all(map(math.isfinite, torch.aminmax(x))):
                raise FloatingPointError(f"the {name} that it sends is not finite (lower the learning rate?)")
            for index, link in links:
                prefix = _of_link(index, link) + ("" if name == "model" else f"{name}/")
                own = {key.removeprefix(prefix): value for key, value in memory.items() if key.startswith(prefix)}
                made, after = link.encode(x, own, round, client)
                kept |= {prefix + key: value for key, value in after.items()}
                x = _pack(message, f"{name}/{index}.", made)
            message[name] = x
        return _arrays(message), kept

    def decode(self, payload: Payload, round: Round) -> Tensors:
        """Return the tensors to be folded, from a client's message."""
        return _unpack(self.links, payload, round, "decode")

    def finish(self, folded: Folded, sent: Tensors, round: Round) -> Folded:
        """Complete the sums; replace sums of differences from what was sent down by what they lead to.

        Where they are private, noise is added to a sum of nothing too, and all else that clients sent is left out.
        """
        if self.private:
            total = folded.sums.get("model", torch.zeros(len(sent["model"]), dtype=torch.float64))
            folded = Folded({"model": total}, {"model": folded.weights.get("model", 0)}, [])
        for name in folded.sums:
            for _, link in reversed(_of(self.links, name)):
                done = link.finish(folded.sums[name], folded.weights[name], round, folded.survivors)
                folded.sums[name], folded.weights[name] = done
        if self.lossy:
            for name in filter(of_model, list(folded.sums)):
                mean = folded.sums[name] / folded.weights[name]
                folded.sums[name], folded.weights[name] = sent[name].double() + mean, 1
            for upload in folded.uploads:
                for name in filter(of_model, list(upload.tensors)):
                    upload.tensors[name] = sent[name] + upload.tensors[name]
        return folded

    def learn(self, folded: Folded, round: Round) -> Tensors:
        """Return what links keep at the server for the next round, by name, from what clients report beside values."""
        kept: Tensors = {}
        for index, link in _of(self.links, "model"):
            if link.reports:
                names = {key: f"model/{index}.{key}" for key in link.reports}
                told = {key: folded.sums.get(name, torch.zeros(1, dtype=torch.float64)) for key, name in names.items()}
                kept |= {_of_link(index, link) + key: value for key, value in link.learn(told, round).items()}
        return kept

    def norm(self, server: Tensors) -> float:
        """The norm that no update exceeds in the next round."""
        names = [_of_link(index, link) + "norm" for index, link in enumerate(self.links)]
        return next((float(server[name]) for name in names if name in server), self.bound)

    @property
    def private(self) -> bool:
        return any(link.private for link in self.links)

    @property
    def bound(self) -> float:
        """The norm that no update exceeds."""
        return next((link.bound for link in self.links if link.bound is not None), math.inf)


def _of_link(index: int, link: Link) -> str:
    """Return how names begin of what a link keeps."""
    return f"link{index}.{type(link).__name__.lower()}/"


def differences(tensors: Tensors, received: Tensors) -> Tensors:
    """Return what a client sends where differences travel: of the model, or its parts, from what it received."""
    return tensors | {name: tensor - received[name] for name, tensor in tensors.items() if of_model(name)}


def counted(payload: Payload, uncounted: frozenset[str]) -> int:
    """Return the bytes of a message, without tensors that a deployment would not send."""
    return sum(array.nbytes for name, array in payload.items() if name not in uncounted)


def _of(links: tuple[Link, ...], name: str) -> list[tuple[int, Link]]:
    """Return the links that act on the tensor of that name, with their positions."""
    about = "model" if of_model(name) else name
    return [(index, link) for index, link in enumerate(links) if about in link.tensors]


def _unpack(links: tuple[Link, ...], payload: Payload, round: Round, verb: str) -> Tensors:
    message = {name: as_tensor(array) for name, array in payload.items()}
    tensors: Tensors = {}
    for name in [name for name in message if not _beside(name, message)]:
        x = message[name]
        for index, link in reversed(_of(links, name)):
            prefix = f"{name}/{index}."
            beside = {key.removeprefix(prefix): each for key, each in message.items() if key.startswith(prefix)}
            tensors |= {prefix + key: beside.pop(key) for key in link.reports if key in beside}
            x = getattr(link, verb)({VALUES: x, **beside} if beside else x, round)
        tensors[name] = x
    return tensors


def _pack(message: Tensors, prefix: str, made: torch.Tensor | Tensors) -> torch.Tensor:
    """Put what a link made beside the values into the message, and return the values."""
    if isinstance(made, torch.Tensor):
        return made
    message |= {prefix + key: value for key, value in made.items() if key != VALUES}
    return made[VALUES]


def _beside(name: str, message: Tensors) -> bool:
    """Tell whether an entry of a message stands beside a tensor's values, put there by a link: NAME/INDEX.KEY."""
    owner, _, rest = name.rpartition("/")
    return owner in message and rest.partition(".")[0].isdigit()


def _arrays(message: Tensors) -> Payload:
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in message.items()}
