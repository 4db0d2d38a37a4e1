"""fedray finetune: as fedray train, of adapters."""

from fedray.commands.train import finetune as main

__all__ = ["main"]
