"""The jobs of evaluation: images drawn from a model, features, nearest training images. Knows nothing of Ray."""

from dataclasses import dataclass

import numpy as np
import torch

from fedray.federation.worker import Shared, Worker
from fedray.record.run import Row
from fedray.scores.nearest import nearest
from fedray.seeds import generator
from fedray.vector import as_tensor


@dataclass(frozen=True)
class SampleJob:
    """Generate one batch of images, and their features if they are asked for."""

    batch: int
    size: int
    sampler: str
    steps: int
    seed: int
    features: bool
    keep: int  # how many of the images are wanted, beside the features
    prompts: tuple[str, ...] = ()  # what each image of the batch is drawn for, where the task knows prompts

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("sample", self.batch)

    def __str__(self) -> str:
        return f"batch {self.batch} of the samples"


@dataclass(frozen=True)
class FeatureJob:
    """Features of the dataset's images from `start` on."""

    start: int
    stop: int

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("features", self.start)

    def __str__(self) -> str:
        return f"the features of images {self.start} to {self.stop - 1}"


@dataclass(frozen=True, eq=False)
class NearestJob:
    """The nearest training images of some images: given, or by their indices in the dataset."""

    start: int
    images: np.ndarray

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("nearest", self.start)

    def __str__(self) -> str:
        return f"the nearest training images of images from {self.start} on"


def sample_batch(worker: Worker, model: Shared, job: SampleJob) -> tuple[Row, tuple[np.ndarray | None, np.ndarray]]:
    """One batch from the model (a float32 vector): features [size, d], and images uint8 [keep, c, h, w]."""
    tensors = {name: as_tensor(array) for name, array in model.arrays.items()}
    worker.load(tensors["model"], tensors.get("base"))
    if job.prompts:
        worker.learner.prompts = job.prompts  # type: ignore[attr-defined]
    images = worker.learner.sample(job.size, generator(job.seed, *job.key), job.sampler, job.steps)
    found = worker.features(images).numpy() if job.features else None
    worker.step()
    return {}, (found, images[: job.keep].numpy())


def dataset_features(worker: Worker, _: Shared, job: FeatureJob) -> tuple[Row, np.ndarray]:
    """Features [stop − start, d] of images of the dataset."""
    images = torch.from_numpy(worker.dataset.images[job.start : job.stop].copy())
    found = worker.features(images).numpy()
    worker.step()
    return {}, found


def nearest_images(worker: Worker, shared: Shared, job: NearestJob) -> tuple[Row, tuple[np.ndarray, ...]]:
    """Indices of the nearest images trained on, and the distances, of uint8 images (or of those indexed)."""
    dataset = worker.dataset.images
    images = job.images if job.images.ndim > 1 else dataset[job.images]
    found = nearest(images, dataset, shared.arrays["trained"], worker.config.random_flip)
    worker.step()
    return {}, found
