"""The ledger of releases, on whole runs: stopped between noise and checkpoint, resumed, out of budget."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from runs import killed_before_checkpoint, sha, train

from fedray.errors import RunError, UserError
from fedray.federation.fit import prepare
from fedray.privacy import epsilon, release_of
from fedray.record.card import privacy_of
from fedray.record.run import Run
from fedray.record.spending import Spending
from fedray.wire.privacy import Noise


@pytest.fixture
def config(toy_config):
    return toy_config(labels=6, wire="clip:0.3,noise:2", cohort="poisson:0.5", rounds=4, evaluate_samples=0)


def ledger(out):
    return [json.loads(line) for line in (out / "privacy.jsonl").read_text().splitlines()]


def test_every_row_says_what_is_spent(config, tmp_path):
    rows = train(config, tmp_path / "run")
    release = release_of(config)
    assert [row["privacy"]["epsilon"] for row in rows] == [epsilon({release: n}, 1e-5) for n in (1, 2, 3, 4)]
    assert len(ledger(tmp_path / "run")) == 4
    result = Run.open(tmp_path / "run").result["privacy"]
    assert result["epsilon"] == rows[-1]["privacy"]["epsilon"] > result["exact_epsilon"] > 0
    assert (result["delta"], result["repeatable"], result["releases"]) == (1e-5, True, 4)
    assert "the run's seed, which must stay secret" in privacy_of({"privacy": result})


@pytest.mark.parametrize(("cohort", "sensitivity"), [("poisson:0.5", 1), ("fixed:0.5", 2), ("fixed:1.0", 1)])
def test_what_holds_where_it_is_known_who_took_part(config, tmp_path, cohort, sensitivity):
    """Three Gaussian releases of all clients: the least of their Rényi bounds (Canonne et al. 2020, proposition 12)."""
    config = replace(config, cohort=cohort, wire="clip:0.3,noise:6", rounds=3)
    train(config, tmp_path / "run")
    spent = Run.open(tmp_path / "run").result["privacy"]
    orders = np.arange(1.01, 200, 0.01)
    divergence = orders * 3 * sensitivity**2 / (2 * 6**2)
    least = (divergence + np.log1p(-1 / orders) - np.log(1e-5 * orders) / (orders - 1)).min()
    assert spent["epsilon_of_known_cohorts"] == pytest.approx(least, rel=5e-3)
    assert (spent["epsilon"] < spent["epsilon_of_known_cohorts"]) == (cohort != "fixed:1.0")
    assert ("to those who know which clients took part" in privacy_of({"privacy": spent})) == (cohort != "fixed:1.0")


def test_the_line_is_written_before_the_noise_is_drawn(config, tmp_path, monkeypatch):
    right, seen = Noise.finish, []

    def finish(link, total, weight, round, survivors):
        if (tmp_path / "run").exists():  # not yet in the round of one client that looks at the algorithm before the run
            seen.append(len(ledger(tmp_path / "run")))
        return right(link, total, weight, round, survivors)

    monkeypatch.setattr(Noise, "finish", finish)
    train(config, tmp_path / "run")
    assert seen == [1, 2, 3, 4]


def test_a_round_done_again_with_the_same_noise_counts_once(config, tmp_path, monkeypatch):
    train(config, tmp_path / "whole")
    killed_before_checkpoint(config, tmp_path / "killed", monkeypatch, 3)
    assert len(ledger(tmp_path / "killed")) == 3
    rows = train(config, tmp_path / "killed", resume=True)
    assert len(ledger(tmp_path / "killed")) == 5
    assert rows[-1]["privacy"]["releases"] == 4
    assert sha(tmp_path / "killed") == sha(tmp_path / "whole")


def resumed_without(config, out, lost):
    """Go on with a run, one client of which fails from now on."""
    config = replace(config, task=replace(config.task, failing=(lost,)))
    saved = json.loads((out / "config.json").read_text())
    saved["config"]["task"] = config.to_json()["task"]
    (out / "config.json").write_text(json.dumps(saved))
    return train(config, out, resume=True)


@pytest.fixture
def noises(monkeypatch):
    """What is added to sums, by round."""
    right, seen = Noise.finish, {}

    def finish(link, total, weight, round, survivors):
        noisy, weight = right(link, total.clone(), weight, round, survivors)
        if round.transcript:  # not in the round of one client that looks at the algorithm before the run
            seen.setdefault(round.number, []).append((noisy - total).numpy())
        return noisy, weight

    monkeypatch.setattr(Noise, "finish", finish)
    return seen


def test_with_other_survivors_it_counts_again_and_its_noise_is_other(config, tmp_path, monkeypatch, noises):
    """Else the difference of both sums would be a client's update, without noise."""
    killed_before_checkpoint(config, tmp_path / "killed", monkeypatch, 3)
    lost = prepare(config, Run(tmp_path / "x")).round(config, 2).cohort[0]
    rows = resumed_without(config, tmp_path / "killed", lost)
    assert [row["privacy"]["releases"] for row in rows] == [4, 5]
    first, second = noises[2]
    assert not np.isclose(first, second).any()
    release = release_of(config)
    twice = replace(release, multiplier=2 / 2**0.5)  # of one draw of clients
    assert rows[-1]["privacy"]["epsilon"] == epsilon({release: 3, twice: 1}, 1e-5) > epsilon({release: 5}, 1e-5)


def test_from_another_model_it_counts_again_though_the_same_clients_take_part(config, tmp_path, monkeypatch, noises):
    config = replace(config, checkpoint_every=3, seed=1)
    killed_before_checkpoint(config, tmp_path / "killed", monkeypatch, 3)
    plan = prepare(config, Run(tmp_path / "x"))
    assert [plan.round(config, number).cohort for number in range(3)] == [(3, 4, 5), (0, 2), (2, 4)]
    rows = resumed_without(config, tmp_path / "killed", lost=3)
    assert rows[-1]["privacy"]["releases"] == 3 + 4
    for first, second in (noises[number] for number in range(3)):
        assert not np.isclose(first, second).any()


def test_where_all_take_part_two_tries_are_two_rounds(toy_config, tmp_path):
    release = release_of(toy_config(wire="clip:1,noise:3"))
    line = {"release": asdict(release), "secure_noise": False}
    spending = Spending(tmp_path, release, 1e-5, None)
    spending.lines = [{**line, "round": 1, "transcript": each} for each in "abb"]
    assert spending.spent()["epsilon"] == pytest.approx(epsilon({release: 2}, 1e-5), rel=1e-9)
    assert spending.spent()["releases"] == 2


def test_with_new_noise_it_counts_again(config, tmp_path, monkeypatch):
    config = replace(config, secure_noise=True)
    killed_before_checkpoint(config, tmp_path / "killed", monkeypatch, 3)
    rows = train(config, tmp_path / "killed", resume=True)
    assert [row["privacy"]["releases"] for row in rows] == [4, 5]
    assert not Run.open(tmp_path / "killed").result["privacy"]["repeatable"]
    train(config, tmp_path / "again")
    assert sha(tmp_path / "again") != sha(tmp_path / "killed")


@pytest.mark.parametrize("secure", [False, True])
def test_a_run_stops_before_the_round_that_it_cannot_afford(config, tmp_path, monkeypatch, secure):
    release = release_of(config)
    enough = epsilon({release: 4}, 1e-5)
    if secure:  # the third round is released twice
        enough = epsilon({release: 2, replace(release, multiplier=2 / 2**0.5): 1}, 1e-5)
    config = replace(config, secure_noise=secure, max_epsilon=enough)
    killed_before_checkpoint(config, tmp_path / "run", monkeypatch, 3)
    if secure:
        with pytest.raises(RunError, match="round 4 would spend ε = .* --max-epsilon .* stops after 3 rounds"):
            train(config, tmp_path / "run", resume=True)
        assert len(ledger(tmp_path / "run")) == 4
        assert len(Run.open(tmp_path / "run").rows) == 3
    else:
        assert len(train(config, tmp_path / "run", resume=True)) == 2
    with pytest.raises(UserError, match="is enough for 3 of 4 rounds"):
        replace(config, max_epsilon=epsilon({release: 4}, 1e-5) - 1e-6).check()


def test_a_line_that_a_kill_cut_short_did_not_count(config, tmp_path):
    train(config, tmp_path / "run", rounds=2)
    path = tmp_path / "run/privacy.jsonl"
    path.write_text(cut := path.read_text() + '{"round": 3, "rel')
    assert Spending(tmp_path / "run", release_of(config), 1e-5, None).spent()["releases"] == 2
    assert path.read_text() == cut  # to read it changes nothing: the run may be writing
    train(config, tmp_path / "run", resume=True)
    assert len(ledger(tmp_path / "run")) in (4, 5)  # the third may have been released when the run was stopped
    assert Spending(tmp_path / "run", release_of(config), 1e-5, None).spent()["releases"] == 4


def test_empty_rounds_get_their_noise_and_count(toy_config, tmp_path):
    """Two of three rounds are empty; the model moves by noise over q N, and by nothing without noise."""
    config = toy_config(labels=6, wire="clip:0.3,noise:2", cohort="poisson:0.02", rounds=3, evaluate_samples=0)
    rows = train(config, tmp_path / "noisy")
    empty = [row for row in rows if not row["cohort"]]
    assert len(empty) >= 2
    assert all(row["loss"] is None and row["examples"] == 0 for row in empty)
    assert rows[-1]["privacy"]["releases"] == 3
    plan = prepare(config, Run(tmp_path / "x"))
    first = next(row["round"] for row in empty) - 1
    assert first == 0
    train(config, tmp_path / "one", rounds=1)
    moved = Run.open(tmp_path / "one").state(plan.layout)
    if moved.round == 1:
        (line,) = ledger(tmp_path / "one")
        drawn = replace(plan.round(config, 0), transcript=line["transcript"]).noise(16, "noise")
        assert torch.allclose(moved.tensors["model"], plan.initial + (drawn * 0.6 / 0.12).float(), atol=1e-5)
    quiet = replace(config, wire="float32")
    rows = train(quiet, tmp_path / "quiet", rounds=1)
    assert rows[0]["cohort"] == []
    state = Run.open(tmp_path / "quiet").state(plan.layout)
    assert torch.equal(state.tensors["model"], plan.initial)


def test_an_algorithm_that_needs_more_than_the_noisy_mean_is_refused(toy_config, tmp_path):
    config = toy_config(wire="clip:1,noise:1", algorithm="scaffold", optimizer="sgd")
    with pytest.raises(UserError, match="scaffold needs more of its clients than noise"):
        prepare(config, Run(tmp_path / "run"))


def test_results_and_the_page_say_what_is_spent(toy_config, tmp_path):
    from fedray.reports.page import write
    from fedray.reports.results import load, summary

    config = toy_config(labels=6, wire="clip:0.3,noise:2", cohort="poisson:0.02", rounds=3, evaluate_samples=0)
    rows = train(config, tmp_path / "run")
    frame = load(tmp_path / "run").rounds
    assert frame["privacy.epsilon"].tolist() == [row["privacy"]["epsilon"] for row in rows]
    assert [row["loss"] is None for row in rows] == [True, False, True]  # nobody takes part
    assert frame["loss"].isna().tolist() == [True, False, False]
    assert frame["loss"][2] == rows[1]["loss"]
    assert summary({"run": tmp_path / "run"}).loc["run", "ε"] == rows[-1]["privacy"]["epsilon"]
    write([tmp_path / "run"], tmp_path / "page.html")
    assert "noise over the clip" in (tmp_path / "page.html").read_text()
