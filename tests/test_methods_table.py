"""docs/methods.md: each of its commands is one, and the bytes beside it are those that the command plans."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from lora_payload import SD15
from peft import LoraConfig

from fedray import menus
from fedray.algorithms.fedavg import FedAvg
from fedray.algorithms.lora import FedEx, Flora
from fedray.algorithms.split import Split
from fedray.cli import main
from fedray.federation import plan as planning
from fedray.presets import PRESETS
from fedray.tasks.lora import PIPELINE, LoRA
from fedray.vector import Layout
from fedray.vector.adapters import adapters
from fedray.vector.part import Part

TEXT = (Path(__file__).parents[1] / "docs/methods.md").read_text()
ROWS = [line for line in TEXT.splitlines() if re.search(r"\| `fedray [^`]*` \|$", line)]


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def command(row):
    return re.findall(r"`(fedray [^`]*)` \|$", row)[0]


def columns(row):
    """A row's cells by the names over them."""
    lines = TEXT.splitlines()
    head = next(line for line in lines[lines.index(row) :: -1] if line.endswith("| command |"))
    return dict(zip(cells(head), cells(row), strict=True))


def arguments(row, photos):
    return shlex.split(command(row).replace("PHOTOS", shlex.quote(str(photos))))[1:]


def told(cell, d):
    """What a cell says of memory, in bytes: a multiple of d, or else a few bytes or none."""
    found = re.search(r"(\d+)d\b", cell) if not cell.startswith("none") else None
    return int(found[1]) * d if found else 0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: cells(row)[0])
def test_commands_plan_the_bytes_beside_them(row, photos, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    make, seen = planning.make_plan, []
    monkeypatch.setattr(planning, "make_plan", lambda config: seen.append((config, make(config))) or seen[-1][1])
    assert main([*arguments(row, photos), "--dry-run"]) == 0, capsys.readouterr().err
    (down, up) = re.search(r"([\d,]+) down to a client in a round, ([\d,]+) up", capsys.readouterr().out).groups()
    assert [down, up] == [cell for cell in cells(row) if re.fullmatch(r"[\d,]{4,}", cell)]
    ((config, plan),), said = seen, columns(row)
    d = plan.layout.size
    if said.get("state at the server") not in (None, "as the method", "the base's change"):
        inner = getattr(config.algorithm, "algorithm", FedAvg())
        kept = [sum(each.nbytes for each in method.init(plan.initial, plan.layout).values())
                for method in (config.algorithm, inner)]  # fmt: skip
        assert abs(kept[0] - kept[1] - told(said["state at the server"], d)) < 32
    if "state at a client" in said and plan.own == 0:
        memory = planning.first_message(config, plan).memory
        assert abs(sum(tensor.nbytes for tensor in memory.values()) - told(said["state at a client"], d)) < 32
    if "memory at the driver" in said:
        assert config.fold.memory(plan.round(config, 0)) == told(said["memory at the driver"], d) * config.cohort_size


@pytest.mark.parametrize(
    ("flag", "menu"), [("--algorithm", menus.ALGORITHMS), ("--fold", menus.FOLDS), ("--wire", menus.LINKS)]
)
def test_everything_in_a_menu_has_a_row(flag, menu):
    forms = [form for row in ROWS for form in re.findall(rf"{flag} ([^ `]+)", command(row))]
    named = {name for form in forms for name in re.split("[:,]", form)} | {"fedavg", "mean"}  # these are the defaults
    assert set(menu.classes) <= named


def layout_of(module):
    """Its trainable parameters, in order."""
    named = [(name, tuple(each.shape)) for name, each in module.named_parameters() if each.requires_grad]
    return Layout(*zip(*named, strict=True))


def test_bytes_of_a_base_in_factors():
    """Of four clients: after a round, of the products, and when the last layer becomes one."""
    with torch.device("meta"):
        large = UNet2DConditionModel(**SD15)
    small = UNet2DConditionModel.from_pretrained(str(PIPELINE), subfolder="unet")
    for unet in (small, large):
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=list(LoRA.target_modules)))
    small, large = (adapters(unet, layout_of(unet), 1.0) for unet in (small, large))
    flora, fedex = (method.columns(range(4), large) for method in (Flora(), FedEx()))
    assert (flora, fedex) == (32, 24)
    text = " ".join(TEXT.split())
    products = [4 * what.base_length(10_000) for what in (small, large)]
    assert f"the products, {products[0]:,} bytes, are shorter than FLoRA's factors of one round" in text
    assert small.base_length(flora) == products[0] / 4
    assert f"FedEx-LoRA's first factors have {4 * small.base_length(fedex):,}" in text
    assert f"FLoRA's factors of one round have {4 * large.base_length(flora):,} bytes" in text
    assert f"FedEx-LoRA's {4 * large.base_length(fedex):,}, where the products have {products[1]:,}" in text
    last = next(rounds for rounds in range(1, 99) if 4 * large.base_length(flora * rounds) == products[1])
    assert f"FLoRA's last layer becomes a product in round {last}." in text


def test_bytes_of_an_encoder():
    with torch.device("meta"):
        unet = PRESETS["digits"].task.unet()
    encoder = Part.of(layout_of(unet), Split().encodes)
    assert f"an encoder has {4 * encoder.layout.size:,} bytes" in TEXT
    assert f"| 638,788 | {4 * encoder.rest.layout.size:,} |" in TEXT
