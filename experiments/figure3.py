"""Do more local epochs make the model better? (Chen 2024, figure 3: C = 4, E varies.)

    fedray sweep experiments/figure3.py

Score against rounds, and against what a client trains in all: rounds are cheap for a larger E only if its epochs are.
On the paper's data: --preset celeba --train-data-dir CELEBA --evaluate-every 1.
"""

from dataclasses import replace

import fedray

BASE = replace(fedray.PRESETS["digits"], evaluate_every=5)
SPACE = {"clients": [4], "local_epochs": [1, 2, 4, 8], "seed": [0, 1, 2]}
SMOKE = fedray.SMOKE | {"seed": [0, 1], "evaluate_every": 1}
