"""fedray finetune: fedray train for adapters."""

from fedray.commands.train import finetune as main

__all__ = ["main"]
