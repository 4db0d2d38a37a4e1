"""A whole run: rounds, checkpoints, samples and scores in sequence, until all rounds are complete."""

import math
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedray import vector
from fedray.config import Config
from fedray.data.dataset import Dataset
from fedray.errors import RunError, reason
from fedray.federation.budget import example_spending
from fedray.federation.callbacks import Callbacks
from fedray.federation.cohort import took_part
from fedray.federation.evaluation import (
    GRID,
    Comparison,
    Scoring,
    evaluate,
    look_for_copies,
    open_reference,
    prompts_of,
    sample,
    scored,
)
from fedray.federation.personal import by_clients
from fedray.federation.plan import Plan, disk_needed, make_plan
from fedray.federation.pool import failure
from fedray.federation.round import Session, run_round, validate_round
from fedray.federation.sampling import Sampling
from fedray.federation.worker import Worker, model, sampled
from fedray.files import durably, remove, write
from fedray.forms import check_loaded
from fedray.record import pictures
from fedray.record.card import model_card
from fedray.record.checkpoint import State
from fedray.record.following import stoppable
from fedray.record.logs import logged
from fedray.record.resume import check_resumable
from fedray.record.run import Row, Run
from fedray.record.saver import Saver
from fedray.record.spending import Spending
from fedray.record.trackers import Trackers
from fedray.scores.nearest import LOOKED_AT
from fedray.scores.reference import Reference

PROMPTS_DRAWN = 10  # of a run's prompts, those that are drawn as it goes
PATIENCE = 1.0  # seconds that a round waits for the checkpoint of the one before


def prepare(
    config: Config, run: Run, resume: bool = False, dataset: Dataset | None = None, plan: Plan | None = None
) -> Plan:
    """Work out a run, and check that its directory allows it.

    Args:
        dataset: the task's, if it is loaded already.
        plan: the run's, if it is worked out already.

    Raises:
        UserError: the configuration, the data or the directory does not allow it.
    """
    chosen = (config.algorithm, config.fold, config.wire, config.wire_down, config.malicious)
    for part in (*chosen, config.partition, config.features):
        check_loaded(part)
    plan = make_plan(config, dataset) if plan is None else plan
    plan.check(config)
    if resume:
        check_resumable(Run.open(run.directory), config)
        run.check_data(plan.data)
    else:
        run.check_vacant()
    run.check_disk(disk_needed(config, plan))
    return plan


def fit(session: Session, provenance: dict[str, Any], resume: bool = False) -> Iterator[Row]:
    """Do all remaining rounds: yield a row per round and write the run directory.

    `provenance` is what config.json says of versions, machine and command.

    Raises:
        UserError: the images cannot be scored against, or the directory is not writable (nothing is written then).
        RunError: the run cannot go on; what was saved stays, and it can be resumed.
    """
    config, plan, run, added = session.config, session.plan, session.run, session.added
    scoring = Scoring.of(config) if config.evaluate_samples else None
    against = open_reference(scoring, plan.dataset, session.pool, session.show) if scoring else None
    ended = run.result is not None
    if not resume:
        look_at_a_sample(session)
        run.create(config, plan.data, provenance)
    else:
        run.extend(config.rounds)
    logs = logged(run, session.pool.printed, session.show)
    with run.locked(), _disk(run), logs as writing, stoppable(run, writing) as show, Saver(run) as saver:
        session = replace(session, show=show)
        _draw_partition(run.directory, plan)
        if plan.release is not None:
            spending = Spending(run.directory, plan.release, config.delta, config.max_epsilon, run.publish)
            session = replace(session, spending=spending)
        if config.method.hides_examples:
            of = (config, plan.example_noise, plan.shards.sizes)
            examples = example_spending(*of, run.directory, run.publish)
            examples.path.touch()  # also where no client ever begins
            session = replace(session, examples=examples)
        state, row = run.state(plan.layout, memories=True), None
        if state is None:
            state = State(0, config.method.init(plan.initial, plan.layout))
        if resume and (found := run.recover(state.round)):
            run.prune(state.round, found, config.checkpoints_total_limit)
            *before, row = found
            saver.recovered(before)
        done = [*run.rows, *saver.rows]
        session.took_part.update(took_part(done if row is None else [*done, row]))
        if done and row is None and "stopped" in done[-1] and not ended:  # killed before its result was written
            session = ending(session, state.round)
        if state.round == 0 and prompts_of(config, plan.dataset):
            draw_prompts(session, state)
        callbacks = Callbacks(added.callbacks)
        callbacks.start(done)
        with closing(Trackers(run, config, added.trackers, added.group)) as trackers:
            while row is not None or state.round < session.config.rounds:
                if row is None:
                    state, row = yield from _beside(run_round(session, state), saver, trackers)
                    session.took_part.update(took_part([row]))
                    if session.examples is not None:
                        session.examples.tell(row)
                    if run.gone_back:
                        row["gone_back"], run.gone_back = run.gone_back, ""
                    hold_out(session, state, row)
                    if config.saves(state.round):
                        saver.begin(state, row, plan.layout, config.checkpoints_total_limit)
                why = row.get("stopped")  # of a row that was in the checkpoint
                if why is None:
                    whys = measure(session, state, row, against, callbacks), callbacks.round(row)
                    why = whys[0] or whys[1]
                if why is not None and state.round < config.rounds:
                    row["stopped"], session = why, ending(session, state.round)
                    hold_out(session, state, row)
                    if not config.saves(state.round):
                        saver.begin(state, row, plan.layout, config.checkpoints_total_limit)
                    measure(session, state, row, against, Callbacks(()))
                saver.rows.append(row)
                row = None
            yield from _shown(saver, trackers)
            if run.result is None:
                _finish(session, state)
            trackers.add()
        callbacks.end(run.result or {})


def ending(session: Session, rounds: int) -> Session:
    """Have a run end after so many rounds, as if its settings said so."""
    return replace(session, config=replace(session.config, rounds=rounds))


@contextmanager
def _disk(run: Run) -> Iterator[None]:
    """Raise `RunError` where a file cannot be read or written: a full disk, for instance."""
    try:
        yield
    except OSError as error:
        where = error.filename or run.directory
        raise RunError(f"{where}: {error.strerror or error}; the run's complete rounds are kept.") from error


def _beside(
    training: Generator[None, None, tuple[State, Row]], saver: Saver, trackers: Trackers
) -> Generator[Row, None, tuple[State, Row]]:
    """Train a round; the rows before it are shown as soon as their checkpoint is durable.

    A small checkpoint is waited for: the first block may take as long as a round.
    """
    if saver.durable(PATIENCE):
        yield from _shown(saver, trackers)
    while True:
        try:
            next(training)
        except StopIteration as done:
            yield from _shown(saver, trackers)
            return done.value
        if saver.durable():
            yield from _shown(saver, trackers)


def _shown(saver: Saver, trackers: Trackers) -> Iterator[Row]:
    """Wait for the checkpoint that is being written, and yield its rows; nothing where there is none."""
    rows = saver.finish()
    trackers.add(*rows)
    yield from rows


def _draw_partition(directory: Path, plan: Plan) -> None:
    """Write partition.csv and partition.png, unless they are there."""
    if not (directory / "partition.csv").exists():
        from fedray.data import partition_picture  # matplotlib takes a second to import

        table = partition_picture.table(plan.examples, plan.parts)
        with durably(directory / "partition.png") as aside:
            aside.write_bytes(partition_picture.draw(table, tuple(plan.parts)))
        write(directory / "partition.csv", table.to_csv(index=False))


def look_at_a_sample(session: Session) -> None:
    """Sample one image of the untrained model: what cannot be scored or drawn is found before round 1, not at the end.

    A task that knows prompts is drawn before round 1 anyhow.
    """
    config, plan = session.config, session.plan
    if config.evaluate_samples and not prompts_of(config, plan.dataset):
        one = replace(Sampling.of(config, 1), steps=1)
        sample(session.pool, model({"model": plan.initial}), one)


def hold_out(session: Session, state: State, row: Row) -> None:
    """Measure held-out losses into `row`, where they are due and not there yet."""
    due = session.plan.held_out.sizes.any() and session.config.validates(state.round)
    if due and not row["held_out"]:
        row["held_out"] = validate_round(session, state, row)


def measure(session: Session, state: State, row: Row, against: Reference | None, callbacks: Callbacks) -> str | None:
    """Sample a round, for prompts and for scores, where it is due; return why the run is to end, if it is."""
    config, why, began = session.config, None, time.perf_counter()
    draws = config.validates(state.round) and prompts_of(config, session.plan.dataset)
    scores = config.evaluates(state.round)
    if draws:
        draw_prompts(session, state)
    if scores:
        why = callbacks.evaluation(row, evaluate_round(session, state, row, against))
    if draws or scores:
        row["seconds"]["evaluate"] = row["seconds"].get("evaluate", 0.0) + time.perf_counter() - began
    return why


def evaluate_round(session: Session, state: State, row: Row, against: Reference | None) -> np.ndarray:
    """Score the model (its average, where there is one) into `row`, draw its samples, and return the first of them.

    After the last round also: the scores' intervals, and whether samples copy what was trained on, by the clients that
    took part: images of others may be of another kind.
    """
    config, plan, run = session.config, session.plan, session.run
    last = state.round == config.rounds
    trained, unseen = plan.images_of(session.took_part if last else ())
    look = len(unseen) > 0
    keep = config.evaluate_samples if config.keep_samples else LOOKED_AT if look else GRID
    sampling = scored(config, config.evaluate_samples, plan.dataset)
    sampling = replace(sampling, repeats=config.evaluate_repeats if last else 1)
    sampling = by_clients(sampling, config, run, state.round)
    comparison = Comparison(plan.dataset, Scoring.of(config), against, session.added.metrics, intervals=last)
    found = evaluate(session.pool, model(sampled(state.tensors)), sampling, comparison, keep, session.show)
    row["scores"] = {name: each.to_json() for name, each in found.scores.items()}
    row["evaluation"] = found.about | {"of": delivers(state)}
    pictures.draw(run.directory, "samples", found.images[:GRID], state.round)
    if config.keep_samples:
        pictures.keep_samples(run.directory, found.images, state.round)
    if look:
        share, closest, nearest = look_for_copies(session.pool, found.images, trained, unseen, session.show)
        row["scores"]["copies"] = share.to_json()
        pictures.draw_nearest(run.directory, found.images[closest], plan.dataset.images[nearest], state.round)
    return found.images[:GRID]


def draw_prompts(session: Session, state: State) -> None:
    """Draw samples for each prompt, from the same noise in every round (Chen 2024, figures 6 and 7)."""
    config, run = session.config, session.run
    prompts = prompts_of(config, session.plan.dataset)[:PROMPTS_DRAWN]
    images = len(prompts) * config.num_validation_images
    sampling = by_clients(Sampling.of(config, images, prompts), config, run, state.round)
    sampling = replace(sampling, batch_size=len(prompts))
    _, drawn = sample(session.pool, model(sampled(state.tensors)), sampling, session.show)
    pictures.draw_prompts(session.run.directory, drawn, prompts, state.round, final=state.round == config.rounds)


def delivers(state: State) -> str:
    """Say what is sampled from, scored and delivered: "average" or "model"."""
    return "average" if "ema/model" in state.tensors else "model"


def _finish(session: Session, state: State) -> None:
    """Write the model for diffusers, then the result: when result.json is there, all is there."""
    config, plan, run = session.config, session.plan, session.run
    worker, delivered = Worker(config, torch.device("cpu"), "here"), sampled(state.tensors)
    worker.load(delivered["model"], delivered.get("base"))
    remove(run.directory / "model")  # what a killed process had written of it
    try:
        worker.learner.save(run.directory / "model")
    except Exception as error:  # libraries raise many kinds where a disk is full
        sentence = f"{run.directory / 'model'} cannot be written: {reason(error)}; the run's complete rounds are kept."
        raise failure(sentence, "", traceback.format_exc()) from error
    rows = run.rows
    totals: dict[str, Any] = {
        name: sum(row[name] for row in rows)
        for name in ("steps", "sequential_steps", "images", "bytes_down", "bytes_up")
    }
    trained = [state.tensors[name] for name in ("model", "base") if name in state.tensors]
    result: Row = {
        "vector_sha256": vector.sha256(*trained),
        "delivers": delivers(state),
        "delivered_sha256": vector.sha256(*delivered.values()),
        "state_sha256": vector.sha256_of(state.tensors),
        "rounds": state.round,
        **({"stopped": rows[-1]["stopped"]} if "stopped" in rows[-1] else {}),
        "loss": next((row["loss"] for row in reversed(rows) if row["loss"] is not None), None),
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
    if session.spending is not None:
        result["privacy"] = session.spending.report(config.secure_noise)
    if session.examples is not None:
        result["example_privacy"] = session.examples.report(config.secure_noise)
    if plan.before is not None:
        result["started_from"] = plan.before
    card = model_card(config.to_json(), result, run.saved.get("command", []))
    (run.directory / "model/README.md").write_text(card)
    run.finish(result)
