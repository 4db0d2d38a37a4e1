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
def pipeline_folder(name: str, revision: str | None = None, files: str | None = None) -> Path:
    """Find a pipeline's folder by path or hub name (then download it). Raises `UserError` if it is not of the kind.

    Args:
        revision: of the hub's.
        files: the variant of its weights, as fp16.
    """
    flag = "--pretrained-model-name-or-path"
    if not name:
        raise UserError(f"{flag} is not given: name the folder, or the hub name, of a Stable Diffusion pipeline.")
    folder = storage.folder(name, f"{flag} ")
    if not folder.is_dir():
        from diffusers import DiffusionPipeline

        try:
            fetched = DiffusionPipeline.download(name, revision=revision, variant=files, safety_checker=None)
            folder = Path(fetched)
        except Exception as error:  # the hub has dozens
            which = "" if revision is None else f" at --revision {revision}"
            raise UserError(f"{flag} {name}: no such folder, and the hub has none{which} ({reason(error)}).") from None
    elif revision is not None:
        raise UserError(f"--revision {revision}: {name} is a folder, which has no revisions; leave it out.")
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
    if files is not None and not _weights(folder / "unet", files):
        there = ", ".join(path.name for path in _weights(folder / "unet"))
        raise UserError(f"--variant {files}: the U-Net of {name} has only {there}.")
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


def _weights(folder: Path, wanted: str | None = None) -> list[Path]:
    """List the files of a part's weights: all, or those of a variant."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    return files if wanted is None else [path for path in files if f".{wanted}." in path.name]


def variant(folder: Path, wanted: str | None = None) -> str | None:
    """Return the variant of a part's weights to load: the wanted one, if it has it; fp16, if it has only that."""
    if wanted is not None and _weights(folder, wanted):
        return wanted
    files = _weights(folder)
    return "fp16" if files and all(".fp16" in path.name for path in files) else None


def base_sha256(folder: Path, wanted: str | None = None) -> str:
    """Return the SHA-256 of the weights of all parts of a pipeline, of the variant where they have it."""
    parts = [folder / part for part in ("unet", "vae", "text_encoder")]
    files = [path for part in parts for path in _weights(part, wanted) or _weights(part)]
    hashes = [_file_sha256(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def encoders_key(folder: Path, wanted: str | None) -> dict[str, object]:
    """Return what the bits of latents and embeddings depend on, beside images, captions and the device, as JSON.

    These are the contents of the VAE, the text encoder and the tokenizer, and the versions of libraries.
    """
    import diffusers
    import transformers

    files = [path for part in ("vae", "text_encoder", "tokenizer") for path in sorted((folder / part).iterdir())]
    stats = [(path, path.stat()) for path in files if path.is_file()]
    return {
        "files": {
            f"{path.parent.name}/{path.name}": _file_sha256(path, stat.st_size, stat.st_mtime_ns)
            for path, stat in stats
        },
        "variant": wanted,
        "versions": [torch.__version__, diffusers.__version__, transformers.__version__],
    }


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


def unet_folder(folder: Path, dtype: str, wanted: str | None = None) -> tuple[Path, str | None]:
    """Return a folder with the U-Net in this dtype, converted once if need be: all processes map the one file.

    With it, the variant of its files; `wanted` is the variant to take, where there are several.
    """
    from diffusers import UNet2DConditionModel
    from safetensors import safe_open

    unet = folder / "unet"
    files = variant(unet, wanted)
    stored = set()
    for path in (path for path in _weights(unet, files) if path.suffix == ".safetensors"):
        with safe_open(path, framework="pt") as file:
            stored |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    if stored == {DTYPES[dtype]}:
        return unet, files

    def make(aside: Path) -> None:
        loaded = UNet2DConditionModel.from_pretrained(unet, torch_dtype=getattr(torch, dtype), variant=files)
        loaded.save_pretrained(aside)

    stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(unet.iterdir())]
    key = ["base", str(folder.resolve()), stamp, dtype, *([] if wanted is None else [wanted])]
    return kept("converting the U-Net", key, make), None


def embed(caption: str, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, device: torch.device) -> torch.Tensor:
    """Embed a caption as Stable Diffusion's pipeline does: [tokens, width]."""
    tokens = tokenizer(
        caption, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).to(device)
    mask = tokens.attention_mask if getattr(text_encoder.config, "use_attention_mask", False) else None
    return text_encoder(tokens.input_ids, attention_mask=mask)[0][0].float()
