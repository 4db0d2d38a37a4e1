"""Stable Diffusion pipelines on disk: their checks, their weights, and the U-Net in a chosen dtype."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedray import storage
from fedray.cache import kept
from fedray.errors import UserError, reason
from fedray.lazy import torch

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # of the base, and their names in safetensors
SUPPORTED = ("StableDiffusionPipeline",)


@cache
def pipeline_folder(name: str) -> Path:
    """Find a pipeline's folder by path or hub name (then download it). Raises `UserError` if it is not of the kind."""
    flag = "--pretrained-model-name-or-path"
    if not name:
        raise UserError(f"{flag} is not given: name the folder, or the hub name, of a Stable Diffusion pipeline.")
    folder = storage.folder(name, f"{flag} ")
    if not folder.is_dir():
        from diffusers import DiffusionPipeline

        try:
            folder = Path(DiffusionPipeline.download(name, safety_checker=None))
        except Exception as error:  # the hub has dozens
            raise UserError(f"{flag} {name}: no such folder, and the hub has none ({reason(error)}).") from None
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{flag} {name} is no pipeline: it has no model_index.json.")
    try:
        kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (ValueError, KeyError):
        raise UserError(f"{flag} {name}: its model_index.json is damaged.") from None
    if kind not in SUPPORTED:
        raise UserError(f"{flag} {name} is a {kind}, which is not supported yet; take a {SUPPORTED[0]} (1.x or 2.x).")
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise UserError(f"{flag} {name}: the pipeline has no {part}.")
        if part in ("unet", "vae", "text_encoder"):
            _check_weights(folder / part)
    for config in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        if not (folder / config).is_file():
            raise UserError(f"{flag} {name}: the pipeline has no {config}.")
    return folder


@cache
def resolution_factor(folder: Path) -> int:
    """Return the factor that a resolution must be a multiple of: the VAE's reduction times the U-Net's."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    vae = AutoencoderKL.load_config(folder, subfolder="vae")
    unet = UNet2DConditionModel.load_config(folder, subfolder="unet")
    return 2 ** (len(vae["block_out_channels"]) - 1 + len(unet["block_out_channels"]) - 1)


def scheduler_config(folder: Path) -> dict[str, Any]:
    """Return the settings of a pipeline's scheduler."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.load_config(folder, subfolder="scheduler")


def _check_weights(folder: Path) -> None:
    """Raise `UserError` for a part of a pipeline without weights, or with damaged ones."""
    from safetensors import safe_open

    files = _weights(folder)
    if not files:
        raise UserError(f"{folder} has no weights (.safetensors or .bin).")
    for path in files:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except Exception as error:  # safetensors has one, and the file system others
                raise UserError(f"{path} is damaged, or not all of it was fetched ({reason(error)}).") from None


def _weights(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))


def variant(folder: Path) -> str | None:
    """Return "fp16" where a part of a pipeline has only such files, else None."""
    files = _weights(folder)
    return "fp16" if files and all(".fp16" in path.name for path in files) else None


def base_sha256(folder: Path) -> str:
    """Return the SHA-256 of the weights of all parts of a pipeline."""
    files = [path for part in ("unet", "vae", "text_encoder") for path in _weights(folder / part)]
    hashes = [_file_sha256(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


@cache
def _file_sha256(path: Path, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def check_targets(folder: Path, targets: tuple[str, ...]) -> None:
    """Raise `UserError` for target modules that match nothing, or layers without weights."""
    if not targets:
        raise UserError("--target-modules is empty: name layers of the U-Net, as to_q to_k to_v to_out.0.")
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))
    linear = {name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear)}
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            raise UserError(f"--target-modules {target}: no linear layer of the U-Net has a name that ends so.")


def unet_folder(folder: Path, dtype: str) -> Path:
    """Return a folder with the U-Net in this dtype, converted once if need be: all processes map the one file."""
    from diffusers import UNet2DConditionModel
    from safetensors import safe_open

    unet = folder / "unet"
    stored = set()
    for path in sorted(unet.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    if stored == {DTYPES[dtype]}:
        return unet

    def make(aside: Path) -> None:
        loaded = UNet2DConditionModel.from_pretrained(unet, torch_dtype=getattr(torch, dtype), variant=variant(unet))
        loaded.save_pretrained(aside)

    stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(unet.iterdir())]
    return kept("converting the U-Net", ["base", str(folder.resolve()), stamp, dtype], make)


def embed(caption: str, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, device: torch.device) -> torch.Tensor:
    """Embed a caption as Stable Diffusion's pipeline does: [tokens, width]."""
    tokens = tokenizer(
        caption, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).to(device)
    mask = tokens.attention_mask if getattr(text_encoder.config, "use_attention_mask", False) else None
    return text_encoder(tokens.input_ids, attention_mask=mask)[0][0].float()
