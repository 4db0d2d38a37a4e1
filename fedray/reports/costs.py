"""Where the time and the bytes of runs went, and what their clients did."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedray.errors import UserError
from fedray.record.run import Row, Run
from fedray.reports.answer import number
from fedray.reports.charts import Chart, values
from fedray.storage import located

TIMES = {  # columns: what a round's seconds were for, and its colour
    "seconds.training": ("training", "#0072b2"),
    "seconds.waiting": ("waiting", "#b8c4ce"),
    "seconds.transfer": ("transfer", "#56b4e9"),
    "seconds.fold": ("fold", "#009e73"),
    "seconds.server": ("server", "#e69f00"),
    "seconds.record": ("record", "#8c8c8c"),
    "seconds.save": ("checkpoint", "#cc79a7"),
    "seconds.validate": ("held-out loss", "#d55e00"),
    "seconds.evaluate": ("evaluation", "#f0e442"),
}
BYTES = {"bytes_down": ("to clients", "#56b4e9"), "bytes_up": ("from clients", "#0072b2")}
BARS = 60  # of a setting over rounds, at most
ALL_BARS = 3000  # of all settings
CLIENTS = 400  # of a page, at most


def spent(rounds: pd.DataFrame) -> pd.DataFrame:
    """Return a column for each of `TIMES` that some round took; rows of older versions have less of them."""
    seconds = rounds.reindex(columns=list(TIMES)).astype(float)
    older = rounds["seconds.round"] - seconds["seconds.fold"].fillna(0.0)
    seconds["seconds.training"] = seconds["seconds.training"].fillna(older)
    return seconds.dropna(axis="columns", how="all").fillna(0.0)


def cost_charts(rounds: pd.DataFrame) -> Iterable[Chart]:
    """Draw seconds and bytes of each setting's rounds, means over its seeds, stacked by what they were for."""
    sent, settings = rounds[list(BYTES)].astype(float).fillna(0.0), rounds["setting"].nunique()
    for title, measured, frame, parts in (
        ("Where the seconds of a round went", "seconds", spent(rounds), TIMES),
        ("Where the bytes of a round went", "bytes", sent, BYTES),
    ):
        groups = []
        for setting in rounds["setting"].unique():
            of_round = rounds["round"][rounds["setting"] == setting]
            means = frame.loc[of_round.index].groupby(of_round).mean()
            most = min(BARS, max(2, ALL_BARS // settings), len(means))
            bars = pd.cut(pd.Series(range(len(means))), most, labels=False) if most > 1 else [0] * len(means)
            by_bar = means.groupby(np.asarray(bars))
            spans = [(numbers[0], numbers[-1]) for numbers in by_bar.groups.values()]
            groups.append({
                "x": [f"{first}" if first == last else f"{first}–{last}" for first, last in spans],
                "y": {name: values(by_bar[name].mean()) for name in frame},
            })  # fmt: skip
        named = [{"key": name, "name": parts[name][0], "colour": parts[name][1]} for name in map(str, frame)]
        figure = {"kind": "stack", "measured": measured, "groups": groups, "parts": named}
        yield {"title": title, "note": "", "axes": [], "figure": figure}


def cost_tables(rounds: pd.DataFrame) -> Iterable[dict[str, Any]]:
    """Tabulate bytes and seconds of each setting, means over its seeds."""
    settings, done = list(rounds["setting"].unique()), rounds[rounds["complete"]]
    rounds = rounds if done.empty else done
    seconds = spent(rounds)
    seconds["in all"] = seconds.sum(axis=1)
    sent, took = [], []
    for setting in rounds["setting"].unique():
        rows = rounds[rounds["setting"] == setting]
        runs, name = rows["directory"].nunique(), setting or rows["run"].iloc[0]
        total = rows[["bytes_down", "bytes_up"]].sum().sum()
        sent.append([name, *_payloads(rows["directory"].iloc[0])])
        sent[-1] += [number(total / count / 1e6) for count in (len(rows), runs)]
        took.append([name, *(number(value / runs) for value in seconds.loc[rows.index].sum())])
    head = ["setting", "bytes down, per client", "bytes up, per client", "MB a round", "MB a run"]
    of = [settings.index(setting) for setting in rounds["setting"].unique()]
    yield table("Payloads per round: of a client; of all clients, both ways (and of a run)", head, sent, of)
    names = [TIMES[name][0] if name in TIMES else name for name in map(str, seconds)]
    yield table("Seconds of a run, by what they were for", ["setting", *names], took, of)
    if "privacy.epsilon" in rounds:
        proved = rounds.groupby("setting", sort=False)[["privacy.epsilon", "privacy.delta", "privacy.multiplier"]]
        lines = [[name, *map(number, numbers)] for name, *numbers in proved.max().itertuples()]
        yield table("Privacy of clients at the end", ["setting", "ε", "δ", "noise over the clip"], lines, of)
    if "example_privacy.epsilon" in rounds:
        proved = rounds.groupby("setting", sort=False)[["example_privacy.epsilon", "example_privacy.delta"]]
        lines = [[name, *map(number, numbers)] for name, *numbers in proved.max().itertuples()]
        yield table("Privacy of examples at the end, of the client that spent most", ["setting", "ε", "δ"], lines, of)


def table(
    caption: str, head: list[str], rows: Sequence[Sequence[str]], of: Sequence[int] = (), best: int | None = None
) -> dict[str, Any]:
    """Make a table.

    Args:
        of: the setting of each row, by its index, where rows are of settings.
        best: the row that is.
    """
    return {"caption": caption, "head": head, "rows": rows, "of": of, "best": best}


def _payloads(directory: str) -> list[str]:
    """Write the bytes per client, the least and the most, down and up."""
    clients = [client for row in _rows(directory) for client in row.get("clients", ())]
    both = [{client[way] for client in clients if client.get(way)} for way in ("bytes_down", "bytes_up")]
    return [" to ".join(f"{size:,}" for size in sorted({min(way), max(way)})) if way else "–" for way in both]


def _rows(directory: str) -> list[Row]:
    """Read a run's rows, where it is still there."""
    try:
        return Run(located(directory)).rows
    except (UserError, OSError, KeyError, ValueError):
        return []


# Clients


def client_table(chosen: Mapping[str, str]) -> dict[str, Any] | None:
    """Tabulate the clients of a run of each setting; those of the highest losses, where there are many.

    Args:
        chosen: a run's directory, by setting.
    """
    found = {setting: _clients(_rows(directory)) for setting, directory in chosen.items()}
    if not any(found.values()):
        return None
    most = max(5, CLIENTS // len(found))
    rows, of = [], []
    for index, (setting, clients) in enumerate(found.items()):
        highest = sorted(clients.items(), key=lambda item: -np.nan_to_num(item[1]["loss"], nan=-np.inf))[:most]
        rows += [[setting, str(client), *_cells(facts)] for client, facts in sorted(highest, key=lambda item: item[0])]
        of += [index] * len(highest)
    head = ["setting", "client", "rounds", "images seen", "loss", "held-out loss", "seconds", "MB down", "MB up"]
    head.append("left out")
    caption = "Sums over rounds, and losses of the last round that a client took part in"
    if len(found) == 1:
        head, rows = head[1:], [row[1:] for row in rows]
    else:
        caption = f"A run of each setting. {caption}"
    hidden = sum(map(len, found.values())) - len(rows)
    return table(caption + (f"; without the {hidden:,} of the lowest losses" if hidden else ""), head, rows, of)


def _clients(rows: list[Row]) -> dict[int, dict[str, float]]:
    """Add up what each client did."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        held_out = (row.get("held_out") or {}).get("clients") or {}
        for client in row.get("clients", ()):
            zeros = dict.fromkeys(("rounds", "images", "seconds", "bytes_down", "bytes_up", "left_out"), 0.0)
            facts = found.setdefault(client["client"], zeros | {"loss": np.nan, "held_out": np.nan})
            ok = client.get("outcome", "ok") == "ok"
            facts["rounds"] += ok
            facts["left_out"] += not ok
            for name in ("images", "seconds", "bytes_down", "bytes_up"):
                facts[name] += client.get(name) or 0
            if client.get("loss") is not None:
                facts["loss"] = client["loss"]
            if (loss := held_out.get(str(client["client"]))) is not None:
                facts["held_out"] = loss
    return found


def _cells(facts: dict[str, float]) -> list[str]:
    numbers = [facts["loss"], facts["held_out"], facts["seconds"], facts["bytes_down"] / 1e6, facts["bytes_up"] / 1e6]
    return [f"{facts['rounds']:,.0f}", f"{facts['images']:,.0f}", *map(number, numbers), f"{facts['left_out']:,.0f}"]
