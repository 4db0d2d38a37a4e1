"""Features of the digit classifier that ships with fedray."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedray.errors import UserError
from fedray.scores import digits
from fedray.scores.metrics import Score, share
from fedray.scores.networks.network import FeatureNetwork
from fedray.scores.reference import Reference

LOOKED_AT = 256  # of a dataset's images, those that are checked to be digits
RECOGNISED = 0.75  # least share of them: it recognises 98 % of its own digits, below 50 % of letters, and no photos


class Digits(FeatureNetwork):
    """The classifier of 8×8 digits, which judges nothing but digits."""

    own = ("sure[digits]",)

    def build(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        return partial(_features, digits.classifier(str(device)))

    def check(self, images: np.ndarray) -> None:
        """Raise `UserError` also for images that the classifier does not recognise: its scores would say nothing.

        Names and captions are not asked: what is called "one dog" is no digit, and a digit that the classifier takes
        for none cannot be judged by it either.
        """
        super().check(images)
        network = self.load(torch.device("cpu"))
        chosen = np.unique(np.linspace(0, len(images) - 1, LOOKED_AT).round().astype(int))
        parts = [torch.from_numpy(images[rows]) for rows in np.array_split(chosen, -(-len(chosen) // 16))]
        recognised = torch.cat([digits.sure(network(part)) for part in parts]).float().mean().item()
        if recognised < RECOGNISED:
            raise UserError(
                f"--features digits judges only images of digits, and its classifier recognises {recognised:.0%} of "
                f"these; choose other --features (inception, or your own), or None for no scores."
            )

    def content(self, images: np.ndarray) -> bytes:
        return digits.WEIGHTS.read_bytes()

    def own_scores(self, features: Tensor, reference: Reference, prompts: Sequence[str]) -> dict[str, Score]:
        """Score the share that the classifier is sure of, and that it takes for the digits in their prompts."""
        scores = {self.score_name("sure"): share(digits.sure(features))}
        wanted = [digits.digit_in(prompt) for prompt in prompts]
        if wanted and None not in wanted:
            scores[self.score_name("accuracy")] = share(digits.classes(features) == torch.tensor(wanted))
        return scores


def _features(classifier: digits.DigitClassifier, images: Tensor) -> Tensor:
    """Give features of digits that were enlarged, or are RGB, too: as they were before."""
    if images.shape[-1] % 8:
        raise ValueError("digits are 8×8, or a multiple of it")
    grey = images.float().mean(1, keepdim=True)
    return classifier.features(F.adaptive_avg_pool2d(grey, 8).round())
