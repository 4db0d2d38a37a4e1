"""Federated averaging on one page: a round, and the run that repeats it.

Chen 2024, section 2.4.1: the server sends w to a random subset of the clients, each trains locally and returns
v, the server takes the mean weighted by examples as the new w; T rounds. Who computes is the pool's affair.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboardX import SummaryWriter

from fedray import vector
from fedray.algorithms.rules import ServerState, Update
from fedray.config import Config, check_resumable
from fedray.data import partition_picture
from fedray.data.dataset import Dataset
from fedray.errors import RunError
from fedray.federation.evaluation import (
    GRID,
    Comparison,
    Metric,
    Scoring,
    Show,
    evaluate,
    look_for_copies,
    open_reference,
    prompts_of,
    sample,
    silent,
)
from fedray.federation.local import TrainJob, ValidateJob, client_update, validate
from fedray.federation.plan import Plan, cohort_of, make_plan
from fedray.federation.pool import Pool, in_order
from fedray.federation.sampling import Sampling
from fedray.federation.worker import Weights, build
from fedray.record.run import Row, Run, environment
from fedray.scores.nearest import LOOKED_AT
from fedray.scores.reference import Reference
from fedray.seeds import generator
from fedray.vector import as_tensor
from fedray.vector.adapters import WeightedSum

PROMPTS_DRAWN = 10  # of a run's prompts, those that are drawn as it goes
IMAGES_PER_PROMPT = 2


def run_round(
    state: ServerState, config: Config, plan: Plan, pool: Pool, run: Run, show: Show = silent
) -> tuple[ServerState, Row]:
    """One communication round.

    Raises:
        RunError: no client returned a usable model.
    """
    started = time.perf_counter()
    clients = cohort_of(config, state.round)
    try:
        model = Weights(config.codec.encode_model(state.vector), None if state.base is None else state.base.numpy())
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
    total_change = WeightedSum(plan.adapters) if plan.adapters else None
    rng = generator(config.seed, "rule", state.round)
    after = config.rule.step(state, _added_up(updates(), total_change), plan.adapters, rng)
    after = replace(after, round=state.round + 1)
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
        steps = max(1, round(mean["steps"]))
        decay = math.prod(config.ema_decay(state.round * steps + step) for step in range(1, steps + 1))
        after = replace(after, ema=state.ema.lerp(after.vector, 1 - decay))
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
        "aggregation": {} if total_change is None else _aggregation(total_change, state, after),
        "held_out": {},
        "scores": {},
        "evaluation": {},
        "clients": rows,
    }


def _added_up(updates: Iterable[Update], total: WeightedSum | None) -> Iterator[Update]:
    """The updates as they pass; adapters' are added up beside, to see what the rule makes of them."""
    for update in updates:
        if total is not None and update.examples:
            total.add(update.vector, update.examples)
        yield update


def _aggregation(total: WeightedSum, before: ServerState, after: ServerState) -> dict[str, float]:
    """How far the aggregated ΔW is from Σ w_i ΔW_i, relative to it: over layers, the largest and the mean."""
    errors = total.errors(before.base, after.vector, after.base)
    return {"error_max": errors.max().item(), "error_mean": errors.mean().item()}


def validate_round(state: ServerState, row: Row, config: Config, plan: Plan, pool: Pool) -> Row:
    """Held-out losses of a round, means weighted by examples; {} where no client has held any out.

    local: before aggregation, over the cohort, each client's own model on its own examples;  aggregated: of the
    aggregated model on the same;  global: of it, over all clients;  spread: its standard deviation over clients;
    clients: each of them.
    """
    began = time.perf_counter()
    clients = range(config.clients) if config.only_client is None else [config.only_client]
    sizes = {client: len(plan.held_out[client]) for client in clients if len(plan.held_out[client])}
    if not sizes:
        return {}
    jobs = [ValidateJob(client, plan.held_out[client]) for client in sizes]
    losses = {}
    for reply in in_order(pool.map(validate, weights(state.vector, state), jobs, lambda done: None)):
        if not reply.ok:
            failed = RunError(f"round {state.round}: {reply.job} could not be measured: {reply.row['error']}.")
            failed.add_note(reply.row["trace"])
            raise failed
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


def evaluate_round(
    state: ServerState,
    row: Row,
    config: Config,
    plan: Plan,
    pool: Pool,
    run: Run,
    against: Reference | None,
    metrics: Mapping[str, Metric],
    show: Show = silent,
) -> None:
    """Score the model (its average, where there is one) into `row`, and draw its samples.

    After the last round also: the scores' intervals, and whether samples copy what was trained on.
    """
    began, last = time.perf_counter(), state.round == config.rounds
    look = last and len(plan.unseen) > 0
    keep = config.evaluate_samples if config.keep_samples else LOOKED_AT if look else GRID
    sampling = Sampling.of(config, config.evaluate_samples, prompts_of(config, plan.dataset))
    comparison = Comparison(plan.dataset, Scoring.of(config), against, metrics, intervals=last)
    found = evaluate(pool, weights(state.sampled, state), sampling, comparison, keep, show)
    row["scores"], row["evaluation"] = found.scores, found.about
    run.draw("samples", found.images[:GRID], state.round)
    if config.keep_samples:
        run.keep_samples(found.images, state.round)
    if look:
        share, closest, nearest = look_for_copies(pool, found.images, plan.trained, plan.unseen, show)
        row["scores"]["copies"] = share.to_json()
        run.draw_nearest(found.images[closest], plan.dataset.images[nearest], state.round)
    row["seconds"]["evaluate"] = time.perf_counter() - began


def draw_prompts(state: ServerState, config: Config, plan: Plan, pool: Pool, run: Run, show: Show = silent) -> None:
    """Samples for each prompt from the same noise in every round: what training changes (Chen 2024, figures 6, 7)."""
    prompts = prompts_of(config, plan.dataset)[:PROMPTS_DRAWN]
    sampling = replace(Sampling.of(config, len(prompts) * IMAGES_PER_PROMPT, prompts), batch_size=len(prompts))
    _, images = sample(pool, weights(state.sampled, state), sampling, show)
    run.draw_prompts(images, prompts, state.round, final=state.round == config.rounds)


def fit(
    config: Config,
    pool: Pool,
    out: Path,
    show: Show = silent,
    resume: bool = False,
    provenance: dict[str, Any] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    dataset: Dataset | None = None,
) -> Iterator[Row]:
    """The whole run: yields a row per round, and writes the run directory. Continues a run that was stopped.

    `provenance` is what config.json says of versions, machine and command; by default those of this process.
    `metrics` are functions of (samples, the dataset's images), both uint8 [n, c, h, w], that give a number.
    `dataset` is the task's, if it is loaded already.

    Raises:
        UserError: the configuration, the data or the directory does not allow it (nothing is written then).
        RunError: the run cannot go on; what was saved stays, and it can be resumed.
    """
    run = Run(out)
    plan = make_plan(config, dataset)
    if resume:
        check_resumable(Run.open(out).saved["config"], config)
        run.check_data(plan.data)
    else:
        run.check_vacant()
    run.check_disk(config, plan.layout)
    scoring = Scoring.of(config) if config.evaluate_samples else None
    against = open_reference(scoring, plan.dataset, pool, show) if scoring else None
    if not resume:
        frame, picture = partition_picture.make(plan.dataset, plan.parts)
        run.create(config, plan.data, provenance or environment())
        frame.to_csv(run.directory / "partition.csv", index=False)
        picture.savefig(run.directory / "partition.png", dpi=100)
    with run.locked(), SummaryWriter(str(run.directory / "tensorboard"), flush_secs=1) as board:
        state, row = run.state(plan.layout), None
        if state is None:
            state = ServerState(0, plan.initial, plan.initial if config.use_ema else None)
        if resume:
            row = run.recover(state.round)
        if state.round == 0 and prompts_of(config, plan.dataset):
            draw_prompts(state, config, plan, pool, run, show)
        while row is not None or state.round < config.rounds:
            if row is None:
                state, row = run_round(state, config, plan, pool, run, show)
                if plan.held_out.sizes.any() and config.validates(state.round):
                    row["held_out"] = validate_round(state, row, config, plan, pool)
                began = time.perf_counter()
                run.complete(state, row, plan.layout, config.checkpoints_total_limit)
                row["seconds"]["save"] = time.perf_counter() - began
            if config.validates(state.round) and prompts_of(config, plan.dataset):
                draw_prompts(state, config, plan, pool, run, show)
            if config.evaluates(state.round):
                evaluate_round(state, row, config, plan, pool, run, against, metrics or {}, show)
            run.append(row)
            _plot(board, row)
            yield row
            row = None
        if run.result is None:
            _finish(run, state, config, plan)


def weights(vector: torch.Tensor, state: ServerState) -> Weights:
    """A model to measure or to sample from: these weights, on the state's base."""
    return Weights(vector.numpy(), None if state.base is None else state.base.numpy())


def _plot(board: SummaryWriter, row: Row) -> None:
    """A round's numbers, for TensorBoard."""
    held_out = {f"held_out/{name}": value for name, value in row["held_out"].items() if name != "clients"}
    scalars = {"loss": row["loss"], "seconds": row["seconds"]["round"], "bytes": row["bytes_down"] + row["bytes_up"]}
    scores = {name: score["value"] for name, score in row["scores"].items()}
    for name, value in (scalars | held_out | scores).items():
        if value is not None:
            board.add_scalar(name, value, row["round"])


def _finish(run: Run, state: ServerState, config: Config, plan: Plan) -> None:
    """Write the model for diffusers, then the result: when result.json is there, all is there."""
    learner = build(config, torch.device("cpu"))
    learner.flat.vector.detach().copy_(state.sampled)
    if state.base is not None:
        learner.set_base(state.base)  # type: ignore[attr-defined]
    learner.save(run.directory / "model")
    rows = run.rows
    totals: dict[str, Any] = {
        name: sum(row[name] for row in rows)
        for name in ("steps", "sequential_steps", "images", "bytes_down", "bytes_up")
    }
    everything = state.vector if state.base is None else torch.cat([state.vector, state.base])
    result: Row = {
        "vector_sha256": vector.sha256(everything),
        "rounds": state.round,
        "loss": rows[-1]["loss"],
        "scores": rows[-1]["scores"],
        "evaluation": rows[-1]["evaluation"],
        "held_out": rows[-1]["held_out"],
        **totals,
        "examples": len(plan.dataset),
        "passes": totals["images"] / len(plan.dataset),
        "seconds": math.fsum(
            sum(row["seconds"].get(k, 0) for k in ("round", "validate", "save", "evaluate")) for row in rows
        ),
    }
    run.write_card(config, result)
    run.finish(result)
