"""Some of the tensors of a layout: the part of a vector that is trained, or sent, apart from the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from fedray.lazy import torch
from fedray.vector import Layout


@dataclass(frozen=True)
class Part:
    """The tensors of a layout whose names are wanted, and the ranges where they lie in its vector [d]."""

    whole: Layout
    wanted: frozenset[str]

    @classmethod
    def of(cls, whole: Layout, wants: Callable[[str], bool]) -> Part:
        """Return the part whose names satisfy `wants`."""
        return cls(whole, frozenset(filter(wants, whole.names)))

    @cached_property
    def layout(self) -> Layout:
        """The layout of the part's own vector [n]: the same tensors in the same order."""
        pairs = [pair for pair in zip(self.whole.names, self.whole.shapes, strict=True) if pair[0] in self.wanted]
        return Layout(tuple(name for name, _ in pairs), tuple(shape for _, shape in pairs))

    @cached_property
    def rest(self) -> Part:
        """The other tensors of the layout."""
        return Part(self.whole, frozenset(self.whole.names) - self.wanted)

    @cached_property
    def ranges(self) -> list[tuple[int, int]]:
        """Start and stop of each stretch of the vector; tensors side by side are one."""
        found: list[tuple[int, int]] = []
        start = 0
        for name, shape in zip(self.whole.names, self.whole.shapes, strict=True):
            stop = start + math.prod(shape)
            if name in self.wanted and found and found[-1][1] == start:
                found[-1] = (found[-1][0], stop)
            elif name in self.wanted:
                found.append((start, stop))
            start = stop
        return found

    def take(self, vector: torch.Tensor) -> torch.Tensor:
        """Return a copy [n] of the part of `vector` [d]."""
        return torch.cat([vector[start:stop] for start, stop in self.ranges] or [vector[:0]])

    def put(self, vector: torch.Tensor, values: torch.Tensor) -> None:
        """Write the part's `values` [n] into `vector` [d], in place."""
        sizes = [stop - start for start, stop in self.ranges]
        for (start, stop), piece in zip(self.ranges, values.split(sizes), strict=True):
            vector[start:stop].copy_(piece)

    def join(self, values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return the vector [d] of the part's `values` [n] and those of the rest [d − n]."""
        vector = values.new_empty(self.whole.size)
        self.put(vector, values)
        self.rest.put(vector, others)
        return vector
