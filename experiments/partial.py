"""What does it cost to share only a part of the U-Net, and what does it save?

The shape of FedDiffuse (arXiv:2406.12575), on digits.

    fedray sweep experiments/partial.py
    python experiments/partial.py           the payloads of the paper's U-Nets, counted

All of the U-Net, its middle and decoder, or its decoder alone are averaged; the rest is each client's own, and samples
are then of clients' own models in turn. In the split exchange each client sends its encoder, or its middle and decoder,
and all of the model is averaged. Without a moving average: it would be of the shared part only.
"""

from dataclasses import replace

import fedray

DECODER = "^(up_blocks|conv_norm_out|conv_out)"
LATENT = "^(mid_block|up_blocks|conv_norm_out|conv_out)"

BASE = replace(fedray.PRESETS["digits"], use_ema=False)
SPACE = {
    "share": [None, LATENT, DECODER],
    "algorithm": lambda config: "fedavg" if config.share else ["fedavg", "split"],
    "partition": ["iid", "dirichlet:0.1"],
    "seed": [0, 1, 2],
}
SMOKE = fedray.SMOKE | {"share": [None, DECODER], "partition": ["iid"], "seed": [0, 1]}


def counted(network: str, shared: str, down: int, up: float, whole: int) -> dict[str, str]:
    """Make a row of the table: of a client and a round, in float32."""
    saved = f"{1 - (down + up) / (2 * whole):.1%}"
    sent = {"bytes down": f"{4 * down:,}", "bytes up": f"{4 * up:,.0f}", "saved": saved}
    return {"U-Net": network, "shared": shared} | sent


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
            rows.append(counted(name, shared, size, size, layout.size))
        # Of the split exchange the mean: half of the clients send the encoder, half the rest.
        rows.append(counted(name, "split", layout.size, layout.size / 2, layout.size))
    print_frame(pd.DataFrame(rows).set_index("U-Net"))


if __name__ == "__main__":
    main()
