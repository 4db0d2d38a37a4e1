"""Which of a pipeline's files are fine-tuned: revisions and variants."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedray.config import Config
from fedray.errors import UserError
from fedray.federation.worker import build
from fedray.presets import PRESETS
from fedray.tasks.lora import PIPELINE
from fedray.tasks.lora.pipelines import base_sha256


@pytest.fixture
def pipeline(tmp_path):
    """The embedded pipeline; beside each part's weights, twice those as its variant fp16."""
    shutil.copytree(PIPELINE, tmp_path / "pipeline")
    for part in ("unet", "vae", "text_encoder"):
        (path,) = (tmp_path / "pipeline" / part).glob("*.safetensors")
        tensors = {name: (2 * tensor).half() for name, tensor in load_file(path).items()}
        save_file(tensors, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
    return tmp_path / "pipeline"


def lora(photos, pipeline, **changes):
    settings = {"train_data_dir": str(photos), "pretrained_model_name_or_path": str(pipeline)} | changes
    return replace(PRESETS["digits-lora"].task, **settings)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_variant_is_what_is_fine_tuned(photos, pipeline, dtype):
    weights = load_file(next((PIPELINE / "unet").glob("*.safetensors")))["conv_in.weight"]
    for variant, scale in ((None, 1), ("fp16", 2)):
        config = Config(task=lora(photos, pipeline, variant=variant, base_dtype=dtype), local_steps=1)
        unet = build(config, torch.device("cpu")).unet
        expected = (scale * weights).half().to(getattr(torch, dtype)) if scale == 2 or dtype == "float16" else weights
        assert torch.equal(unet.conv_in.weight, expected)
    assert base_sha256(pipeline) != base_sha256(pipeline, "fp16")


def test_variants_and_revisions_that_there_are_not(photos, pipeline):
    with pytest.raises(UserError, match="--variant ema: the U-Net of .* has only .*fp16.safetensors"):
        lora(photos, pipeline, variant="ema").check("ddpm", 10)
    with pytest.raises(UserError, match="--revision v2: .*pipeline is a folder, which has no revisions"):
        lora(photos, pipeline, revision="v2").check("ddpm", 10)


def test_revision_and_variant_are_what_the_hub_is_asked_for(photos, pipeline, monkeypatch):
    from diffusers import DiffusionPipeline

    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(pipeline)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    assert lora(photos, "someone/model", revision="v2", variant="fp16").folder == pipeline
    assert asked == {"name": "someone/model", "revision": "v2", "variant": "fp16", "safety_checker": None}
