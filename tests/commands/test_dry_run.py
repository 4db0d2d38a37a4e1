"""The plan that --dry-run prints."""

import re

import numpy as np
import pytest

from fedray.cli import main
from fedray.commands.dry_run import labels_held
from fedray.config import Config
from fedray.data.partition import ByFolder, Dirichlet
from fedray.data.sources import digits
from fedray.federation.plan import disk_needed, make_plan
from fedray.files import size
from fedray.tasks.ddpm import DDPM


def test_labels_of_each_client_are_counted():
    """Against a count of the shards themselves."""
    config = Config(clients=5, partition=Dirichlet(0.3), held_out_share=0.2, local_epochs=1)
    plan, labels = make_plan(config), digits().labels
    for client, text in enumerate(labels_held(plan)):
        mine = labels[np.concatenate([shards[client] for shards in plan.parts.values()])]
        counts = {int(label): int(count) for label, count in zip(*np.unique(mine, return_counts=True), strict=True)}
        told = {int(label): int(count.replace(",", "")) for label, count in re.findall(r"(\d+) \(([\d,]+)\)", text)}
        assert told == {label: counts[label] for label in told}
        assert len(told) == min(6, len(counts))
        assert min(told.values()) >= max([counts[label] for label in counts if label not in told], default=0)
        assert (", " + f"{len(counts) - 6} more" in text) == (len(counts) > 6)


def test_a_plan_names_parts_places_and_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = (
        "--clients 3 --held-out-share 0.1 --test-share 0.2 --dropout-rate 0.25 --rounds 3 --evaluate-every 1 --out here"
    )
    assert main(["train", "--dry-run", *flags.split()]) == 0
    said = capsys.readouterr().out
    plan = make_plan(Config(clients=3, held_out_share=0.1, test_share=0.2, local_epochs=1))
    for name, parts in (("held out", plan.held_out), ("kept for tests", plan.test)):
        assert re.search(rf"examples {name} +│ {parts.sizes.sum():,} ", said)
    for words in ("25% of those", "3, of 512 samples", "here", "checkpoints", "model 638.8 kB", "labels (examples)"):
        assert words in said
    assert list(tmp_path.iterdir()) == []


def test_folders_are_named(photos):
    config = Config(
        task=DDPM("imagefolder", str(photos), resolution=8), clients=2, partition=ByFolder(), local_epochs=1,
        features=None,
    )  # fmt: skip
    held = labels_held(make_plan(config))
    assert len(held) == 2
    names = {path.name for path in photos.iterdir()}
    assert {name for text in held for name in re.findall(r"([^,(]+) \(4\)", text.replace(", ", ","))} <= names


def test_a_directory_that_is_taken_is_told_before(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").touch()
    assert main(["train", "--dry-run", "--out", str(tmp_path / "run")]) == 2
    assert "is not an empty directory" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{}, {"keep_optimizer": True}])
def test_the_disk_that_is_told_is_what_is_checked(settings):
    config = Config(local_epochs=1, **settings)
    needed = disk_needed(config, make_plan(config))
    assert ("kB" in size(needed["clients' memories"])) == (not settings)
