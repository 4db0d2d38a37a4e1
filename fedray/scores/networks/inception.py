"""Features of the Inception network that FID is measured on: pytorch-fid's blocks and weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_fid import inception
from torch import Tensor, nn
from torchvision.models import inception_v3

from fedray.errors import UserError, reason
from fedray.scores.networks.network import FeatureNetwork

SIDE = 299  # pixels: what images are resized to
CLASSES = 1008
STAGES = {  # of the network, by the dimensions of their features; each goes on from the one before
    64: ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"),
    192: ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
    768: ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    2048: ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
}


@dataclass(frozen=True)
class Inception(FeatureNetwork):
    """pytorch-fid's Inception (that of Heusel et al. 2017): a score on its 2048 features is called FID.

    d: 2048, 768, 192 or 64;  weights: file of its weights; None takes torch's hub cache.
    """

    d: int
    weights: str | None

    takes_weights = True

    def build(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        path = self.path()
        try:
            whole = architecture()
            whole.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        except Exception as error:  # torch has no common error for damaged files
            raise UserError(f"{path} does not hold the weights of pytorch-fid's Inception ({reason(error)}).") from None
        names = [name for d, stage in STAGES.items() if d <= self.d for name in stage]
        layers = nn.Sequential(*(getattr(whole, name) for name in names)).requires_grad_(False).to(device).eval()

        def network(images: Tensor) -> Tensor:
            colour = images.expand(-1, 3, -1, -1)  # a grey image is one with three equal channels
            large = F.interpolate(colour.float() / 255, (SIDE, SIDE), mode="bilinear", align_corners=False)
            return F.adaptive_avg_pool2d(layers(2 * large - 1), 1).flatten(1)

        return network

    def path(self) -> Path:
        """Find the file of the weights. It is never fetched in silence: a run without a network must fail at once.

        Raises:
            UserError: there is no such file.
        """
        name = Path(inception.FID_WEIGHTS_URL).name
        path = Path(self.weights) if self.weights else Path(torch.hub.get_dir()) / "checkpoints" / name
        if path.is_file():
            return path
        if self.weights:
            raise UserError(f"--inception-weights {self.weights}: there is no such file.")
        raise UserError(
            f"Inception's weights are not on this machine: fetch {inception.FID_WEIGHTS_URL} and put it at {path}, or "
            f"name the file with --inception-weights; or choose other --features."
        )

    def content(self, images: np.ndarray) -> bytes:
        return self.path().read_bytes()

    def score_name(self, metric: str) -> str:
        metric = "fid" if metric == "fd" else metric
        return metric if self.name == "inception" else f"{metric}[{self.d}]"


def architecture() -> nn.Module:
    """Build the network of `pytorch_fid.inception.fid_inception_v3`, which would fetch its weights: freshly
    initialised."""
    network = inception_v3(num_classes=CLASSES, aux_logits=False, weights=None, init_weights=False)
    network.Mixed_5b = inception.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = inception.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = inception.FIDInceptionA(288, pool_features=64)
    network.Mixed_6b = inception.FIDInceptionC(768, channels_7x7=128)
    network.Mixed_6c = inception.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6d = inception.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6e = inception.FIDInceptionC(768, channels_7x7=192)
    network.Mixed_7b = inception.FIDInceptionE_1(1280)
    network.Mixed_7c = inception.FIDInceptionE_2(2048)
    return network
