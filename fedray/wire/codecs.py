"""How models and updates are packed for the wire. A payload is a flat array; its bytes are what is counted.

Down goes the model, from which the client starts: `decode_model(encode_model(w))`.
Up comes what the client trained, `encode_update(v, start)`, which the server reads as `decode_update(payload, w)`.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedray.vector import as_tensor

Payload = np.ndarray


class Codec(Protocol):
    def encode_model(self, model: Tensor) -> Payload: ...
    def decode_model(self, payload: Payload) -> Tensor: ...
    def encode_update(self, trained: Tensor, start: Tensor) -> Payload: ...
    def decode_update(self, payload: Payload, model: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Float32:
    """The weights themselves: exact, where w + (v − w) would not be. Nothing is copied."""

    def encode_model(self, model: Tensor) -> Payload:
        return model.numpy()

    def decode_model(self, payload: Payload) -> Tensor:
        return as_tensor(payload)

    def encode_update(self, trained: Tensor, start: Tensor) -> Payload:
        return trained.numpy()

    def decode_update(self, payload: Payload, model: Tensor) -> Tensor:
        return as_tensor(payload)


@dataclass(frozen=True)
class Float16:
    """Half the bytes: down goes fp16(w), up comes fp16(v − fp16(w)), which the server adds to its float32 w.

    Differences, because rounding the weights themselves to float16 would freeze most of them.

    Raises:
        OverflowError: a value is beyond float16's largest, 65,504.
    """

    def encode_model(self, model: Tensor) -> Payload:
        return _half(model, "model")

    def decode_model(self, payload: Payload) -> Tensor:
        return as_tensor(payload).float()

    def encode_update(self, trained: Tensor, start: Tensor) -> Payload:
        return _half(trained - start, "update")

    def decode_update(self, payload: Payload, model: Tensor) -> Tensor:
        return model + as_tensor(payload)


CODECS: dict[str, type] = {"float32": Float32, "float16": Float16}


def _half(values: Tensor, what: str) -> Payload:
    half = values.to(torch.float16)
    if not torch.isfinite(half).all():
        raise OverflowError(f"the {what} has values beyond float16's range; use --codec float32.")
    return half.numpy()
