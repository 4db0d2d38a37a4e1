"""Does the number of clients matter at equal sequential steps? (The control that Chen 2024 lacks.)

    fedray sweep experiments/same_steps.py

E·T/C is held fixed: with twice the clients, each has half of the data and trains for twice the rounds, so that every
client makes the same number of sequential steps. The total compute and the bytes sent then grow with C: what
is left of figure 2 here is the effect of averaging.
"""

import fedray

BASE = fedray.PRESETS["digits"]
SPACE = {
    "local_epochs": [2],
    "clients": [2, 4, 8],
    "rounds": lambda config: config.rounds * config.clients // 4,
    "seed": [0, 1, 2],
}
SMOKE = fedray.SMOKE | {"seed": [0, 1]}
