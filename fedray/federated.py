"""Settings of the federation: who takes part, what travels, and how it is averaged."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from fedray import menus
from fedray.algorithms import Algorithm
from fedray.algorithms.attacks import Malicious
from fedray.algorithms.cohorts import Cohort
from fedray.algorithms.fedavg import FedAvg
from fedray.algorithms.folds import Fold, Mean
from fedray.data.partition import IID, Partition
from fedray.menus import word, words_of
from fedray.wire import Link


@dataclass(frozen=True, kw_only=True)
class Federation:
    """The part of `Config` that makes a run federated."""

    clients: int = 4
    """C, how many clients hold the data. One client is centralised training."""
    fraction: float = 1.0
    """Share of the clients that take part in a round, drawn anew each round; in (0, 1]."""
    cohort: Annotated[Cohort | None, word(menus.parse_cohort, menus.cohort_form, "fixed|poisson")] = None
    """Who takes part, in place of a fraction: fixed:FRACTION, or poisson:RATE (each client with that probability)."""
    dropout_rate: float = 0.0
    """Probability that a client of a round's cohort drops out before it trains: the others' models are averaged."""
    partition: Annotated[Partition, words_of(menus.PARTITIONS)] = IID()
    """Who holds which examples: iid, quantity:ALPHA (skewed sizes), by-label, by-attribute:COLUMN, by-folder (or
    identity), or dirichlet:ALPHA[:COLUMN] (the smaller ALPHA, the more skewed)."""
    held_out_share: float = 0.0
    """Share of each client's examples that it does not train on; the loss on them is measured each round."""
    test_share: float = 0.0
    """Share of each client's examples that is kept for tests: neither trained on nor measured."""
    validation_rounds: int = 1
    """Measure the held-out loss, and draw the prompts, every so many rounds, and after the last."""
    num_validation_images: int = 2
    """Images drawn for each prompt."""
    canaries: int = 0
    """Plant so many images of random pixels, half of which clients train on, for `fedray audit`: with noise at as many
    clients (the last) of one image each, else among clients' own images."""
    only_client: int | None = None
    """Train this client alone, on its part of the partition: what it would reach without the others."""
    rounds: int = 10
    """T, communication rounds."""
    algorithm: Annotated[Algorithm, words_of(menus.ALGORITHMS), tyro.conf.arg(aliases=["--rule"])] = FedAvg()
    """The federated method: fedavg, fedavgm, fedadagrad, fedadam, fedyogi, fedprox, fedprox-adaptive, scaffold, fednova
    or split (each client sends its encoder or the rest), with values in order or by name, as fedadam:0.01:tau=0.1; of
    adapters (which fedavg averages as A and B
    apart) also ffa (A is frozen), rolora (A and B by turns), svd (the best factors of the mean of B A), fedex (what
    fedavg loses goes into the base), flora (stacking; the mean of B A goes into the base) or raflora (unequal ranks);
    ema:DECAY:ALGORITHM; ditto:LAMBDA:ALGORITHM (each client has a model of its own beside); dpsgd:NORM:NOISE:ALGORITHM
    (clients' gradients hide single examples); or your own, FILE.py:CLASS:VALUES. See docs/methods.md."""
    fold: Annotated[Fold, words_of(menus.FOLDS)] = Mean()
    """How uploads become one: mean; against malicious clients median, trimmed:BETA, krum:F, multikrum:F[:M] or
    normbound:NORM; secure:THRESHOLD (a sum of masked uploads); or your own, FILE.py:CLASS:VALUES."""
    weights: str = "examples"
    """What a client counts for in means: examples (as many as it trains on) or uniform (all alike)."""
    wire: Annotated[
        tuple[Link, ...],
        word(menus.parse_wire, menus.wire_form, "|".join([*menus.EXACT, *menus.LINKS.classes])),
        tyro.conf.arg(aliases=["--codec"]),
    ] = ()
    """How weights travel: float32 (exact), float16 or bfloat16 (half the bytes), int8 (a quarter), up alone also
    topk:SHARE, randk:SHARE and feedback:LINK (what a link does not send is added the next time), clip:NORM and
    noise:MULTIPLIER (differential privacy), links separated by commas, your own by FILE.py:CLASS:VALUES."""
    wire_down: Annotated[tuple[Link, ...] | None, word(menus.parse_wire_down, menus.wire_down_form, "LINKS")] = None
    """How weights travel to clients, if not as `wire` says: float32, float16, bfloat16 or int8."""
    malicious: Annotated[Malicious | None, word(menus.parse_malicious, menus.malicious_form, "SHARE:ATTACK")] = None
    """Share of clients that are malicious, and what they do: 0.2:signflip (they send the opposite change),
    0.2:noise:SCALE (Gaussian noise) or 0.2:labelflip (they train on wrong labels)."""
    share: str | None = None
    """Send and average only parameters whose names match this regular expression (re.search); the others are each
    client's own, trained and kept by it. None shares all."""
    keep_local: str | None = None
    """Keep parameters whose names match this regular expression each client's own, as norm for the norms."""
    target_epsilon: float | None = None
    """Find the least noise that proves this ε for the whole run (--wire clip:NORM,noise; or --algorithm dpsgd:NORM, for
    the examples of each client)."""
    delta: float = 1e-5
    """δ of differential privacy, below one over the number of clients (of dpsgd: of a client's examples)."""
    max_epsilon: float | None = None
    """Stop before a round that would exceed this ε at δ: of clients, and with dpsgd of any client's examples."""
    secure_noise: bool = False
    """Draw noise (of --wire and of dpsgd) from the system's randomness, not from the run's seed: such a run cannot be
    repeated."""
    use_ema: bool = False
    """Keep an exponential moving average of the global model at the server, and sample from it."""
    ema_max_decay: float = 0.9999
    """Largest decay of that average per local step. Where one client trains it is taken at every step, else once a
    round, decayed for as many steps as clients made on average."""
    ema_inv_gamma: float = 1.0
    """The decay at step k is 1 − (1 + (k − 1) / ema_inv_gamma) ** −ema_power, up to ema_max_decay."""
    ema_power: float = 0.75
    """Exponent of that warm-up."""
