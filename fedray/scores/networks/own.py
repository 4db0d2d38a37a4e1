"""Feature networks of the user's own: TorchScript files and Python functions."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedray.errors import UserError, reason
from fedray.own import load_file
from fedray.scores.networks.network import FeatureNetwork


class TorchScript(FeatureNetwork):
    """A TorchScript module in a file."""

    runs_code = True

    def build(self, device: torch.device) -> Callable[[Tensor], Any]:
        try:
            return torch.jit.load(self.name, map_location=device).eval()
        except Exception as error:
            raise UserError(
                f"--features {self.name}: no TorchScript module could be loaded ({reason(error)})."
            ) from None


class Function(FeatureNetwork):
    """A Python function, MODULE:FUNCTION or FILE.py:FUNCTION."""

    runs_code = True

    def build(self, device: torch.device) -> Callable[[Tensor], Any]:
        home, _, function = self.name.rpartition(":")
        try:
            module = load_file(home) if home.endswith(".py") else importlib.import_module(home)
            return getattr(module, function)
        except Exception as error:  # it is anybody's code
            raise UserError(f"--features {self.name}: {reason(error)}.") from None
