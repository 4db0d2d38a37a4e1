"""Feature networks: what images are compared by. A network maps uint8 [n, c, h, w] to float32 [n, d].

digits                          the classifier of 8×8 digits that ships with fedray, d = 64
inception, inception-768 …      pytorch-fid's Inception, d = 2048, 768, 192 or 64
clip:FOLDER                     a CLIP model in Hugging Face's form, d = its projection's width
FILE.pt                         a TorchScript module
MODULE:FUNCTION, FILE.py:FUNCTION   a Python function
"""

import hashlib
import importlib
import importlib.util
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from pytorch_fid import inception
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from fedray.errors import UserError, check_name, reason
from fedray.scores import digits

Network = Callable[[Tensor], Tensor]  # uint8 [n, c, h, w] to [n, d]

INCEPTION = {"inception": 2048, "inception-768": 768, "inception-192": 192, "inception-64": 64}
NAMES = ("digits", *INCEPTION)
PATCHING = threading.Lock()
CLIP = "clip:"


def load(name: str, weights: str | None, device: torch.device) -> Network:
    """The feature network of that name, on a device.

    Args:
        weights: file of Inception's weights; None takes torch's hub cache.

    Raises:
        UserError: there is none of that name, or its weights are absent or damaged.
    """
    network: Network
    if name == "digits":
        network = partial(_digits, digits.classifier(str(device)))
    elif name in INCEPTION:
        network = _inception(INCEPTION[name], _weights(weights), device)
    elif name.startswith(CLIP):
        network = _Clip(name, device).images
    elif _is_file(name):
        network = _torchscript(Path(name), device)
    else:
        network = _function(name)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        found = torch.as_tensor(network(images.to(device)))
        if found.ndim != 2 or len(found) != len(images):
            shape = list(found.shape)
            raise ValueError(f"it made features {shape} of {len(images)} images, not [{len(images)}, d]")
        return found.float().cpu()

    return features


def check(name: str, weights: str | None, images: np.ndarray) -> None:
    """Raise `UserError` if the network cannot be loaded, or makes no features of images uint8 [n, c, h, w]."""
    if weights is not None and name not in INCEPTION:
        raise UserError(f"--inception-weights is given, but the features are {name} (--features inception).")
    network = load(name, weights, torch.device("cpu"))
    try:
        network(_first(images))
    except Exception as error:  # it may be anybody's
        shape = "×".join(map(str, images.shape[1:]))
        raise UserError(f"--features {name} cannot take images of {shape}: {reason(error)}.") from None


def absolute(name: str) -> str:
    """The name, with the path in it, if there is one, made absolute: actors have other working directories."""
    if name.startswith(CLIP):
        folder = Path(name.removeprefix(CLIP))
        return f"{CLIP}{folder.absolute()}" if folder.is_dir() else name
    file, colon, function = name.partition(":")
    return str(Path(file).absolute()) + colon + function if file.endswith((".py", ".pt", ".pth", ".ts")) else name


def key(name: str, weights: str | None, images: np.ndarray) -> str:
    """Names the network and its weights: features with the same key can be compared.

    Of somebody else's network, by what it makes of the first two of `images`: its weights may lie anywhere.
    """
    if name == "digits":
        content = digits.WEIGHTS.read_bytes()
    elif name in INCEPTION:
        content = _weights(weights).read_bytes()
    else:
        content = load(name, weights, torch.device("cpu"))(_first(images)).numpy().tobytes()
    return f"{name} {hashlib.sha256(content).hexdigest()}"


def _first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images[:2].copy())


def named(metric: str, name: str) -> str:
    """The full name of a score, which says its features: fid, fid[64], fd[digits], kid, kid[digits] …"""
    if name in INCEPTION:
        metric = "fid" if metric == "fd" else metric
        return metric if name == "inception" else f"{metric}[{INCEPTION[name]}]"
    if name.startswith(CLIP):
        return f"{metric}[clip]"
    return f"{metric}[{Path(name.rpartition(':')[2]).stem}]"


def _is_file(name: str) -> bool:
    return name.endswith((".pt", ".pth", ".ts"))


def clip_texts(name: str, prompts: Sequence[str]) -> Tensor:
    """The features [n, d] of texts, by the CLIP model that is the feature network."""
    return _Clip(name, torch.device("cpu")).texts(prompts)


class _Clip:
    """A CLIP model (Radford et al. 2021) from a folder, or by its Hugging Face name."""

    def __init__(self, name: str, device: torch.device) -> None:
        folder, self.device = name.removeprefix(CLIP), device
        transformers.utils.logging.disable_progress_bar()
        try:
            self.model = CLIPModel.from_pretrained(folder).eval().to(device)
            self.processor = CLIPImageProcessor.from_pretrained(folder)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        except Exception as error:  # transformers and the hub have dozens
            raise UserError(f"--features {name}: no CLIP model could be loaded ({reason(error)}).") from None

    def images(self, images: Tensor) -> Tensor:
        colour = images.expand(-1, 3, -1, -1).cpu()
        pixels = self.processor(images=list(colour.numpy()), return_tensors="pt", input_data_format="channels_first")
        return _pooled(self.model.get_image_features(pixel_values=pixels["pixel_values"].to(self.device)))

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        return _pooled(self.model.get_text_features(**tokens))


def _pooled(output: Any) -> Tensor:
    """Features as a tensor: newer versions of transformers wrap them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _digits(classifier: digits.DigitClassifier, images: Tensor) -> Tensor:
    """Of digits that were enlarged, or are RGB, too: as they were before."""
    if images.shape[-1] % 8:
        raise ValueError("digits are 8×8, or a multiple of it")
    grey = images.float().mean(1, keepdim=True)
    return classifier.features(F.adaptive_avg_pool2d(grey, 8).round())


def _weights(given: str | None) -> Path:
    """Inception's weights. Never fetched in silence: a run without a network must fail at once, and clearly."""
    name = Path(inception.FID_WEIGHTS_URL).name
    path = Path(given) if given else Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    if given:
        raise UserError(f"--inception-weights {given}: there is no such file.")
    raise UserError(
        f"Inception's weights are not on this machine: fetch {inception.FID_WEIGHTS_URL} and put it at {path}, or name "
        f"the file with --inception-weights; or choose other --features."
    )


def _inception(d: int, path: Path, device: torch.device) -> Network:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        # pytorch-fid takes its weights from the hub; here the file that was found, or named, stands for it.
        # One at a time: threads that patch and restore over each other would leave the patch in place.
        with PATCHING, mock.patch.object(inception, "load_state_dict_from_url", return_value=state):
            block = inception.InceptionV3.BLOCK_INDEX_BY_DIM[d]
            model = inception.InceptionV3([block]).to(device).eval()
    except Exception as error:  # torch has no common error for damaged files
        raise UserError(f"{path} does not hold the weights of pytorch-fid's Inception ({reason(error)}).") from None

    def network(images: Tensor) -> Tensor:
        colour = images.expand(-1, 3, -1, -1)  # a grey image is one with three equal channels
        return F.adaptive_avg_pool2d(model(colour.float() / 255)[0], 1).flatten(1)

    return network


def _torchscript(path: Path, device: torch.device) -> Network:
    try:
        return torch.jit.load(path, map_location=device).eval()
    except Exception as error:
        raise UserError(f"--features {path}: no TorchScript module could be loaded ({reason(error)}).") from None


def _function(name: str) -> Network:
    """A Python function by name."""
    home, colon, function = name.rpartition(":")
    if not colon:
        check_name("feature network", name, NAMES)
    try:
        if home.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(home).stem, home)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(home)
        return getattr(module, function)
    except Exception as error:  # it is anybody's code
        raise UserError(f"--features {name}: {reason(error)}.") from None
