"""Features of CLIP models, in whose space images and texts can be compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from fedray.errors import UserError, reason
from fedray.scores.cmmd import cmmd
from fedray.scores.metrics import Score
from fedray.scores.networks.network import FeatureNetwork
from fedray.scores.reference import DRAWN, Reference


@dataclass(frozen=True)
class Clip(FeatureNetwork):
    """A CLIP model (Radford et al. 2021) from a folder, or by its Hugging Face name."""

    model: str

    own = ("clip-image", "cmmd")

    def build(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        return _Model(self, device).images

    @property
    def label(self) -> str:
        return "clip"

    def own_scores(self, features: Tensor, reference: Reference, prompts: Sequence[str]) -> dict[str, Score]:
        """Score mean cosines, to all real images and to their prompts (Ruiz et al. 2023, section 5.2), and CMMD.

        CMMD is of at most 10,000 images on each side. Published values are on openai/clip-vit-large-patch14-336.
        """
        unit, n = F.normalize(features), len(features)
        scores = {"clip-image": Score((unit @ F.normalize(reference.drawn).T).mean().item(), n)}
        few = features[:DRAWN]
        against = f"{len(few):,} images against {len(reference.drawn):,} real ones, features of {self.model}"
        scores["cmmd"] = Score(cmmd(few, reference.drawn), len(few), note=against)
        if prompts:
            different = list(dict.fromkeys(prompts))
            texts = F.normalize(_Model(self, torch.device("cpu")).texts(different))
            alike = (unit * texts[[different.index(prompt) for prompt in prompts]]).sum(1)
            scores["clip-text"] = Score(alike.mean().item(), n, alike.std().item() / n**0.5, f"{n} images")
        return scores


class _Model:
    """A CLIP model on a device, with what prepares images and texts for it."""

    def __init__(self, network: Clip, device: torch.device) -> None:
        self.device = device
        transformers.utils.logging.disable_progress_bar()
        try:
            self.model = CLIPModel.from_pretrained(network.model).eval().to(device)
            self.processor = CLIPImageProcessor.from_pretrained(network.model)
            self.tokenizer = CLIPTokenizer.from_pretrained(network.model)
        except Exception as error:  # transformers and the hub have dozens
            raise UserError(f"--features {network.name}: no CLIP model could be loaded ({reason(error)}).") from None

    def images(self, images: Tensor) -> Tensor:
        """Embed images, uint8 [n, c, h, w], as [n, d]."""
        colour = images.expand(-1, 3, -1, -1).cpu()
        pixels = self.processor(images=list(colour.numpy()), return_tensors="pt", input_data_format="channels_first")
        return _pooled(self.model.get_image_features(pixel_values=pixels["pixel_values"].to(self.device)))

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embed n texts as [n, d]."""
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        return _pooled(self.model.get_text_features(**tokens))


def _pooled(output: Any) -> Tensor:
    """Take the features out of what newer versions of transformers wrap them in."""
    return output if isinstance(output, Tensor) else output.pooler_output
