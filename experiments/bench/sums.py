"""What does a term of the mean cost? Milliseconds per million weights and client, on one core.

    python experiments/bench/sums.py

`add_term`: Σ rint(w x 2^k) as int64, exact in any order. Against it: torch's own operations for the same, sums of
doubles rounded by adding and subtracting 1.5 · 2^52 (two bits fewer of the mean per bit of the bound), the running
float32 mean that depends on the order, and a copy, which is the speed of memory.
"""

import time

import numpy as np
import torch
import tyro
from measure import spread, table

from fedray.vector.integers import CHUNK, add_term

SIZE, SCALE = 16_000_000, 57 * 2.0**30


def by_torch(total: torch.Tensor, x: torch.Tensor) -> None:
    for start in range(0, SIZE, CHUNK):
        total[start : start + CHUNK] += (x[start : start + CHUNK].double() * SCALE).round_().long()


def by_shifting(total: np.ndarray, x: np.ndarray) -> None:
    value = np.empty(CHUNK)
    for start in range(0, SIZE, CHUNK):
        part = value[: len(x[start : start + CHUNK])]
        part[:] = x[start : start + CHUNK]
        part *= SCALE / 2**11
        part += 1.5 * 2.0**52
        total[start : start + CHUNK] += part.view(np.int64)


def main(repeats: int = 9) -> None:
    """Measure.

    Args:
        repeats: how often each is measured, in turns.
    """
    torch.set_num_threads(1)
    x = torch.randn(SIZE) * 0.05
    total, mean, other = torch.zeros(SIZE, dtype=torch.int64), torch.zeros(SIZE), torch.zeros(SIZE)
    ways = {
        "add_term (fedray)": lambda: add_term(total.numpy(), x.numpy(), SCALE),
        "round().long() by torch": lambda: by_torch(total, x),
        "doubles shifted by 1.5 · 2^52": lambda: by_shifting(total.numpy(), x.numpy()),
        "running float32 mean": lambda: mean.lerp_(x, 0.1),
        "copy": lambda: other.copy_(x),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append((time.perf_counter() - started) / SIZE * 1e9)
    table(["", "ms per million weights and client"], [[name, spread(found)] for name, found in times.items()])


if __name__ == "__main__":
    tyro.cli(main)
