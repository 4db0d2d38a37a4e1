"""The geometric median in place of the mean (Pillutla et al. 2022): the point nearest to all uploads together."""

from dataclasses import dataclass

import torch

from fedray import Collect


@dataclass(frozen=True)
class GeometricMedian(Collect):
    steps: int = 100

    def combine(self, tensors):
        points = torch.stack(tensors).double()
        center = points.mean(0)
        for _ in range(self.steps):  # Weiszfeld 1937
            near = 1 / (points - center).norm(dim=1).clamp(min=1e-9)
            center = near @ points / near.sum()
        return center
