"""The audit of uploads: what a server that looks at them learns about each client's own examples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fedray.algorithms.folds import Fold
from fedray.config import Config
from fedray.errors import UserError
from fedray.federation.audit import losses_at
from fedray.federation.evaluation import Show, silent
from fedray.federation.local import TrainJob, client_update
from fedray.federation.plan import Plan
from fedray.federation.pool import Pool, failure, in_order
from fedray.federation.ranks import filled_in
from fedray.federation.worker import Shared, Worker
from fedray.record.run import Row, Run
from fedray.scores.membership import Interval, Rate, area, by_chance, pooled, rates_of
from fedray.seeds import number


@dataclass(frozen=True, eq=False)
class UploadJob:
    """A job to train a client as in a round, and to measure losses with the model that it sends."""

    train: TrainJob
    indices: np.ndarray  # int64, into the dataset

    @property
    def key(self) -> tuple[str | int, ...]:
        return self.train.key

    def __str__(self) -> str:
        return f"the upload of client {self.train.client}"


class Uploads(NamedTuple):
    """Attacks on uploads.

    auc: mean area under the curve over clients, and its 95 % interval;  p: of an area as large by chance;  rates:
    true-positive rates by false-positive rates, of one threshold for all clients;  clients: the area for each;
    p_largest: of the largest of these by chance, times their number (Bonferroni).
    """

    auc: Interval
    p: float
    rates: dict[float, Rate]
    clients: dict[int, float]
    p_largest: float


def ongoing(config: Config) -> Config:
    """Return a run's settings for a round after its last: at the learning rate that its schedule starts from."""
    return replace(config, lr_scheduler="constant", lr_warmup_steps=0)


def masked(config: Config) -> bool:
    """Tell whether the server sees uploads only under masks, which are uniform numbers: nothing can be learned."""
    return type(config.fold).seal is not Fold.seal


def upload_losses(worker: Worker, shared: Shared, job: UploadJob) -> tuple[Row, np.ndarray]:
    """Measure how much higher the loss of each example is with a client's upload than with what it received, [n]."""
    config, client = worker.config, job.train.client
    received = config.links.arrive(shared.arrays, shared.about)
    differs = received if config.links.lossy else None
    _, trained = client_update(worker, shared, job.train)
    seen = filled_in(config.links.decode(trained.payload, shared.about), client, shared.about, differs)["model"].clone()
    if differs is not None:
        seen += received["model"]
    losses = []
    for model in (received["model"], seen):
        worker.load(model, received.get("base"))
        losses.append(losses_at(worker, job.indices))
    return {}, losses[1] - losses[0]


def audit_uploads(
    pool: Pool, config: Config, plan: Plan, run: Run, limits: tuple[int, int], seed: int, show: Show = silent
) -> Uploads:
    """Attack what clients would send in one more round, as the server sees it.

    A client's own examples are told from as many that it held out, by how much its training lowered their losses.

    Args:
        config: the pool's: the run's, of which `ongoing` has made one more round possible.
        limits: how many clients to attack at most, and how many examples of each kind.

    Raises:
        UserError: no client has held out any examples, or no round is complete.
        RunError: an upload could not be made.
    """
    rng, state = np.random.default_rng(number(seed, "audit of uploads")), run.state(plan.layout)
    if state is None:
        raise UserError(f"the run at {run} has no complete round yet.")
    own = {
        client: np.concatenate([plan.held_out[client], plan.test[client]]) for client in range(len(plan.shards))
    }  # fmt: skip
    able = [client for client, unseen in own.items() if len(unseen)]
    if not able:
        raise UserError("no client has held out any images of its own (--test-share): uploads cannot be attacked.")
    chosen = sorted(rng.permutation(able)[: limits[0]].tolist())
    round = plan.round(config, state.round, state.tensors)
    round = replace(
        round, cohort=tuple(chosen), weights={client: max(1, len(plan.shards[client])) for client in chosen}
    )
    down = config.links.send(config.method.broadcast(state.tensors, round), round)
    jobs = []
    for client in chosen:
        memory = run.recall(client, run.generation(client, state.round))
        train = TrainJob(
            round.number, client, plan.shards[client], plan.held_out[client],
            {name: tensor.numpy() for name, tensor in memory.items()},
        )  # fmt: skip
        members = plan.shards[client][plan.shards[client] < len(plan.dataset)]
        size = min(limits[1], len(members), len(own[client]))
        kinds = [rng.permutation(indices)[:size] for indices in (members, own[client])]
        jobs.append(UploadJob(train, np.concatenate(kinds)))
    found: list[np.ndarray] = []  # [2, size] of each client
    shared = Shared(down, round)
    for reply in in_order(pool, upload_losses, shared, jobs, lambda done: show("attacking uploads", done, len(jobs))):
        if not reply.ok:
            error = reply.row["error"]
            raise failure(f"{reply.job} could not be attacked: {error}.", error, reply.row["trace"])
        found.append(reply.fetch().reshape(2, -1))
    return judged(dict(zip(chosen, found, strict=True)), rng)


def judged(found: dict[int, np.ndarray], rng: np.random.Generator) -> Uploads:
    """Judge attacks on clients: of each, how much the losses [2, n] rose, of its own examples and of others."""
    areas = [area(*each)[0] for each in found.values()]
    sizes = np.array([each.shape[1] for each in found.values()])
    auc, p = pooled(np.array(areas), np.stack([sizes, sizes], 1), rng)
    members, others = np.concatenate(list(found.values()), axis=1)
    whose = np.repeat(list(found), sizes)
    largest = min(1.0, len(areas) * by_chance(*found[list(found)[int(np.argmax(areas))]]))
    return Uploads(auc, p, rates_of(members, others, (whose, whose)), dict(zip(found, areas, strict=True)), largest)
