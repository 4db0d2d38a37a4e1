"""Clients that drop out of a round before they train."""

from dataclasses import replace

import pytest
from runs import sha, train

from fedray.algorithms.cohorts import Poisson
from fedray.errors import RunError, UserError
from fedray.federation.cohort import dropped_of
from fedray.federation.plan import make_plan
from fedray.record.run import Run


def test_as_many_drop_out_as_the_rate_says(toy_config):
    """Over 500 rounds of 4 clients: binomial, with a standard deviation of 20; others in every round, and per seed."""
    config = toy_config(rounds=500, dropout_rate=0.3)
    plan = make_plan(config)
    draws = [dropped_of(config, plan.round(config, number)) for number in range(500)]
    assert abs(sum(map(len, draws)) - 600) < 80
    for client in range(4):
        assert abs(sum(client in draw for draw in draws) - 150) < 40
    other = replace(config, seed=1)
    assert draws != [dropped_of(other, make_plan(other).round(other, number)) for number in range(500)]
    assert not dropped_of(replace(config, dropout_rate=0.0), plan.round(config, 0))


def test_who_drops_out_is_in_no_mean(toy_config, tmp_path):
    """The round is that of the others, as if those had failed; the ledger counts them apart."""
    config = toy_config(rounds=1, dropout_rate=0.4, seed=3)
    (row,) = train(config, tmp_path / "run")
    dropped = row["dropped"]
    assert 0 < len(dropped) < 4
    ledger = row["ledger"]
    assert (ledger["dropped"], ledger["asked"], ledger["folded"], ledger["failed"]) == (
        len(dropped), 4 - len(dropped), 4 - len(dropped), 0,
    )  # fmt: skip
    assert [client["client"] for client in row["clients"]] == [c for c in range(4) if c not in dropped]
    assert row["cohort"] == [0, 1, 2, 3]
    (other,) = train(toy_config(rounds=1, seed=3, failing=tuple(dropped)), tmp_path / "failed")
    assert other["ledger"]["failed"] == len(dropped)
    assert sha(tmp_path / "run") == sha(tmp_path / "failed")


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"keep_optimizer": True}, {"cohort": Poisson(0.7)}, {"fold": "median"}, {"fold": "secure:0.2", "labels": 8},
        {"algorithm": "scaffold", "optimizer": "sgd"}, {"wire": "feedback:topk:0.2"}, {"use_ema": True},
        {"algorithm": "ditto:0.1:fedavg"}, {"wire": "clip:1.0,noise:1.0"}, {"held_out_share": 0.25},
    ],
    ids=str,
)  # fmt: skip
def test_a_stopped_run_resumes_with_the_same_drop_outs(toy_config, tmp_path, settings):
    config = toy_config(rounds=6, dropout_rate=0.4, seed=3, **settings)
    whole = train(config, tmp_path / "whole")
    assert len({tuple(row["dropped"]) for row in whole}) > 1
    first = train(config, tmp_path / "stopped", rounds=3)
    rest = train(config, tmp_path / "stopped", resume=True)
    assert {row["round"]: row["dropped"] for row in [*first, *rest]} == {row["round"]: row["dropped"] for row in whole}
    assert sha(tmp_path / "stopped") == sha(tmp_path / "whole")


def test_a_round_may_lose_all_unless_some_are_needed(toy_config, tmp_path):
    config = toy_config(rounds=4, dropout_rate=0.95)
    rows = train(config, tmp_path / "run")
    empty = [row for row in rows if len(row["dropped"]) == 4]
    assert empty
    assert all(row["loss"] is None for row in empty)
    assert Run.open(tmp_path / "run").result["rounds"] == 4
    with pytest.raises(RunError, match=r"took part \(\d dropped out\), fewer than --min-clients 2"):
        train(replace(config, min_clients=2), tmp_path / "needed")


def test_rates_that_are_none(toy_config):
    for rate in (-0.1, 1.0):
        with pytest.raises(UserError, match="--dropout-rate"):
            toy_config(dropout_rate=rate).check()
    with pytest.raises(UserError, match="a client that trains alone"):
        toy_config(dropout_rate=0.5, only_client=0).check()
