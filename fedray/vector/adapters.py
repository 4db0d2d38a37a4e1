"""Low-rank adapters as parts of a vector, and the error of aggregating them.

A layer's adapter changes its weights by ΔW = s B A, with A [r, in], B [out, r] and s = α / r. Averaging A and B
separately does not average ΔW: the error is exactly Σ w_i (B_i − B̄) (A_i − Ā). `WeightedSum` measures it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from fedray.lazy import torch
from fedray.vector import Layout

Factors: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"  # left [out, k] and right [k, in] of a layer's change


class Adapters:
    """The layers of a module that have adapters, in the order of its parameters."""

    def __init__(
        self,
        layout: Layout,
        scale: float,
        frozen: dict[str, torch.Tensor],
        shapes: dict[str, tuple[int, int]],
        ranks: tuple[int, ...] = (),
    ):
        self.layout = layout
        named = zip(layout.names, layout.shapes, strict=True)
        # Of clients, in turn by their numbers; the vector has the largest.
        self.ranks = ranks or tuple({shape[1] for name, shape in named if ".lora_B." in name})
        self.scale = scale
        self.frozen = frozen  # A [r, in] by layer, where it is not trained
        self.shapes = shapes  # (out, in) by layer
        self._originals: dict[str, torch.Tensor] = {}
        self._blocks: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def layers(self) -> list[str]:
        return list(self.shapes)

    def factors(self, vector: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each layer's B and A as views of the vector (a frozen A as it was drawn)."""
        views = self.layout.views(vector)
        for layer in self.layers:
            a = self.frozen[layer] if layer in self.frozen else views[f"{layer}.lora_A.default.weight"]
            yield views[f"{layer}.lora_B.default.weight"], a

    def rank(self, client: int) -> int:
        """Return the rank of a client's adapters."""
        return self.ranks[client % len(self.ranks)]

    @property
    def edges(self) -> list[int]:
        """Where the ranks are divided into blocks, each of which a client has whole or not at all: 0, …, largest."""
        return [0, *sorted(set(self.ranks))]

    def block(self, low: int, high: int) -> torch.Tensor:
        """Return a mask [d] of the ranks from `low` to `high`: of those rows of each A and columns of each B."""
        if (low, high) not in self._blocks:
            mask = torch.zeros(self.layout.size, dtype=torch.bool)
            for name, view in self.layout.views(mask).items():
                (view[low:high] if ".lora_A." in name else view[:, low:high]).fill_(True)
            self._blocks[low, high] = mask
        return self._blocks[low, high]

    def held(self, client: int) -> torch.Tensor | None:
        """Return a mask [d] of what a client of a smaller rank holds; None where it holds all."""
        if self.rank(client) == max(self.ranks):
            return None
        return self.block(0, self.rank(client))

    def cut(self, vector: torch.Tensor, client: int) -> None:
        """Make zero, in place, what is beyond a client's rank."""
        held = self.held(client)
        if held is not None:
            vector.masked_fill_(~held.to(vector.device), 0)

    # A change of the base is one vector. Of each layer it holds factors of k columns, the same k for all, or their
    # product [out, in] where that is no longer than they are: so its length tells k.

    def base_length(self, columns: int) -> int:
        """Return the length of a change of the base whose factors have so many columns."""
        return sum(min(columns * (rows + width), rows * width) for rows, width in self.shapes.values())

    def parts(self, change: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield each layer's part of a change of the base as views: its factors, or the product and None."""
        enough = max(map(min, self.shapes.values()), default=0)  # with so many columns every product is shorter
        columns = bisect_left(range(enough + 1), len(change), key=self.base_length)
        if self.base_length(columns) != len(change):
            raise ValueError(f"a change of the base of {len(change):,} elements is of other layers")
        start = 0
        for rows, width in self.shapes.values():
            middle, stop = start + columns * rows, start + columns * (rows + width)
            if stop - start < rows * width:
                yield change[start:middle].view(rows, columns), change[middle:stop].view(columns, width)
            else:
                stop = start + rows * width
                yield change[start:stop].view(rows, width), None
            start = stop

    def changes(self, change: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield each layer's part of a change of the base as a matrix [out, in], float64."""
        for left, right in self.parts(change):
            yield left.double() if right is None else left.double() @ right.double()

    def grown(self, change: torch.Tensor | None, added: Iterable[Factors]) -> torch.Tensor:
        """Return a change of the base, None being none, with a product of factors added to each layer; float32."""
        pieces: list[torch.Tensor] = []
        parts = self.parts(torch.zeros(0) if change is None else change)
        for (left, right), (more_left, more_right) in zip(parts, added, strict=True):
            if right is None:
                pieces.append((left.double() + more_left.double() @ more_right.double()).float())
                continue
            left, right = torch.cat([left, more_left.float()], dim=1), torch.cat([right, more_right.float()])
            if left.numel() + right.numel() < len(left) * right.shape[1]:
                pieces += [left, right]
            else:
                pieces.append((left.double() @ right.double()).float())
        return torch.cat([piece.flatten() for piece in pieces])

    def weakened_base(self, change: torch.Tensor, strength: float) -> torch.Tensor:
        """Return the change of the base that is `strength` times this one."""
        result = change.clone()
        for left, _ in self.parts(result):
            left *= strength
        return result

    def change_base(self, module: torch.nn.Module, change: torch.Tensor) -> None:
        """Set the layers' frozen weights to what they were, plus the change."""
        for layer, part in zip(self.layers, self.changes(change), strict=True):
            linear: Any = module.get_submodule(layer).base_layer
            original = self._originals.setdefault(layer, linear.weight.data)
            linear.weight.data = (original.float() + part).to(original.dtype)

    @property
    def base_has_changed(self) -> bool:
        return bool(self._originals)

    def weakened(self, vector: torch.Tensor, strength: float) -> torch.Tensor:
        """Return the vector whose ΔW is `strength` times this one's."""
        result = vector.clone()
        for b, _ in self.factors(result):
            b *= strength
        return result


def adapters(module: torch.nn.Module, layout: Layout, scale: float, ranks: tuple[int, ...] = ()) -> Adapters:
    """Find the adapters that peft has put into a module; `layout` is of its trainable parameters.

    Args:
        ranks: of clients, in turn by their numbers; by default all have the module's.
    """
    frozen, shapes = {}, {}
    for name, parameter in module.named_parameters():
        layer, _, rest = name.partition(".lora_B.")
        if not rest:
            continue
        adapted: Any = module.get_submodule(layer)
        a = adapted.lora_A["default"].weight
        shapes[layer] = (parameter.shape[0], a.shape[1])
        if f"{layer}.lora_A.default.weight" not in layout.names:
            frozen[layer] = a.detach().clone().cpu()
    return Adapters(layout, scale, frozen, shapes, ranks)


class WeightedSum:
    """Σ w_i s B_i A_i of every layer as factors, in float64: exact, and no longer than the layer is wide."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self.examples = 0
        self._factors: list[tuple[torch.Tensor, torch.Tensor]] = [
            (torch.zeros(rows, 0, dtype=torch.float64), torch.zeros(0, columns, dtype=torch.float64))
            for rows, columns in adapters.shapes.values()
        ]

    def add(self, vector: torch.Tensor, examples: int) -> None:
        """Add a client's adapters, weighted by its examples."""
        self.examples += examples
        for layer, (b, a) in enumerate(self.adapters.factors(vector)):
            left, right = self._factors[layer]
            left = torch.cat([left, b.double() * (examples * self.adapters.scale)], dim=1)
            right = torch.cat([right, a.double()])
            if len(right) > right.shape[1]:
                left, right = left @ right, torch.eye(right.shape[1], dtype=torch.float64)
            self._factors[layer] = (left, right)

    def factors(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield left [out, k] and right [k, in] factors of each layer's weighted mean."""
        for left, right in self._factors:
            yield left / self.examples, right

    def errors(self, before: torch.Tensor | None, vector: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
        """Measure how far the aggregated model is from the weighted mean, per layer: ‖ΔW − Σ‖ / ‖Σ‖ (Frobenius).

        Args:
            before: the change of the base before aggregation;  vector, base: the aggregated adapters and change.
        """
        errors = []
        changed = zip(
            self.adapters.changes(base) if base is not None else [None] * len(self._factors),
            self.adapters.changes(before) if before is not None else [None] * len(self._factors),
            strict=True,
        )
        for (left, right), (b, a), (now, was) in zip(
            self.factors(), self.adapters.factors(vector), changed, strict=True
        ):  # fmt: skip
            # [s B, −left] [A; right] is the difference; where the base has changed too, so much is added to it.
            difference = torch.cat([b.double() * self.adapters.scale, -left], dim=1), torch.cat([a.double(), right])
            if now is None:
                off = product_norm(*difference)
            else:
                dense = difference[0] @ difference[1] + now - (0 if was is None else was)
                off = torch.linalg.norm(dense)
            size = product_norm(left, right)
            errors.append(off / size if size > 0 else off)
        return torch.stack(errors)


def product_norm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Compute ‖left right‖ (Frobenius) without the product, by the R of each side."""
    return torch.linalg.norm(torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T)
