"""The report: runs and sweeps on one HTML page that needs no network, with the question and the answer first."""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedray.errors import UserError
from fedray.files import write as write_file
from fedray.record.run import RECORD, Run
from fedray.reports.answer import (
    LOSSES,
    answer,
    decisive,
    effect,
    field_of,
    number,
    pair,
    ranked,
    title_of,
    value_of,
    with_settings,
)
from fedray.reports.charts import charts, settings_of
from fedray.reports.comparisons import compare
from fedray.reports.costs import client_table, cost_charts, cost_tables, table
from fedray.reports.pictures import KINDS, Chosen, viewers
from fedray.reports.results import finals, load, score_table, scores_of
from fedray.reports.tables import cells, pivot
from fedray.reports.unlike import by_dataset, named
from fedray.storage import located

SIZE = 1_450_000  # bytes of a page, about; pictures are made to fit
WEB = Path(__file__).parent / "web"
FILES = {"style": "page.css", "script": "page.js", "d3": "d3.min.js", "plot": "plot.umd.min.js"}


@dataclass(frozen=True)
class Chapter:
    """A sweep, or the runs that belong to none."""

    title: str
    question: list[str]
    """Paragraphs."""
    rounds: pd.DataFrame
    """Of `results.load`, with a column "setting": what varies but the seed, in words."""
    varied: list[str]
    """Columns that vary, without the seed."""
    planned: int
    """Runs that there should be."""
    commands: list[str]


def write(places: Sequence[str | Path], out: Path) -> None:
    """Write the page of these runs, sweeps or folders of them: complete or not at all. Raises `UserError`."""
    write_file(out, make(places))


def make(places: Sequence[str | Path]) -> str:
    """Make the page, as HTML.

    Raises:
        UserError: a place does not exist, or none holds a run with a complete round.
    """
    rounds, problems = load(*places)
    if rounds.empty:
        raise UserError(f"there is no complete round to report on: {' '.join(problems)}")
    chapters = list(_chapters(places, rounds))
    template = Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    ).get_template("page.html.jinja")  # fmt: skip
    chosen = [_chosen(chapter) for chapter in chapters]
    contents = [_contents(*each) for each in zip(chapters, chosen, strict=True)]

    def page(pictures: list[list[dict[str, Any]]]) -> str:
        return template.render(
            title=", ".join(chapter.title for chapter in chapters),
            problems=problems,
            chapters=[content | {"viewers": those} for content, those in zip(contents, pictures, strict=True)],
            environment=_environment(rounds),
            commands=dict.fromkeys(command for chapter in chapters for command in chapter.commands if command),
            **{name: Markup((WEB / file).read_text()) for name, file in FILES.items()},
        )

    room = SIZE - len(page([[] for _ in chapters]).encode())
    return page(viewers(chosen, room))


def _contents(chapter: Chapter, chosen: Chosen) -> dict[str, Any]:
    """Make what a chapter shows, without its pictures."""
    rounds = chapter.rounds
    return {
        "chapter": chapter,
        "answer": answer(rounds, chapter.planned),
        "settings": settings_of(rounds),
        "charts": list(charts(rounds, chapter.varied)),
        "tables": list(_tables(chapter)),
        "costs": list(cost_charts(rounds)),
        "cost_tables": list(cost_tables(rounds)),
        "clients": client_table(dict(zip(rounds["setting"].unique(), chosen, strict=True))),
    }


# Questions


def _chapters(places: Sequence[str | Path], rounds: pd.DataFrame) -> Iterable[Chapter]:
    """Divide runs into sweeps, and those that belong to none."""
    where = rounds["directory"].map(lambda directory: located(directory).resolve())
    gone = ~where.map(Path.exists).astype(bool)
    told = pd.Series(False, index=rounds.index)
    for path in dict.fromkeys(path for place in places for path in _records(located(place))):
        try:
            record = json.loads(path.read_text())
            mine = where.isin([(path.parent / trial["directory"]).resolve() for trial in record["trials"]])
            # Of results that were kept without their runs, or brought from elsewhere: a name has the settings' hash.
            mine |= gone & where.map(lambda run: run.name).isin(
                [Path(each["directory"]).name for each in record["trials"]]
            )
            free = [name for name in record["varied"] if name != "seed" and name in rounds]
            texts = re.split(r"\n\s*\n", record.get("question", ""))
        except (OSError, ValueError, KeyError, TypeError):  # `load` has named it
            continue
        told |= mine
        if mine.any():
            title, question = path.name.removesuffix(RECORD), [text.strip("\n") for text in texts if text.strip()]
            of_sweep, commands = with_settings(rounds[mine], free), [_command(record.get("command", []))]
            yield Chapter(title, question, of_sweep, free, len(record["trials"]), commands)
    rest = dict(by_dataset(rounds[~told])) if not told.all() else {}
    for data, rows in rest.items():
        (rows, free, said), runs = named(rows), rows.drop_duplicates("directory")
        title = ("Other runs" if told.any() else Path(places[0]).resolve().name) + f" on {data}" * (len(rest) > 1)
        commands = [_command(_saved(directory).get("command", [])) for directory in runs["directory"]]
        yield Chapter(title, [said or _in_words(runs, free)], rows, free, runs["sha256"].nunique(), commands)


def _records(place: Path) -> list[Path]:
    """Find the records of the sweeps at a place and below it."""
    if not place.is_dir() or (place / "config.json").is_file():
        return []
    return sorted(place.glob(f"*{RECORD}")) + [path for child in sorted(place.iterdir()) for path in _records(child)]


def _saved(directory: str) -> dict[str, Any]:
    """Read config.json, where the run is still there."""
    try:
        return Run.open(located(directory)).saved
    except UserError:
        return {}


def _in_words(runs: pd.DataFrame, free: list[str]) -> str:
    """Phrase the question of runs, from the settings of the first and from what varies."""
    first: dict[str, Any] = {name: None if pd.isna(value) else value for name, value in runs.iloc[0].items()}  # type: ignore[misc]
    data = value_of(first.get("task.train_data_dir") or first.get("task.dataset_name") or first["task.name"])
    base = first.get("task.pretrained_model_name_or_path")
    what = f"fine-tune {value_of(base)} by LoRA of rank {first['task.rank']} on {data}" if base else f"train on {data}"
    if free:
        return f"What happens when clients {what}, depending on {', '.join(map(field_of, free))}?"
    often, unit = (first["local_epochs"], "epoch") if first["local_epochs"] else (first["local_steps"], "step")
    how = f"{first['rounds']} rounds of {often} local {unit}{'' if often == 1 else 's'}"
    who = "one client" if first["clients"] == 1 else f"{first['clients']} clients (partition {first['partition']})"
    if first["only_client"] is not None:
        who = f"client {first['only_client']} of {first['clients']} (partition {first['partition']}) alone"
    share = f", each with a share of {first['fraction']:g} of them" if first["fraction"] < 1 else ""
    return f"What happens when {who} {what}, for {how}{share}?"


def _command(arguments: Sequence[str]) -> str:
    """Write a command as users type it, without the folder that the interpreter is installed in."""
    if not arguments:
        return ""
    program, rest = Path(arguments[0]), list(arguments[1:])
    if program.name == "__main__.py":
        start = [program.parent.name]
    elif program.suffix == ".py":
        start = ["python", "/".join(program.parts[-2:]) if program.is_absolute() else str(program)]
    else:
        start = [program.name]
    return shlex.join(start + rest)


# Tables: a caption, the columns' names, rows of cells, and which row is the best


def _tables(chapter: Chapter) -> Iterable[dict[str, Any]]:
    """Yield the tables of a chapter's complete runs."""
    done = finals(chapter.rounds)
    if done.empty:
        return
    score, free = decisive(done), chapter.varied
    if done["setting"].nunique() == 1 and all((located(run) / "result.json").exists() for run in done["directory"]):
        rows = [
            [title_of(row["score"]), pair(row["value"], row["std"]), _text(row["over"]), number(row["within"])]
            + [_text(row["n"]), _text(row["note"])]
            for row in score_table(map(located, done["directory"])).to_dict("records")
        ]
        if rows:
            yield table("Scores", ["score", "value", "± over", "± of one run", "n", "remarks"], rows)
        return
    if len(free) == 2 and done["setting"].nunique() > done[free].nunique().max():  # neither follows from the other
        crossed = cells(pivot(chapter.rounds, score, *free))
        head = [field_of(free[0]), *(f"{field_of(free[1])}={value_of(value)}" for value in crossed.columns)]
        lines = zip(crossed.index, crossed.to_numpy().tolist(), strict=True)
        rows = [[value_of(name), *values] for name, values in lines]
        caption = f"{title_of(score)}, mean ± standard deviation over seeds"
        yield table(caption, head, rows)
    shown = dict.fromkeys(
        [score, *scores_of(done), *(loss for loss in LOSSES if loss in done and done[loss].notna().any())]
    )
    best, found, rows = ranked(done, score).index[0], compare(done, score), []
    for setting in done["setting"].unique():
        runs = done[done["setting"] == setting]
        values = [pair(runs[name].mean(), runs[name].std()) for name in shown]
        gap = "" if setting == best else effect(found.difference(setting, best))
        n = "" if score in LOSSES else ", ".join(f"{n:,}" for n in sorted(runs[f"{score}.n"].dropna().unique()))
        rows.append([setting, str(runs["seed"].nunique()), n, values[0], gap, *values[1:]])
    titles = [title_of(name) for name in shown]
    caption = "After the last round: mean ± standard deviation over seeds, n samples each; difference to the best, "
    head = ["setting", "seeds", "n", titles[0], "difference", *titles[1:]]
    caption += "with its simultaneous 95 % interval"
    settings = list(chapter.rounds["setting"].unique())
    names = [row[0] for row in rows]
    yield table(caption, head, rows, of=[settings.index(name) for name in names], best=names.index(best))


def _text(value: Any) -> str:
    return "" if pd.isna(value) else f"{value:,}" if isinstance(value, int) else str(value)


# Pictures and clients


def _chosen(chapter: Chapter) -> Chosen:
    """Choose a run of each setting, of which pictures and clients are shown; one of each partition for its picture."""
    runs = chapter.rounds.drop_duplicates("directory").sort_values(["complete", "seed"], ascending=[False, True])
    chosen: Chosen = {}
    same: dict[str, list[int]] = {}  # settings, by their partition
    for index, setting in enumerate(chapter.rounds["setting"].unique()):
        run = runs[runs["setting"] == setting].iloc[0]
        name = ", ".join(part for part in (setting, f"seed {run['seed']}") if part)
        partition = _saved(run["directory"]).get("partition_sha256", run["directory"])
        of = {kind: [index] for kind in KINDS}
        if partition in same:
            del of["partition.png"]
        else:
            same[partition] = of["partition.png"]
        same[partition] += [index] * (index not in same[partition])
        chosen[run["directory"]] = name if len(runs) > 1 else run["run"], of
    return chosen


# Environment


def _environment(rounds: pd.DataFrame) -> dict[str, str]:
    """List the versions, machines and commits that runs had."""
    values_of: dict[str, dict[str, None]] = {}
    for saved in map(_saved, rounds["directory"].unique()):
        facts = saved.get("versions", {}) | saved.get("machine", {})
        facts |= {"git commit of fedray": saved.get("git_commit"), "begun": saved.get("started")}
        facts["images (SHA-256)"] = (saved.get("images_sha256") or "")[:12]
        for name, value in facts.items():
            values_of.setdefault(name, {})["–" if value in (None, "") else str(value)] = None
    listed = {name: sorted(values) for name, values in values_of.items()}
    return {
        name: f"{v[0]} to {v[-1]}" if name == "begun" and len(v) > 1 else ", ".join(v) for name, v in listed.items()
    }
