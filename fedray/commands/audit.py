"""fedray audit: what a run's model tells about the images that it was trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from fedray.commands.sample import Draw, model_of
from fedray.commands.terminal import progress
from fedray.errors import UserError
from fedray.files import write
from fedray.forms import files_named
from fedray.record.run import Run
from fedray.storage import upload


@dataclass(frozen=True, kw_only=True)
class Audit(Draw):
    """Attack a run's model by membership inference: images that it was trained on, against images held out."""

    run: tyro.conf.Positional[Path]
    """Directory of the run, or its URL; it needs images that nobody trained on (--test-share)."""
    images: int = 1000
    """How many images of each kind to compare, at most."""


def main(arguments: list[str]) -> None:
    """Parse and run `fedray audit`."""
    options = tyro.cli(Audit, args=arguments, prog="fedray audit")
    if options.images < 2:
        raise UserError(f"--images {options.images}: it must be at least 2.")
    run = Run.open(options.run)
    config = replace(options.settings(run.config_with(files_named(arguments))), features=None)
    config.check()

    from rich.console import Console
    from rich.table import Table

    from fedray.cluster.pool import open_pool  # Ray and torch take seconds to import: mistakes are told before
    from fedray.federation.audit import audit
    from fedray.federation.plan import make_plan

    plan = make_plan(config)
    saved = {name: value for name, value in plan.data.items() if name != "features"}
    run.check_data(saved)
    with open_pool(config, plan.dataset) as pool, progress(config.rounds) as (_, show):
        found, about = audit(pool, model_of(run.directory, config), plan, options.seed, options.images, show)
    table = Table("membership inference", "value", "95 % interval", "by guessing", title_justify="left")
    kinds = f"{about['trained_on']:,} images trained on, {about['not_trained_on']:,} held out"
    table.title = f"{run}: {kinds}, each at {about['draws']} timesteps and noises"
    table.add_row("area under the curve", f"{found.auc[0]:.3f}", _interval(found.auc), "0.5")
    for rate, share in found.rates.items():
        name = f"true positives at {rate:.1%} false ones"
        table.add_row(name, f"{share[0]:.2%}", f"{share[1]:.2%} to {share[2]:.2%}", f"{rate:.1%}")
    table.add_row("p of no leak", f"{found.p:.2g}", "", "uniform")
    Console().print(table)
    if len(found.rates) < 2:
        print("lower rates of false positives need more images that nobody trained on (1,000 for 0.1 %)")
    result = found._asdict() | {"rates": {str(rate): share for rate, share in found.rates.items()}} | about
    write(run.directory / "audit.json", json.dumps(result, indent=1) + "\n")
    upload(run.directory / "audit.json")
    print(f"audit     {run}/audit.json")


def _interval(of: tuple[float, float, float]) -> str:
    return f"{of[1]:.3f} to {of[2]:.3f}"
