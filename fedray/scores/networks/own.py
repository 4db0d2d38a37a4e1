"""Feature networks of the user's own: TorchScript files and Python functions."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedray.errors import UserError, reason
from fedray.scores.networks.network import FeatureNetwork

FILES = (".pt", ".pth", ".ts")  # how TorchScript files' names end


class TorchScript(FeatureNetwork):
    """A TorchScript module in a file."""

    def build(self, device: torch.device) -> Callable[[Tensor], Any]:
        try:
            return torch.jit.load(self.name, map_location=device).eval()
        except Exception as error:
            raise UserError(
                f"--features {self.name}: no TorchScript module could be loaded ({reason(error)})."
            ) from None


class Function(FeatureNetwork):
    """A Python function, MODULE:FUNCTION or FILE.py:FUNCTION."""

    def build(self, device: torch.device) -> Callable[[Tensor], Any]:
        home, _, function = self.name.rpartition(":")
        try:
            if home.endswith(".py"):
                spec = importlib.util.spec_from_file_location(Path(home).stem, home)
                assert spec is not None
                assert spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
            else:
                module = importlib.import_module(home)
            return getattr(module, function)
        except Exception as error:  # it is anybody's code
            raise UserError(f"--features {self.name}: {reason(error)}.") from None
