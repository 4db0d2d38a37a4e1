"""The plan of a run, worked out without training anything."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedray.algorithms import Round, Rows, Tensors, Upload
from fedray.config import Config
from fedray.data.dataset import Dataset
from fedray.data.partition import Shards, hold_out
from fedray.errors import UserError, reason
from fedray.federation.budget import check_budget, noise_of
from fedray.federation.canaries import Canaries, alone
from fedray.federation.cohort import cohort_of
from fedray.federation.examples import check_examples
from fedray.federation.ranks import filled_in, left_out
from fedray.federation.warm_start import spent_before, warm_start
from fedray.federation.worker import build, shared_part
from fedray.menus import ALGORITHMS, FOLDS
from fedray.privacy import Release, release_of
from fedray.scores import networks
from fedray.seeds import generator
from fedray.vector import Layout, sha256
from fedray.vector.adapters import Adapters
from fedray.wire import Payload, counted, differences
from fedray.wire.privacy import split


@dataclass(frozen=True, eq=False)
class Plan:
    """The data, shards, initial weights and references of a run, before it starts."""

    dataset: Dataset
    shards: Shards  # what clients train on
    held_out: Shards  # what their losses are measured on
    test: Shards
    layout: Layout  # of what clients share
    initial: torch.Tensor  # [d], the weights it starts from
    own: int  # how many weights each client keeps to itself
    only_client: int | None
    fingerprint: dict[str, str]  # of what else the task learns from, and of what it starts from
    features: str | None  # names the network that scores are measured on, and its weights
    adapters: Adapters | None  # what the vector means, where it is not a whole model
    release: Release | None = None  # of a round with noise
    malicious: frozenset[int] = frozenset()  # clients
    canaries: Canaries | None = None
    example_noise: float = 0.0  # σ of clients that hide their examples
    before: dict[str, Any] | None = None  # what was spent of privacy by the run that it starts from

    def check(self, config: Config) -> None:
        """Raise `UserError` where the uploads that a fold keeps do not fit this machine, or data cannot be attacked."""
        need, have = config.fold.memory(self.round(config, 0)), machine_memory()
        if need > have:
            raise UserError(
                f"--fold {FOLDS.form(config.fold)} keeps all uploads of a round: {need / 1e9:,.1f} GB for "
                f"{config.cohort_size} clients, and this machine has {have / 1e9:,.1f} GB; lower --fraction."
            )
        if config.malicious is not None:
            config.malicious.attack.poison(self.dataset)
        if config.method.hides_examples:
            check_examples(config, build(config, torch.device("cpu")))
            check_budget(config, self.example_noise, self.shards.sizes)
        if config.protected:
            check_private(config, self)

    @property
    def data(self) -> dict[str, str]:
        """Hashes that a resumed run must find again: of the images, the partition, and the features of scores."""
        owners = hashlib.sha256()
        for shards in self.parts.values():
            owners.update(shards.offsets.tobytes() + shards.indices.tobytes())
        data = {"images_sha256": self.dataset.sha256, "partition_sha256": owners.hexdigest()}
        data |= self.fingerprint
        return data if self.features is None else data | {"features": self.features}

    @property
    def examples(self) -> Dataset:
        """What clients hold: the dataset, and the canaries after it."""
        return self.dataset if self.canaries is None else self.canaries.planted_in(self.dataset)

    def images_of(self, clients: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the dataset's images that these clients train on, and those that they held out or kept for tests."""
        whose = sorted(clients)
        trained, *unseen = (
            np.concatenate([part.indices[:0], *(part[each] for each in whose)]) for part in self.parts.values()
        )
        return trained[trained < len(self.dataset)], np.concatenate(unseen)  # without canaries

    def round(self, config: Config, number: int, server: Tensors | None = None) -> Round:
        """Return the round of that number, from 0: its cohort, the weight of each client, and the noise.

        Args:
            server: its state, where the norm of updates follows from it; by default that before the first round.
        """
        clients = cohort_of(config, number)
        links = (*config.wire, *(config.wire_down or ()))
        uniform = config.weights == "uniform" or config.fold.uniform or any(link.uniform for link in links)
        weights = {client: 1 if uniform else len(self.shards[client]) for client in clients}
        count = 1 if config.single else config.clients
        norm = config.links.norm(server or {})
        round = Round(
            number, config.seed, tuple(clients), count, weights, self.layout, self.adapters,
            expected=config.drawn.expected(config.clients), norm=norm, secure_noise=config.secure_noise,
            example_noise=self.example_noise,
        )  # fmt: skip
        if self.release is None:
            return round
        longest = norm + 0.5 * config.fold.step(round) * self.layout.size**0.5
        counts = [link.noise_on_count(round) for link in config.wire if link.reports]
        multiplier = split(self.release.multiplier, counts[0]) if counts else self.release.multiplier
        return replace(round, deviation=multiplier * longest, count_noise=counts[0] if counts else 0.0)

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
    others = config.clients - alone(config)
    if others > len(dataset):
        raise UserError(
            f"--clients {config.clients}: there are only {len(dataset)} examples; each client needs at least one."
        )
    whole = config.partition.split(dataset, others, generator(config.seed, "partition"))
    shares = (config.held_out_share, config.test_share)
    shards, held_out, test = hold_out(whole, shares, generator(config.seed, "held out"))
    canaries = Canaries.of(config, len(dataset)) if config.canaries else None
    if canaries is not None:
        shards = canaries.added(shards, trained=True)
        held_out, test = (canaries.added(part, trained=False) for part in (held_out, test))
    learner = build(config, torch.device("cpu"))
    flat, shared = learner.flat, shared_part(config, learner)
    fingerprint: dict[str, str] = getattr(config.task, "fingerprint", lambda dataset: {})(dataset)
    if config.init_from is not None:
        warm_start(learner, Path(config.init_from))
        fingerprint = fingerprint | {"init_sha256": sha256(flat.vector.detach())}
    initial = flat.vector.detach()
    return Plan(
        dataset=dataset,
        shards=shards,
        held_out=held_out,
        test=test,
        layout=flat.layout if shared is None else shared.layout,
        initial=initial.clone() if shared is None else shared.take(initial),
        own=0 if shared is None else flat.layout.size - shared.layout.size,
        only_client=config.only_client,
        fingerprint=fingerprint,
        features=scored,
        malicious=frozenset() if config.malicious is None else config.malicious.draw(config.seed, config.clients),
        adapters=getattr(learner, "adapters", None) if shared is None else None,
        release=release_of(config),
        example_noise=noise_of(config, shards.sizes),
        canaries=canaries,
        before=None if config.init_from is None else spent_before(Path(config.init_from)),
    )


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of the container that it is."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return whole if text == "max" else min(whole, int(text))


def steps_planned(config: Config, plan: Plan) -> list[list[int]]:
    """Return the optimizer steps of each client of each round's cohort."""
    return [
        [config.steps(len(plan.shards[client])) for client in cohort_of(config, number)]
        for number in range(config.rounds)
    ]


class PlannedBytes(NamedTuple):
    """Bytes of a client's messages: down in the first round, down in the last (the most), and up."""

    first: int
    down: int
    up: int


def disk_needed(config: Config, plan: Plan) -> dict[str, int]:
    """Return about how many bytes a run keeps on its disk, by what they are; pictures and rows are not counted."""
    vector = 4 * (plan.layout.size + plan.own)
    state = sum(tensor.nbytes for tensor in config.method.init(plan.initial, plan.layout).values())
    state += config.method.growth(plan.round(config, 0), config.rounds)
    # Until a checkpoint is written, the memories of all rounds since the one before stay.
    clients = 1 if config.only_client is not None else config.clients
    memories = clients + (config.checkpoint_every + 1) * config.cohort_size
    kept = 4 * plan.own + (2 * vector if config.keep_optimizer else 0)  # by Adam
    largest = None
    if plan.adapters is not None and config.only_client is None:
        largest = max(range(config.clients), key=plan.adapters.rank)
    # It is an estimate: a method of the user's own may need a client that trains.
    with suppress(Exception):
        kept += sum(tensor.nbytes for tensor in first_message(config, plan, 0, largest).memory.values())
    evaluations = sum(map(config.evaluates, range(1, config.rounds + 1)))
    image = int(np.prod(plan.dataset.images.shape[1:]))
    return {
        "checkpoints": state * (config.checkpoints_total_limit + 1),
        "clients' memories": kept * memories,
        "samples": config.evaluate_samples * evaluations * image if config.keep_samples else 0,
        "model": vector,
    }


def bytes_planned(config: Config, plan: Plan) -> PlannedBytes:
    """Return the bytes of messages, from a round of one client that trains nothing.

    Where the size of a message depends on what is in it, those of training are others.
    """
    first, method, fold = first_message(config, plan), config.method, config.fold
    round, local, wire = first.round, first.local, config.links
    rows = {"examples": max(1, local.examples), "steps": local.steps} | first.rows
    if not method.hides_examples:
        rows = {"loss": 0.0} | rows
    growth = method.growth(round, max(1, config.rounds - 1))
    few = round.cohort[: fold.least]
    round = replace(round, cohort=few, weights={client: max(1, round.weights[client]) for client in few})
    partial = fold.start(round)
    for client in few:
        arrived = wire.decode(fold.seal(first.plain, round, client), round)
        arrived = filled_in(arrived, local.client, round, first.received if wire.lossy else None)
        weights = {name: round.weight(client, name) for name in arrived}
        partial = fold.add(partial, Upload(client, arrived, weights, rows), round)
    after = method.aggregate(first.server, wire.finish(fold.result(partial, round), first.broadcast, round), round)
    later = wire.send(method.broadcast(after, plan.round(config, 1)), round)
    down, up = fold.exchanged(first.round)
    sizes = [counted(payload, method.uncounted) for payload in (first.payload, later, first.sent)]
    return PlannedBytes(sizes[0] + down, sizes[1] + down - method.growth(round, 1) + growth, sizes[2] + up)


class _Message(NamedTuple):
    """The first round's messages to a client that trains nothing, and from it."""

    round: Round
    server: Tensors
    broadcast: Tensors
    payload: Payload  # down
    received: Tensors
    local: Idle
    rows: Rows
    plain: Payload  # up, before the fold seals it
    sent: Payload  # up
    memory: Tensors  # what the client keeps, but for its optimizer and its own part of the model


def first_message(config: Config, plan: Plan, number: int = 0, client: int | None = None) -> _Message:
    round, fold = plan.round(config, number), config.fold
    if len(round.cohort) < fold.least:  # as Poisson cohorts may be
        round = replace(round, cohort=tuple(range(fold.least)), weights=dict.fromkeys(range(fold.least), 1))
    method, wire = config.method, config.links
    server = method.init(plan.initial, plan.layout)
    broadcast = method.broadcast(server, round)
    payload = wire.send(broadcast, round)
    received, memory = wire.arrive(payload, round), dict[str, torch.Tensor]()
    down = method.receive(received, round)
    local = Idle(config, plan, round, method.start(down, memory), client)
    method.train(local, down, memory)
    tensors, rows, kept = method.upload(local, down, memory)
    if wire.lossy:
        tensors = differences(tensors, received)
    plain, kept_by_links = wire.encode(left_out(tensors, local.client, round), {}, round, local.client)
    sent, kept = fold.seal(plain, round, local.client), {**kept, **kept_by_links}
    return _Message(round, server, broadcast, payload, received, local, rows, plain, sent, kept)


def check_private(config: Config, plan: Plan) -> None:
    """Raise `UserError` for an algorithm that needs more of its clients than noise or a secure sum leaves."""
    try:
        bytes_planned(config, plan)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        who = ALGORITHMS.form(config.algorithm)
        raise UserError(
            f"--algorithm {who} needs more of its clients than noise, or a secure sum, leaves of them: the mean of "
            f"their models ({type(error).__name__}: {reason(error)})."
        ) from error


class Idle:
    """A client that makes no step, as an algorithm sees it."""

    def __init__(
        self, config: Config, plan: Plan, round: Round, start: torch.Tensor, client: int | None = None
    ) -> None:
        self.client = round.cohort[0] if client is None else client
        self.round = round
        self.examples = len(plan.shards[self.client])
        self.steps = self.step = config.steps(self.examples)
        self.weights = start.clone()  # a method that trains by itself changes them in place
        self.total_learning_rate = self.steps * config.learning_rate

    def run(self, correct: Callable[[torch.Tensor], None]) -> None:
        """Make no step."""

    def apart(
        self, start: torch.Tensor, correct: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make no step."""
        return start, torch.zeros(())

    def watch(self, stepped: Callable[[], object]) -> None:
        """There is no step to watch."""

    def protect(self, norm: float, multiplier: float) -> None:
        """There is nothing to protect."""

    def gradient(self) -> torch.Tensor:
        """Return zeros in place of a gradient."""
        return torch.zeros_like(self.weights)
