"""What a run is going to do, worked out without training anything."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from fedray.config import Config
from fedray.data.dataset import Dataset
from fedray.data.partition import Shards, hold_out
from fedray.errors import UserError
from fedray.federation import cohort
from fedray.federation.worker import build
from fedray.scores import networks
from fedray.seeds import generator
from fedray.tasks.lora import LoRA
from fedray.vector import Layout
from fedray.vector.adapters import Adapters


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run is going to do."""

    dataset: Dataset
    shards: Shards  # what clients train on
    held_out: Shards  # what their losses are measured on
    test: Shards
    layout: Layout
    initial: torch.Tensor  # [d], the weights it starts from
    payload: int  # bytes per client and direction
    only_client: int | None
    fingerprint: dict[str, str]  # of what else the task learns from
    features: str | None  # names the network that scores are measured on, and its weights
    adapters: Adapters | None  # what the vector means, where it is not a whole model

    @property
    def data(self) -> dict[str, str]:
        """What a resumed run must find again: the images, who holds which, and what they are compared by."""
        owners = hashlib.sha256()
        for shards in self.parts.values():
            owners.update(shards.offsets.tobytes() + shards.indices.tobytes())
        data = {"images_sha256": self.dataset.sha256, "partition_sha256": owners.hexdigest()}
        data |= self.fingerprint
        return data if self.features is None else data | {"features": self.features}

    @property
    def trained(self) -> np.ndarray:
        """The dataset's images that are trained on."""
        return self.shards.indices if self.only_client is None else self.shards[self.only_client]

    @property
    def unseen(self) -> np.ndarray:
        """The dataset's images that no client trains on: held out, or kept for tests."""
        return np.concatenate([self.held_out.indices, self.test.indices])

    @property
    def parts(self) -> dict[str, Shards]:
        return {"train": self.shards, "held out": self.held_out, "test": self.test}


def make_plan(config: Config, dataset: Dataset | None = None) -> Plan:
    """Work out a run without training anything, from its task's dataset, if that is loaded already.

    Raises:
        UserError: the configuration is wrong, or does not fit the data.
    """
    config.check()
    dataset = config.task.dataset() if dataset is None else dataset
    scored = None
    if config.evaluate_samples and config.features is not None:
        networks.check(config.features, config.inception_weights, dataset.images)
        scored = networks.key(config.features, config.inception_weights, dataset.images)
    if config.clients > len(dataset):
        raise UserError(
            f"--clients {config.clients}: there are only {len(dataset)} examples; each client needs at least one."
        )
    whole = config.partition.split(dataset, config.clients, generator(config.seed, "partition"))
    shares = (config.held_out_share, config.test_share)
    shards, held_out, test = hold_out(whole, shares, generator(config.seed, "held out"))
    learner = build(config, torch.device("cpu"))
    flat = learner.flat
    return Plan(
        dataset=dataset,
        shards=shards,
        held_out=held_out,
        test=test,
        layout=flat.layout,
        initial=flat.vector.detach().clone(),
        payload=config.codec.encode_model(flat.vector.detach()).nbytes,
        only_client=config.only_client,
        fingerprint=config.task.fingerprint(dataset) if isinstance(config.task, LoRA) else {},
        features=scored,
        adapters=getattr(learner, "adapters", None),
    )


def steps_planned(config: Config, plan: Plan) -> list[list[int]]:
    """Optimizer steps of each client of each round's cohort."""
    return [
        [config.steps(len(plan.shards[client])) for client in cohort_of(config, number)]
        for number in range(config.rounds)
    ]


def cohort_of(config: Config, number: int) -> list[int]:
    if config.only_client is not None:
        return [config.only_client]
    return cohort.choose(config.clients, config.cohort_size, generator(config.seed, "cohort", number))
