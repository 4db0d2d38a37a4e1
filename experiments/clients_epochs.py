"""How do the number of clients C and of local epochs E go together?

    fedray sweep experiments/clients_epochs.py --out runs/paper

Both of the paper's figures 2 and 3 are lines in this table. All cells of one E train on as many images, but a client
makes E·T·n / (C·32) sequential steps: C and E are also a sweep over steps. same_steps.py is the control.
"""

import fedray

BASE = fedray.PRESETS["digits"]
SPACE = {"clients": [2, 4, 8], "local_epochs": [1, 2, 4], "seed": [0, 1, 2]}
SMOKE = fedray.SMOKE | {"clients": [2, 4], "local_epochs": [1, 2], "seed": [0, 1]}
