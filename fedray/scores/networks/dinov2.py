"""Features of DINOv2, on which Fréchet distances agree better with what people see (Stein et al. 2023)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import Dinov2Model

from fedray.errors import UserError, reason
from fedray.scores.networks.network import FeatureNetwork

SIDE = 224  # pixels: what images are resized to, as in the authors' dgm-eval
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


@dataclass(frozen=True)
class DINOv2(FeatureNetwork):
    """A DINOv2 model from a folder, or by its Hugging Face name (facebook/dinov2-large in the literature).

    Its features are the class token after the last layer's normalisation.
    """

    model: str

    def build(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        transformers.utils.logging.disable_progress_bar()
        try:
            model = Dinov2Model.from_pretrained(self.model).eval().to(device)
        except Exception as error:  # transformers and the hub have dozens
            raise UserError(f"--features {self.name}: no DINOv2 model could be loaded ({reason(error)}).") from None
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

        def network(images: Tensor) -> Tensor:
            colour = images.expand(-1, 3, -1, -1).float()
            large = F.interpolate(colour, (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)
            pixels = large.round().clamp(0, 255) / 255  # as an image is resized
            return model((pixels - mean) / std).last_hidden_state[:, 0]

        return network

    @property
    def label(self) -> str:
        return "dinov2"
