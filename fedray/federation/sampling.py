"""The jobs of evaluation: images sampled from a model, features, nearest training images. Knows nothing of Ray."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedray.config import Config
from fedray.errors import UserError
from fedray.federation.local import load_own
from fedray.federation.worker import Shared, Worker
from fedray.record.run import Row
from fedray.scores.nearest import nearest
from fedray.seeds import generator
from fedray.vector import as_tensor
from fedray.wire import Payload

T = TypeVar("T")


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. The bits of the images depend only on these and on the model."""

    n: int
    """How many images."""
    sampler: str
    """Which diffusers scheduler samples."""
    steps: int
    """Denoising steps per image."""
    batch_size: int
    """Images in a batch."""
    seed: int
    """Seed of the noise that the images start from."""
    prompts: tuple[str, ...] = ()
    """Image i is for prompt i modulo their number; none where the task knows no prompts."""
    labels: tuple[int, ...] = ()
    """Image i is of class i modulo their number; none where the task knows no classes."""
    clients: tuple[int, ...] = ()
    """Whose own models make a batch each in turn; none where the global model makes all."""
    memory: Callable[[int], Payload] = field(default=lambda client: {}, compare=False)
    """Reads what makes the model a client's own."""
    repeats: int = 1
    """Sets of n images, each from other noise; the first is what one set alone would be."""

    @classmethod
    def of(cls, config: Config, n: int, prompts: tuple[str, ...] = ()) -> "Sampling":
        """Sample one set as a run does; of a class-conditional model, all classes in turn."""
        return cls(
            n, config.sampler, config.sampling_steps, config.eval_batch_size, config.evaluate_seed, prompts,
            getattr(config.task, "class_labels", lambda n: ())(n),
        )  # fmt: skip

    def prompts_of(self, start: int, stop: int) -> tuple[str, ...]:
        """Repeat the prompts in turn, for images `start` to `stop`."""
        return _in_turn(self.prompts, start, stop)

    def jobs(self, features: bool, keep: int) -> "Iterator[SampleJob]":
        """Divide the images into batches, set after set.

        Args:
            features: whether features of all images are wanted.
            keep: how many of the images themselves are wanted.
        """
        starts = [(number, start) for number in range(self.repeats) for start in range(0, self.n, self.batch_size)]
        for batch, (number, start) in enumerate(starts):
            stop = min(start + self.batch_size, self.n)
            yield SampleJob(
                batch=batch,
                size=stop - start,
                sampler=self.sampler,
                steps=self.steps,
                seed=self.seed,
                features=features,
                keep=max(0, keep - number * self.n - start),
                prompts=self.prompts_of(start, stop),
                labels=_in_turn(self.labels, start, stop),
                client=self.clients[start // self.batch_size % len(self.clients)] if self.clients else None,
            )

    def load(self, job: "SampleJob") -> "SampleJob":
        """Return a job with what makes the model its client's own."""
        return job if job.client is None else replace(job, memory=self.memory(job.client))


def _in_turn(values: tuple[T, ...], start: int, stop: int) -> tuple[T, ...]:
    return tuple(values[index % len(values)] for index in range(start, stop)) if values else ()


@dataclass(frozen=True)
class SampleJob:
    """A job to generate one batch of images, and their features if those are wanted."""

    batch: int
    size: int
    sampler: str
    steps: int
    seed: int
    features: bool
    keep: int  # how many of the images are wanted, beside the features
    prompts: tuple[str, ...] = ()  # one for each image of the batch, where the task knows prompts
    labels: tuple[int, ...] = ()  # likewise, where it knows classes
    client: int | None = None  # whose own model makes them; None for the global one
    memory: Payload = field(default_factory=dict)  # what makes the model that client's, once it is loaded

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("sample", self.batch)

    def __str__(self) -> str:
        return f"batch {self.batch} of the samples"


@dataclass(frozen=True)
class FeatureJob:
    """A job to compute features of images `start` to `stop` of the dataset."""

    start: int
    stop: int

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("features", self.start)

    def __str__(self) -> str:
        return f"the features of images {self.start} to {self.stop - 1}"


@dataclass(frozen=True, eq=False)
class NearestJob:
    """A job to find the nearest training images of some images, or of some indices into the dataset."""

    start: int
    images: np.ndarray

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("nearest", self.start)

    def __str__(self) -> str:
        return f"the nearest training images of images from {self.start} on"


def sample_batch(worker: Worker, model: Shared, job: SampleJob) -> tuple[Row, tuple[np.ndarray | None, np.ndarray]]:
    """Sample one batch from the model (a float32 vector): features [size, d], and images uint8 [keep, c, h, w]."""
    tensors = {name: as_tensor(array) for name, array in model.arrays.items()}
    load_own(worker, tensors, job.memory)
    # A task that knows none has no such parameter. Prompts beside labels are the names of classes, for scores.
    extra: dict[str, Any] = {"labels": job.labels} if job.labels else {"prompts": job.prompts} if job.prompts else {}
    rng = generator(job.seed, *job.key)
    images = worker.learner.sample(job.size, rng, job.sampler, job.steps, **extra)
    check_sample(images, job.size, worker.config.task.name)
    features = worker.features(images).numpy() if job.features else None
    worker.step()
    return {}, (features, images[: job.keep].numpy())


def check_sample(images: Any, n: int, task_name: str) -> None:
    """Raise `UserError` unless a task's `sample` gave what scores and pictures are made of: uint8 [n, 1 or 3, h, w].

    Args:
        images: what it gave when n images were asked for.
    """
    if isinstance(images, Tensor):
        kind = str(images.dtype).removeprefix("torch.")
        fits = images.ndim == 4 and len(images) == n and images.shape[1] in (1, 3) and min(images.shape[2:]) > 0
        if fits and images.dtype == torch.uint8 and images.device.type == "cpu":
            return
        where = "" if images.device.type == "cpu" else f" on {images.device}"
        gave = f"a {kind} tensor {list(images.shape)}{where}"
    elif hasattr(images, "dtype") and hasattr(images, "shape"):
        gave = f"a {images.dtype} {type(images).__name__} {list(images.shape)}"
    else:
        gave = f"a {type(images).__name__}" + (f" of {len(images)}" if hasattr(images, "__len__") else "")
    raise UserError(
        f"the task {task_name!r}: its learner's sample gave {gave}, and must give a uint8 tensor [{n}, 1 or 3 "
        f"channels, height, width] on the CPU."
    )


def dataset_features(worker: Worker, _: Shared, job: FeatureJob) -> tuple[Row, np.ndarray]:
    """Make features [stop − start, d] of images of the dataset."""
    images = torch.from_numpy(worker.dataset.images[job.start : job.stop].copy())
    features = worker.features(images).numpy()
    worker.step()
    return {}, features


def nearest_images(worker: Worker, shared: Shared, job: NearestJob) -> tuple[Row, tuple[np.ndarray, ...]]:
    """Find the images trained on that are nearest to each of the job's: their indices, and the distances."""
    dataset = worker.dataset.images
    images = job.images if job.images.ndim > 1 else dataset[job.images]
    closest = nearest(images, dataset, shared.arrays["trained"], worker.config.random_flip)
    worker.step()
    return {}, closest
