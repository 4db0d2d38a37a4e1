"""Which folds withstand malicious clients, and what do they cost where there are none?

    fedray sweep experiments/robust.py

Ten clients, of whom none, one or three send the opposite of their change, or three send noise of some eight times its
length (0.05 √d = 20; labels cannot be flipped, as this model learns from none). The mean is moved by each of them;
coordinate median and trimmed mean (Yin et al. 2018), MultiKrum (Blanchard et al. 2017) and norm bounding (Sun et al.
2019) are meant not to be. Norms are bounded by 2.5, the length of an honest change from the fifth to the fifteenth of
40 rounds.
"""

import fedray

BASE = fedray.PRESETS["digits"]
SPACE = {
    "clients": [10],
    "malicious": [None, "0.1:signflip", "0.3:signflip", "0.3:noise:0.05"],
    "fold": ["mean", "median", "trimmed:0.3", "multikrum:3", "normbound:2.5"],
    "seed": [0, 1, 2],
}
SMOKE = fedray.SMOKE | {"malicious": [None, "0.3:signflip"], "fold": ["mean", "multikrum:3"], "seed": [0, 1]}
