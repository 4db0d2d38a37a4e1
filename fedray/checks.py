"""What is refused before a run begins."""

import dataclasses
import math
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fedray.algorithms.attacks import Malicious
from fedray.errors import UserError, check_name
from fedray.forms import Unloaded, check_types
from fedray.menus import ALGORITHMS, COHORTS, FOLDS, LINKS, PARTITIONS, malicious_form
from fedray.privacy import release_of, rounds_within
from fedray.vector.optimizer import LR_SCHEDULERS, Optimizer
from fedray.wire import Link

if TYPE_CHECKING:
    from fedray.config import Config

PRECISIONS = ("no", "bf16", "fp16")
WEIGHTS = ("examples", "uniform")

# Names, bounds, and what they must be; None is not asked.
LIMITS: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    ((
        "clients", "rounds", "local_epochs", "local_steps", "train_batch_size", "eval_batch_size", "learning_rate",
        "max_grad_norm", "cpus_per_actor", "client_timeout", "start_timeout", "gradient_accumulation_steps",
        "validation_rounds", "checkpoint_every", "checkpoints_total_limit", "evaluate_every", "evaluate_repeats",
        "ema_inv_gamma", "ema_power", "target_epsilon", "max_epsilon", "num_validation_images",
    ), lambda value: 0 < value < math.inf, "be above 0"),
    ((
        "evaluate_samples", "gpus_per_actor", "adam_weight_decay", "adam_epsilon", "actors", "lr_warmup_steps",
        "client_retries", "min_clients", "canaries",
    ), lambda value: 0 <= value < math.inf, "not be negative"),
    (("ema_max_decay", "adam_beta1", "adam_beta2", "held_out_share", "test_share", "dropout_rate"),
     lambda value: 0 <= value < 1, "be at least 0 and below 1"),
    (("train_batch_size",), lambda value: value < 2**31, "be below 2,147,483,648"),
    (("rounds",), lambda value: value < 10**6, "be below 1,000,000"),  # files of rounds have six digits
)  # fmt: skip


def check(config: "Config") -> None:
    """Raise `UserError` for what can be seen to be wrong without data or hardware."""
    check_types(config)
    _check_parts(config)
    check_types(config.task)
    check_environment(config.threads)
    if config.local_epochs is not None and config.local_steps is not None:
        raise UserError("--local-epochs and --local-steps are both given; give one of them.")
    if config.local_epochs is None and config.local_steps is None:
        raise UserError("neither --local-epochs nor --local-steps is given; give one of them.")
    for names, fits, must in LIMITS:
        for name in names:
            value = getattr(config, name)
            if value is not None and not fits(value):
                raise UserError(f"{flag(name)} {value}: it must {must}.")
    if config.cohort is not None and config.fraction != 1:
        raise UserError("--fraction and --cohort both say who takes part in a round; give one of them.")
    drawn = config.drawn  # raises for a fraction that is none
    if config.min_clients is not None and config.min_clients > config.cohort_size:
        raise UserError(f"--min-clients {config.min_clients}: only {config.cohort_size} take part in a round.")
    most = config.cohort_size if drawn.rate is None else config.clients
    if most > config.fold.most:
        raise UserError(
            f"--fold {FOLDS.form(config.fold)} can combine {config.fold.most:,} clients, and {most:,} may take part in "
            f"a round: lower its bits or its limit."
        )
    if config.gpus_per_actor > 1 and config.gpus_per_actor != int(config.gpus_per_actor):
        raise UserError(f"--gpus-per-actor {config.gpus_per_actor}: above 1 it must be a whole number.")
    if 0 < config.gpus_per_actor < 1 and abs(config.gpus_per_actor * round(1 / config.gpus_per_actor) - 1) > 0.03:
        several = math.floor(1 / config.gpus_per_actor)
        raise UserError(
            f"--gpus-per-actor {config.gpus_per_actor}: actors that share a GPU have equal parts of it, or Ray may let "
            f"some wait for ever; give {1 / (several + 1):.3g} or {1 / several:.3g}."
        )
    if config.node_label is not None and not re.fullmatch(r"[^=]+=[^=]+", config.node_label):
        raise UserError(f"--node-label {config.node_label!r}: it must be KEY=VALUE.")
    if config.kid_subset_size < 2:
        raise UserError(f"--kid-subset-size {config.kid_subset_size}: it must be at least 2.")
    if config.evaluate_samples == 1 and config.features:
        raise UserError("--evaluate-samples 1: a score needs at least 2 images (or --features None).")
    if config.held_out_share + config.test_share >= 1:
        raise UserError("--held-out-share and --test-share together leave nothing to train on.")
    if config.only_client is not None and not 0 <= config.only_client < config.clients:
        raise UserError(f"--only-client {config.only_client}: clients are numbered 0 to {config.clients - 1}.")
    if config.dropout_rate and config.single:
        raise UserError(f"--dropout-rate {config.dropout_rate}: a client that trains alone leaves nobody behind.")
    if config.init_from is not None and config.partial:
        raise UserError("--init-from: clients that keep a part of the model to themselves start from fresh weights.")
    if config.malicious is not None:
        _check_malicious(config)
    if config.canaries:
        _check_canaries(config)
    _check_wire("--wire", config.wire)
    _check_wire("--wire-down", config.wire_down or ())
    for link in config.wire_down or ():
        if getattr(type(link), "send", None) is Link.send:
            raise UserError(f"--wire-down {LINKS.form(link)}: this link does nothing on the way down; leave it out.")
    if config.fold.least > config.cohort_size:
        raise UserError(
            f"--fold {FOLDS.form(config.fold)} needs {config.fold.least} clients in a round, and "
            f"{config.cohort_size} take part."
        )
    if config.fold.needed(config.cohort_size) < config.fold.least:
        raise UserError(
            f"--fold {FOLDS.form(config.fold)}: a sum of one of {config.cohort_size} clients is its upload; "
            f"raise the threshold above {1 / config.cohort_size:.3g}."
        )
    for name in ("share", "keep_local"):
        try:
            re.compile(getattr(config, name) or "")
        except re.error as error:
            pattern = getattr(config, name)
            raise UserError(f"{flag(name)} {pattern!r} is no regular expression: {error}.") from None
    check_name("learning-rate scheduler", config.lr_scheduler, LR_SCHEDULERS)
    check_name("precision", config.mixed_precision, PRECISIONS)
    check_name("kind of weights", config.weights, WEIGHTS)
    if config.mixed_precision == "fp16" and not config.gpus_per_actor:
        raise UserError("--mixed-precision fp16 needs a GPU (--gpus-per-actor); on a CPU use bf16.")
    config.task.check(config.sampler, config.sampling_steps)
    _check_fit(config)
    _check_privacy(config)


def _check_malicious(config: "Config") -> None:
    """Raise `UserError` for attackers that there cannot be."""
    assert config.malicious is not None
    what = f"--malicious {malicious_form(config.malicious)}"
    if config.single:
        raise UserError(f"{what}: a client that trains alone attacks nobody.")
    if not (0 < config.malicious.share < 1 and 0 < config.malicious.count(config.clients) < config.clients):
        raise UserError(f"{what}: the share must make some of the {config.clients} clients malicious, and not all.")


def _check_canaries(config: "Config") -> None:
    """Raise `UserError` for canaries that nobody could hold."""
    if config.only_client is not None or config.malicious is not None:
        what = "--only-client" if config.only_client is not None else "--malicious"
        raise UserError(f"--canaries {config.canaries}: all clients take part, and are honest; leave {what} out.")
    if getattr(config.task, "aspect_ratio_buckets", None) is not None:
        raise UserError(f"--canaries {config.canaries}: they are squares; leave --aspect-ratio-buckets out.")
    if config.links.private and config.canaries >= config.clients:
        raise UserError(
            f"--canaries {config.canaries}: with noise each is a client of its own, and there are {config.clients} "
            f"clients in all; raise --clients."
        )


def _check_wire(name: str, links: "tuple[Link, ...]") -> None:
    """Raise `UserError` for links that cannot follow each other."""
    for index, link in enumerate(links):
        for before in links[:index]:
            if before.coded:
                raise UserError(f"{name}: {LINKS.form(link)} cannot follow {LINKS.form(before)}, which sends codes.")
            if before.sparse and link.remembers:
                raise UserError(
                    f"{name}: {LINKS.form(link)} cannot follow {LINKS.form(before)}, which sends other coordinates "
                    f"every time; put it around that link."
                )


def _check_parts(config: "Config") -> None:
    """Raise `UserError` where a part of the run is no object of its kind."""
    parts: list[tuple[str, Any, type]] = [
        *((menu.kind, getattr(config, menu.kind), menu.base) for menu in (PARTITIONS, ALGORITHMS, FOLDS)),
        ("optimizer", config.optimizer, Optimizer),
    ]
    for wire in ("wire", "wire_down"):
        links = getattr(config, wire)
        if wire == "wire" or links is not None:
            parts.append((wire, links, tuple))
            parts += [(wire, link, LINKS.base) for link in (links if isinstance(links, tuple) else ())]
    for name, kind in (("cohort", COHORTS.base), ("malicious", Malicious)):
        if getattr(config, name) is not None:
            parts.append((name, getattr(config, name), kind))
    for name, part, kind in parts:
        if not isinstance(part, (kind, Unloaded)):
            what = "a tuple of links" if "wire" in name else f"a short form or an object of class {kind.__name__}"
            raise UserError(f"{flag(name)} {part!r}: it must be {what}.")
    task = config.task
    if not dataclasses.is_dataclass(task) or isinstance(task, type) or not hasattr(task, "dataset"):
        raise UserError(f"task {task!r}: it must be an object of a task's class, such as DDPM().")


def check_environment(threads: int) -> None:
    """Raise `UserError` where OpenMP may start fewer threads than torch asks for, which then hangs."""
    limit, dynamic = os.environ.get("OMP_THREAD_LIMIT", ""), os.environ.get("OMP_DYNAMIC", "")
    if threads > 1 and limit.strip().isdecimal() and int(limit) < threads:
        raise UserError(
            f"the environment has OMP_THREAD_LIMIT={limit}, with which torch hangs on {threads} threads "
            f"(--cpus-per-actor): unset it, or raise it to {threads}."
        )
    if threads > 1 and dynamic.strip().lower() == "true":
        raise UserError(
            f"the environment has OMP_DYNAMIC={dynamic}, with which torch hangs on {threads} threads "
            f"(--cpus-per-actor): unset it."
        )


def _check_fit(config: "Config") -> None:
    """Raise `UserError` where a part of the run needs what no other part offers."""
    if config.use_ema and ALGORITHMS.form(config.algorithm).startswith("ema:"):
        raise UserError("--use-ema and --algorithm ema:… both ask for an average; leave one of them out.")
    method, parts = config.method, {"algorithm": ALGORITHMS.form(config.algorithm), "fold": FOLDS.form(config.fold)}
    offered = config.task_offers | method.offers | config.fold.offers | config.optimizer.offers
    links = {f"--wire {LINKS.form(link)}": link for link in config.wire}
    links |= {f"--wire-down {LINKS.form(link)}": link for link in config.wire_down or ()}
    offered = offered.union(*(link.offers for link in links.values()))
    if not config.partial:
        offered |= {"whole vector"}
    if "adapters" not in offered:
        offered |= {"equal ranks"}
    if config.partial and "adapters" in offered and "equal ranks" not in offered:
        raise UserError("--rank: clients that keep a part of their adapters to themselves have one rank; give one.")
    if config.evaluate_personal and not config.partial and "personal" not in method.offers:
        raise UserError(
            f"--evaluate-personal: --algorithm {parts['algorithm']} makes no model of a client's own, as ditto does."
        )
    if not config.keep_optimizer or "plain sgd" in offered:
        offered |= {"fresh optimizer"}  # which remembers no earlier round
    offered = offered.difference(*(link.hides for link in config.wire))
    needs = [(f"--algorithm {parts['algorithm']}", method.needs), (f"--fold {parts['fold']}", config.fold.needs)]
    needs += [(who, link.needs) for who, link in links.items()]
    if config.malicious is not None:
        needs.append((f"--malicious {malicious_form(config.malicious)}", config.malicious.attack.needs))
    if config.keep_optimizer:
        why = "makes new factors every round, to which an optimizer of the old ones does not fit: keep none"
        needs.append((f"--algorithm {parts['algorithm']}", {"fixed coordinates": why}))
    for who, needed in needs:
        for need, why in needed.items():
            if need not in offered:
                raise UserError(f"{who} {why}.")


def _check_privacy(config: "Config") -> None:
    """Raise `UserError` where noise would not hide what it should."""
    links = [LINKS.form(link) for link in config.wire]
    bounds = [index for index, link in enumerate(config.wire) if link.bound is not None]
    noises = [index for index, link in enumerate(config.wire) if link.private]
    ranks = "adapters" in config.task_offers and "equal ranks" not in config.task_offers
    if ranks and (bounds or noises or config.fold.uniform):
        raise UserError("--rank: clips, noise and secure sums are for adapters of one rank; give one.")
    for indices in (bounds, noises):
        if len(indices) > 1:
            raise UserError(f"--wire {links[indices[0]]},{links[indices[1]]}: once is enough.")
    if noises and config.only_client is not None:
        raise UserError(f"--wire {links[noises[0]]}: a client that trains alone is hidden in no sum.")
    if noises and (not bounds or noises[0] < bounds[0]):
        raise UserError(
            f"--wire {links[noises[0]]}: nothing bounds the updates that it hides; put clip:NORM before it."
        )
    for index, link in enumerate(config.wire):
        if bounds and (not link.contracts or index < bounds[0]):
            raise UserError(
                f"--wire {','.join(links)}: {links[index]} may lengthen what {links[bounds[0]]} has clipped; leave it "
                f"out."
                if not link.contracts
                else f"--wire {','.join(links)}: put {links[bounds[0]]} first."
            )
    examples = config.method.hides_examples
    if (noises or examples or config.canaries) and not 0 < config.delta < 1:
        raise UserError(f"--delta {config.delta}: it must be above 0 and below 1.")
    if not noises and not examples:
        asked = [name for name in ("target_epsilon", "max_epsilon") if getattr(config, name) is not None]
        if asked or config.secure_noise:
            who = flag([*asked, "secure_noise"][0])
            raise UserError(
                f"{who} is about noise: give --wire clip:NORM,noise:MULTIPLIER, or --algorithm dpsgd:NORM:NOISE."
            )
        return
    if noises and config.drawn.rate is None and not config.drawn.fixed:
        cohort = COHORTS.form(config.drawn)
        raise UserError(f"--cohort {cohort}: no ε is known for cohorts drawn so; use fixed:FRACTION or poisson:RATE.")
    _check_noise(config, noises)
    release = release_of(config)
    if config.max_epsilon is not None and release is not None:
        fits = rounds_within(release, config.max_epsilon, config.delta, config.rounds)
        if fits < config.rounds:
            raise UserError(f"--max-epsilon {config.max_epsilon:g} is enough for {fits} of {config.rounds} rounds.")


def _check_noise(config: "Config", noises: list[int]) -> None:
    """Raise `UserError` unless all noise is given, or --target-epsilon finds the one that is not."""
    missing = [f"--wire {LINKS.form(config.wire[index])}" for index in noises if config.wire[index].multiplier is None]
    if config.method.hides_examples and config.method.example_noise is None:
        missing.append(f"--algorithm {ALGORITHMS.form(config.algorithm)}")
    if config.target_epsilon is None and missing:
        raise UserError(
            f"{missing[0]}: give its multiplier (as noise:1.0, dpsgd:NORM:1.0), or --target-epsilon to find it."
        )
    if config.target_epsilon is not None and not missing:
        raise UserError(
            "--target-epsilon finds the noise's multiplier, and one is given (--wire noise:…, --algorithm dpsgd:…); "
            "leave one of them out."
        )
    if len(missing) > 1:
        raise UserError(f"--target-epsilon finds one noise, and {' and '.join(missing)} have none: give one of them.")


def flag(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")
