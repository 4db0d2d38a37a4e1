"""Tables where the output is no terminal."""

import numpy as np
import pandas as pd

from fedray.commands.terminal import print_frame, print_scores
from fedray.federation.evaluation import Evaluation
from fedray.scores.metrics import Score


def test_in_a_file_nothing_is_cut(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    frame = pd.DataFrame({f"a long name {index}": [f"value {index} " * 4] for index in range(12)}, index=["row"])
    print_frame(frame.rename_axis("setting"))
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert len(lines) == 5
    for index in range(12):
        assert f"a long name {index}" in lines[1]
        assert (f"value {index} " * 4).strip() in lines[3]
    assert "…" not in said


def test_the_scale_of_the_kernel_distance_is_said(capsys):
    scores = {"kid[digits]": Score(0.5, 100), "fd[digits]": Score(2.0, 100)}
    print_scores("scores", Evaluation(np.zeros((1, 1, 8, 8), np.uint8), scores, {"refused": {}}))
    lines = capsys.readouterr().out.splitlines()
    assert ["times 1,000" in line for line in lines if "digits" in line] == [True, False]
