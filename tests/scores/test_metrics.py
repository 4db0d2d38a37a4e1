"""The table of metrics, by the names that runs record."""

import pytest

from fedray.reports.answer import title_of
from fedray.scores.metrics import METRICS, deciding, higher_is_better, metric_of


@pytest.mark.parametrize(
    ("score", "metric", "title"),
    [
        ("fid", "fid", "fid ↓"),
        ("fid[64]", "fid", "fid[64] ↓"),
        ("fd[digits]", "fd", "fd[digits] ↓"),
        ("fd[digits]@64", "fd", "fd[digits]@64 ↓"),
        ("fd[digits]@inf", "fd", "fd[digits]@inf ↓"),
        ("fid@inf", "fid", "fid@inf ↓"),
        ("cmmd", "cmmd", "cmmd ↓"),
        ("kid[a @ b/c]", "kid", "kid[a @ b/c] ↓"),
        ("precision", "precision", "precision ↑"),
        ("coverage[clip]", "coverage", "coverage[clip] ↑"),
        ("clip-text", "clip-text", "clip-text ↑"),
        ("sure[digits]", "sure", "sure[digits] ↑"),
        ("copies", "copies", "copies"),
        ("held_out.global", "held_out.global", "held-out loss ↓"),
        ("loss", "loss", "training loss ↓"),
        ("fd[digits]/real", None, "fd[digits]/real"),
        ("score.loss", None, "score.loss"),
        ("brightness", None, "brightness"),
        ("fidelity", None, "fidelity"),
    ],
)
def test_names_that_runs_record_are_found_in_the_table(score, metric, title):
    found = metric_of(score)
    assert (found and found.name) == metric
    assert title_of(score) == title
    assert higher_is_better(score) == title.endswith("↑")


def test_a_frechet_distance_decides_before_a_kernel_distance_before_a_loss():
    names = [
        "loss",
        "held_out.global",
        "precision",
        "kid",
        "fd[digits]@64",
        "fd[digits]@inf",
        "fd[digits]/real",
        "fd[digits]",
        "fid",
    ]
    order = []
    while (best := deciding(names)) is not None:
        order.append(best)
        names.remove(best)
    assert order == ["fd[digits]", "fid", "kid", "held_out.global", "loss"]
    assert deciding(["brightness"]) is None


def test_less_is_better_of_all_that_decides():
    assert all(metric.higher_is_better is False for metric in METRICS.values() if metric.rank is not None)
