"""What does a client send a round? (Chen 2024, section 3.2: 3.1 MB for LoRA against 433 MB for "the entire U-Net".)

    python experiments/lora_payload.py

The payloads of the paper's three networks, on fedray's wires. The paper divides Stable Diffusion's adapter by
another network's U-Net, the DDPM's. The honest ratio is to what would travel without LoRA: Stable Diffusion's own.

    python experiments/lora_payload.py --smoke      of the small Stable Diffusion that ships with fedray, by training it
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import tyro
from diffusers import UNet2DConditionModel
from lora_digits import photos
from peft import LoraConfig
from torch import nn

import fedray
from fedray.algorithms import Round
from fedray.commands.terminal import print_frame, program
from fedray.menus import parse_wire
from fedray.tasks.ddpm import DDPM
from fedray.tasks.lora import PIPELINE, LoRA
from fedray.vector import Layout
from fedray.wire import Wire, counted

SD15 = dict(
    sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768,
    attention_head_dim=8,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip


def adapted(unet: UNet2DConditionModel, task: LoRA) -> UNet2DConditionModel:
    """The network, with adapters alone trainable."""
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=task.largest_rank, target_modules=list(task.target_modules)))
    return unet


WIRES = ("float32", "float16")
NO_ROUND = Round(0, 0, (0,), 1, {0: 1}, Layout((), ()))  # on which these messages do not depend


def trainable(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def payloads(networks: dict[str, nn.Module]) -> pd.DataFrame:
    """Parameters that travel, and bytes per client and direction by wire: lengths of payloads that are made."""
    rows = {}
    for name, network in networks.items():
        vector = torch.zeros(1).expand(trainable(network))
        rows[name] = {"parameters": len(vector)} | {
            wire: counted(Wire(parse_wire(wire)).send({"model": vector}, NO_ROUND), frozenset()) for wire in WIRES
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("what travels")


def main(smoke: bool = False) -> None:
    """Print the table.

    Args:
        smoke: of the small Stable Diffusion, beside the bytes of a round that was run.
    """
    task = fedray.PRESETS["sd"].task
    assert isinstance(task, LoRA)
    if smoke:
        small = UNet2DConditionModel.from_pretrained(PIPELINE, subfolder="unet")
        whole = UNet2DConditionModel.from_pretrained(PIPELINE, subfolder="unet")
        table = payloads({"LoRA": adapted(small, task), "its own U-Net": whole})
        print_frame(table.map("{:,}".format))
        with tempfile.TemporaryDirectory() as folder:
            config = fedray.PRESETS["digits-lora"]
            config = replace(
                config, task=replace(config.task, train_data_dir=str(photos(Path(folder), 0))), rounds=1,
                wire=(fedray.Float16(),), local_steps=1, evaluate_samples=0, features=None, actors=0,
            )  # fmt: skip
            client = fedray.run(config, Path(folder) / "run").rows[0]["clients"][0]
        print(f"a round of it: {client['bytes_down']:,} bytes down to a client and {client['bytes_up']:,} up")
        return
    celeba = fedray.PRESETS["celeba"].task
    assert isinstance(celeba, DDPM)
    with torch.device("meta"):  # shapes without memory
        networks = {
            "LoRA of rank 8, Stable Diffusion 1.5": adapted(UNet2DConditionModel(**SD15), task),
            "DDPM U-Net (the paper's 433 MB)": celeba.unet(),
            "U-Net of Stable Diffusion 1.5": UNet2DConditionModel(**SD15),
        }
    table = payloads(networks)
    print_frame(table.map("{:,}".format))
    lora, ddpm, own = (table.iloc[row] for row in range(3))
    print(f"the paper's ratio    {ddpm['float32'] / lora['float16']:,.0f} to 1, of two networks and two precisions")
    print(f"like for like        {own['float16'] / lora['float16']:,.0f} to 1, both in float16")
    print(f"next                 {program()} finetune --help")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except fedray.UserError as error:
        raise SystemExit(f"lora_payload.py: {error}") from None
