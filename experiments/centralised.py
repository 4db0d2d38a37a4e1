"""What does centralised training reach after ten epochs (Chen 2024: FID 17.96), and what if it goes on?

    fedray sweep experiments/centralised.py

One client has all the data and keeps its optimizer, so a round of one epoch is an epoch of a plain, uninterrupted run.
The learning rate's cosine is stretched over the whole run, so each length is a run of its own.
"""

import fedray

BASE = fedray.PRESETS["digits"]
SPACE = {"clients": [1], "local_epochs": [1], "rounds": [10, 20, 40, 80, 160], "seed": [0, 1, 2]}
SMOKE = fedray.SMOKE | {"rounds": [1, 2], "seed": [0, 1]}
