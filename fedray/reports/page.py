"""The report: runs and sweeps on one HTML page that needs no network, with the question and the answer first."""

import base64
import functools
import io
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

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
from fedray.reports.charts import charts
from fedray.reports.comparisons import compare
from fedray.reports.results import finals, load, score_table, scores_of
from fedray.reports.tables import cells, pivot
from fedray.reports.unlike import by_dataset, named
from fedray.storage import located

PICTURES = 5_000_000  # characters of pictures on a page, about
SHOWN = 12  # rounds of a run that are shown
LARGE = 40_000  # bytes; larger pictures are compressed


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
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    ).get_template("page.html.jinja")  # fmt: skip
    contents = [
        (chapter, answer(chapter.rounds, chapter.planned), list(_tables(chapter)),
         list(charts(chapter.rounds, chapter.varied)))
        for chapter in chapters
    ]  # fmt: skip
    return template.render(
        title=", ".join(chapter.title for chapter in chapters),
        problems=problems,
        chapters=contents,
        viewers=_viewers(chapters),
        costs=list(_costs(chapters)),
        environment=_environment(rounds),
        commands=dict.fromkeys(command for chapter in chapters for command in chapter.commands if command),
        plotly=Markup(get_plotlyjs()),
    )


# Questions


def _chapters(places: Sequence[str | Path], rounds: pd.DataFrame) -> Iterable[Chapter]:
    """Divide runs into sweeps, and those that belong to none."""
    where = rounds["directory"].map(lambda directory: located(directory).resolve())
    told = pd.Series(False, index=rounds.index)
    for path in dict.fromkeys(path for place in places for path in _records(located(place))):
        try:
            record = json.loads(path.read_text())
            mine = where.isin([(path.parent / trial["directory"]).resolve() for trial in record["trials"]])
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
        return f"What comes of it when clients {what}, depending on {', '.join(map(field_of, free))}?"
    often, unit = (first["local_epochs"], "epoch") if first["local_epochs"] else (first["local_steps"], "step")
    how = f"{first['rounds']} rounds of {often} local {unit}{'' if often == 1 else 's'}"
    who = "one client" if first["clients"] == 1 else f"{first['clients']} clients (partition {first['partition']})"
    if first["only_client"] is not None:
        who = f"client {first['only_client']} of {first['clients']} (partition {first['partition']}) alone"
    share = f", each with a share of {first['fraction']:g} of them" if first["fraction"] < 1 else ""
    return f"What comes of it when {who} {what}, for {how}{share}?"


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
            yield _table("Scores", ["score", "value", "± over", "± of one run", "n", "remarks"], rows)
        return
    if len(free) == 2 and done["setting"].nunique() > done[free].nunique().max():  # neither follows from the other
        table = cells(pivot(chapter.rounds, score, *free))
        head = [field_of(free[0]), *(f"{field_of(free[1])}={value_of(value)}" for value in table.columns)]
        rows = [[value_of(name), *values] for name, values in zip(table.index, table.to_numpy().tolist(), strict=True)]
        caption = f"{title_of(score)}, mean ± standard deviation over seeds"
        yield _table(caption, head, rows)
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
    yield _table(caption + "with its simultaneous 95 % interval", head, rows, [row[0] for row in rows].index(best))


def _table(caption: str, head: list[str], rows: list[list[str]], best: int | None = None) -> dict[str, Any]:
    return {"caption": caption, "head": head, "rows": rows, "best": best}


def _text(value: Any) -> str:
    return "" if pd.isna(value) else f"{value:,}" if isinstance(value, int) else str(value)


# Pictures


def _viewers(chapters: list[Chapter]) -> list[dict[str, Any]]:
    """Choose pictures of a run of each setting, after as many rounds as there is room for."""
    chosen: dict[str, str] = {}  # directory: name on the page
    for chapter in chapters:
        runs = chapter.rounds.drop_duplicates("directory").sort_values(["complete", "seed"], ascending=[False, True])
        for setting in chapter.rounds["setting"].unique():
            run = runs[runs["setting"] == setting].iloc[0]
            name = ", ".join(part for part in (setting, f"seed {run['seed']}") if part)
            chosen.setdefault(run["directory"], name if len(runs) > 1 else run["run"])
    partitions = {_saved(directory).get("partition_sha256", directory): directory for directory in reversed(chosen)}
    kinds = [
        ("Samples", "samples", "Samples", list(chosen)),
        ("Samples by prompt, from the same noise", "validation", "A strip of samples by prompt", list(chosen)),
        ("Prompts, from the base to the last round", "validation.png", "Samples by prompt over rounds", list(chosen)),
        ("Samples above the training images nearest to them", "nearest.png", "Samples, nearest images", list(chosen)),
        ("Who holds what", "partition.png", "How many images each client holds", [*partitions.values()][::-1]),
    ]
    encode = functools.cache(_data_uri)

    def frames(directory: str, source: str, alt: str, limit: int) -> list[dict[str, str]]:
        pictures = [(label, encode(path)) for label, path in _thin(_pictures(located(directory), source), limit)]
        text = f"{alt}: {chosen[directory]}"
        return [{"label": label, "src": src, "alt": f"{text} {label}".strip()} for label, src in pictures if src]

    def viewer(title: str, source: str, alt: str, directories: list[str], limit: int) -> dict[str, Any]:
        runs = [{"name": chosen[path], "frames": frames(path, source, alt, limit)} for path in directories]
        return {"title": title, "kind": source.removesuffix(".png"), "runs": [run for run in runs if run["frames"]]}

    for limit in (SHOWN, 6, 3):
        viewers = [viewer(*kind, limit) for kind in kinds]
        pictures = [frame["src"] for viewer in viewers for run in viewer["runs"] for frame in run["frames"]]
        if sum(map(len, pictures)) <= PICTURES:
            break
    else:
        viewers = [viewer(*kind, 1) for kind in kinds]
    return [viewer for viewer in viewers if viewer["runs"]]


def _pictures(directory: Path, source: str) -> list[tuple[str, Path]]:
    """Find a run's pictures of a kind, with the round they are of."""
    if source.endswith(".png"):
        return [("", directory / source)] if (directory / source).exists() else []
    paths = sorted(directory.glob(f"{source}/round-*.png"))
    numbers = [int(path.stem.removeprefix("round-")) for path in paths]
    return [(f"round {number}" if number else "base", path) for number, path in zip(numbers, paths, strict=True)]


def _thin(items: list[Any], limit: int) -> list[Any]:
    """Keep at most so many of them, evenly, the last always."""
    if len(items) <= limit:
        return items
    back = np.unique(np.linspace(0, len(items) - 1, limit).round().astype(int))
    return [items[len(items) - 1 - index] for index in back][::-1]


def _data_uri(path: Path) -> str:
    """Encode a picture as text, compressed where it is large; as nothing if it cannot be read."""
    try:
        data, kind = path.read_bytes(), "png"
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if len(data) > LARGE:
                image.thumbnail((1600, 1600))
                small = io.BytesIO()
                image.convert("RGB").save(small, "webp", quality=80)
                data, kind = small.getvalue(), "webp"
    except OSError:
        return ""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# Costs and environment


def _costs(chapters: list[Chapter]) -> Iterable[dict[str, Any]]:
    """Tabulate bytes and seconds of each setting, means over its seeds."""
    for chapter in chapters:
        done = chapter.rounds[chapter.rounds["complete"]]
        rounds = chapter.rounds if done.empty else done
        of = "" if len(chapters) == 1 else f"{chapter.title}: "
        seconds = pd.DataFrame({
            name: rounds[f"seconds.{name}"] for name in ("fold", "validate", "evaluate", "save")
            if f"seconds.{name}" in rounds
        }).fillna(0.0)  # fmt: skip
        seconds.insert(0, "training", rounds["seconds.round"] - seconds["fold"])
        seconds["in all"] = seconds.sum(axis=1)
        sent, spent = [], []
        for setting in rounds["setting"].unique():
            rows = rounds[rounds["setting"] == setting]
            runs, name = rows["directory"].nunique(), setting or rows["run"].iloc[0]
            total = rows[["bytes_down", "bytes_up"]].sum().sum()
            payloads = [_payload(rows["directory"].iloc[0], way) for way in ("bytes_down", "bytes_up")]
            sent.append([name, *payloads, *(number(total / count / 1e6) for count in (len(rows), runs))])
            spent.append([name, *(number(value / runs) for value in seconds.loc[rows.index].sum())])
        head = ["setting", "bytes down, per client", "bytes up, per client", "MB a round", "MB a run"]
        yield _table(f"{of}Payloads per round: of a client; of all clients, both ways (and of a run)", head, sent)
        yield _table(f"{of}Seconds of a run, by phase", ["setting", *seconds.columns], spent)
        if "privacy.epsilon" in rounds:
            proved = rounds.groupby("setting", sort=False)[["privacy.epsilon", "privacy.delta", "privacy.multiplier"]]
            lines = [[name, *map(number, values)] for name, *values in proved.max().itertuples()]
            yield _table(f"{of}Privacy of clients at the end", ["setting", "ε", "δ", "noise over the clip"], lines)


def _payload(directory: str, way: str) -> str:
    """Write the bytes per client, the least and the most."""
    try:
        sizes = {client[way] for row in Run(directory).rows for client in row["clients"] if client.get(way)}
    except (UserError, OSError, KeyError):
        return "–"
    return " to ".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)})) if sizes else "–"


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
