"""Is the best E another one where there is less data? (The paper's closing claim, Chen 2024, section 4.)

    fedray sweep experiments/data_amount.py

A quarter, half and all of every client's images are trained on; the rest is kept apart (`test_share`). Scores are taken
against all images.
"""

import fedray

BASE = fedray.PRESETS["digits"]
SPACE = {"test_share": [0.75, 0.5, 0.0], "local_epochs": [1, 2, 4, 8], "seed": [0, 1, 2]}
SMOKE = fedray.SMOKE | {"test_share": [0.95, 0.9], "local_epochs": [1, 2], "seed": [0, 1]}
