"""What does an uneven split of the data cost, and does joining still pay?

    fedray sweep experiments/non_iid.py

Dealt at random, skewed by Dir(0.1) over the digits, and by digit; beside each federation, each of its clients alone
(`only_client`). With faces, whose label is the person, by-label is a split by identity: --preset faces
--train-data-dir FACES.
"""

import fedray

BASE = fedray.PRESETS["digits"]
SPACE = {
    "clients": [4],
    "partition": ["iid", "dirichlet:0.1", "by-label"],
    "only_client": [None, 0, 1, 2, 3],
    "seed": [0, 1, 2],
}
SMOKE = fedray.SMOKE | {"partition": ["iid", "by-label"], "only_client": [None, 0], "seed": [0, 1]}
