"""fedray: federated training of diffusion models, simulated on Ray.

run = fedray.run(fedray.Config(clients=4, rounds=20, local_epochs=4), out="runs/first")

Public names are in `__init__.pyi` and are imported on first use: torch and Ray take seconds, and `fedray --version`
needs neither.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("fedray")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
