"""Sentences on what weakens a run's privacy."""

import pytest

from fedray.cli import main
from fedray.commands.cautions import cautions

SEED = "the noise follows from --seed 0, the default"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"delta": 0.9}, []),
        ({"wire": "clip:1,noise:1"}, [SEED]),
        ({"algorithm": "dpsgd:1:1"}, [SEED]),
        ({"wire": "clip:1,noise:1", "seed": 3}, []),
        ({"wire": "clip:1,noise:1", "secure_noise": True}, []),
        ({"wire": "clip:1,noise:1", "secure_noise": True, "cohort": "poisson:0.5"}, ["who takes part follows from"]),
        ({"wire": "clip:1,noise:1", "secure_noise": True, "cohort": "poisson:0.5", "seed": 3}, []),
        ({"wire": "clip:1,noise:1", "seed": 3, "delta": 0.24}, []),
        ({"wire": "clip:1,noise:1", "seed": 3, "delta": 0.25}, ["--delta 0.25 is not below one over 4 clients"]),
        ({"algorithm": "dpsgd:1:1", "seed": 3, "delta": 0.2}, ["one over a client's {most} examples"]),
        ({"algorithm": "dpsgd:1:1", "seed": 3, "delta": 1e-3}, []),
    ],
    ids=str,
)
def test_what_is_told(toy_config, changes, expected):
    config = toy_config(labels=4, **changes)
    config.check()
    dataset = config.task.dataset()
    most = max(len(shard) for shard in config.partition.split(dataset, 4, None))
    found = cautions(config, dataset)
    assert len(found) == len(expected)
    assert all(part.format(most=most) in sentence for part, sentence in zip(expected, found, strict=True))


def test_it_is_told_before_the_run(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")  # so that it ends there
    words = ["train", "--preset", "digits", "--wire", "clip:1,noise:1", "--actors", "0", "--evaluate-samples", "0"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert SEED in capsys.readouterr().err
