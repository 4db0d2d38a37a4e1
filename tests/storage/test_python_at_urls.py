"""What Python adds to runs, at URLs: callbacks, trackers, and a run to read from."""

import json

import pytest
from runs import curves, sha

import fedray
from fedray.cli import main
from fedray.errors import RunError
from fedray.storage import shown


class Lines:
    """A tracker: a line for each round, in the run's directory."""

    def start(self, run):
        self.path = run.directory / "lines.txt"
        return json.loads(self.path.read_text().splitlines()[-1]) if self.path.exists() else None

    def log(self, entry):
        with open(self.path, "a") as file:
            file.write(f"{entry.round}\n")

    def finish(self):
        pass


class Enough(fedray.Callback):
    def on_round(self, row):
        return "it is enough" if row["round"] == 2 else None


def test_a_run_is_stopped_read_and_continued_from_another_node(toy_config, tmp_path, place, node):
    config, url = toy_config(rounds=4, evaluate_every=1), f"{place}/a"
    here = fedray.run(config, tmp_path / "here")
    run = fedray.run(config, url, callbacks=[Enough()], report_to=["tensorboard", Lines()])
    assert shown(run.directory) == url
    node("another")
    read = fedray.Run.open(url, config)
    assert repr(read).startswith(f"<fedray.Run {url} · 2 of 4 rounds · ended early: it is enough · loss ")
    assert url in read._repr_html_()
    assert read.frame["loss"].tolist() == here.frame["loss"].tolist()[:2]
    assert read.samples.size == here.samples.size
    assert read.sample(3).equal(run.sample(3))
    again = fedray.run(config, url, resume=True, report_to=["tensorboard", Lines()])
    assert sha(again.directory) == sha(here.directory)
    assert again.scores.equals(here.scores)
    node("a third")
    copy = fedray.Run.open(url, config).directory
    assert (copy / "lines.txt").read_text().split() == ["0", "1", "2", "3", "4"]
    shown_losses = {step: values for (name, step), values in curves(copy).items() if name == "loss"}
    assert shown_losses == {number: [pytest.approx(loss)] for number, loss in enumerate(here.frame["loss"], 1)}


@pytest.mark.parametrize("place", ["memory"], indirect=True)
def test_the_command_that_goes_on_names_the_url_and_the_trackers(place, capsys, monkeypatch):
    flags = ["--rounds", "1", "--local-steps", "1", "--evaluate-samples", "0", "--actors", "0", "--report-to", "none"]
    assert main(["train", *flags, "--out", f"{place}/a"]) == 0

    def broken(*arguments, **named):
        raise RunError("the disk is full.")

    monkeypatch.setattr("fedray.cluster.driver.run", broken)
    assert main(["train", "--resume", f"{place}/a", "--report-to", "none"]) == 1
    assert f"train --resume {place}/a --report-to none\n" in capsys.readouterr().err
