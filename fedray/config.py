"""A run is its configuration: one frozen dataclass, and the presets."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from fedray.algorithms.lora_rules import FFA, SVD, Flora
from fedray.algorithms.rules import FedAvg, Rule
from fedray.data.partition import IID, PARTITIONS, Partition
from fedray.errors import UserError, check_name, pick, short
from fedray.scores import networks
from fedray.tasks import Task
from fedray.tasks.ddpm import DDPM
from fedray.tasks.lora import LoRA
from fedray.wire.codecs import CODECS, Codec, Float32

TASKS: dict[str, type] = {DDPM.name: DDPM, LoRA.name: LoRA}
RULES: dict[str, type] = {"fedavg": FedAvg, "ffa": FFA, "svd": SVD, "flora": Flora}
LR_SCHEDULERS = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
)  # fmt: skip
PRECISIONS = ("no", "bf16", "fp16")

# Where a run is computed. It does not change the result, but for threads and for GPUs, whose float sums differ:
# `check_resumable` holds a run to those.
PLACEMENT = ("actors", "cpus_per_actor", "gpus_per_actor", "address", "client_timeout", "inception_weights")


def _short_form(menu: dict[str, type], kind: str) -> PrimitiveConstructorSpec:
    """How tyro reads and shows what is chosen by name: `--partition dirichlet:0.1`."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join(menu),
        instance_from_str=lambda arguments: pick(kind, arguments[0], menu),
        is_instance=lambda instance: True,
        str_from_instance=lambda instance: [short(instance, menu)],
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run depends on. Names are those of diffusers' `train_unconditional.py` where it has one."""

    task: Annotated[Task, tyro.conf.Suppress] = field(default_factory=DDPM)

    # The federation
    clients: int = 4
    """C, how many clients hold the data. One client is centralised training."""
    fraction: float = 1.0
    """Share of the clients that take part in a round, drawn anew each round; in (0, 1]."""
    partition: Annotated[Partition, _short_form(PARTITIONS, "partition")] = IID()
    """Who holds which examples: iid, quantity:ALPHA (skewed sizes), by-label, by-attribute:COLUMN, by-folder (or
    identity), or dirichlet:ALPHA[:COLUMN] (the smaller ALPHA, the more skewed)."""
    held_out_share: float = 0.0
    """Share of each client's examples that it does not train on; the loss on them is measured each round."""
    test_share: float = 0.0
    """Share of each client's examples that is kept for tests: neither trained on nor measured."""
    validation_rounds: int = 1
    """Measure the held-out loss, and draw the prompts, every so many rounds, and after the last."""
    only_client: int | None = None
    """Train this client alone, on its part of the partition: what it would reach without the others."""
    rounds: int = 10
    """T, communication rounds."""
    rule: Annotated[Rule, _short_form(RULES, "rule")] = FedAvg()
    """How updates become the next model: fedavg; of adapters (which fedavg averages as A and B apart) also ffa (A is
    frozen), svd (the best factors of the mean of B A) or flora (stacking; the mean of B A goes into the base)."""
    codec: Annotated[Codec, _short_form(CODECS, "codec")] = Float32()
    """How weights travel: float32 (exact), or float16 (half the bytes)."""
    use_ema: bool = False
    """Keep an exponential moving average of the global model at the server, and sample from it."""
    ema_max_decay: float = 0.9999
    """Largest decay of that average per local step. Where one client trains it is taken at every step, else once a
    round, decayed for as many steps as clients made on average."""
    ema_inv_gamma: float = 1.0
    """The decay at step k is 1 − (1 + (k − 1) / ema_inv_gamma) ** −ema_power, up to ema_max_decay."""
    ema_power: float = 0.75
    """Exponent of that warm-up."""

    # Local training
    local_epochs: int | None = None
    """E, passes over its own data that a client makes in a round (by default the preset's). Give this or local
    steps."""
    local_steps: int | None = None
    """Optimizer steps that a client makes in a round, in place of local epochs."""
    train_batch_size: int = 16
    """Images in a client's batch; an epoch's last batch may be smaller."""
    learning_rate: float = 1e-4
    """AdamW's learning rate."""
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
    """AdamW's β1."""
    adam_beta2: float = 0.999
    """AdamW's β2."""
    adam_weight_decay: float = 1e-6
    """AdamW's weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's ε."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient to this norm; None does not clip."""
    keep_optimizer: bool = False
    """Keep each client's optimizer state from round to round (2 vectors a client, on disk) instead of a fresh one."""
    seed: int = 0
    """Seed of every random number in the run."""

    # Samples and scores
    sampler: str = "ddpm"
    """Which diffusers scheduler samples: ddpm, ddim, dpmsolver++ or unipc."""
    sampling_steps: int = 1000
    """Denoising steps per image."""
    evaluate_samples: int = 64
    """Images generated, and scored, after the last round; 0 for none."""
    evaluate_every: int | None = None
    """Generate and score every so many rounds, besides after the last."""
    keep_samples: bool = False
    """Keep every generated image as a PNG file, not only the grid of the first 64."""
    eval_batch_size: int = 64
    """Images in a sampling batch."""
    checkpoints_total_limit: int = 1
    """How many of the last checkpoints are kept."""
    features: str | None = None
    """Features that scores are measured on: inception (inception-768, -192, -64), digits (a small classifier of
    digits), a TorchScript FILE.pt, a Python function MODULE:FUNCTION or FILE.py:FUNCTION; None for no score."""
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
    """GPUs of an actor, for example 0.25; 0 computes on CPUs."""
    address: str | None = None
    """A running Ray cluster to join (auto, or HOST:PORT); None starts a private one, unless RAY_ADDRESS is set."""
    client_timeout: float = 86_400.0
    """Seconds after which a client that has not answered ends the run."""

    def __post_init__(self) -> None:
        if isinstance(self.task, LoRA):
            object.__setattr__(self, "task", replace(self.task, train_a=not isinstance(self.rule, FFA)))
        # Actors and resumed runs have other working directories.
        if self.features is not None:
            object.__setattr__(self, "features", networks.absolute(self.features))
        if self.inception_weights is not None:
            object.__setattr__(self, "inception_weights", str(Path(self.inception_weights).absolute()))

    @property
    def threads(self) -> int:
        """Threads a client computes with. Float sums depend on it, so a resumed run must keep it."""
        return max(1, math.floor(self.cpus_per_actor))

    @property
    def cohort_size(self) -> int:
        return 1 if self.only_client is not None else max(1, math.floor(self.fraction * self.clients + 0.5))

    def steps(self, examples: int) -> int:
        """Optimizer steps of a client with so many examples in one round."""
        if self.local_steps is not None:
            return self.local_steps
        assert self.local_epochs is not None
        batches = math.ceil(examples / self.train_batch_size)
        return self.local_epochs * math.ceil(batches / self.gradient_accumulation_steps)

    def validates(self, rounds: int) -> bool:
        """Whether held-out losses are measured, and prompts drawn, after so many rounds."""
        return rounds == self.rounds or rounds % self.validation_rounds == 0

    def evaluates(self, rounds: int) -> bool:
        """Whether the model is sampled and scored after so many rounds."""
        due = rounds == self.rounds or (self.evaluate_every is not None and rounds % self.evaluate_every == 0)
        return due and self.evaluate_samples > 0

    def ema_decay(self, step: int) -> float:
        """Decay of the average at an optimizer step, counted from 1 over the whole run: diffusers' `EMAModel`."""
        warm_up = 1 - (1 + (step - 1) / self.ema_inv_gamma) ** -self.ema_power
        return min(self.ema_max_decay, warm_up)

    @property
    def single(self) -> bool:
        """One client trains: the run is plain training, not a federation."""
        return self.clients == 1 or self.only_client is not None

    def check(self) -> None:
        """Raise `UserError` for what can be seen to be wrong without data or hardware."""
        if self.local_epochs is not None and self.local_steps is not None:
            raise UserError("--local-epochs and --local-steps are both given; give one of them.")
        if self.local_epochs is None and self.local_steps is None:
            raise UserError("neither --local-epochs nor --local-steps is given; give one of them.")
        counts = (
            "clients", "rounds", "local_epochs", "local_steps", "train_batch_size", "eval_batch_size",
            "learning_rate", "max_grad_norm", "cpus_per_actor", "client_timeout", "gradient_accumulation_steps",
            "validation_rounds", "checkpoints_total_limit", "evaluate_every", "ema_inv_gamma", "ema_power",
        )  # fmt: skip
        for name in counts:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{flag(name)} {value}: it must be above 0.")
        for name in ("evaluate_samples", "gpus_per_actor", "adam_weight_decay", "actors", "lr_warmup_steps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{flag(name)} {value}: it must not be negative.")
        if not 0 < self.fraction <= 1:
            raise UserError(f"--fraction {self.fraction}: it must be above 0 and at most 1.")
        for name in ("ema_max_decay", "adam_beta1", "adam_beta2", "held_out_share", "test_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{flag(name)} {getattr(self, name)}: it must be at least 0 and below 1.")
        if self.gpus_per_actor > 1 and self.gpus_per_actor != int(self.gpus_per_actor):
            raise UserError(f"--gpus-per-actor {self.gpus_per_actor}: above 1 it must be a whole number.")
        if self.kid_subset_size < 2:
            raise UserError(f"--kid-subset-size {self.kid_subset_size}: it must be at least 2.")
        if self.evaluate_samples == 1 and self.features:
            raise UserError("--evaluate-samples 1: a score needs at least 2 images (or --features None).")
        if self.held_out_share + self.test_share >= 1:
            raise UserError("--held-out-share and --test-share together leave nothing to train on.")
        if self.only_client is not None and not 0 <= self.only_client < self.clients:
            raise UserError(f"--only-client {self.only_client}: clients are numbered 0 to {self.clients - 1}.")
        check_name("learning-rate scheduler", self.lr_scheduler, LR_SCHEDULERS)
        check_name("precision", self.mixed_precision, PRECISIONS)
        if self.mixed_precision == "fp16" and not self.gpus_per_actor:
            raise UserError("--mixed-precision fp16 needs a GPU (--gpus-per-actor); on a CPU use bf16.")
        self.task.check(self.sampler, self.sampling_steps)
        if isinstance(self.rule, (FFA, SVD, Flora)) and not isinstance(self.task, LoRA):
            raise UserError(
                f"--rule {short(self.rule, RULES)} is for adapters (fedray finetune), not for whole models."
            )
        if isinstance(self.rule, (SVD, Flora)) and (self.use_ema or self.keep_optimizer):
            raise UserError(
                f"--rule {short(self.rule, RULES)} makes new factors every round, to which an average or an optimizer "
                f"of the old ones does not fit: say --no-use-ema and --no-keep-optimizer."
            )
        if isinstance(self.rule, Flora) and isinstance(self.task, LoRA) and self.task.base_dtype != "float32":
            raise UserError(
                f"--rule flora needs --base-dtype float32: {self.task.base_dtype} would round most of a change away."
            )

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON can hold, with the short forms of what was chosen by name."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["task"] = {"name": self.task.name, **dataclasses.asdict(self.task)}  # type: ignore[call-overload]
        for name, menu in MENUS.items():
            values[name] = short(values[name], menu)
        return values

    @property
    def sha256(self) -> str:
        """Of everything that the result depends on: the same for two runs that only compute in other places."""
        return sha256_of(self.to_json())

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_json`, for fedray's own tasks, partitions, codecs and rules.

        Raises:
            UserError: something in it is the user's own class (use `fedray.run` from the script that defines it),
                or is of another version.
        """
        values = dict(values)
        task = dict(values.pop("task"))
        name = task.pop("name")
        if name not in TASKS:
            raise UserError(
                f"the task {name!r} of this run is not fedray's own; continue it from the Python script that "
                f"defines it, with fedray.run(config, out, resume=True)."
            )
        unknown = [key for key in values if key not in {item.name for item in dataclasses.fields(cls)}]
        if unknown:
            raise UserError(f"this run is of another version of fedray: it has a setting {unknown[0]!r}.")
        for key, menu in MENUS.items():
            values[key] = pick(key, values[key], menu)
        lists = {key: tuple(value) if isinstance(value, list) else value for key, value in task.items()}
        try:
            return cls(task=TASKS[name](**lists), **values)
        except TypeError as error:
            raise UserError(f"this run is of another version of fedray: its task does not fit ({error}).") from None


def sha256_of(values: dict[str, Any]) -> str:
    """`Config.sha256` of what `to_json` gave, as it was saved with a run."""
    matters = {name: value for name, value in values.items() if name not in PLACEMENT}
    return hashlib.sha256(json.dumps(matters, sort_keys=True, default=str).encode()).hexdigest()


MENUS: dict[str, dict[str, type]] = {"partition": PARTITIONS, "rule": RULES, "codec": CODECS}


def flag(name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + name.replace("_", "-")


def check_resumable(saved: dict[str, Any], asked: Config) -> None:
    """Raise `UserError`, naming the setting, if `asked` differs from a saved `to_json` in more than placement."""
    now = json.loads(json.dumps(asked.to_json(), default=str))  # tuples are lists in JSON
    for name in now:
        if name not in PLACEMENT and now[name] != saved.get(name):
            raise UserError(
                f"{flag(name)} is {now[name]} now, but was {saved.get(name)} when the run began; a resumed run "
                f"keeps its settings."
            )
    if bool(asked.gpus_per_actor) != bool(saved["gpus_per_actor"]):
        raise UserError(
            f"--gpus-per-actor is {asked.gpus_per_actor:g} now, but was {saved['gpus_per_actor']:g} when the run "
            f"began; a run that began on CPUs stays on CPUs, and one on GPUs on GPUs."
        )
    threads = max(1, math.floor(saved["cpus_per_actor"]))
    if asked.threads != threads:
        raise UserError(
            f"--cpus-per-actor {asked.cpus_per_actor:g} computes with {asked.threads} threads, but the run began "
            f"with {threads}, on which its float sums depend; keep the number of threads."
        )
