"""Which kept results stand behind the numbers of docs/gallery.md and LOG.md?

    python experiments/claims.py        writes docs/claims.md

A number whose runs are kept (analysis/results) is computed from them here, in the words in which the prose says it;
tests/test_claims.py fails where prose, data and docs/claims.md differ. What has a ± and no kept runs is listed as such.
"""

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from fedray.files import write
from fedray.reports.answer import effect, number, pair
from fedray.reports.comparisons import compare
from fedray.reports.results import finals, load

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "analysis/results/digits"
GALLERY, LOG = "docs/gallery.md", "experiments/LOG.md"
PROSE = ("README.md", GALLERY, "docs/finetune.md", "docs/scores.md", LOG)
FD, SURE, KID = "fd[digits]", "sure[digits]", "kid[digits]"
SPREAD = re.compile(r"[−-]?\d[\d.,]* ± \d[\d.]*(?<=\d)(?: %)?")
MINUS = str.maketrans("-", "−")


@dataclass(frozen=True, eq=False)
class Claim:
    """A number, the complete runs that it is of, and the words that say it, by file."""

    about: str
    number: str
    sweep: str
    runs: pd.DataFrame
    said: dict[str, str] = field(default_factory=dict)
    interval: str = ""

    def missing(self) -> list[str]:
        """List the files whose text does not have the words."""
        return [file for file, words in self.said.items() if words not in prose(file)]


def prose(file: str) -> str:
    """Read a file of the project, its lines joined."""
    return " ".join((ROOT / file).read_text().split())


def claims() -> list[Claim]:
    """Compute every number from the kept runs."""
    done = finals(load(RESULTS).rounds)
    return [*_clients_and_epochs(done), *_same_steps(done), *_law(done)]


def _at(done: pd.DataFrame, clients: int, epochs: int, rounds: int = 40) -> pd.DataFrame:
    return done[(done["clients"] == clients) & (done["local_epochs"] == epochs) & (done["rounds"] == rounds)]


def _spread(runs: pd.DataFrame, score: str, percent: bool = False) -> str:
    values = runs[score].astype(float) * (100 if percent else 1)
    return pair(values.mean(), values.std()) + (" %" if percent else "")


def _interval(runs: pd.DataFrame, score: str, scale: float = 1) -> str:
    """Write the 95 % interval of a mean over seeds."""
    values = runs[score].astype(float) * scale
    half = stats.t.ppf(0.975, len(values) - 1) * values.sem()
    return f"{number(values.mean() - half)} to {number(values.mean() + half)}"


def _gap(low: pd.DataFrame, high: pd.DataFrame, score: str = FD) -> tuple[float, float, float]:
    """Return by how much the score of `high` is higher, and its 95 % interval, paired by seed."""
    settings = pd.concat([low.assign(setting="low"), high.assign(setting="high")])
    found = compare(settings, score).difference("high", "low")
    return found.value, found.low, found.high


def _clients_and_epochs(done: pd.DataFrame) -> Iterable[Claim]:
    """Compute the table of the log, and what the gallery takes from it."""
    sweep = "clients_epochs"
    in_gallery = {
        (2, 2): f"rises from {_spread(_at(done, 2, 2), FD)} with two clients",
        (8, 2): f"to {_spread(_at(done, 8, 2), FD)} with eight (E = 2, three seeds)",
        (4, 4): f"| {_spread(_at(done, 4, 4), FD)} | 5.59",
    }
    for clients in (2, 4, 8):
        row = f"| {clients} | {' | '.join(_spread(_at(done, clients, epochs), FD) for epochs in (1, 2, 4))} |"
        for epochs in (1, 2, 4):
            runs = _at(done, clients, epochs)
            said = {LOG: row} | ({GALLERY: in_gallery[clients, epochs]} if (clients, epochs) in in_gallery else {})
            about = f"`{FD}`, C = {clients}, E = {epochs}, T = 40"
            yield Claim(about, _spread(runs, FD), sweep, runs, said, _interval(runs, FD))
    words = {
        1: "by {0:.1f} at E = 1 (95 % interval {1:.1f} to {2:.1f}, paired by the three seeds)",
        2: "by {0:.1f} ({1:.1f} to {2:.1f}) at E = 2",
        4: "by {0:.1f} ({1:.2f} to {2:.1f}) at E = 4",
    }
    for epochs in (1, 2, 4):
        few, many = _at(done, 2, epochs), _at(done, 8, epochs)
        gap = _gap(few, many)
        about = f"`{FD}`, C = 8 less C = 2, E = {epochs}, T = 40"
        runs, interval = pd.concat([few, many]), f"{number(gap[1])} to {number(gap[2])}"
        said = {LOG: words[epochs].format(*gap)}
        yield Claim(about, number(gap[0]), sweep, runs, said, interval)
    chosen = _at(done, 4, 4)
    real = chosen[f"{FD}/real"].astype(float).mean()
    said = {GALLERY: f"n = 512; real against real: {real:.2f}", LOG: f"real against real: {real:.2f}"}
    yield Claim(f"`{FD}/real`", f"{real:.2f}", sweep, chosen, said)
    sure = _spread(chosen, SURE, percent=True)
    yield Claim(
        f"`{SURE}`, C = 4, E = 4", sure, sweep, chosen, {GALLERY: sure, LOG: sure}, _interval(chosen, SURE, 100)
    )
    mean, std = (getattr(chosen[KID].astype(float), what)() for what in ("mean", "std"))
    said = {GALLERY: f"| {mean:.0f} ± {std:.0f} |", LOG: f"| {mean:.1f} ± {std:.1f} |"}
    yield Claim(f"`{KID}`, C = 4, E = 4", f"{mean:.0f} ± {std:.0f}", sweep, chosen, said, _interval(chosen, KID))
    shares = [chosen[f"{name}[digits]"].astype(float).mean() for name in ("precision", "recall")]
    said = {GALLERY: f"| {shares[0]:.2f}, {shares[1]:.2f} |", LOG: f"| {shares[0]:.3f}, {shares[1]:.3f} |"}
    yield Claim("precision, recall, C = 4, E = 4", said[GALLERY].strip("| "), sweep, chosen, said)
    sent = f"{chosen['total.bytes'].astype(float).mean() / 1e6:.0f}"
    yield Claim("MB sent, both ways, C = 4, E = 4", sent, sweep, chosen, {GALLERY: f"| MB sent, both ways | {sent} |"})


def _same_steps(done: pd.DataFrame) -> Iterable[Claim]:
    """Compute the control at equal sequential steps."""
    sweep, settings = "same_steps", {clients: _at(done, clients, 2, 10 * clients) for clients in (2, 4, 8)}
    for clients, runs in settings.items():
        steps, images, sent = (runs[f"total.{name}"].mean() for name in ("sequential_steps", "images", "bytes"))
        fd = _spread(runs, FD)
        row = f"| {clients} | {10 * clients} | {steps:,.0f} | {images:,.0f} | {sent / 1e6:.0f} | {fd} |"
        said = {LOG: f"{row} {_spread(runs, SURE, percent=True)} |"}
        yield Claim(f"`{FD}`, C = {clients}, E = 2, T = {10 * clients}", fd, sweep, runs, said, _interval(runs, FD))
    named = pd.concat([runs.assign(setting=f"C = {clients}") for clients, runs in settings.items()])
    together, all_runs = compare(named, FD), pd.concat(settings.values())
    for one, other in ((2, 8), (4, 2)):
        gap, low, high = _gap(settings[other], settings[one])
        at_once = effect(together.difference(f"C = {one}", f"C = {other}"))
        interval = f"{number(low)} to {number(high)}; all three pairs at once: {at_once}"
        said = {LOG: f"four cannot be told from two ({gap:.1f}, {low:.1f} to {high:.1f})".translate(MINUS)}
        if one == 2:
            said = dict.fromkeys(
                (GALLERY, LOG), f"are better than two by {gap:.2f} (95 % interval {low:.2f} to {high:.2f})"
            )
        about = f"`{FD}`, C = {one} less C = {other}, equal steps"
        yield Claim(about, number(gap), sweep, all_runs, said, interval)
    times = {4: "four times", 16: "sixteen times"}
    ratios = [settings[8][f"total.{of}"].mean() / settings[2][f"total.{of}"].mean() for of in ("images", "bytes")]
    compute, bytes_sent = (times[round(ratio)] for ratio in ratios)
    said = {
        GALLERY: f"for {compute} the compute and {bytes_sent} the bytes",
        LOG: f"{compute} the images trained on, at {bytes_sent} the",
    }
    values = f"{ratios[0]:.2f}, {ratios[1]:.2f}"
    yield Claim("images and bytes, C = 8 ÷ C = 2, equal steps", values, sweep, all_runs, said)


def _law(done: pd.DataFrame) -> Iterable[Claim]:
    """Fit log fd against log steps, over the means of settings."""
    means = done.groupby(["clients", "local_epochs", "rounds"])[["total.sequential_steps", FD]].mean().astype(float)
    line = stats.linregress(np.log(means["total.sequential_steps"]), np.log(means[FD]))
    words = f"(exponent {line.slope:.2f}) explains {line.rvalue**2:.0%}".translate(MINUS).replace("%", " %")
    half = stats.t.ppf(0.975, len(means) - 2) * line.stderr
    interval = f"{number(line.slope - half)} to {number(line.slope + half)}"
    values = f"{line.slope:.2f}, {line.rvalue**2:.0%}".translate(MINUS)
    about = f"exponent of `{FD}` against steps, and share of variance explained, {len(means)} settings"
    yield Claim(about, values, "both", done, {LOG: words}, interval)


def without_results(made: list[Claim]) -> Iterable[tuple[str, str, list[str]]]:
    """Yield a file, a section of it, and the numbers with a ± there that no claim says."""
    for file in PROSE:
        words = " ".join(claim.said.get(file, "") for claim in made)
        for part in re.split(r"^## ", (ROOT / file).read_text(), flags=re.MULTILINE):
            title, _, text = part.partition("\n")
            text = " ".join(text.split())
            left = [found for found in dict.fromkeys(SPREAD.findall(text)) if found not in words]
            if left:
                yield file, title.strip("# "), left


def document() -> str:
    """Write docs/claims.md, as text."""
    made = claims()
    lines = [
        "# What stands behind the numbers", "",
        "Made by `python experiments/claims.py` from the runs that are kept in `analysis/results`; a test computes",
        "each number again and compares it with docs/gallery.md and experiments/LOG.md. ±: standard deviation over",
        "seeds, which includes the draw of samples. Intervals are 95 %, Student's t over seeds (paired, of",
        "differences).", "",
        "## Experiments", "", "| experiment | command | runs | commit | versions |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for path in sorted(RESULTS.glob("*.sweep.json")):
        record = json.loads(path.read_text())
        versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("python", "torch", "diffusers", "ray"))
        command, trials = shlex.join(record["command"]), len(record["trials"])
        lines.append(f"| {record['name']} | `{command}` | {trials} | `{record['git_commit'][:12]}` | {versions} |")
    head = ("", "number", "95 % interval", "experiment", "n", "seeds", "said in", "configurations (SHA-256)")
    lines += ["", "## Numbers", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for claim in made:
        n, seeds = (", ".join(map(str, sorted(set(claim.runs[name])))) for name in (f"{FD}.n", "seed"))
        hashes = [f"`{sha[:8]}`" for sha in claim.runs["sha256"]]
        runs = " ".join(hashes) if len(hashes) <= 9 else f"all {len(hashes)} kept"
        files = ", ".join(Path(file).name for file in claim.said)
        row = (claim.about, claim.number, claim.interval, claim.sweep, n, seeds, files, runs)
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", "## Numbers without kept results", "",
              "Their runs were not kept: only the commands in the text reproduce them.", "",
              "| file | section | numbers |", "|---|---|---|"]  # fmt: skip
    lines += [f"| {Path(file).name} | {title} | {'; '.join(left)} |" for file, title, left in without_results(made)]
    return "\n".join([*lines, ""])


def main() -> None:
    for claim in claims():
        for file in claim.missing():
            print(f"{file} does not say: {claim.said[file]}")
    write(ROOT / "docs/claims.md", document())
    print("table     docs/claims.md")


if __name__ == "__main__":
    main()
