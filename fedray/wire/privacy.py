"""Differential privacy of clients: updates of bounded length, and noise on their sum (McMahan et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedray.algorithms import Round, Tensors
from fedray.errors import UserError
from fedray.lazy import torch
from fedray.wire import VALUES, Link

MARGIN = 1 - 2.0**-20  # room for the rounding of float32 and of sums of integers: no update is longer than the norm


@dataclass(frozen=True)
class Clip(Link):
    """Scales a client's update down to this Euclidean norm, if it is longer; clients count alike.

    per_layer: clip each of the L tensors of the model to norm/√L in place of all at once (McMahan et al. 2018, 3.1);
    quantile: let the norm follow this quantile γ of the updates' norms (Andrew et al. 2021, algorithm 1), from `norm`
    on, by C ← C exp(−rate (b − γ)), where b is the share of updates within C;  count_noise: σ_b, standard deviation of
    the noise on the number of those; by default a twentieth of the clients that take part on average.
    """

    norm: float
    per_layer: bool = False
    quantile: float | None = None
    rate: float = 0.2
    count_noise: float | None = None

    lossy = uniform = contracts = True

    def __post_init__(self) -> None:
        if not 0 < self.norm < math.inf:
            raise UserError(f"--wire clip:{self.norm}: the norm must be above 0.")
        if self.quantile is not None and (self.per_layer or not 0 < self.quantile < 1 or not self.rate > 0):
            raise UserError("--wire clip: a quantile lies between 0 and 1, its rate above 0, and it is not per layer.")

    @property
    def reports(self) -> tuple[str, ...]:
        return () if self.quantile is None else ("within",)

    @property
    def bound(self) -> float:
        return self.norm

    @property
    def needs(self) -> Mapping[str, str]:
        if not self.per_layer:
            return {}
        return {"same upload": "clips tensors of whole models, and this algorithm sends others: leave per_layer out"}

    @property
    def hides(self) -> frozenset[str]:
        return frozenset({"parts of uploads"})  # norms are of whole ones

    def encode(
        self, x: torch.Tensor, memory: Tensors, round: Round, client: int
    ) -> tuple[torch.Tensor | Tensors, Tensors]:
        if self.quantile is not None:
            within = 0.5 if _length(x) <= round.norm else -0.5  # less a half: one client moves the sum by as much
            return {VALUES: _clip(x, round.norm), "within": torch.tensor([within])}, {}
        if not self.per_layer:
            return _clip(x, round.norm), {}
        clipped = x.clone()
        layers = round.layout.views(clipped).values()
        for layer in layers:
            layer.copy_(_clip(layer, round.norm / math.sqrt(len(layers))))
        return clipped, {}

    def noise_on_count(self, round: Round) -> float:
        return round.expected / 20 if self.count_noise is None else self.count_noise

    def learn(self, told: Tensors, round: Round) -> Tensors:
        assert self.quantile is not None
        noise = round.count_noise * round.noise(1, "count noise")
        share = float(told["within"] + noise) / round.expected + 0.5
        return {
            "norm": torch.tensor([round.norm * math.exp(-self.rate * (share - self.quantile))], dtype=torch.float64)
        }


def split(multiplier: float, count_noise: float) -> float:
    """Return the multiplier z_Δ of the noise on updates, with which it and the count's together are as good as z's.

    z_Δ = (z⁻² − (2 σ_b)⁻²)^−½ (Andrew et al. 2021, theorem 1).

    Raises:
        UserError: the count's noise alone is too little.
    """
    if multiplier == 0:
        return 0.0
    if 2 * count_noise <= multiplier:
        raise UserError(
            f"--wire clip:…: noise of {count_noise:g} on the count of short updates is too little for noise:"
            f"{multiplier:.4g}; give count_noise above {multiplier / 2:.4g}, or let more clients take part."
        )
    return (multiplier**-2 - (2 * count_noise) ** -2) ** -0.5


@dataclass(frozen=True)
class Noise(Link):
    """Adds Gaussian noise to the sum of clipped updates: `multiplier` times the clip's norm; without one, that of
    --target-epsilon.

    The sum is divided by the number of clients that take part on average, whoever did; of its clients, the algorithm
    sees nothing else. The noise comes from the run's seed, so that a run can be repeated: it protects only as long as
    the seed is secret, or with --secure-noise.
    """

    multiplier: float | None = None

    lossy = uniform = contracts = private = True

    def __post_init__(self) -> None:
        if self.multiplier is not None and not 0 <= self.multiplier < math.inf:
            raise UserError(f"--wire noise:{self.multiplier}: the multiplier must not be negative.")

    @property
    def needs(self) -> Mapping[str, str]:
        return {"sums": "hides a client in a sum, and this fold is none: use fold mean or secure"}

    @property
    def hides(self) -> frozenset[str]:
        return frozenset({"uploads", "parts of uploads"})

    def finish(
        self, total: torch.Tensor, weight: float, round: Round, survivors: list[int]
    ) -> tuple[torch.Tensor, float]:
        return round.noise(len(total), "noise").mul_(round.deviation).add_(total), round.expected


def _length(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _clip(x: torch.Tensor, norm: float) -> torch.Tensor:
    """Return x, scaled down if it is longer; the length is taken in float64."""
    length = _length(x)
    return x if length <= MARGIN * norm else x * (MARGIN * norm / length)
