"""fedray plan: what a run would take on this machine, measured."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fedray.commands import share
from fedray.commands.dry_run import print_plan
from fedray.commands.train import asked_for, directory_of
from fedray.config import Config
from fedray.files import size
from fedray.storage import located

if TYPE_CHECKING:
    from fedray.federation.plan import Plan


def main(arguments: list[str]) -> None:
    """Parse and run `fedray plan [train|finetune] …`."""
    began, command = time.perf_counter(), "train"
    if arguments[:1] in (["train"], ["finetune"]):
        command, *arguments = arguments
    what = "Measure a step, its memory and a batch of samples, and say how long a run would take. Nothing is written."
    asked, config, words = asked_for(arguments, command, what, "plan")
    out, resume = directory_of(asked, config, words)
    if share.whole(words)[1]:
        config.check()
        config = share.shared(config, config.task.dataset())
    _rehearse(config, print_plan(config, out, resume), out, began)


def _rehearse(config: Config, plan: Plan, out: Path, began: float) -> None:
    """Measure on the processes that would do the run, and print what follows from it."""
    from fedray.cluster.pool import open_pool
    from fedray.federation.plan import disk_needed, machine_memory
    from fedray.federation.rehearsal import measure, predict

    console = Console()
    what = "starting, then measuring a client and a batch of samples"
    with console.status(what), open_pool(config, plan.dataset) as pool:
        measured = measure(config, plan, pool)
    start = time.perf_counter() - began - measured.seconds
    if config.actors != 0:
        start += time.process_time()  # a run's driver is another process, which imports what this one did
    expected = predict(config, plan, measured)
    total = start + expected.training + expected.evaluation
    processes = f"{measured.workers} actors" if config.actors != 0 else "this process"
    of = "its GPU's" if config.gpus_per_actor else f"of {size(machine_memory())} in all, each"
    disk = sum(disk_needed(config, plan).values())
    free = shutil.disk_usage(next(place for place in located(out).absolute().parents if place.exists())).free
    table = Table("what", "measured, or worked out from it", title="rehearsal: nothing is kept")
    for name, value in {
        "processes": f"{processes}, {config.cpus_per_actor:g} CPUs, {config.threads} threads and "
        f"{config.gpus_per_actor:g} GPUs each",
        "a step": f"{measured.step:.4g} s; a client beyond its steps {measured.client:.3g} s",
        "samples": f"{measured.batch + config.sampling_steps * measured.denoising:.3g} s a batch",
        "memory": f"{size(measured.memory)} at most, {of}",
        "disk": f"about {size(disk)}; {size(free)} are free",
        "a round": f"{_words(expected.round)} at most",
        "start": _words(start),
        "training": _words(expected.training),
        "evaluation": _words(expected.evaluation),
        "in all": _words(total),
        "limit": _limit(start, expected.training, expected.evaluation),
    }.items():
        if name != "samples" or config.evaluate_samples:
            table.add_row(name, value)
    console.print(table)


def _limit(start: float, training: float, evaluation: float) -> str:
    """Say what takes the most time, and what would change that."""
    parts = {
        "training: more actors, a larger batch, or fewer steps": training,
        "sampling: fewer --evaluate-samples or --sampling-steps, or another --sampler": evaluation,
        "the start of Ray and of its processes: --actors 0 for a run this short": start,
    }
    name = max(parts, key=lambda part: parts[part])
    return f"{parts[name] / max(1e-9, sum(parts.values())):.0%} is {name}"


def _words(seconds: float) -> str:
    """Write a duration."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.3g} min" if minutes < 120 else f"{hours:.3g} h" if hours < 48 else f"{hours / 24:.3g} days"
