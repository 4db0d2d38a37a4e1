"""What a long run would take, from a rehearsal."""

from dataclasses import replace

import pytest

from fedray.cli import main
from fedray.commands import share
from fedray.errors import RunError
from fedray.federation.plan import machine_memory, make_plan
from fedray.federation.pool import LocalPool
from fedray.federation.rehearsal import Rehearsal, measure, predict


def test_clients_are_dealt_to_who_is_free_first(toy_config):
    """Four clients, one step each of 2 s, and 1 s beyond; three workers end at 3, 3 and 6 s."""
    config = toy_config(rounds=5, local_steps=1, local_epochs=None, evaluate_samples=0)
    found = predict(config, make_plan(config), Rehearsal(1.0, 2.0, 0.0, 0.0, 0, 1, 3, 0.0))
    assert found == (5 * 6.0, 0.0, 6.0)


def test_batches_of_samples_are_counted_with_the_smaller_last_one(toy_config):
    """40 samples in batches of 16: 16, 16, 8; each of 0.5 s and 10 denoising steps of 0.25 s. Twice, by one worker."""
    config = toy_config(rounds=4, evaluate_samples=40, eval_batch_size=16, evaluate_every=2, sampling_steps=10)
    found = predict(config, make_plan(config), Rehearsal(0.0, 0.0, 0.5, 0.25, 0, 1, 1, 0.0))
    assert found.evaluation == pytest.approx(2 * (3.0 + 3.0 + 1.5))


def test_a_slow_client_is_measured_and_nothing_is_changed(toy_config):
    config = toy_config(local_steps=3, local_epochs=None, evaluate_samples=0)
    config = replace(config, task=replace(config.task, slow=(0, 1, 2, 3), pause=0.1))
    pool = LocalPool(config)
    plan = make_plan(config)
    before = plan.initial.clone()
    found = measure(config, plan, pool)
    assert 0.05 <= found.step < 2
    assert found.seconds >= 6 * 0.1
    assert found.memory > 0
    assert found.fit == int(machine_memory() / (1.1 * found.memory))
    assert pool.worker.config == config
    assert (plan.initial == before).all()


def test_what_the_run_would_fail_at_is_told(toy_config):
    config = toy_config(local_steps=3, local_epochs=None, evaluate_samples=0)
    config = replace(config, task=replace(config.task, failing=(0, 1, 2, 3)))
    with pytest.raises(RunError, match="this client's camera is broken"):
        measure(config, make_plan(config), LocalPool(config))


@pytest.mark.slow
def test_by_the_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smoke = ["--actors", "0", "--test-share", "0.9", "--evaluate-samples", "4", "--sampling-steps", "2"]
    assert main(["plan", "--preset", "digits", "--rounds", "3", *smoke]) == 0
    said = capsys.readouterr().out
    for name in ("a step", "samples", "memory", "disk", "start", "training", "evaluation", "in all", "limit"):
        assert name in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "whole"),
    [
        (["--gpus-per-actor", "auto", "--out", "auto"], ["--gpus-per-actor", "1", "--out", "auto"]),
        (["--gpus_per_actor=auto"], ["--gpus-per-actor=1"]),
        (["--gpus-per-actor", "0.5"], ["--gpus-per-actor", "0.5"]),
    ],
)
def test_auto_asks_for_a_whole_gpu_first(words, whole):
    assert share.whole(words) == (whole, whole != words)


@pytest.mark.parametrize(
    ("changes", "fit", "expected"),
    [
        ({}, 3, 3),
        ({"cpus_per_actor": 0.5}, 9, 2),  # two CPUs and two GPUs of the first node
        ({"fraction": 0.5}, 9, 2),  # six clients on three GPUs
        ({"actors": 4}, 9, 2),
        ({}, 0, 1),
    ],
)
def test_as_many_actors_share_a_gpu_as_have_memory_cpus_and_clients(toy_config, changes, fit, expected):
    nodes = [{"CPU": 2, "GPU": 2}, {"CPU": 2, "GPU": 1}, {"CPU": 2}]
    config = toy_config(**{"labels": 12, "clients": 12, "actors": None, "cpus_per_actor": 0.1} | changes)
    assert share.actors_on_a_gpu(config, fit, nodes) == expected
