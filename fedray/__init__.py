"""fedray: federated training of diffusion models, simulated on Ray.

run = fedray.run(fedray.Config(clients=4, rounds=20, local_epochs=4), out="runs/first")
"""

import importlib
from importlib.metadata import version

__version__ = version("fedray")

_HOME = {
    "Config": "config", "PRESETS": "presets", "SMOKE": "presets", "RunError": "choices", "UserError": "choices",
    "Dataset": "data", "FlatParameters": "vector", "DDPM": "tasks.ddpm", "Run": "record",
    "IID": "partition", "Quantity": "partition", "ByLabel": "partition", "ByAttribute": "partition",
    "ByFolder": "partition", "Dirichlet": "partition", "Shards": "partition", "run_local_only": "local_only",
    "Float16": "codecs", "Float32": "codecs", "FedAvg": "rules", "grid": "record", "run": "actors",
    "summary": "results", "score_table": "results",
}  # fmt: skip
__all__ = list(_HOME)


def __getattr__(name: str):
    """Imports on first use: torch and Ray take seconds, and `fedray --version` needs neither."""
    if name not in _HOME:
        raise AttributeError(f"module 'fedray' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedray.{_HOME[name]}"), name)
