"""The answer that runs give: which setting is best, by how much, and with what certainty."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from fedray.record.run import Run
from fedray.reports.comparisons import Difference, compare, rms
from fedray.reports.results import finals, scores_of
from fedray.scores.metrics import LOSSES, deciding, metric_of

ARROWS = {True: "↑", False: "↓", None: ""}  # to where a score is better


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
    return deciding(measured) or "loss"


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
    if done.empty:
        return "No client took part in any round."
    settings = ranked(done, score)
    mean, std, seeds = (float(value) for value in settings.iloc[0])
    about, named = _measured(done, score), f"The {LOSSES[score]}" if score in LOSSES else score
    if len(settings) == 1 < rounds["setting"].nunique():
        named += f" at {settings.index[0]}"
    if len(settings) > 1:
        spread = f"{pair(mean, std)} over {seeds:.0f} seeds" if seeds > 1 else number(mean)
        about = (["one seed"] if seeds == 1 else []) + about + _drawn(done, score)
        if done["seed"].nunique() > seeds:
            about.append("of the seeds that all settings have")
        said.append(f"{named} is lowest at {settings.index[0]}: {spread}{_in_brackets(about)}.")
        said += _comparison(comparable(done), score, list(settings.index))
    elif seeds > 1:
        half = stats.t.ppf(0.975, seeds - 1) * std / math.sqrt(seeds)
        about = [f"95 % interval of the mean {number(mean - half)} to {number(mean + half)}", *about]
        about += _drawn(done, score)
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


def _drawn(done: pd.DataFrame, score: str) -> list[str]:
    """Say how much of the spread over seeds is of the draw of samples: within runs, as a root mean square."""
    if score in LOSSES or f"{score}.std" not in done or math.isnan(within := rms(done[f"{score}.std"])):
        return []
    repeats = set(done["evaluate_repeats"].dropna()) if "evaluate_repeats" in done else set()
    how = f"over {max(repeats)} draws" if len(repeats) == 1 and max(repeats) > 1 else "by resampling"
    return [f"a run's samples drawn again: ± {number(within)}, {how}"]


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
    """Say by how much the others are higher than the first, and what these seeds cannot tell."""
    best, second = settings[:2]
    found = compare(done, score)
    gap = found.difference(second, best)
    if math.isnan(gap.low):
        yield f"The next, {second}, is higher by {number(gap.value)}, without an interval: fewer than two common seeds."
        return
    interval = f"95 % interval {number(gap.low)} to {number(gap.high)}, paired by {gap.seeds} seeds"
    unclear = "" if gap.low > 0 else ", so that these seeds do not tell them apart"
    yield f"The next, {second}, is higher by {number(gap.value)} ({interval}){unclear}."
    if len(settings) > 2:
        others = [(other, found.difference(other, best)) for other in settings[1:]]
        above = [f"{other} by {effect(each)}" for other, each in others if each.low > 0]
        listed = above if len(above) < 4 else [above[0], "…", above[-1]]
        higher = f": {', '.join(listed)}" if above else ""
        yield (
            f"Of the {len(others)} others, {len(above) or 'none'} {'is' if len(above) < 2 else 'are'} higher with an "
            f"interval above 0{higher}. The intervals hold for all {found.pairs} pairs of the {len(settings)} settings "
            f"at once (Tukey's method, for scores that scatter alike), so also for a lowest one chosen among them."
        )
    yield f"A true difference below {number(found.visible)} would be missed by more than one in five such comparisons."


def effect(found: Difference) -> str:
    """Write a difference with its interval: "3.33 (1.90 to 4.77)"."""
    return number(found.value) + ("" if math.isnan(found.low) else f" ({number(found.low)} to {number(found.high)})")


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
