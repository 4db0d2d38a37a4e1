"""Do more clients make the model worse? (Chen 2024, figure 2: C = 2, 4, 8 at E = 2.)

    fedray sweep experiments/figure2.py

E is in epochs, so that a client of eight makes a quarter of the steps of one of two: see same_steps.py for the control.
On the paper's data: --preset celeba --train-data-dir CELEBA.
"""

import fedray

BASE = fedray.PRESETS["digits"]
SPACE = {"local_epochs": [2], "clients": [2, 4, 8], "seed": [0, 1, 2]}
SMOKE = fedray.SMOKE | {"seed": [0, 1]}
