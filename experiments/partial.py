"""What does it cost to share only a part of the U-Net, and what does it save?

The shape of FedDiffuse (arXiv:2406.12575), on digits.

    fedray sweep experiments/partial.py
    python experiments/partial.py           the payloads of the paper's U-Nets, counted

All of the U-Net, its middle and decoder, or its decoder alone are averaged; the rest is each client's own, and samples
are then of clients' own models in turn. Without a moving average: it would be of the shared part only.
"""

from dataclasses import replace

import fedray

DECODER = "^(up_blocks|conv_norm_out|conv_out)"
LATENT = "^(mid_block|up_blocks|conv_norm_out|conv_out)"

BASE = replace(fedray.PRESETS["digits"], use_ema=False)
SPACE = {
    "share": [None, LATENT, DECODER],
    "partition": ["iid", "dirichlet:0.1"],
    "seed": [0, 1, 2],
}
SMOKE = fedray.SMOKE | {"share": [None, DECODER], "partition": ["iid"], "seed": [0, 1]}


def main() -> None:
    """Print what travels of each network; on torch's meta device, which needs no memory."""
    import pandas as pd
    import torch
    from diffusers import UNet2DConditionModel
    from lora_payload import SD15

    from fedray.commands.terminal import print_frame
    from fedray.tasks.ddpm import DDPM
    from fedray.vector import Layout
    from fedray.vector.part import Part

    digits, celeba = fedray.PRESETS["digits"].task, fedray.PRESETS["celeba"].task
    assert isinstance(digits, DDPM)
    assert isinstance(celeba, DDPM)
    rows = []
    with torch.device("meta"):
        networks = {
            "digits": digits.unet(), "DDPM (the paper's)": celeba.unet(), "SD 1.5": UNet2DConditionModel(**SD15)
        }  # fmt: skip
    for name, network in networks.items():
        named = dict(network.named_parameters())
        layout = Layout(tuple(named), tuple(tuple(parameter.shape) for parameter in named.values()))
        for shared, pattern in {"all": None, "latent and decoder": LATENT, "decoder": DECODER}.items():
            size = Part.of(layout, replace(BASE, share=pattern).shares).layout.size
            share = f"{size / layout.size:.1%}"
            rows.append({"U-Net": name, "shared": shared, "parameters": f"{size:,}", "bytes": f"{4 * size:,}"})
            rows[-1]["share"] = share
    print_frame(pd.DataFrame(rows).set_index("U-Net"))


if __name__ == "__main__":
    main()
