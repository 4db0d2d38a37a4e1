"""Run directories as tables: one tidy frame of all rounds, and what is read from it."""

import json
import os
from collections.abc import Iterable, Mapping
from math import inf, isnan, nan
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import pandas as pd

from fedray.config import PLACEMENT, Config, sha256_of
from fedray.errors import UserError, reason
from fedray.files import write as write_text
from fedray.record.copies import local
from fedray.record.run import FAILED, RECORD, STOPPED, Row, Run
from fedray.record.upgrade import RENAMED, upgrade
from fedray.reports.comparisons import rms
from fedray.reports.problems import left_out, mixed, not_begun, unfinished
from fedray.storage import located, shown
from fedray.tasks.named import OURS, task_class

TABLE = "results.parquet"
READ = ("config.json", "rounds.jsonl", FAILED, STOPPED, TABLE)  # files that are read


def _kind(hint: Any) -> type:
    """Choose the type of a setting's values, where they are given."""
    return next((kind for kind in (bool, int, float) if kind in (hint, *get_args(hint))), str)


RUN = {"directory": str, "run": str, "sha256": str, "complete": bool}
SETTINGS = {name: _kind(hint) for name, hint in get_type_hints(Config).items() if name != "task"}
OF_TASKS = {
    f"task.{name}": _kind(hint) for task in map(task_class, OURS) for name, hint in get_type_hints(task).items()
}
ROUND = {
    "round": int, "loss": float, "steps": int, "sequential_steps": int, "images": int, "bytes_down": int,
    "bytes_up": int, "training_seconds": float,
}  # fmt: skip
TOTALS = ("total.sequential_steps", "total.images", "total.bytes", "total.training_seconds")
PROVED = {"ε": "privacy", "ε of examples": "example_privacy"}  # without noise there is no bound
# Prefixes of numbers that have names of their own.
GROUPS = ("seconds", "held_out", "aggregation", "ledger", "privacy", "example_privacy")
SETTING = "setting"  # a column that reports add: what varies, in words


class Results(NamedTuple):
    """Rounds of runs, and a sentence for each thing that is missing or could not be read."""

    rounds: pd.DataFrame
    problems: list[str]


class _Run(NamedTuple):
    """A run as it was read: the names of its settings, and a row for each round, with all of them."""

    settings: list[str]
    rows: list[Row]


def load(*places: str | Path) -> Results:
    """Read all runs at and below the given places, at any depth: run directories, sweeps, folders that hold such; or
    their URLs.

    Where a folder with a results.parquet (of `write`) has no run directories below it, the rounds are those of the
    table; a table may also be given itself. What cannot be read is left out, and named in `problems`.

    `rounds` has a row per run and complete round, in order. Columns: directory, run (the directory's name), sha256
    (of the configuration), complete; the fields of `Config`, the task's as task.FIELD; round, loss (mean training
    loss), steps (of all clients), sequential_steps (of the slowest), images, bytes_down and bytes_up (all clients'),
    training_seconds (of the slowest client); where a run has them, seconds.NAME, held_out.NAME, aggregation.NAME,
    ledger.NAME (clients dropped, asked, folded, retried, failed; actors_lost, nodes_lost, and seconds_lost by all of
    that) and scores by their names, with NAME.n and NAME.std (over draws or resamples of that run's samples); and
    total.NAME, sums from the first round on (total.bytes: down and up). Whole numbers are Int64, other numbers
    float64, the rest boolean or string; lists are JSON text.

    Raises:
        UserError: a place does not exist, or is a file other than a table that `write` wrote.
    """
    problems: list[str] = []
    runs: list[_Run] = []
    seen: dict[Path, dict[str, Any]] = {}  # what config.json says, of each run directory
    tables: dict[Path, bool] = {}  # True: a place that was given, not one found below
    records: dict[Path, None] = {}
    for place in map(local, places):
        if not place.exists():
            raise UserError(f"there are no results at {shown(place)}: it does not exist.")
        if place.is_file():
            tables[place] = True
            continue
        empty = True
        for path, directories, names in os.walk(place):
            directory = Path(path)
            ours = [name for name in names if name in READ or name.endswith(RECORD)]
            pipes = [name for name in ours if not (directory / name).is_file()]  # or links that lead nowhere
            problems += [f"{directory / name} is no file; it is left out." for name in pipes]
            names = [name for name in ours if name not in pipes]
            directories[:] = sorted(name for name in directories if not name.startswith("."))
            if "config.json" in names:
                saved = _saved(directory, problems)
                if saved is not None or "rounds.jsonl" in names:
                    directories.clear()  # below a run there are no runs
                empty = empty and saved is None
                if saved is not None and directory.resolve() not in seen:
                    seen[directory.resolve()] = saved
                    runs.append(_run(directory, saved["config"], problems))
            elif "rounds.jsonl" in names:
                problems.append(f"{directory} has rounds but no config.json, without which they are not read.")
            elif {FAILED, STOPPED} & set(names):
                problems.append(unfinished(directory))
            records |= dict.fromkeys(directory / name for name in names if name.endswith(RECORD))
            if TABLE in names:
                tables.setdefault(directory / TABLE, False)
                empty = False
        if empty:
            problems.append(f"{shown(place)} holds no runs.")
    for table, given in tables.items():
        folder = table.parent.resolve()
        if given or not any(directory.is_relative_to(folder) for directory in seen):
            try:
                runs += _table(table, problems)
            except UserError as error:
                if given:
                    raise
                problems.append(str(error))
    begun = {run.rows[0]["run"] for run in runs if run.rows}
    for record in records:
        problems += not_begun(record, begun)
    problems += mixed(list(seen.values()))
    return Results(_frame(runs), list(dict.fromkeys(problems)))


def write(rounds: pd.DataFrame, directory: str | Path) -> None:
    """Write a frame of `load` as results.parquet, which `load` reads back exactly, and as results.csv."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    aside = Path(directory) / f".{TABLE}.{os.getpid()}"
    try:
        rounds.to_parquet(aside, index=False)
        aside.replace(Path(directory) / TABLE)
    finally:
        aside.unlink(missing_ok=True)
    write_text(Path(directory) / "results.csv", rounds.to_csv(index=False))


def finals(rounds: pd.DataFrame) -> pd.DataFrame:
    """Take the last row of each complete run; a configuration counts once, wherever it was computed."""
    last = rounds[rounds["complete"] & ~rounds.duplicated(["directory", "sha256"], keep="last")]
    return last.drop_duplicates("sha256").reset_index(drop=True)


def scores_of(rounds: pd.DataFrame) -> list[str]:
    """List the scores that some round has."""
    return [name for name in map(str, rounds) if f"{name}.n" in rounds]


def settings_of(rounds: pd.DataFrame) -> list[str]:
    """List the settings: all columns but those that name a run, and those measured in a round.

    Settings of other versions and of a user's own tasks are among them, of which no list is known.
    """
    scores = [f"{name}{ending}" for name in scores_of(rounds) for ending in ("", ".n", ".std")]
    others = {*RUN, *ROUND, *TOTALS, *scores, SETTING}
    return [name for name in map(str, rounds) if name not in others and name.split(".")[0] not in GROUPS]


def varied(rounds: pd.DataFrame) -> list[str]:
    """List the settings in which runs differ, but for the seed and for where they were computed."""
    settings = [name for name in settings_of(rounds) if name not in (*PLACEMENT, "seed")]
    return [name for name in settings if rounds[name].nunique(dropna=False) > 1]


def summary(runs: Mapping[str, str | Path]) -> pd.DataFrame:
    """Summarise complete runs, a row for each, under the name given to it.

    Columns: loss (mean training loss of the last round), the loss on held-out examples and the scores where there
    are any, passes over the data, sequential steps (of the slowest client, over all rounds), MB down and up (10⁶
    bytes, over all clients and rounds), seconds.

    Raises:
        UserError: a run is not complete.
    """
    table = {}
    for name, directory in runs.items():
        result = _result(Run.open(directory))
        table[name] = {
            "loss": result["loss"],
            **({"held-out loss": result["held_out"]["global"]} if result["held_out"] else {}),
            **{name: score["value"] for name, score in result["scores"].items()},
            **{of: inf if (e := result[key]["epsilon"]) is None else e for of, key in PROVED.items() if key in result},
            "passes": result["passes"],
            "sequential steps": result["sequential_steps"],
            "MB down": result["bytes_down"] / 1e6,
            "MB up": result["bytes_up"] / 1e6,
            "seconds": result["seconds"],
        }
    return pd.DataFrame.from_dict(table, orient="index")


def score_table(runs: Iterable[str | Path]) -> pd.DataFrame:
    """Tabulate scores with their intervals, a row for each score of each setting.

    Complete runs whose settings differ in the seed alone are one setting; a seed counts once. Columns: run (the first
    one's directory), score, value (the mean), std, over (what std was taken over: seeds where there are several, else
    draws or resamples of one run's samples), within (that of one run, as a root mean square over the seeds: std over
    seeds has it in it), n (samples that a score was measured on), note.

    Raises:
        UserError: a run is not complete.
    """
    settings: dict[str, dict[int, Run]] = {}
    for directory in runs:
        run = Run.open(directory)
        config = run.saved["config"]
        depends_on = {name: value for name, value in config.items() if name not in (*PLACEMENT, "seed")}
        depends_on["images"] = run.saved.get("images_sha256")
        settings.setdefault(json.dumps(depends_on, sort_keys=True), {}).setdefault(config["seed"], run)
    rows = []
    for seeds in settings.values():
        same = list(seeds.values())
        results = [_result(run)["scores"] for run in same]
        for name, first in results[0].items():
            values = pd.Series([result[name]["value"] for result in results if name in result])
            several = {"std": values.std(), "over": f"{len(values)} seeds"} if len(values) > 1 else {}
            within = rms(pd.Series([result[name].get("std") for result in results if name in result], dtype=float))
            row = {"run": str(same[0]), "score": name, **first, "value": values.mean(), "within": within}
            rows.append(row | several)
    return pd.DataFrame(rows, columns=["run", "score", "value", "std", "over", "within", "n", "note"])


def _result(run: Run) -> Row:
    if run.result is None:
        raise UserError(f"the run at {run} is not complete; finish it with --resume {run}.")
    return run.result


def _saved(directory: Path, problems: list[str]) -> dict[str, Any] | None:
    """Read config.json, if it is a run's."""
    path = directory / "config.json"
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        problems.append(f"{path} is damaged ({reason(error)}); the run is left out.")
        return None
    config = saved.get("config") if isinstance(saved, dict) else None
    if not (isinstance(config, dict) and isinstance(config.get("task"), dict) and type(config.get("rounds")) is int):
        problems.append(f"{path} is not the configuration of a run of fedray; it is left out.")
        return None
    return saved | {"config": upgrade(config)}


def _run(directory: Path, config: dict[str, Any], problems: list[str]) -> _Run:
    """Read a run's rows, as far as that is possible."""
    settings = {name: value for name, value in config.items() if name != "task"}
    settings |= {f"task.{name}": value for name, value in config["task"].items()}
    path, rounds = directory / "rounds.jsonl", config["rounds"]
    text = path.read_text(errors="replace") if path.is_file() else ""
    lines = text.removesuffix("\n").split("\n") if text else []
    rows: list[Row] = []
    failed: list[Row] = []  # the first client of each round that was left out
    for number, line in enumerate(lines, 1):
        try:
            saved = json.loads(line)
            row = _round(saved)
            if row["round"] != number:
                raise ValueError
            failed += [client for client in saved.get("clients", ()) if client.get("outcome", "ok") != "ok"][:1]
            if isnan(row["loss"]) and rows:
                row["loss"] = rows[-1]["loss"]  # nobody took part: the model is that of the round before, or noisier
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            problems.append(f"{path} is damaged at line {number}; the rounds before it are read.")
            break
        rows.append(settings | row)
    if failed:
        problems.append(left_out(directory, failed, len(rows)))
    finished = (directory / "result.json").exists()
    rounds = len(lines) if rows and "stopped" in saved else rounds  # by a callback
    if not finished:
        problems.append(unfinished(directory, len(rows), rounds))
    elif len(rows) == len(lines) != rounds:
        problems.append(f"{path} has {len(rows)} of the {rounds} rounds of a complete run; the others are lost.")
    complete = finished and len(rows) == rounds
    run = {"directory": shown(directory), "run": directory.resolve().name, "sha256": sha256_of(config)}
    return _Run(list(settings), [run | {"complete": complete} | row for row in rows])


def _round(row: Row) -> Row:
    """Flatten a row of rounds.jsonl into what the frame has of it."""
    took = [client["seconds"] for client in row.get("clients", []) if client.get("seconds") is not None]
    row = row | {"training_seconds": max(took, default=None)}
    flat = {name: None if row.get(name) is None else kind(row[name]) for name, kind in ROUND.items()}
    flat["round"], flat["loss"] = int(row["round"]), nan if row.get("examples") == 0 else float(row["loss"])
    for group in GROUPS:
        numbers = {name: value for name, value in row.get(group, {}).items() if name != "clients"}
        flat |= {f"{group}.{name}": None if value is None else float(value) for name, value in numbers.items()}
    for name, score in row.get("scores", {}).items():
        own = f"score.{name}" if name in (*RUN, *SETTINGS, *ROUND, *TOTALS) else name  # a user's metric
        flat |= {own: float(score["value"]), f"{own}.n": int(score["n"])}
        if score.get("std") is not None:
            flat[f"{own}.std"] = float(score["std"])
    return flat


def _table(path: Path, problems: list[str]) -> list[_Run]:
    """Read the runs of a frame that was written. Raises `UserError`."""
    try:
        frame = pd.read_parquet(path).rename(columns=RENAMED).astype(object)
        frame = frame.where(frame.notna(), None)
        groups = frame.groupby(["directory", "sha256"], sort=False)
        settings = settings_of(frame)
        runs = [_Run(settings, rows.to_dict("records")) for _, rows in groups]  # type: ignore[arg-type]
        for row in (run.rows[-1] for run in runs):
            if not row["complete"]:
                problems.append(unfinished(located(row["directory"]), row["round"], row["rounds"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a table of results that fedray wrote ({reason(error)}).") from None
    return runs


def _frame(runs: list[_Run]) -> pd.DataFrame:
    """Make a tidy frame of rows, with totals."""
    rows = [row for run in runs for row in run.rows]
    settings = dict.fromkeys([*SETTINGS, *(name for run in runs if run.rows for name in run.settings)])
    names = [*RUN, *settings, *ROUND]
    known = {*names, *TOTALS}
    measured = dict.fromkeys(name for row in rows for name in row if name not in known)
    names += sorted(measured, key=lambda name: name.split(".")[0] not in GROUPS)
    kinds = RUN | SETTINGS | OF_TASKS | ROUND
    frame = pd.DataFrame({name: _column([row.get(name) for row in rows], kinds.get(name)) for name in names})
    so_far = {total: frame[total.removeprefix("total.")] for total in TOTALS if total != "total.bytes"}
    so_far["total.bytes"] = frame["bytes_down"] + frame["bytes_up"]
    run_of = frame.index.map(dict(enumerate(number for number, run in enumerate(runs) for _ in run.rows)))
    for total in TOTALS:
        frame[total] = so_far[total].groupby(run_of).cumsum()
    return frame


def _column(values: list[Any], kind: type | None) -> pd.Series:
    """Make a column of the narrowest type that holds all values, and `kind`."""
    kinds = {type(value) for value in values if value is not None} | ({kind} if kind else set())
    if any(type(value) is int and abs(value) >= 2**63 for value in values):
        kinds.add(str)
    if kinds == {bool}:
        return pd.Series(values, dtype="boolean")
    if kinds == {int}:
        return pd.Series(values, dtype="Int64")
    if kinds and kinds <= {int, float}:
        return pd.Series(values, dtype="float64")
    text = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pd.Series(text, dtype="string")
