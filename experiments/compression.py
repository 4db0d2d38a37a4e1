"""How many bytes does a federation need? Scores against what is sent, for each way to compress.

    fedray sweep experiments/compression.py

The shape of FedDM (Vora et al. 2024, arXiv:2407.14730): float32, float16 and int8 with stochastic rounding, both ways;
and on the way up the largest 1 % of the changes, with and without error feedback. total.bytes is both ways together.
"""

import fedray

BASE = fedray.PRESETS["digits"]
SPACE = {
    "wire": ["float32", "float16", "int8", "topk:0.01", "feedback:topk:0.01"],
    "seed": [0, 1, 2],
}
SMOKE = fedray.SMOKE | {"wire": ["float32", "int8", "feedback:topk:0.01"], "seed": [0, 1]}
