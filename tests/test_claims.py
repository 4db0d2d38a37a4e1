"""The numbers of gallery.md and LOG.md against the results that are kept."""

import shutil
from pathlib import Path

import claims
import numpy as np
import pandas as pd
import pytest
from scipy import stats

ROOT = Path(__file__).parents[1]
AGAIN = "run `python experiments/claims.py`, and say in the prose what it prints"


def test_the_prose_says_what_the_kept_results_say():
    wrong = {words: file for claim in claims.claims() for file in claim.missing() for words in [claim.said[file]]}
    assert not wrong, AGAIN


def test_the_file_of_claims_is_that_of_the_kept_results():
    assert (ROOT / "docs/claims.md").read_text() == claims.document(), AGAIN


def test_kept_results_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "analysis/results").rglob("*") if path.is_file()) < 3_000_000


def test_a_number_is_what_numpy_makes_of_the_table():
    rounds = pd.read_parquet(ROOT / "analysis/results/digits/results.parquet")
    last = rounds[(rounds["round"] == rounds["rounds"]) & (rounds["local_epochs"] == 2)]
    two, eight = (
        last[(last["clients"] == c) & (last["rounds"] == 10 * c)].sort_values("seed")["fd[digits]"].to_numpy()
        for c in (2, 8)
    )
    wanted = stats.ttest_rel(two, eight).confidence_interval(0.95)
    (claim,) = (each for each in claims.claims() if each.about.endswith("C = 2 less C = 8, equal steps"))
    assert claim.number == f"{np.mean(two - eight):.2f}"
    assert claim.interval.startswith(f"{wanted.low:.2f} to {wanted.high:.2f};")
    assert len(claim.runs) == 9


@pytest.mark.parametrize("changed", ["docs/gallery.md", "experiments/LOG.md", "results"])
def test_a_changed_number_is_found(tmp_path, monkeypatch, changed):
    for name in ("docs/gallery.md", "experiments/LOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = (ROOT / name).read_text()
        (tmp_path / name).write_text(text.replace("3.75", "3.76") if name == changed else text)
    results = shutil.copytree(ROOT / "analysis/results/digits", tmp_path / "results")
    if changed == "results":
        rounds = pd.read_parquet(results / "results.parquet")
        rounds.loc[(rounds["clients"] == 8) & (rounds["rounds"] == 80) & (rounds["seed"] == 1), "fd[digits]"] += 0.1
        rounds.to_parquet(results / "results.parquet")
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    monkeypatch.setattr(claims, "RESULTS", results)
    missing = {file for claim in claims.claims() for file in claim.missing()}
    assert missing == ({"docs/gallery.md", "experiments/LOG.md"} if changed == "results" else {changed})
