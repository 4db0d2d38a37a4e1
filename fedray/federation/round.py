"""A communication round on one page (Chen 2024, section 2.4.1), and the loss on held-out examples.

The server sends w to a random subset of the clients, each trains locally and returns v, the server takes the mean
weighted by examples as the new w. The algorithm, the fold and the wire can change each of these steps. The pool decides
where clients run.
"""

import hashlib
import math
import os
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedray.algorithms import Folded, Round, Rows
from fedray.config import Config
from fedray.errors import RunError
from fedray.federation.added import Added
from fedray.federation.blocks import Block, Pace, Queue, TrainBlock, merge_partials, train_block
from fedray.federation.clock import Clock
from fedray.federation.cohort import dropped_of
from fedray.federation.evaluation import Show, silent
from fedray.federation.local import TrainJob, ValidateJob, validate
from fedray.federation.personal import memories
from fedray.federation.plan import Plan
from fedray.federation.pool import Pool, failure, in_order
from fedray.federation.worker import Shared, model, threads
from fedray.menus import FOLDS
from fedray.record.checkpoint import State
from fedray.record.example_spending import ExampleSpending
from fedray.record.run import Row, Run
from fedray.record.spending import Spending
from fedray.vector import as_tensor, sha256_of
from fedray.wire import Payload, counted


@dataclass(frozen=True, eq=False)
class Session:
    """A run in progress: its configuration, plan, pool, directory and progress display."""

    config: Config
    plan: Plan
    pool: Pool
    run: Run
    show: Show = silent
    added: Added = field(default_factory=Added)  # the user's own scores, callbacks and trackers
    pace: Pace = field(default_factory=Pace)
    spending: Spending | None = None  # of privacy, of clients
    examples: ExampleSpending | None = None  # of their examples
    took_part: set[int] = field(default_factory=set)  # clients whose models have counted so far


def run_round(session: Session, state: State) -> Generator[None, None, tuple[State, Row]]:
    """Do one communication round: return the next state, and the round's row. Yields after every block of clients.

    Raises:
        UserError: no client fits into the memory of its GPU.
        RunError: no client returned a usable model.
    """
    config, server, clock = session.config, state.tensors, Clock()
    method, fold, wire = config.method, config.fold, config.links
    round = replace(session.plan.round(config, state.round, server), nonce=os.urandom(16).hex())
    broadcast = method.broadcast(server, round)
    try:
        down = wire.send(broadcast, round)
    except OverflowError as error:
        raise RunError(f"round {round.number + 1}: {error}") from None
    if config.protected:
        round = replace(round, transcript=hashed(round.norm, sha256_of({name: as_tensor(down[name]) for name in down})))
    if session.spending is not None:
        session.spending.check(round)
    dropped = dropped_of(config, round)
    if session.plan.canaries is not None:
        dropped |= session.plan.canaries.absent.intersection(round.cohort)
    asked = [client for client in round.cohort if client not in dropped]
    if method.hides_examples and not config.secure_noise:  # their noise is other where anything is they start from
        run = session.run
        starts = [sha256_of(run.recall(client, run.generation(client, round.number))) for client in round.cohort]
        round = replace(round, transcript=hashed(round.transcript, *starts))
    if session.examples is not None:
        session.examples.begin(round, asked)
    queue, ledger = Queue(round, config.client_retries, dropped), Ledger(round, dropped)
    nodes, _ = session.pool.nodes, session.pool.usage()  # of what was done since the last round
    ledger.bytes_down = counted(down, method.uncounted) + fold.exchanged(round)[0]
    partial = fold.start(round)
    for block in train(session, queue, down, clock):  # in the order of arrival: a fold is a monoid
        with clock.on("fold"):
            partial = fold.merge(partial, block.partial, round)
            for client, memory in block.memories.items():  # counts once the round is complete
                tensors = {name: as_tensor(array) for name, array in memory.items()}
                session.run.remember(client, round.number + 1, tensors)
            ledger.add(block.rows)
        with clock.on("record"):
            yield
    ledger.check(config.least, f"--min-clients {config.least}")
    if fold.least > 1 and (ledger.took_part or not fold.uniform):  # a secure sum of nobody tells nothing
        ledger.check(fold.least, f"the {fold.least} that --fold {FOLDS.form(fold)} needs")
    with threads(config.threads):
        folded, after, found = Folded({}, {}, []), server, Rows()
        if wire.private or ledger.took_part:  # of no client, without noise, the state passes
            folded = fold.result(partial, round)
        survivors = folded.survivors
        round = replace(round, transcript=hashed(round.seed, round.transcript, *survivors))
        spent = {} if session.spending is None else session.spending.release(round)
        if wire.private or survivors:
            kept = wire.learn(folded, round)
            folded = wire.finish(folded, broadcast, round)
            after = method.aggregate(server, folded, round) | kept
            found = method.diagnose(server, after, folded, round)
    if config.malicious is not None:
        found["malicious"] = len(session.plan.malicious.intersection(survivors))
    for client in queue.reopened & ledger.failures.keys():
        forget(session.run, client, round.number)
    row = ledger.row(found, queue.losses + session.pool.losses(), session.pool.usage()) | {"privacy": spent}
    if row["lost"]:
        row["ledger"]["nodes_lost"] = len(nodes - session.pool.nodes)
    row["seconds"] = clock.seconds(session.pool.workers)
    return State(round.number + 1, after), row


def hashed(*what: str | float) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()


def train(session: Session, queue: Queue, down: Payload, clock: Clock) -> Iterator[Block]:
    """Train the cohort, and yield its blocks as they come, until each client was accepted once."""
    config, plan, run, pool, pace = session.config, session.plan, session.run, session.pool, session.pace
    round = queue.round
    # A fold that keeps uploads needs them one by one: merged, they would be as long.
    shared = Shared(down, round, None if config.fold.memory(round) else merge_partials)

    def steps(client: int) -> int:
        return config.steps(len(plan.shards[client]))

    total, before = sum(map(steps, queue.todo)), 0

    def progress(done: int) -> None:
        session.show("training", round.number + min(1, (before + max(0, done)) / max(1, total)), config.rounds)

    def job(client: int) -> TrainJob:
        memory = run.recall(client, run.generation(client, round.number))
        arrays = {name: tensor.numpy() for name, tensor in memory.items()}
        own = plan.shards[client], plan.held_out[client]
        return TrainJob(round.number, client, *own, arrays, client in plan.malicious)

    begun = set[int]()

    def blocks() -> Iterator[TrainBlock]:  # drawn only as fast as they are done: a memory may be as large as two models
        while clients := queue.take(pace, steps, pool.workers):
            if session.examples is not None and (again := begun.intersection(clients)):
                session.examples.begin(round, again)
            begun.update(clients)
            yield TrainBlock(tuple(map(job, clients)))

    progress(0)
    while not queue.empty:
        before = sum(map(steps, queue.accepted))
        for reply in clock.during("clients", pool.map(train_block, shared, blocks(), progress)):
            if reply.row:
                clock.job(reply.row["seconds"], queue.since(reply.job.jobs))
            with clock.on("transfer"):
                block = queue.receive(reply, config.fold.start(round))
            if block is not None:
                pace.learn(block)
                yield block
        if queue.cramped:
            yield queue.after(pool.make_room(), config.fold.start(round))


def forget(run: Run, client: int, rounds: int) -> None:
    """Make a client's memory that of so many rounds again: the next had come, but not the partial that it is about."""
    if run.generation(client, rounds + 1) == rounds + 1:
        run.remember(client, rounds + 1, run.recall(client, run.generation(client, rounds)))


class Ledger:
    """The record of a round: a row for each client of the cohort, and their totals."""

    def __init__(self, round: Round, dropped: frozenset[int]) -> None:
        self.round = round
        self.dropped = dropped  # of the cohort, before they trained
        self.bytes_down = 0  # to each client
        self.rows: dict[int, Row] = {}  # by client; the last, of one that was done again
        self.nodes: dict[int, str] = {}  # by client, where it was done
        self.failures: dict[int, str] = {}  # by client, the trace

    def add(self, rows: list[Row]) -> None:
        """Record the clients of a block."""
        for row in rows:
            client, trace = row["client"], row.pop("trace", "")
            self.nodes[client] = row.pop("node", "")
            row["outcome"] = row.pop("error", "ok")
            row["bytes_down"] = self.bytes_down
            self.rows[client] = row
            self.failures.pop(client, None)
            if row["outcome"] != "ok":
                self.failures[client] = trace

    @property
    def took_part(self) -> int:
        """How many clients did."""
        return len(self.rows) - len(self.failures)

    def check(self, least: int, what: str) -> None:
        """Raise `RunError` where fewer clients than that took part; `UserError` for a mistake of the user's own."""
        took_part = self.took_part
        if took_part >= least:
            return
        number = self.round.number + 1
        if not self.failures:
            cause = f"took part ({len(self.dropped)} dropped out)" if self.dropped else "were drawn"
            raise RunError(f"round {number}: only {took_part} clients {cause}, fewer than {what}.")
        client, trace = min(self.failures.items())
        reason = self.rows[client]["outcome"]
        if took_part == 0:
            raise failure(f"round {number}: no client returned a model. Client {client}: {reason}.", reason, trace)
        raise failure(
            f"round {number}: {took_part} of {len(self.rows)} clients returned a model, fewer than {what}. "
            f"Client {client}: {reason}.", reason, trace,
        )  # fmt: skip

    def row(self, aggregation: Mapping[str, float], losses: list[Row], usage: dict[str, Row]) -> Row:
        """Return the round's row. Means are weighted by examples.

        Args:
            losses: of `Queue`: what was done in vain, to be done again.
            usage: of the pool, by node.
        """
        rows = [self.rows[client] for client in sorted(self.rows)]
        took_part = [row for row in rows if row["outcome"] == "ok"]
        examples, nodes = sum(row["examples"] for row in took_part), {*self.nodes.values(), *usage} - {""}
        return {
            "round": self.round.number + 1,
            "cohort": list(self.round.cohort),
            "dropped": sorted(self.dropped),
            "loss": sum(row["examples"] * row["loss"] for row in took_part) / examples if examples else None,
            "examples": examples,
            "steps": sum(row["steps"] for row in took_part),
            "sequential_steps": max((row["steps"] for row in took_part), default=0),
            "images": sum(row["images"] for row in took_part),
            "bytes_down": sum(row["bytes_down"] for row in rows),
            "bytes_up": sum(row["bytes_up"] for row in took_part),
            "seconds": {},
            "bytes_crossed": sum(there["bytes_to"] + there["bytes_from"] for there in usage.values()),
            "nodes": {node: self._at(node) | usage.get(node, {}) for node in sorted(nodes)},
            "aggregation": dict(aggregation),
            "held_out": {},
            "scores": {},
            "evaluation": {},
            "clients": rows,
            "time": time.time(),
            "lost": losses,
            "ledger": {
                "dropped": len(self.dropped),
                "asked": len(rows),
                "folded": len(took_part),
                "retried": len({client for loss in losses for client in loss["clients"]}),
                "failed": len(self.failures),
                "actors_lost": sum(loss["actor"] for loss in losses),
                "nodes_lost": 0,
                "seconds_lost": math.fsum(
                    [loss["seconds"] for loss in losses] + [row["seconds"] for row in rows if row["outcome"] != "ok"]
                ),
            },
        }

    def _at(self, node: str) -> Row:
        """Sum up the clients of a node."""
        rows = [self.rows[client] for client, there in self.nodes.items() if there == node]
        actors = len({row["actor"] for row in rows})
        return {"actors": actors, "clients": len(rows), "seconds": math.fsum(row["seconds"] for row in rows)}


def validate_round(session: Session, state: State, row: Row) -> Row:
    """Measure held-out losses of a round, means weighted by examples; {} where no client has held any out.

    local: before aggregation, over the cohort, each client's own model on its own examples;  aggregated: of the
    aggregated model on the same, with what each client keeps to itself;  global: of it, over all clients;  spread: its
    standard deviation over clients;  clients: each of them.
    """
    config, held_out = session.config, session.plan.held_out
    began = time.perf_counter()
    sizes = {client: len(held_out[client]) for client in config.trainers if len(held_out[client])}
    if not sizes:
        return {}
    memory = memories(config, session.run, state.round)
    jobs = [ValidateJob(client, held_out[client]) for client in sizes]

    def load(job: ValidateJob) -> ValidateJob:
        return replace(job, memory=memory(job.client))

    losses = {}
    for reply in in_order(session.pool, validate, model(plain(state)), jobs, lambda done: None, load):
        if not reply.ok:
            error = reply.row["error"]
            sentence = f"round {state.round}: {reply.job} could not be measured: {error}."
            raise failure(sentence, error, reply.row["trace"])
        losses[reply.job.client] = reply.row["held_out"]
    local = {client["client"]: client["held_out_local"] for client in row["clients"] if "held_out_local" in client}
    row["seconds"]["validate"] = time.perf_counter() - began

    def mean(values: dict[int, float]) -> float | None:
        return float(np.average(list(values.values()), weights=[sizes[c] for c in values])) if values else None

    spread = float(np.std(list(losses.values())))
    aggregated = {client: losses[client] for client in local}
    return {
        "local": mean(local), "aggregated": mean(aggregated), "global": mean(losses), "spread": spread,
        "clients": losses,
    }  # fmt: skip


def plain(state: State) -> dict[str, Any]:
    """Return the model that clients train, without its moving average."""
    return {name: tensor for name, tensor in state.tensors.items() if name in ("model", "base")}
