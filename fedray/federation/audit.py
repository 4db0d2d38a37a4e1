"""The audit of a run: what its model tells about the examples that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fedray.errors import UserError
from fedray.federation.cohort import took_part
from fedray.federation.evaluation import Show, silent
from fedray.federation.local import batch_of, precision
from fedray.federation.plan import Plan
from fedray.federation.pool import Pool, failure, in_order
from fedray.federation.worker import Shared, Worker
from fedray.record.run import Row
from fedray.scores.canaries import Leak, leak
from fedray.scores.membership import Membership, attack
from fedray.seeds import generator, number
from fedray.vector import as_tensor

DRAWS = 32  # timesteps and noises, the same for every example
BATCH = 16  # examples of a job


@dataclass(frozen=True, eq=False)
class LossJob:
    """A job to measure the loss of single examples."""

    start: int
    indices: np.ndarray  # int64, into the dataset

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("audit", self.start)

    def __str__(self) -> str:
        return f"the losses of examples from {self.start} on"


def losses_of(worker: Worker, shared: Shared, job: LossJob) -> tuple[Row, np.ndarray]:
    """Measure the loss of each example alone, the mean over `DRAWS` timesteps and noises, float64."""
    tensors = {name: as_tensor(array) for name, array in shared.arrays.items()}
    worker.load(tensors["model"], tensors.get("base"))
    return {}, losses_at(worker, job.indices)


@torch.no_grad()
def losses_at(worker: Worker, indices: np.ndarray) -> np.ndarray:
    """Measure the loss of each example alone with the worker's model as it is, as `losses_of` does."""
    config, learner = worker.config, worker.learner
    learner.prepare(worker.dataset, indices, False)
    losses = []
    for index in indices:
        batch = batch_of(worker.dataset, np.repeat(index, DRAWS))
        with precision(config, worker.device):
            losses.append(learner.loss(batch, generator(config.seed, "audit")).item())
        worker.step()
    return np.array(losses)


def kinds(plan: Plan, rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Return the dataset's images that clients which took part train on, and those that the same clients held out.

    Args:
        rows: of the run's rounds.

    Raises:
        UserError: no client took part, or these held out fewer than two images.
    """
    if not (clients := took_part(rows)):
        raise UserError("there is nothing to audit: no client has taken part in a round yet.")
    trained, others = plan.images_of(clients)
    if len(others) < 2:
        raise UserError("an audit compares images with such that no client trains on: the run needs --test-share.")
    return trained, others


def audit(
    pool: Pool, model: Shared, plan: Plan, rows: list[Row], seed: int, most: int, show: Show = silent
) -> tuple[Membership, Row]:
    """Attack a model by the losses of at most `most` examples of each of `kinds`.

    Returns the attack, and how many examples of each kind it had.

    Raises:
        UserError: as of `kinds`.
        RunError: a loss could not be measured.
    """
    rng = np.random.default_rng(number(seed, "audit"))
    chosen = [rng.permutation(indices)[:most] for indices in kinds(plan, rows)]
    losses = measured(pool, model, np.concatenate(chosen), show)
    members, others = np.split(losses, [len(chosen[0])])
    owner = np.empty(len(plan.dataset), np.int64)
    for part in plan.parts.values():
        own = part.indices < len(plan.dataset)  # no canaries
        owner[part.indices[own]] = np.repeat(np.arange(len(part)), part.sizes)[own]
    found = attack(members, others, (owner[chosen[0]], owner[chosen[1]]))
    return found, {"trained_on": len(members), "not_trained_on": len(others), "draws": DRAWS}


def audit_canaries(pool: Pool, model: Shared, plan: Plan, delta: float, seed: int, show: Show = silent) -> Leak | None:
    """Attack a model by the losses of the run's canaries; None where there are none of one kind.

    Raises:
        RunError: a loss could not be measured.
    """
    if plan.canaries is None or not 0 < plan.canaries.planted.sum() < len(plan.canaries.planted):
        return None
    losses = measured(pool, model, plan.canaries.indices, show)
    return leak(losses, plan.canaries.planted, delta, np.random.default_rng(number(seed, "audit of canaries")))


def measured(pool: Pool, model: Shared, chosen: np.ndarray, show: Show = silent) -> np.ndarray:
    """Measure the loss of each chosen example alone with a model, [n]."""
    jobs = [LossJob(start, chosen[start : start + BATCH]) for start in range(0, len(chosen), BATCH)]
    losses = []
    for reply in in_order(pool, losses_of, model, jobs, lambda done: show("measuring losses", done, len(chosen))):
        if not reply.ok:
            error = reply.row["error"]
            raise failure(f"{reply.job} could not be measured: {error}.", error, reply.row["trace"])
        losses.append(reply.fetch())
    return np.concatenate(losses)
