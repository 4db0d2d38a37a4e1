"""The answer that runs give: which setting is best, by how much, and with what certainty."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

from fedray.record.run import Run
from fedray.reports.results import finals, scores_of
from fedray.scores.metrics import LOSSES, deciding, metric_of

ARROWS = {True: "↑", False: "↓", None: ""}  # to where a score is better


class Difference(NamedTuple):
    """By how much one setting's score is higher than another's."""

    value: float
    low: float
    high: float
    """The 95 % interval, of Student's t over the seeds that both have; NaN where they share fewer than two."""
    seeds: int

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" ({number(self.low)} to {number(self.high)})"
        return f"{number(self.value)}{interval}"


def with_settings(rounds: pd.DataFrame, varied: list[str]) -> pd.DataFrame:
    """Sort rounds by their settings, and add a column "setting": the values of what varies, in words."""

    def setting(run: pd.Series) -> str:
        given = [name for name in varied if pd.notna(run[name])] or varied
        return ", ".join(f"{field_of(name)}={value_of(run[name])}" for name in given)

    names = {run["directory"]: setting(run) for _, run in rounds.drop_duplicates("directory").iterrows()}
    ordered = rounds.sort_values([*varied, "seed", "round"], kind="stable")
    return ordered.assign(setting=ordered["directory"].map(names))


def field_of(name: str) -> str:
    """Name the field of a column: without the prefix of a task's."""
    return name.removeprefix("task.")


def value_of(value: Any) -> str:
    """Write a setting's value; of an absolute path its end."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return Path(text).name if text.startswith("/") else text


def decisive(rounds: pd.DataFrame) -> str:
    """Choose the column that decides, of which less is better: a Fréchet or kernel distance, else a loss."""
    measured = [name for name in (*scores_of(rounds), *LOSSES) if name in rounds and rounds[name].notna().any()]
    score = deciding(measured)
    assert score is not None, "each round has a training loss"
    return score


def ranked(done: pd.DataFrame, score: str) -> pd.DataFrame:
    """Rank settings, the best first: a row for each, with mean, std over seeds, and count of seeds.

    Over the seeds that all settings have, where there are any: an easy seed must not make a setting look good.
    """
    compared = comparable(done.dropna(subset=[score]).astype({score: float}))
    return compared.groupby("setting")[score].agg(["mean", "std", "count"]).sort_values("mean")


def comparable(done: pd.DataFrame) -> pd.DataFrame:
    """Keep the runs of the seeds that all settings have; all runs, where there is none."""
    seeds = set.intersection(*(set(runs["seed"]) for _, runs in done.groupby("setting")))
    return done[done["seed"].isin(seeds)] if seeds else done


def difference(done: pd.DataFrame, score: str, one: str, other: str) -> Difference:
    """Measure by how much `one` setting's score is higher than the `other`'s, paired by seed where they share some."""
    values = done.astype({score: float}).pivot_table(index="seed", columns="setting", values=score)
    values = values.reindex(columns=[one, other])  # where a setting has no score at all
    paired = (values[one] - values[other]).dropna()
    if len(paired) < 2:
        return Difference(values[one].mean() - values[other].mean(), math.nan, math.nan, len(paired))
    half = stats.t.ppf(0.975, len(paired) - 1) * paired.sem()
    return Difference(paired.mean(), paired.mean() - half, paired.mean() + half, len(paired))


def answer(rounds: pd.DataFrame, planned: int) -> str:
    """Say in a few sentences what runs show, with intervals and with what is missing.

    Args:
        rounds: of `with_settings`.
        planned: how many runs there should be.
    """
    done, said = finals(rounds), []
    if done.empty and planned > 1:
        return f"None of the {planned} runs is complete yet."
    score = decisive(rounds if done.empty else done)
    if done.empty:
        last = rounds.iloc[-1]
        said.append(f"The run is not complete: {last['round']} of {last['rounds']} rounds.")
        done = rounds.dropna(subset=[score]).tail(1)
    elif len(done) < planned:
        said.append(f"{len(done)} of {planned} runs are complete.")
    if score in LOSSES:
        said.append("No score was measured.")
    lacking = int(done[score].isna().sum())
    if lacking:
        said.append(f"{lacking} {'run has' if lacking == 1 else 'runs have'} no {score}.")
    done = done.dropna(subset=[score]).astype({score: float})
    settings = ranked(done, score)
    mean, std, seeds = (float(value) for value in settings.iloc[0])
    about, named = _measured(done, score), f"The {LOSSES[score]}" if score in LOSSES else score
    if len(settings) == 1 < rounds["setting"].nunique():
        named += f" at {settings.index[0]}"
    if len(settings) > 1:
        spread = f"{pair(mean, std)} over {seeds:.0f} seeds" if seeds > 1 else number(mean)
        about = (["one seed"] if seeds == 1 else []) + about
        if done["seed"].nunique() > seeds:
            about.append("of the seeds that all settings have")
        said.append(f"{named} is lowest at {settings.index[0]}: {spread}{_in_brackets(about)}.")
        said += _comparison(comparable(done), score, list(settings.index))
    elif seeds > 1:
        half = stats.t.ppf(0.975, seeds - 1) * std / math.sqrt(seeds)
        about.insert(0, f"95 % interval of the mean {number(mean - half)} to {number(mean + half)}")
        said.append(f"{named} is {pair(mean, std)} over {seeds:.0f} seeds{_in_brackets(about)}.")
    else:
        run = done.iloc[-1]
        over = _over(run, score)
        spread = pair(mean, run["held_out.spread" if score in LOSSES else f"{score}.std"]) if over else number(mean)
        about = ([f"± over {over}"] if over else []) + about
        said.append(f"{named} after round {run['round']} is {spread}{_in_brackets(about)}.")
    return " ".join(said)


def _in_brackets(about: list[str]) -> str:
    return f" ({'; '.join(about)})" if about else ""


def _measured(done: pd.DataFrame, score: str) -> list[str]:
    """Say on how many samples a score was measured, and what real images have."""
    if score in LOSSES:
        return []
    low, high = done[f"{score}.n"].min(), done[f"{score}.n"].max()
    few = f"n = {low:,}" if low == high else f"n = {low:,} to {high:,}, but scores of different n do not compare"
    real = real_of(done, score)
    return [few] if real is None else [few, f"real against real {number(real)}"]


def real_of(rounds: pd.DataFrame, score: str) -> float | None:
    """Look up a score of real images against real ones, where that was measured."""
    name = f"{score}/real"
    return rounds[name].mean() if name in rounds and rounds[name].notna().any() else None


def _over(run: pd.Series, score: str) -> str | None:
    """Say what a single run's standard deviation is over; None where it has none."""
    if score in LOSSES:
        return "clients" if score == "held_out.global" and pd.notna(run["held_out.spread"]) else None
    result = Run(run["directory"]).result if run["complete"] else None
    return result["scores"].get(score, {}).get("over") if result else None


def _comparison(done: pd.DataFrame, score: str, settings: list[str]) -> Iterable[str]:
    """Say by how much the others are higher than the first."""
    best, second = settings[:2]
    gap = difference(done, score, second, best)
    if math.isnan(gap.low):
        yield f"The next, {second}, is higher by {number(gap.value)}, without an interval: fewer than two common seeds."
    else:
        interval = f"95 % interval {number(gap.low)} to {number(gap.high)}, paired by {gap.seeds} seeds"
        unclear = "" if gap.low > 0 else ", so that these seeds do not tell them apart"
        yield f"The next, {second}, is higher by {number(gap.value)} ({interval}){unclear}."
    others = [difference(done, score, other, best) for other in settings[1:]]
    if len(others) > 1 and any(not math.isnan(other.low) for other in others):
        clear = sum(other.low > 0 for other in others)
        many = {0: "None", len(others): f"All {len(others)}"}.get(clear, str(clear))
        yield (
            f"{many} of the others {'is' if clear < 2 else 'are'} clearly higher (95 % intervals, each taken alone: "
            f"none allows for the best having been chosen among {len(settings)})."
        )


def number(value: float, digits: int = 3) -> str:
    """Write so many significant digits, but whole numbers in full: 5.53, 0.0822, 1,234."""
    if pd.isna(value):
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.2e}" if decimals > 6 else f"{value:,.{max(0, decimals)}f}".replace("-", "−")


def pair(mean: float, std: float, digits: int = 3) -> str:
    """Write a mean and its standard deviation, with as many decimals as the larger one needs."""
    if pd.isna(mean) or pd.isna(std):
        return number(mean, digits)
    largest = max(abs(mean), abs(std))
    decimals = digits - 1 - math.floor(math.log10(largest)) if largest else 0
    if decimals > 6:
        return f"{mean:.2e} ± {std:.1e}"
    return f"{mean:,.{max(0, decimals)}f} ± {std:,.{max(0, decimals)}f}".replace("-", "−")


def title_of(name: str) -> str:
    """Name a score for readers, with an arrow to where it is better, where that is known."""
    metric = metric_of(name)
    arrow = ARROWS[metric.higher_is_better] if metric else ""
    return f"{LOSSES.get(name, name)} {arrow}".strip()
