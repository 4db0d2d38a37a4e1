"""Messages of any objects, their tensors and arrays beside them: Ray then maps these, and copies no byte.

Ray pickles a torch tensor at a tenth of the speed of a NumPy array.
"""

import io
import pickle
from typing import Any, NamedTuple

import numpy as np
import torch
from ray import cloudpickle

from fedray.vector import as_tensor


class Message(NamedTuple):
    """An object without its arrays, and these."""

    pickled: bytes
    arrays: list[np.ndarray]

    @property
    def nbytes(self) -> int:
        return len(self.pickled) + sum(array.nbytes for array in self.arrays)


class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is torch.Tensor and obj.device.type == "cpu" and obj.dtype != torch.bfloat16:
            return as_tensor, (obj.detach().contiguous().numpy(),)
        return super().reducer_override(obj)


def pack(obj: Any) -> Message:
    """Take an object apart."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(obj)
    return Message(file.getvalue(), [np.asarray(buffer.raw()) for buffer in buffers])


def unpack(message: Message) -> Any:
    """Put an object together again. What arrived by Ray is read-only: its tensors must not be written to."""
    return pickle.loads(message.pickled, buffers=message.arrays)
