"""What is the effect of the number of clients where all settings train on as many images?

    fedray sweep experiments/same_images.py --out runs/steps

The other half of same_steps.py: batches of 256/C images, so that C clients of 30 local steps see as many images as
eight of batch 32 do. The learning rate is the preset's times √(batch / 32), the rule for Adam (Malladi et al. 2022,
arXiv:2205.10287).
"""

from dataclasses import replace

import fedray

BASE = replace(fedray.PRESETS["digits"], local_epochs=None, local_steps=30, evaluate_samples=2048)
SPACE = {
    "clients": [1, 2, 4, 8],
    "train_batch_size": lambda config: 256 // config.clients,
    "learning_rate": lambda config: BASE.learning_rate * (config.train_batch_size / 32) ** 0.5,
    "seed": [0, 1, 2, 3, 4],
}
SMOKE = fedray.SMOKE | {"local_steps": 4, "seed": [0, 1]}
