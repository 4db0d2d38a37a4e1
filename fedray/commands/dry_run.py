"""The plan of a run, printed: what would be done and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from fedray.commands.console import show
from fedray.config import Config
from fedray.privacy import epsilon, release_of
from fedray.record.run import Run
from fedray.storage import located

if TYPE_CHECKING:
    from fedray.federation.plan import Plan


LISTED = 32  # clients, at most, that are listed
VALUES = 6  # labels of a client that are listed


def print_plan(config: Config, out: Path, resume: bool) -> Plan:
    """Print a run's plan, without training anything, and return it. Raises `UserError` where it could not begin.

    Args:
        out: where the run would be written.
        resume: there is a run that would be continued.
    """
    from fedray.federation.plan import bytes_planned, disk_needed, make_plan, steps_planned
    from fedray.federation.traffic import bytes_down_in_all, bytes_up_in_all
    from fedray.files import size as in_words

    run = Run(located(out))
    if not resume:
        run.check_vacant()
    plan = make_plan(config)
    plan.check(config)
    disk = disk_needed(config, plan)
    run.check_disk(disk)
    steps = steps_planned(config, plan)
    sizes, parts = plan.shards.sizes, {"held out": plan.held_out, "kept for tests": plan.test}
    parts = {part: shards for part, shards in parts.items() if shards.sizes.any()}
    evaluations = sum(map(config.evaluates, range(1, config.rounds + 1)))
    actors = {None: "as many as fit", 0: "none (this process)"}.get(config.actors, config.actors)
    planned, messages = bytes_planned(config, plan), sum(map(len, steps))
    kept = config.fold.memory(plan.round(config, 0))
    down = bytes_down_in_all(config, plan, planned, list(map(len, steps)))
    up = bytes_up_in_all(config, plan, planned, messages)
    table = Table("what", "value", title="dry run: nothing is trained")
    for name, value in {
        "clients": f"{config.clients}, of which {config.cohort_size} take part in a round",
        **({"drop-outs": f"{config.dropout_rate:.0%} of those, in the mean"} if config.dropout_rate else {}),
        "examples": f"{sizes.sum():,} in all; per client {sizes.min():,} to {sizes.max():,}",
        **{f"examples {part}": f"{shards.sizes.sum():,}" for part, shards in parts.items()},
        "rounds": f"{config.rounds}",
        "actors": f"{actors}, {config.cpus_per_actor:g} CPUs and {config.gpus_per_actor:g} GPUs each",
        "parameters": f"{plan.layout.size:,}",
        "steps": f"{sum(map(sum, steps)):,} in all; {sum(max(each, default=0) for each in steps):,} sequential",
        "bytes": f"{planned.down:,} down to a client in a round, {planned.up:,} up",
        **({"bytes in round 1": f"{planned.first:,} down to a client"} if planned.first != planned.down else {}),
        "bytes in all": f"{down / 1e6:,.1f} MB down, {up / 1e6:,.1f} up",
        **({"uploads kept": f"{kept / 1e6:,.1f} MB at the driver"} if kept else {}),
        **({"canaries": _canaries(plan)} if plan.canaries is not None else {}),
        **({"malicious": ", ".join(map(str, sorted(plan.malicious)))} if plan.malicious else {}),
        **_privacy_planned(config, plan),
        "evaluations": f"{evaluations}, of {config.evaluate_samples:,} samples" if evaluations else "none",
        "directory": str(run),
        "on its disk": ", ".join(f"{what} {in_words(bytes)}" for what, bytes in disk.items() if bytes),
    }.items():
        table.add_row(name, escape(value))
    show(table)
    held = labels_held(plan)
    clients = Table("client", "examples", *parts, "steps a round", *(["labels (examples)"] if held else []))
    for client, size in enumerate(sizes[:LISTED]):
        counts = [f"{shards.sizes[client]:,}" for shards in parts.values()]
        steps_a_round = f"{config.steps(int(size)):,}"
        clients.add_row(str(client), f"{size:,}", *counts, steps_a_round, *(escape(text) for text in held[client:][:1]))
    show(clients)
    if config.clients > LISTED:
        print(f"and {config.clients - LISTED:,} clients more")
    return plan


def labels_held(plan: Plan) -> list[str]:
    """Describe the labels, folders or identities of each client's examples; [] where the data has none."""
    from fedray.data.partition_picture import DIFFERENT, table

    frame = table(plan.examples, plan.parts)
    for kind in ("label", "folder", "identity"):
        many = f"{DIFFERENT} {kind}"
        if many in frame:
            return [f"{count:,} different ones" for count in frame[many]]
        columns = [str(name) for name in frame if str(name).startswith(f"{kind} ")]
        if not columns:
            continue
        found = []
        for _, row in frame.iterrows():
            counts = {name.removeprefix(f"{kind} "): round(row[name] * row["examples"]) for name in columns}
            most = sorted((name for name in counts if counts[name]), key=lambda name: -counts[name])
            more = f", {len(most) - VALUES} more" if len(most) > VALUES else ""
            found.append(", ".join(f"{name} ({counts[name]:,})" for name in most[:VALUES]) + more)
        return found
    return []


def _canaries(plan: Plan) -> str:
    assert plan.canaries is not None
    where = "clients of one image each" if plan.canaries.apart else "among clients' images"
    return f"{len(plan.canaries.planted)} ({where}), of which {plan.canaries.planted.sum()} are trained on"


def _privacy_planned(config: Config, plan: Plan) -> dict[str, str]:
    """Say what noise will prove after some of the rounds, and after all."""
    from fedray.federation.budget import spent

    said, release, delta = dict[str, str](), release_of(config), f"δ = {config.delta:g}"

    def after(spend: Callable[[int], float]) -> str:
        some = sorted({max(1, config.rounds * share // 10) for share in (1, 2, 5, 10)})
        return ", ".join(f"{spend(rounds):.3g} after {rounds:,}" for rounds in some) + " rounds"

    if release is not None:
        said["privacy"] = f"noise of {release.multiplier:.4g} times the clip; {release.neighbours}, {delta}"
        said["ε"] = after(lambda rounds: epsilon({release: rounds}, config.delta))
    if config.method.hides_examples:
        noise, sizes = plan.example_noise, plan.shards.sizes
        said["privacy of examples"] = f"noise of {noise:.4g} times the clip; one example more or less, {delta}"
        said["ε of examples"] = after(lambda rounds: spent(config, noise, sizes, rounds)) + ", at most, of a client"
    return said
