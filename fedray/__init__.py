"""fedray: federated training of diffusion models, simulated on Ray.

run = fedray.run(fedray.Config(clients=4, rounds=20, local_epochs=4), out="runs/first")
"""

import importlib
from importlib.metadata import version

__version__ = version("fedray")

_HOME = {
    "Config": "config", "PRESETS": "presets", "SMOKE": "presets", "RunError": "errors", "UserError": "errors",
    "Dataset": "data.dataset", "FlatParameters": "vector", "DDPM": "tasks.ddpm", "Run": "record.run",
    "IID": "data.partition", "Quantity": "data.partition", "ByLabel": "data.partition", "ByAttribute": "data.partition",
    "ByFolder": "data.partition", "Dirichlet": "data.partition", "Shards": "data.partition",
    "Float16": "wire.float16", "Algorithm": "algorithms", "Wrapper": "algorithms", "Link": "wire",
    "Fold": "algorithms.folds", "Collect": "algorithms.folds", "Mean": "algorithms.folds",
    "FedAvg": "algorithms.fedavg", "grid": "record.pictures",
    "summary": "reports.results", "score_table": "reports.results",
    "run": "cluster.driver", "run_local_only": "cluster.alone", "sweep": "cluster.tune", "Experiment": "cluster.trials",
}  # fmt: skip
__all__ = list(_HOME)


def __getattr__(name: str):
    """Imports on first use: torch and Ray take seconds, and `fedray --version` needs neither."""
    if name not in _HOME:
        raise AttributeError(f"module 'fedray' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedray.{_HOME[name]}"), name)
