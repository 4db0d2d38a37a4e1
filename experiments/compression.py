"""How many bytes does a federation need? Scores against what is sent, for each way to compress.

    fedray sweep experiments/compression.py

The shape of FedDM (Vora, Basu and Hossain 2024, arXiv:2407.14730): float32, float16, int8 with stochastic rounding, both ways; and
the largest 1 % of changes on the way up, with and without error feedback. `total.bytes` is both ways together.
"""

import fedray

BASE = fedray.PRESETS["digits"]
SPACE = {
    "wire": ["float32", "float16", "int8", "topk:0.01", "feedback:topk:0.01"],
    "seed": [0, 1, 2],
}
SMOKE = fedray.SMOKE | {"wire": ["float32", "int8", "feedback:topk:0.01"], "seed": [0, 1]}
