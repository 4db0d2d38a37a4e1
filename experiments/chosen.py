"""How close to centralised training is what the paper settles on? (Chen 2024, section 3.1: C = 4, E = 4, T = 10.)

    fedray sweep experiments/chosen.py

Beside the federation, ten epochs of centralised training: as many sequential steps as each client makes, as in the
paper. Samples after every round make its figure 4. On the paper's data: --preset celeba
--train-data-dir CELEBA --evaluate-every 1.
"""

from dataclasses import replace

import fedray

BASE = replace(fedray.PRESETS["digits"], evaluate_every=1)
SPACE = {"clients": [4, 1], "local_epochs": lambda config: config.clients, "rounds": [10], "seed": [0, 1, 2]}
SMOKE = fedray.SMOKE | {"rounds": [2], "seed": [0, 1]}
