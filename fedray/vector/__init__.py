"""A model is one vector: the trainable parameters of a module as views of one flat float32 tensor."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedray.errors import RunError, UserError
from fedray.files import durably
from fedray.lazy import torch

CHECKSUM = "sha256"  # in the metadata of files: of all tensors, and of the rest of the metadata


@dataclass(frozen=True)
class Layout:
    """The positions of named tensors in the vector: contiguous, in this order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Number of elements of the vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    def views(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the named tensors as views of `vector` [size]."""
        parts = vector.split([math.prod(shape) for shape in self.shapes])
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}


class FlatParameters:
    """The trainable parameters of `module`, and their gradients, as views of two flat tensors.

    Afterwards, loading a model is `flat.vector.copy_(v)`, an optimizer step is one kernel over one tensor, and
    the gradients are zeroed by `flat.gradient.zero_()` (`zero_grad()` would set them to None and detach them).

    Move the module to its device and memory format first: doing it later silently replaces the views. `check()`
    finds that out.

    Raises:
        ValueError: a trainable parameter is not float32, or there is none.
    """

    layout: Layout
    vector: torch.nn.Parameter  # [d] float32; what the optimizer steps; its .grad is `gradient`
    gradient: torch.Tensor  # [d] float32

    def __init__(self, module: torch.nn.Module) -> None:
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError(f"{type(module).__name__} has no trainable parameter.")
        for name, parameter in trainable.items():
            if parameter.dtype != torch.float32:
                raise ValueError(f"trainable parameter {name} is {parameter.dtype}; fedray's vector is float32.")
        self.module = module
        self.layout = Layout(tuple(trainable), tuple(tuple(p.shape) for p in trainable.values()))
        self.vector = torch.nn.Parameter(torch.cat([p.detach().reshape(-1) for p in trainable.values()]))
        self.gradient = self.vector.grad = torch.zeros_like(self.vector)
        self._parameters = trainable
        sizes = [parameter.numel() * parameter.element_size() for parameter in trainable.values()]
        self._offsets = list(itertools.accumulate(sizes[:-1], initial=0))  # bytes
        for name, view in self.layout.views(self.vector.detach()).items():
            trainable[name].data = view
        for name, view in self.layout.views(self.gradient).items():
            trainable[name].grad = view
        # Buffers do not travel: one that training changes (BatchNorm's statistics) would be lost in silence.
        self._buffers = [(name, b, b.clone()) for name, b in module.named_buffers() if b.is_floating_point()]

    def check(self) -> None:
        """Assert that every parameter and gradient still lies in its vector and that no buffer was trained.

        Raises:
            RuntimeError: names the first tensor that does not.
        """
        for what, flat in (("parameter", self.vector), ("gradient", self.gradient)):
            start = flat.data_ptr()
            for (name, parameter), offset in zip(self._parameters.items(), self._offsets, strict=True):
                tensor = parameter if what == "parameter" else parameter.grad
                if tensor is None or tensor.data_ptr() - start != offset or not tensor.is_contiguous():
                    raise RuntimeError(
                        f"the {what} of {name} no longer lies in the flat vector (was zero_grad() called, or the "
                        f"module moved or reformatted after it was flattened?)."
                    )
        if self.vector.grad is not self.gradient:
            raise RuntimeError("the vector's gradient was replaced; zero it with flat.gradient.zero_().")
        for name, buffer, before in self._buffers:
            if not torch.equal(buffer, before):
                raise RuntimeError(
                    f"buffer {name} changes in training (BatchNorm?), but buffers are not averaged: use GroupNorm, "
                    f"or freeze its statistics."
                )


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Return a tensor over `array` without a copy. Arrays from Ray are read-only: do not write to the result."""
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def sha256(*vectors: torch.Tensor) -> str:
    """Return the SHA-256 of the float32 bytes of vectors in turn: two models with the same are equal, bit for bit."""
    digest = hashlib.sha256()
    for vector in vectors:
        digest.update(vector.detach().cpu().contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def sha256_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of named tensors: of their names and bytes, by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def save(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors: complete or not at all, and on the disk when this returns."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():  # safetensors refuses tensors that share memory, as two names of one do
        tensor = tensor.detach().cpu().contiguous()
        own[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    try:
        with durably(path) as aside:
            save_file(own, aside, {**(metadata or {}), CHECKSUM: _checksum(own, metadata or {})})
    except SafetensorError as error:  # a full disk, for instance
        raise RunError(f"{path} cannot be written: {error}.") from None


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    return hashlib.sha256((sha256_of(tensors) + json.dumps(metadata, sort_keys=True)).encode()).hexdigest()


def load_checked(path: Path, known: Collection[str] = ()) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read all tensors of a file that `save` wrote, and its metadata.

    Args:
        known: keys that the metadata may have.

    Raises:
        UserError: it is damaged: it cannot be read, or its checksum is another (files of older versions have none).
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    written = metadata.pop(CHECKSUM, None)
    if set(metadata) - set(known) or written not in (None, _checksum(tensors, metadata)):
        raise UserError(f"{path} is damaged: its contents are not those that were written (the checksum is another).")
    return tensors, metadata


def load(path: Path, layout: Layout, prefix: str = "") -> torch.Tensor:
    """Read the tensors that `layout` names (each after `prefix`) into a new vector [size].

    Raises:
        ValueError: a tensor is absent or has another shape.
    """
    from safetensors import safe_open

    vector = torch.empty(layout.size)
    with safe_open(path, framework="pt") as file:
        stored = set(file.keys())
        for name, view in layout.views(vector).items():
            if prefix + name not in stored:
                raise ValueError(f"{path} has no tensor {prefix + name!r}: it is of another model.")
            tensor = file.get_tensor(prefix + name)
            if tensor.shape != view.shape:
                raise ValueError(
                    f"{path}: {prefix + name!r} has shape {list(tensor.shape)}, not {list(view.shape)}: "
                    f"it is of another model."
                )
            view.copy_(tensor)
    return vector
