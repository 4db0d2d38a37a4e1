"""The ledger of what clients release of their examples, on whole runs: tries that were lost, failed and done again."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from memory import memory_config
from runs import Memories, killed_before_checkpoint, sha, train, whole_round

from fedray.commands.audit import spent as spent_of
from fedray.errors import RunError, UserError
from fedray.federation.causes import Cause
from fedray.federation.examples import Private
from fedray.federation.fit import prepare
from fedray.federation.plan import make_plan
from fedray.federation.pool import LocalPool
from fedray.federation.round import Session
from fedray.privacy import Release, epsilon, release_of
from fedray.record.checkpoint import State
from fedray.record.run import Run

LEDGER = "example-privacy.jsonl"


@pytest.fixture
def config():
    """Three clients, of 22, 21 and 21 images, that all take part in three rounds of six steps."""
    return memory_config(algorithm="dpsgd:0.5:1.5", clients=3, rounds=3)


def ledger(out):
    return [json.loads(line) for line in (out / LEDGER).read_text().splitlines()]


def proved(images, tries, noise=1.5):
    """ε of so many tries of six steps, of a batch of 8 on average."""
    return epsilon({Release(noise, images, 8, 8 / images): 6 * tries}, 1e-5)


@pytest.fixture
def noises(monkeypatch):
    """The noise of first steps, by round and client."""
    right, seen = Private.finish, {}

    def finish(private, gradient):
        before = gradient.clone()
        right(private, gradient)
        if private.step == 1:
            noise = (gradient * private.expected - before).numpy()
            seen.setdefault((private.round.number, private.client), []).append(noise)

    monkeypatch.setattr(Private, "finish", finish)
    return seen


def same(noises, key):
    """Tell whether two tries had the same noise, but for the rounding of what it was added to; they had, or not."""
    first, second = noises[key]
    equal = np.allclose(first, second, atol=1e-4)
    assert equal or abs(np.corrcoef(first, second)[0, 1]) < 0.05
    return equal


class Losing(LocalPool):
    """A pool that loses a client's first two replies in round 2, after the client has sent all of it."""

    lost = 0

    def map(self, work, shared, jobs, progress):
        for reply in super().map(work, shared, jobs, progress):
            for job in getattr(reply.job, "jobs", ()):
                if (job.round, job.client) == (1, 2) and self.lost < 2:
                    self.lost += 1
                    reply = replace(reply, lost="its node is gone", cause=Cause.NODE)
            yield reply


@pytest.mark.parametrize("secure", [False, True])
def test_a_try_that_was_lost_counts_where_its_noise_is_its_own(config, tmp_path, noises, secure):
    config = replace(config, secure_noise=secure)
    rows = train(config, tmp_path / "run", pool=Losing(config))
    assert rows[1]["ledger"]["actors_lost"] == 2
    assert len(noises[1, 2]) == 3
    assert same({0: noises[1, 2][:2]}, 0) != secure
    tries = [5 if secure else 3, 3]  # of client 2, and of the others
    found = Run.open(tmp_path / "run").result["example_privacy"]
    assert found["clients"] == {"0": proved(22, 3), "1": proved(21, 3), "2": proved(21, tries[0])}
    assert found["epsilon"] == max(found["clients"].values())
    assert [client["epsilon"] for client in rows[1]["clients"]][2] == proved(21, tries[0] - 1)
    counted = Counter(client for line in ledger(tmp_path / "run") for client in line["clients"])
    assert counted == {0: 3, 1: 3, 2: tries[0]}


@pytest.mark.parametrize(("secure", "retries"), [(False, 1), (True, 1), (True, 0)])
def test_a_try_that_failed_counts_too(config, tmp_path, monkeypatch, secure, retries):
    """At its last step; the server is told why. Left out of the round, the client has spent all the same."""
    right, failed = Private.finish, []

    def finish(private, gradient):
        right(private, gradient)
        if (private.round.number, private.client, private.step) == (1, 1, 6) and not failed:
            failed.append(True)
            raise ValueError("the camera is on fire")

    monkeypatch.setattr(Private, "finish", finish)
    config = replace(config, secure_noise=secure, client_retries=retries)
    rows = train(config, tmp_path / "run")
    assert failed
    (row,) = [client for client in rows[1]["clients"] if client["client"] == 1]
    assert (row["outcome"] == "ok") == (retries > 0)
    tries = 3 if not secure or not retries else 4
    assert row["epsilon"] == proved(21, tries - 1)
    assert Run.open(tmp_path / "run").result["example_privacy"]["clients"]["1"] == proved(21, tries)


def test_a_round_done_again_from_the_same_counts_once(config, tmp_path, monkeypatch, noises):
    train(config, tmp_path / "whole")
    noises.clear()
    killed_before_checkpoint(config, tmp_path / "killed", monkeypatch, 2)
    train(config, tmp_path / "killed", resume=True)
    assert same(noises, (1, 0))
    assert sha(tmp_path / "killed") == sha(tmp_path / "whole")
    assert ledger(tmp_path / "killed") == ledger(tmp_path / "whole")
    results = [Run.open(tmp_path / name).result["example_privacy"] for name in ("whole", "killed")]
    assert results[0] == results[1]


def test_a_run_without_its_ledger_is_not_continued(config, tmp_path, monkeypatch):
    """As versions before it left them: what its clients have released is not known."""
    killed_before_checkpoint(config, tmp_path / "run", monkeypatch, 2)
    (tmp_path / "run" / LEDGER).unlink()
    with pytest.raises(UserError, match="kept no ledger of examples"):
        train(config, tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="nor audited"):
        spent_of(Run.open(tmp_path / "run"), config, make_plan(config))


def test_with_noise_of_the_system_it_counts_again(config, tmp_path, monkeypatch, noises):
    config = replace(config, secure_noise=True)
    killed_before_checkpoint(config, tmp_path / "run", monkeypatch, 2)
    begun = Counter(client for line in ledger(tmp_path / "run") for client in line["clients"])
    assert begun == {0: 2, 1: 2, 2: 2}  # round 3 had not begun
    train(config, tmp_path / "run", resume=True)
    assert not same(noises, (1, 0))
    found = Run.open(tmp_path / "run").result["example_privacy"]["clients"]
    assert found == {"0": proved(22, 4), "1": proved(21, 4), "2": proved(21, 4)}


def test_from_another_model_it_counts_again(config, tmp_path, monkeypatch, noises):
    """No checkpoint until all is done; client 1 fails in the second try of round 1, so round 2 begins elsewhere."""
    config = replace(config, checkpoint_every=3)
    killed_before_checkpoint(config, tmp_path / "run", monkeypatch, 3)
    right = Private.finish

    def finish(private, gradient):
        if (private.round.number, private.client) == (0, 1):
            raise ValueError("the camera is on fire")
        right(private, gradient)

    monkeypatch.setattr(Private, "finish", finish)
    train(config, tmp_path / "run", resume=True)
    assert same(noises, (0, 0))
    assert not same(noises, (1, 0))
    assert not same(noises, (2, 1))
    found = Run.open(tmp_path / "run").result["example_privacy"]["clients"]
    assert found == {"0": proved(22, 1 + 2 * 2), "1": proved(21, 5), "2": proved(21, 5)}


def test_from_other_memories_the_noise_is_other(tmp_path, noises):
    """Krum chose the same model, while a client that failed in one try kept what its optimizer remembers in another."""
    config = memory_config(algorithm="dpsgd:0.5:1.5", optimizer="adam", keep_optimizer=True, rounds=3)
    plan = prepare(config, Run(tmp_path / "x"))
    for late in (False, True):
        memories, pool = Memories(), LocalPool(config)
        session = Session(config, plan, pool, memories)
        state, _ = whole_round(session, State(0, config.method.init(plan.initial, plan.layout)))
        if late:
            del memories.kept[0, 1]
        whole_round(session, replace(state, tensors={"model": torch.zeros(plan.layout.size)}))
    assert same(noises, (0, 0))
    assert not same(noises, (1, 0))
    assert not same(noises, (1, 1))


def test_the_line_is_on_disk_before_a_client_makes_its_first_step(config, tmp_path, monkeypatch):
    right, seen = Private.draw, []

    def draw(private, examples):
        lines = ledger(tmp_path / "run")
        seen.append(lines[private.round.number]["round"] == private.round.number + 1)
        assert private.client in lines[private.round.number]["clients"]
        return right(private, examples)

    monkeypatch.setattr(Private, "draw", draw)
    train(replace(config, secure_noise=True), tmp_path / "run")
    assert seen == [True] * 3 * 3 * 6


def test_clients_that_drop_out_before_they_train_release_nothing(config, tmp_path):
    config = replace(config, dropout_rate=0.4)
    rows = train(config, tmp_path / "run")
    took = Counter(client["client"] for row in rows for client in row["clients"])
    assert sum(took.values()) < 9
    assert Counter(client for line in ledger(tmp_path / "run") for client in line["clients"]) == took


# Budgets


def test_the_noise_for_a_target_spends_it(tmp_path):
    """Of clients of unequal sizes, drawn unequally often: the worst of them reaches it, and none exceeds it."""
    settings = dict(clients=4, partition="quantity:0.5", fraction=0.5, rounds=6, local_steps=None, local_epochs=2)
    config = memory_config(algorithm="dpsgd:0.5", target_epsilon=3.0, **settings)
    plan = prepare(config, Run(tmp_path / "x"))
    train(config, tmp_path / "run")
    found = Run.open(tmp_path / "run").result["example_privacy"]["clients"]
    assert max(found.values()) == pytest.approx(3, abs=1e-3)
    assert max(found.values()) <= 3
    assert len({round(each, 2) for each in found.values()}) > 1
    given = replace(config, algorithm=f"dpsgd:0.5:{plan.example_noise!r}", target_epsilon=None)
    train(given, tmp_path / "given")
    assert sha(tmp_path / "given") == sha(tmp_path / "run")
    assert Run.open(tmp_path / "given").result["example_privacy"]["clients"] == found


def test_of_two_noises_a_target_finds_the_one_that_is_not_given(tmp_path):
    alone = memory_config(wire="clip:1,noise", target_epsilon=3.0)
    assert prepare(alone, Run(tmp_path / "x")).example_noise == 0
    both = memory_config(algorithm="dpsgd:0.5", wire="clip:1,noise:9", target_epsilon=3.0)
    assert prepare(both, Run(tmp_path / "x")).release.multiplier == 9
    sums = replace(both, algorithm="dpsgd:0.5:9", wire="clip:1,noise")
    plan = prepare(sums, Run(tmp_path / "x"))
    assert plan.example_noise == 9
    assert epsilon({plan.release: 2}, 1e-5) == pytest.approx(3, abs=1e-3)


@pytest.mark.parametrize("secure", [False, True])
def test_a_run_stops_before_a_try_that_it_cannot_afford(config, tmp_path, monkeypatch, secure):
    """Enough for three tries; round 2 is done twice, which are two releases only with noise of the system."""
    config = replace(config, secure_noise=secure, max_epsilon=proved(21, 3) + 1e-9)
    killed_before_checkpoint(config, tmp_path / "run", monkeypatch, 2)
    if not secure:
        assert len(train(config, tmp_path / "run", resume=True)) == 3 - 1
        return
    message = "round 3 would spend ε = .* of examples of client [012], more than --max-epsilon"
    with pytest.raises(RunError, match=message):
        train(config, tmp_path / "run", resume=True)
    assert len(Run.open(tmp_path / "run").rows) == 2
    assert len(ledger(tmp_path / "run")) == 3


def test_a_retry_that_cannot_be_afforded_stops_the_run_too(config, tmp_path):
    config = replace(config, secure_noise=True, max_epsilon=proved(21, 3) + 1e-9)
    with pytest.raises(RunError, match="round 2 would spend|round 3 would spend"):
        train(config, tmp_path / "run", pool=Losing(config))
    counted = Counter(client for line in ledger(tmp_path / "run") for client in line["clients"])
    assert counted[2] == 3


def test_a_run_that_would_spend_more_is_refused_before_it_begins(config, tmp_path):
    config = replace(config, max_epsilon=proved(21, 3) - 1e-6)
    with pytest.raises(UserError, match=r"is enough for 2 of 3 rounds of --algorithm dpsgd:0.5:1.5:fedavg\.$"):
        prepare(config, Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"algorithm": "dpsgd:1"},
            r"--algorithm dpsgd:1:fedavg: give its multiplier .* or --target-epsilon to find it",
        ),
        ({"target_epsilon": 1.0}, "one is given .*; leave one of them out"),
        (
            {"algorithm": "dpsgd:1", "wire": "clip:1,noise", "target_epsilon": 1.0},
            "finds one noise, and --wire noise and --algorithm dpsgd:1:fedavg have none: give one of them",
        ),
        (
            {"algorithm": "dpsgd:1", "target_epsilon": 1e-9, "delta": 1e-12, "train_batch_size": 64},
            "no noise reaches it in 18 noisy sums",
        ),
    ],
)
def test_noise_that_is_missing_or_given_twice(config, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(replace(config, **changes), Run(tmp_path / "run"))


def test_the_plan_shows_it(config, tmp_path, capsys):
    from fedray.commands.dry_run import print_plan

    print_plan(replace(config, rounds=10, algorithm="dpsgd:0.5", target_epsilon=2.0), tmp_path / "run", False)
    said = " ".join(capsys.readouterr().out.split())
    plan = prepare(replace(config, rounds=10, algorithm="dpsgd:0.5", target_epsilon=2.0), Run(tmp_path / "run"))
    assert f"noise of {plan.example_noise:.4g} times the clip; one example more or less, δ = 1e-05" in said
    some = ", ".join(f"{proved(21, n, plan.example_noise):.3g} after {n}" for n in (1, 2, 5, 10))
    assert f"{some} rounds, at most, of a client" in said
    assert "2 after 10 rounds" in said
    both = replace(config, rounds=10, wire="clip:1,noise:3")
    print_plan(both, tmp_path / "run", False)
    said = " ".join(capsys.readouterr().out.split())
    sums = [epsilon({release_of(both): n}, 1e-5) for n in (1, 2, 5, 10)]
    assert ", ".join(f"{found:.3g} after {n}" for found, n in zip(sums, (1, 2, 5, 10), strict=True)) + " rounds" in said
    assert f"{proved(21, 10):.3g} after 10 rounds, at most, of a client" in said


def test_an_audit_reads_the_ledger(config, tmp_path):
    config = replace(config, secure_noise=True)
    train(config, tmp_path / "run", pool=Losing(config))
    plan, run = prepare(config, Run(tmp_path / "x")), Run.open(tmp_path / "run")
    assert spent_of(run, config, plan) == run.result["example_privacy"]["epsilon"] == proved(21, 5)
