"""Federated averaging on one page: a round, and the run that repeats it.

Chen 2024, section 2.4.1: the server sends w to a random subset of the clients, each trains locally and returns
v, the server takes the mean weighted by examples as the new w; T rounds. Who computes is the pool's affair.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboardX import SummaryWriter

from fedray import cohort, partition_report, vector
from fedray.choices import RunError, UserError
from fedray.client import (
    Row,
    SampleJob,
    TrainJob,
    ValidateJob,
    build,
    client_update,
    sample_batch,
    threads,
    validate,
)
from fedray.config import Config, check_resumable
from fedray.data import Dataset
from fedray.partition import Shards, hold_out
from fedray.pools import Pool, Reply, in_order
from fedray.record import Run, environment
from fedray.rules import ServerState, Update
from fedray.scores import digits
from fedray.seeds import generator
from fedray.vector import Layout, as_tensor

Show = Callable[[str, float, float], None]  # phase, how much of it is done, of how much


def silent(phase: str, done: float, total: float) -> None:
    """Show nothing."""


def run_round(
    state: ServerState, config: Config, plan: "Plan", pool: Pool, run: Run, show: Show = silent
) -> tuple[ServerState, Row]:
    """One communication round.

    Raises:
        RunError: no client returned a usable model.
    """
    started = time.perf_counter()
    clients = _cohort(config, state.round)
    try:
        model = config.codec.encode_model(state.vector)
    except OverflowError as error:
        raise RunError(f"round {state.round + 1}: {error}") from None
    rows: list[Row] = []
    failures: list[tuple[int, str, str]] = []  # client, reason, trace
    folding = 0.0

    def jobs() -> Iterator[TrainJob]:  # drawn only as fast as they are done: a memory is as large as two models
        for client in clients:
            memory = run.recall(client) if config.keep_optimizer else None
            yield TrainJob(state.round, client, plan.shards[client], plan.held_out[client], memory, step_ema)

    step_ema = state.ema.numpy() if state.ema is not None and config.single else None
    total = sum(config.steps(len(plan.shards[client])) for client in clients)

    def progress(done: int) -> None:
        show("training", state.round + done / total, config.rounds)

    def updates() -> Iterator[Update]:  # in cohort order, so that float sums are reproducible
        nonlocal folding, step_ema
        for reply in in_order(pool.map(client_update, model, jobs(), progress)):
            client = reply.job.client
            row = {"client": client, "examples": len(reply.job.indices), "bytes_down": model.nbytes, **reply.row}
            rows.append(row)
            row["outcome"] = row.pop("error", "ok")
            if not reply.ok:
                failures.append((client, row["outcome"], row.pop("trace")))
                continue
            began = time.perf_counter()
            trained = reply.fetch()
            if trained.memory is not None:
                run.remember(client, state.round + 1, trained.memory)
            step_ema = trained.ema
            yield Update(client, config.codec.decode_update(trained.payload, state.vector), row["examples"])
            folding += time.perf_counter() - began

    progress(0)
    after = replace(config.rule.step(state, updates()), round=state.round + 1)
    if len(failures) == len(clients):
        client, reason, trace = failures[0]
        failed = RunError(f"round {state.round + 1}: no client returned a model. Client {client}: {reason}.")
        failed.add_note(trace)
        raise failed

    took_part = [row for row in rows if row["outcome"] == "ok"]
    examples = sum(row["examples"] for row in took_part)
    mean = {name: sum(row["examples"] * row[name] for row in took_part) / examples for name in ("loss", "steps")}
    if step_ema is not None:
        after = replace(after, ema=as_tensor(step_ema).clone())
    elif state.ema is not None:
        after = replace(after, ema=state.ema.lerp(after.vector, 1 - config.ema_decay ** mean["steps"]))
    return after, {
        "round": after.round,
        "cohort": clients,
        "loss": mean["loss"],
        "examples": examples,
        "steps": sum(row["steps"] for row in took_part),
        "sequential_steps": max(row["steps"] for row in took_part),
        "images": sum(row["images"] for row in took_part),
        "bytes_down": sum(row["bytes_down"] for row in rows),
        "bytes_up": sum(row["bytes_up"] for row in took_part),
        "seconds": {"fold": folding, "round": time.perf_counter() - started},
        "held_out": {},
        "scores": {},
        "clients": rows,
    }


def validate_round(state: ServerState, row: Row, config: Config, plan: "Plan", pool: Pool) -> Row:
    """Held-out losses of a round: of what the cohort trained, before aggregation, and of the aggregated model.

    local: mean over the cohort, each client's own model on its own examples, weighted by them;  global: mean over
    all clients of the aggregated model;  spread: standard deviation of that over clients;  clients: each of them.
    """
    began = time.perf_counter()
    clients = range(config.clients) if config.only_client is None else [config.only_client]
    sizes = {client: len(plan.held_out[client]) for client in clients if len(plan.held_out[client])}
    jobs = [ValidateJob(client, plan.held_out[client]) for client in sizes]
    losses = {}
    for reply in in_order(pool.map(validate, state.vector.numpy(), jobs, lambda done: None)):
        if not reply.ok:
            raise _failed(f"round {state.round}: {reply.job} could not be measured: {reply.row['error']}.", reply)
        losses[reply.job.client] = reply.row["held_out"]
    local = {client["client"]: client["held_out_local"] for client in row["clients"] if "held_out_local" in client}
    row["seconds"]["validate"] = time.perf_counter() - began

    def mean(values: dict[int, float]) -> float | None:
        return float(np.average(list(values.values()), weights=[sizes[c] for c in values])) if values else None

    spread = float(np.std(list(losses.values())))
    return {"local": mean(local), "global": mean(losses), "spread": spread, "clients": losses}


def _failed(message: str, reply: Reply) -> RunError:
    error = RunError(message)
    error.add_note(reply.row["trace"])
    return error


def fit(
    config: Config,
    pool: Pool,
    out: Path,
    show: Show = silent,
    resume: bool = False,
    provenance: dict[str, Any] | None = None,
) -> Iterator[Row]:
    """The whole run: yields a row per round, and writes the run directory. Continues a run that was stopped.

    `provenance` is what config.json says of versions, machine and command; by default those of this process.

    Raises:
        UserError: the configuration, the data or the directory does not allow it (nothing is written then).
        RunError: the run cannot go on; what was saved stays, and it can be resumed.
    """
    run = Run(out)
    plan = make_plan(config)
    if resume:
        check_resumable(Run.open(out).saved["config"], config)
    else:
        run.check_vacant()
    run.check_disk(config, plan.layout)
    if not resume:
        run.create(config, provenance or environment())
        partition_report.write(run.directory, plan.dataset, plan.parts)
    with run.locked(), SummaryWriter(str(run.directory / "tensorboard")) as board:
        state, row = run.state(plan.layout), None
        if state is None:
            state = ServerState(0, plan.initial, plan.initial if config.use_ema else None)
        if resume:
            row = run.recover(state.round)
        while row is not None or state.round < config.rounds:
            if row is None:
                state, row = run_round(state, config, plan, pool, run, show)
                last = state.round == config.rounds
                if plan.held_out.sizes.any() and (last or state.round % config.validation_rounds == 0):
                    row["held_out"] = validate_round(state, row, config, plan, pool)
                began = time.perf_counter()
                run.complete(state, row, plan.layout, config.checkpoints_total_limit)
                row["seconds"]["save"] = time.perf_counter() - began
            if state.round == config.rounds and config.evaluate_samples:
                images, row["scores"], row["seconds"]["evaluate"] = evaluate(state, config, pool, show)
                run.draw(images, state.round)
            run.append(row)
            _plot(board, row)
            yield row
            row = None
        if run.result is None:
            _finish(run, state, config, plan)


def evaluate(
    state: ServerState, config: Config, pool: Pool, show: Show = silent
) -> tuple[np.ndarray, dict[str, float], float]:
    """Samples of the model (its average, where there is one), their scores, and the seconds it took."""
    began = time.perf_counter()
    model = state.vector if state.ema is None else state.ema
    images = sample(pool, model, config.evaluate_samples, config, config.seed, show)
    return images, score(images, config), time.perf_counter() - began


def sample(pool: Pool, model: torch.Tensor, n: int, config: Config, seed: int, show: Show = silent) -> np.ndarray:
    """n images, uint8 [n, channels, height, width], from the vector `model`; the same whatever the pool.

    Raises:
        RunError: a batch could not be generated.
    """
    sizes = [min(config.eval_batch_size, n - start) for start in range(0, n, config.eval_batch_size)]
    jobs = [SampleJob(batch, size, config.sampler, config.sampling_steps, seed) for batch, size in enumerate(sizes)]
    images = []

    def progress(done: int) -> None:
        show("sampling", done, len(jobs))

    show("sampling", 0, len(jobs))
    for reply in in_order(pool.map(sample_batch, model.numpy(), jobs, progress)):
        if not reply.ok:
            raise _failed(f"sampling failed: {reply.row['error']}.", reply)
        images.append(reply.fetch())
    return np.concatenate(images)


def score(images: np.ndarray, config: Config) -> dict[str, float]:
    """Scores of generated images on the features that the configuration names."""
    if config.features is None:
        return {}
    with threads(1):
        return digits.score(torch.from_numpy(images))


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

    @property
    def parts(self) -> dict[str, Shards]:
        return {"train": self.shards, "held out": self.held_out, "test": self.test}


def make_plan(config: Config) -> Plan:
    """Work out a run without training anything.

    Raises:
        UserError: the configuration is wrong, or does not fit the data.
    """
    config.check()
    dataset = config.task.dataset()
    if config.clients > len(dataset):
        raise UserError(
            f"--clients {config.clients}: there are only {len(dataset)} examples; each client needs at least one."
        )
    whole = config.partition.split(dataset, config.clients, generator(config.seed, "partition"))
    shares = (config.held_out_share, config.test_share)
    shards, held_out, test = hold_out(whole, shares, generator(config.seed, "held out"))
    flat = build(config, torch.device("cpu")).flat
    return Plan(
        dataset=dataset,
        shards=shards,
        held_out=held_out,
        test=test,
        layout=flat.layout,
        initial=flat.vector.detach().clone(),
        payload=config.codec.encode_model(flat.vector.detach()).nbytes,
    )


def steps_planned(config: Config, plan: Plan) -> list[list[int]]:
    """Optimizer steps of each client of each round's cohort."""
    return [
        [config.steps(len(plan.shards[client])) for client in _cohort(config, number)]
        for number in range(config.rounds)
    ]


def _cohort(config: Config, number: int) -> list[int]:
    if config.only_client is not None:
        return [config.only_client]
    return cohort.choose(config.clients, config.fraction, generator(config.seed, "cohort", number))


def _plot(board: SummaryWriter, row: Row) -> None:
    """A round's numbers, for TensorBoard."""
    held_out = {f"held_out/{name}": value for name, value in row["held_out"].items() if name != "clients"}
    scalars = {"loss": row["loss"], "seconds": row["seconds"]["round"], "bytes": row["bytes_down"] + row["bytes_up"]}
    for name, value in (scalars | held_out | row["scores"]).items():
        if value is not None:
            board.add_scalar(name, value, row["round"])


def _finish(run: Run, state: ServerState, config: Config, plan: Plan) -> None:
    """Write the model for diffusers, then the result: when result.json is there, all is there."""
    learner = build(config, torch.device("cpu"))
    learner.flat.vector.detach().copy_(state.vector if state.ema is None else state.ema)
    learner.save(run.directory / "model")
    rows = run.rows
    totals: dict[str, Any] = {
        name: sum(row[name] for row in rows)
        for name in ("steps", "sequential_steps", "images", "bytes_down", "bytes_up")
    }
    run.finish(
        {
            "vector_sha256": vector.sha256(state.vector),
            "rounds": state.round,
            "loss": rows[-1]["loss"],
            "scores": rows[-1]["scores"],
            "held_out": rows[-1]["held_out"],
            **totals,
            "passes": totals["images"] / len(plan.dataset),
            "seconds": math.fsum(
                sum(row["seconds"].get(k, 0) for k in ("round", "validate", "save", "evaluate")) for row in rows
            ),
        }
    )
