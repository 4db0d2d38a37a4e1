"""A run is its configuration: one frozen dataclass."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from fedray import menus
from fedray.algorithms import Algorithm
from fedray.algorithms.cohorts import Cohort, Fixed
from fedray.algorithms.ema import EMA
from fedray.checks import check
from fedray.errors import UserError
from fedray.federated import Federation
from fedray.forms import find_sources
from fedray.menus import word
from fedray.scores import networks
from fedray.tasks import Task
from fedray.tasks.ddpm import DDPM
from fedray.tasks.named import task_from_json, task_to_json
from fedray.vector.optimizer import Optimizer
from fedray.wire import Wire

FORMAT = 2  # of config.json: 1 knew `rule` and `codec`

# Where a run is computed. It does not change the result, but for threads and for GPUs, whose float sums differ:
# `check_resumable` holds a run to those.
PLACEMENT = ("actors", "cpus_per_actor", "gpus_per_actor", "node_label", "address", "client_timeout", "start_timeout",
             "client_retries", "min_clients", "inception_weights", "checkpoint_every")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(Federation):
    """Everything that a run depends on. Names are those of diffusers' `train_unconditional.py` where it has one."""

    task: Annotated[Task, tyro.conf.Suppress] = field(default_factory=DDPM)

    # Local training
    local_epochs: int | None = None
    """E, passes over its own data that a client makes in a round (by default the preset's). Give this or local
    steps."""
    local_steps: int | None = None
    """Optimizer steps that a client makes in a round, in place of local epochs."""
    train_batch_size: int = 16
    """Images in a client's batch. An epoch's last batch is what remains, and is a whole step: of 225 images in batches
    of 32, a single one."""
    drop_last: bool = False
    """Leave out an epoch's last batch where it is smaller than the others, and not the only one."""
    optimizer: Annotated[Optimizer, word(Optimizer.parse, str, "adamw|adam|sgd|CLASS")] = Optimizer()
    """Of a client: adamw, adam, sgd, or the name of a class of torch.optim, with options as sgd:momentum=0.9."""
    learning_rate: float = 1e-4
    """The optimizer's learning rate."""
    lr_scheduler: str = "constant"
    """Learning rate over the whole run: constant, constant_with_warmup, linear, cosine, cosine_with_restarts or
    polynomial."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises at the beginning of the run."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are averaged for one optimizer step."""
    mixed_precision: str = "no"
    """Compute in float32 (no), bf16 or fp16 (GPU only); the weights stay float32."""
    random_flip: bool = False
    """Mirror half of the training images, left to right."""
    adam_beta1: float = 0.95
    """β1 of adamw and adam."""
    adam_beta2: float = 0.999
    """β2 of adamw and adam."""
    adam_weight_decay: float = 1e-6
    """Weight decay of adamw and adam."""
    adam_epsilon: float = 1e-8
    """ε of adamw and adam."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient to this norm; None does not clip."""
    keep_optimizer: bool = False
    """Keep each client's optimizer state from round to round (2 vectors a client, on disk) instead of a fresh one."""
    seed: int = 0
    """Seed of every random number in training."""
    init_from: str | None = None
    """Start from the model of this run, or of this folder that diffusers loads, instead of from fresh weights."""

    # Samples and scores
    sampler: str = "ddpm"
    """Which diffusers scheduler samples: ddpm, ddim, dpmsolver++, sde-dpmsolver++, unipc, heun or euler."""
    sampling_steps: int = 1000
    """Denoising steps per image."""
    evaluate_samples: int = 64
    """Images generated, and scored, after the last round; 0 for none."""
    evaluate_personal: bool = False
    """Sample clients' own models in turn, a batch each, in place of the global one: where an algorithm makes some, as
    ditto does. With --share or --keep-local it is always so."""
    evaluate_seed: int = 0
    """Seed of the noise that samples start from: runs of several seeds are sampled from the same noise."""
    evaluate_repeats: int = 1
    """After the last round, generate and score so many sets of images, each from other noise: scores are their means,
    ± their spread over draws."""
    evaluate_every: int | None = None
    """Generate and score every so many rounds, besides after the last."""
    keep_samples: bool = False
    """Keep every generated image as a PNG file, not only the grid of the first 64."""
    eval_batch_size: int = 64
    """Images in a sampling batch."""
    checkpoint_every: int = 1
    """Save the state every so many rounds, and after the last; rows are written, and shown, once it is saved."""
    checkpoints_total_limit: int = 1
    """How many of the last checkpoints are kept."""
    features: Annotated[str | None, word(menus.name_or_none, str, "NAME")] = None
    """Features that scores are measured on: inception (inception-768, -192, -64), digits (a small classifier of
    digits), clip:FOLDER, dinov2:FOLDER, a TorchScript FILE.pt, a Python function MODULE:FUNCTION or
    FILE.py:FUNCTION; None for no score."""
    inception_weights: str | None = None
    """File of Inception's weights (pytorch-fid's); by default torch's hub cache."""
    kid_subset_size: int = 1000
    """Images in each of the 100 subsets that the kernel distance is averaged over."""

    # Placement
    actors: int | None = None
    """Client actors (processes); 0 trains in this process without Ray, None takes as many as fit."""
    cpus_per_actor: float = 1.0
    """CPUs of an actor; it computes with as many threads (at least one)."""
    gpus_per_actor: float = 0.0
    """GPUs of an actor: a whole number, or 1/n for n actors on each GPU (0.5, 0.333, 0.25 …); 0 computes on CPUs. On
    the command line of a run, `auto` is 1/n for as many as fit, by a rehearsal of one."""
    node_label: str | None = None
    """KEY=VALUE, a label that Ray's nodes must have for actors to be on them, such as ray.io/accelerator-type=A100."""
    address: str | None = None
    """A running Ray cluster to join (auto, or HOST:PORT); None starts a private one, unless RAY_ADDRESS is set."""
    client_timeout: float = 86_400.0
    """Seconds without an answer after which a client is done again by another process, three times in all."""
    start_timeout: float = 180.0
    """Seconds for an actor to start: each imports torch, and a cold disk serves them sequentially."""
    client_retries: int = 0
    """How often a client that fails (an error, weights that are not finite) is done again before it is left out."""
    min_clients: int | None = None
    """Clients of a round that must not be left out, or the run stops; by default 1, and 0 where rounds may be empty."""

    def __post_init__(self) -> None:
        # Actors and resumed runs have other working directories.
        if isinstance(self.features, str):
            object.__setattr__(self, "features", networks.absolute(self.features))
        if isinstance(self.wire, list):
            object.__setattr__(self, "wire", tuple(self.wire))
        for name in ("inception_weights", "init_from"):
            if isinstance(getattr(self, name), (str, Path)):
                object.__setattr__(self, name, str(Path(getattr(self, name)).absolute()))
        for name, parse in menus.FORMS.items():
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, parse(value, None))
        links = [link for wire in (self.wire, self.wire_down) if isinstance(wire, tuple) for link in wire]
        for part in (self.task, self.partition, self.algorithm, self.fold, *links, self.malicious):
            find_sources(part)

    @property
    def method(self) -> Algorithm:
        """The algorithm, with the average around it that `use_ema` asks for."""
        if not self.use_ema:
            return self.algorithm
        return EMA(self.ema_max_decay, self.algorithm, self.ema_inv_gamma, self.ema_power)

    @property
    def links(self) -> Wire:
        """The wire as a chain of links."""
        return Wire(self.wire, self.wire_down, self.fold.differences)

    @property
    def protected(self) -> bool:
        """True where noise or masks hide what clients send."""
        return self.links.private or self.fold.uniform or self.method.hides_examples

    @property
    def adam(self) -> dict[str, Any]:
        """Options of the optimizers adamw and adam."""
        return {
            "betas": (self.adam_beta1, self.adam_beta2),
            "weight_decay": self.adam_weight_decay,
            "eps": self.adam_epsilon,
        }

    @property
    def threads(self) -> int:
        """Threads per client. Float sums depend on their number, so a resumed run must keep it."""
        return max(1, math.floor(self.cpus_per_actor))

    @property
    def drawn(self) -> Cohort:
        """How a round's clients are drawn."""
        return self.cohort or Fixed(self.fraction)

    @property
    def least(self) -> int:
        """How many clients of a round must not be left out."""
        if self.min_clients is not None:
            return self.min_clients
        return 1 if self.only_client is not None or (self.drawn.rate is None and not self.dropout_rate) else 0

    @property
    def cohort_size(self) -> int:
        """Clients of a round; where their number is random, of a round of average size."""
        return max(1, math.floor(self.drawn.expected(self.clients) + 0.5)) if self.only_client is None else 1

    def steps(self, examples: int) -> int:
        """Return the optimizer steps in one round of a client with this number of examples."""
        if self.local_steps is not None:
            return self.local_steps
        assert self.local_epochs is not None
        return self.local_epochs * math.ceil(self.batches(examples) / self.gradient_accumulation_steps)

    def batches(self, examples: int) -> int:
        """Return the batches of one epoch of a client with this number of examples."""
        full, rest = divmod(examples, self.train_batch_size)
        return full + (rest > 0 and not (self.drop_last and full > 0))

    def validates(self, rounds: int) -> bool:
        """Tell whether to measure held-out losses, and sample for prompts, after this number of rounds."""
        return rounds == self.rounds or rounds % self.validation_rounds == 0

    def evaluates(self, rounds: int) -> bool:
        """Tell whether to sample and score the model after this number of rounds."""
        due = rounds == self.rounds or (self.evaluate_every is not None and rounds % self.evaluate_every == 0)
        return due and self.evaluate_samples > 0

    def saves(self, rounds: int) -> bool:
        """Tell whether to write a checkpoint after this number of rounds."""
        return rounds == self.rounds or rounds % self.checkpoint_every == 0

    @property
    def partial(self) -> bool:
        """True where clients keep a part of the model to themselves."""
        return self.share is not None or self.keep_local is not None

    @property
    def personal(self) -> bool:
        """True where clients' own models are sampled, and measured on what they hold out."""
        return self.partial or self.evaluate_personal

    def shares(self, name: str) -> bool:
        """Tell whether a parameter of that name is shared."""
        wanted = self.share is None or re.search(self.share, name) is not None
        return wanted and (self.keep_local is None or re.search(self.keep_local, name) is None)

    @property
    def trainers(self) -> list[int]:
        """All clients that may take part in a round."""
        return list(range(self.clients)) if self.only_client is None else [self.only_client]

    @property
    def single(self) -> bool:
        """True where one client trains: the run is plain training, not a federation."""
        return self.clients == 1 or self.only_client is not None

    def check(self) -> None:
        """Raise `UserError` for what can be seen to be wrong without data or hardware."""
        check(self)

    @property
    def task_offers(self) -> frozenset[str]:
        """Properties of the task that an algorithm may require; a user's own task need not define them."""
        return getattr(self.task, "offers", frozenset())

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary that JSON can hold, with the short forms of what was chosen by name."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return (
            values
            | {name: form(values[name]) for name, form in menus.TEXTS.items()}
            | {"task": task_to_json(self.task)}
        )

    @property
    def sha256(self) -> str:
        """SHA-256 of everything that the result depends on: equal for two runs that differ only in placement."""
        return sha256_of(self.to_json())

    @classmethod
    def from_json(cls, values: Mapping[str, Any], allowed: Collection[Path] = ()) -> "Config":
        """Return the inverse of `to_json`.

        Args:
            allowed: the user's own files that may run; what is of another refuses to be used.

        Raises:
            UserError: it is of another version, or its task is code of a file that may not run.
        """
        unknown = [key for key in values if key not in {item.name for item in dataclasses.fields(cls)}]
        if unknown:
            raise UserError(f"this run is of another version of fedray: it has a setting {unknown[0]!r}.")
        parsed = {name: parse(values[name], allowed) for name, parse in menus.FORMS.items() if name in values}
        parsed["features"] = menus.saved_features(values.get("features"), allowed)
        # A cluster is joined where the user says so: on the command line, or by RAY_ADDRESS.
        parsed["address"] = None
        return cls(**{**values, **parsed, "task": task_from_json(values["task"], allowed)})


def sha256_of(values: dict[str, Any]) -> str:
    """Return `Config.sha256` of a saved configuration, as `to_json` gave it."""
    matters = {name: value for name, value in values.items() if name not in PLACEMENT}
    return hashlib.sha256(json.dumps(matters, sort_keys=True, default=str).encode()).hexdigest()
