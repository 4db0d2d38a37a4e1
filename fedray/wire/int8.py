"""The link that sends a byte for each value, rounded at random."""

from __future__ import annotations

from dataclasses import dataclass

from fedray.algorithms import Round, Tensors
from fedray.lazy import torch
from fedray.wire import VALUES, Link


@dataclass(frozen=True)
class Int8(Link):
    """QSGD in blocks, in both directions: ξ · norm / levels with integers ξ, unbiased (Alistarh et al. 2017, 3.1).

    A block's values are divided by norm / levels, which travels as a float32, and rounded up or down at random, up the
    more often the nearer it is. The norm is the largest magnitude ("max", as in their experiments: the finer steps),
    or the Euclidean norm ("l2", as in their definition).
    """

    levels: int = 127
    block: int = 256
    norm: str = "max"

    lossy = True
    coded = True

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 127 or self.block < 1:
            raise ValueError("levels must be from 1 to 127, and a block must hold a value")
        if self.norm not in ("max", "l2"):
            raise ValueError(f"the norm is max or l2, not {self.norm!r}")

    def send(self, x: torch.Tensor, round: Round) -> Tensors:
        return self._rounded(x, round.rng("int8, down"))

    def arrive(self, payload: torch.Tensor | Tensors, round: Round) -> torch.Tensor:
        return self.decode(payload, round)

    def encode(self, x: torch.Tensor, memory: Tensors, round: Round, client: int) -> tuple[Tensors, Tensors]:
        return self._rounded(x, round.rng("int8", client)), {}

    def decode(self, payload: torch.Tensor | Tensors, round: Round) -> torch.Tensor:
        assert isinstance(payload, dict)
        x, scales = payload[VALUES].float(), payload["scale"]
        return x.mul_(scales.repeat_interleave(self.block)[: len(x)])

    def _rounded(self, x: torch.Tensor, rng: torch.Generator) -> Tensors:
        blocks = torch.nn.functional.pad(x, (0, -len(x) % self.block)).view(-1, self.block)
        norms = torch.linalg.vector_norm(blocks, float("inf") if self.norm == "max" else 2, dim=1)
        scales = norms / self.levels
        steps = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
        below = steps.floor()
        below += torch.rand(steps.shape, generator=rng) < steps - below
        codes = below.clamp_(-self.levels, self.levels).to(torch.int8)
        return {VALUES: codes.flatten()[: len(x)], "scale": scales}
