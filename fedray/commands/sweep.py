"""fedray sweep: the runs of an experiment's file, in parallel, and their table."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import tyro

from fedray.checks import flag
from fedray.commands.settings import Settings, T, ask, preset_help
from fedray.commands.terminal import print_frame, program
from fedray.config import Config
from fedray.errors import RunError, UserError, check_name
from fedray.files import read_json, write
from fedray.own import load_file
from fedray.presets import PRESETS
from fedray.record.publishing import take_over
from fedray.record.run import RECORD
from fedray.record.trackers import DEFAULT, open_trackers
from fedray.storage import located, shown, upload

if TYPE_CHECKING:
    from fedray.cluster.directories import Sweep

DURATION = ("local_epochs", "local_steps")  # of which one is given


@dataclass(frozen=True, kw_only=True)
class Flags(Settings[T]):
    preset: Annotated[str | None, preset_help()]
    experiment: tyro.conf.Positional[Path] = tyro.MISSING
    """A Python file with BASE (a Config), SPACE (values by the name of a setting) and, for --smoke, SMOKE."""
    smoke: bool = False
    """Try it out: in seconds, with the changes that the file's SMOKE says."""
    resume: bool = False
    """Go on with the sweep in OUT: complete trials are kept, others continue from their last round."""
    again: bool = False
    """Run anew what OUT has already."""
    asha: str | None = None
    """Stop trials early that are behind in this score after as many images trained (needs --evaluate-every)."""
    report_to: tuple[str, ...] = DEFAULT
    """Where trials are shown, in a group: tensorboard, wandb, trackio, mlflow, none, or your own FILE.py:CLASS."""
    out: Path | None = None
    """Directory of the sweep, which several may share, or its URL; by default runs/NAME."""
    take_over: bool = False
    """Take trials at a URL from the processes that write them, or did so when they ended."""


def main(arguments: list[str]) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--preset")
    first, _ = parser.parse_known_args(arguments)
    # The file, wherever it stands: `--features FILE.py:FUNCTION` does not end so.
    file = next((argument for argument in arguments if argument.endswith(".py")), None)
    base, space, question = PRESETS["digits"], {}, ""
    if file is not None:
        module = load_experiment(Path(file))
        base, space, question = module.BASE, dict(module.SPACE), module.__doc__ or ""
        if first.preset is not None:
            check_name("preset", first.preset, PRESETS)
            base = PRESETS[first.preset]
        for name, value in (getattr(module, "SMOKE", {}) if first.smoke else {}).items():
            from fedray.cluster.trials import change

            if name in space and not callable(space[name]):
                space[name] = value
            else:
                base = change(base, name, value)
    flags, config = ask(Flags, base, arguments, "sweep", "Train many runs that differ, and compare them.", first.preset)
    if not space:
        raise UserError(f"{flags.experiment} is not a Python file; name an experiment, as experiments/figure2.py.")
    given = {argument.split("=")[0].replace("_", "-") for argument in arguments}
    for name in space:
        if flag(name.removeprefix("task.")) in given or (name in DURATION and given & set(map(flag, DURATION))):
            raise UserError(f"{flag(name)} is what {flags.experiment} varies; change its SPACE.")
    trackers = open_trackers(flags.report_to)
    name = flags.experiment.stem
    out = flags.out or Path("runs") / (f"{name}-smoke" if flags.smoke else name)

    from fedray.cluster.progress import on_terminal
    from fedray.cluster.trials import Experiment  # Ray and torch take seconds to import: mistakes are told before
    from fedray.cluster.tune import sweep

    if flags.take_over:
        take_over(out)
    place = located(out)
    experiment = Experiment(config, space, name, question)
    with on_terminal(len(config.task.dataset())) as on_news:
        try:
            done = sweep(
                experiment, out, resume=flags.resume, again=flags.again, asha=flags.asha, on_news=on_news,
                report_to=trackers,
            )  # fmt: skip
        except (KeyboardInterrupt, RunError):
            if (place / f"{name}{RECORD}").exists():
                once = ("--again", "--resume", "--take-over")
                repeated = [argument for argument in arguments if argument not in once]
                print(f"\nGo on with: {program()} sweep {shlex.join(repeated)} --resume", file=sys.stderr)
            raise

    _show(place, done, name)
    print(f"sweep     {shown(place)}\nnext      {program()} report {shown(place)}")
    if done.missing:
        reasons = "\n".join(f"  {trial}: {why}" for trial, why in done.missing.items())
        raise RunError(f"{len(done.missing)} of {sum(map(len, done))} trials are missing:\n{reasons}")


def load_experiment(path: Path) -> ModuleType:
    """Run an experiment's file. Raises `UserError` if it is not one."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; name an experiment, as experiments/figure2.py.")
    module = load_file(path)
    for name, kind in (("BASE", Config), ("SPACE", dict)):
        if not isinstance(getattr(module, name, None), kind):
            raise UserError(f"{path} is not an experiment: it must have {name}, a {kind.__name__}.")
    return module


def _show(out: Path, done: Sweep, name: str) -> None:
    """Write results.parquet and .csv of all runs in OUT and the table of this sweep's; print it."""
    from fedray.reports.results import TABLE, finals, load, scores_of
    from fedray.reports.results import write as write_results
    from fedray.reports.tables import by_setting, cells, shown, to_latex, to_markdown

    rounds = load(out).rounds
    if rounds.empty:
        return
    write_results(rounds, out)
    rounds = rounds[rounds["run"].isin([run.directory.name for run in done.runs])]
    if rounds.empty:
        return
    record = read_json(out / f"{name}{RECORD}")
    varied = [setting for setting in record["varied"] if setting != "seed"] or ["clients"]
    settings = {
        trial["directory"]: " · ".join(shown(trial["changes"].get(field)) for field in varied)
        for trial in record["trials"]
    }
    scores = [*scores_of(finals(rounds)), "loss", "total.sequential_steps", "total.bytes"]
    table = by_setting(rounds, settings, " · ".join(varied), scores)
    names = [".".join(map(str, column)).removesuffix(".mean") for column in table.columns.to_flat_index()]
    flat = table.set_axis(names, axis=1)
    changed = {settings[trial["directory"]]: trial["changes"] for trial in record["trials"]}
    columns = {field: [shown(changed[setting].get(field)) for setting in flat.index] for field in varied}
    write(out / f"{name}.csv", flat.reset_index(drop=True).assign(**columns)[[*varied, *names]].to_csv(index=False))
    text = cells(table)
    text.insert(0, "seeds", table["loss"]["n"].astype(str))
    absent = [f"- {trial}: {why}" for trial, why in (done.stopped | done.missing).items()]
    write(
        out / f"{name}.md", "\n".join([to_markdown(text), *(["", "Not complete:", "", *absent] if absent else []), ""])
    )
    write(out / f"{name}.tex", to_latex(text))
    upload(out / TABLE, out / "results.csv", *(out / f"{name}.{kind}" for kind in ("csv", "md", "tex")))
    print_frame(text[["seeds", *[score for score in scores if "@" not in score and "/" not in score][:4]]])
    for trial, why in done.stopped.items():
        print(f"stopped   {trial}: {why}")
