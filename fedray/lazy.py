"""torch, imported when something of it is first used: its import takes seconds, and --help or a mistake needs none."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module("torch"), name)
            setattr(self, name, value)  # asked for once
            return value

    torch = _Torch()

__all__ = ["torch"]
