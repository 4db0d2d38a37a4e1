"""SCAFFOLD against numbers worked out by hand, a loop in double precision, and its invariant."""

from dataclasses import replace

import made
import numpy as np
import pytest
import torch
from runs import train, trained_client
from toy import Linear

from fedray.algorithms.scaffold import Scaffold
from fedray.config import Config
from fedray.errors import UserError
from fedray.federation.fit import prepare
from fedray.federation.plan import bytes_planned, make_plan
from fedray.menus import ALGORITHMS
from fedray.record.run import Run
from fedray.wire.float16 import Float16

BOTH = pytest.mark.parametrize("option", [1, 2])


def config(option=2, **changes):
    settings = dict(
        task=Linear(), clients=1, local_epochs=1, train_batch_size=2, optimizer="sgd", learning_rate=0.1,
        max_grad_norm=None, evaluate_samples=0, actors=0, algorithm=f"scaffold:{option}",
    )  # fmt: skip
    return Config(**(settings | changes))


def once(control, option=2, own=None, **changes):
    """What a client changes, its next control variate, and the change of that, which it sends."""
    down = {"control": torch.full((4,), control)}
    memory = {} if own is None else {"control": torch.full((4,), own)}
    made_config = config(option, **changes)
    _, (payload, _, kept) = trained_client(made_config, down, memory)
    start = np.array(made_config.task.w).ravel()
    return payload["model"] - start, kept["algorithm/control"], payload["control"]


@BOTH
@pytest.mark.parametrize(
    ("control", "change", "loss"), [(0.0, [0.05, 0.05, 0.1, 0.1], 3.75), (0.1, [0.04, 0.04, 0.09, 0.09], 3.78)]
)
def test_one_step(control, change, loss, option):
    """Either option makes the gradient of one step at x of the client's variate, whatever corrected that step."""
    moved, own, sent = once(control, option)
    np.testing.assert_allclose(moved, change, atol=1e-6)
    task = Linear()
    after = np.array(task.x) @ (np.array(task.w) + moved.reshape(2, 2)) - task.t
    assert np.abs(after).sum(1).mean() == pytest.approx(loss, abs=1e-6)
    np.testing.assert_allclose(own, [-0.5, -0.5, -1, -1], atol=1e-5)
    assert np.array_equal(own, sent)


@BOTH
def test_one_step_of_a_client_that_remembers(option):
    """w = 1, where SGD alone goes to 1.3: corrected by c_i − c = 0.5 − 2 it goes to 1.15."""
    task = Linear(x=((6.0, 0.0), (0.0, 6.0)), t=((99.0, 99.0), (99.0, 99.0)), w=((1.0, 1.0), (1.0, 1.0)))
    moved, own, sent = once(2.0, option, own=0.5, task=task)
    np.testing.assert_allclose(1 + moved, 1.15, rtol=1e-6)
    np.testing.assert_allclose(own, -3.0, rtol=1e-5)
    np.testing.assert_allclose(sent, -3.5, rtol=1e-5)


def test_the_server_divides_by_all_clients():
    """c = 2, and the mean of the changes of 5 of 100 clients is 0.5."""
    round = made.round_of(dict.fromkeys(range(5), 7), clients=100)
    sent = [{"model": torch.zeros(2), "control": torch.full((2,), k / 4)} for k in range(5)]
    server = {"model": torch.zeros(2), "control": torch.full((2,), 2.0)}
    assert Scaffold().aggregate(server, made.fold(sent, round), round)["control"].tolist() == pytest.approx([2.025] * 2)


def test_option_1_takes_the_gradient_over_all_examples():
    """In batches of 2, the last of 1: against the gradient of the mean loss of all five, by autograd."""
    rng = np.random.default_rng(0)
    task = Linear(
        x=tuple(map(tuple, rng.normal(size=(5, 2)))), t=tuple(map(tuple, rng.normal(size=(5, 2)))), squared=True
    )
    _, own, _ = once(0.0, 1, task=task)
    w = torch.tensor(task.w, dtype=torch.float64, requires_grad=True)
    x, t = (torch.tensor(table, dtype=torch.float64) for table in (task.x, task.t))
    ((x @ w - t).square() / 2).sum(1).mean().backward()
    np.testing.assert_allclose(own, w.grad.ravel(), rtol=1e-5)


@BOTH
def test_rounds_against_a_loop_in_double_precision(tmp_path, option):
    """Three clients of unequal sizes, two of whom take part in a round, with full batches and four local steps."""
    rng = np.random.default_rng(1)
    x, t = rng.normal(size=(12, 2)), rng.normal(size=(12, 2))
    task = Linear(x=tuple(map(tuple, x)), t=tuple(map(tuple, t)), squared=True)
    whole = config(
        option, task=task, clients=3, fraction=0.67, rounds=6, partition="quantity:2", local_epochs=None, local_steps=4,
        train_batch_size=12,
    )  # fmt: skip
    train(whole, tmp_path / "run")
    plan = make_plan(whole)
    w, c, own = np.array(task.w, float), np.zeros((2, 2)), np.zeros((3, 2, 2))
    for number in range(6):
        cohort = plan.round(whole, number).cohort
        assert len(cohort) == 2
        ends, change, sizes = [], 0, []
        for client in cohort:
            shard, y = plan.shards[client], w.copy()

            def gradient(v, shard=shard):
                return x[shard].T @ (x[shard] @ v - t[shard]) / len(shard)

            for _ in range(4):
                y -= 0.1 * (gradient(y) - own[client] + c)
            after = gradient(w) if option == 1 else own[client] - c + (w - y) / (4 * 0.1)
            change = change + (after - own[client])
            own[client] = after
            ends.append(y)
            sizes.append(len(shard))
        w, c = np.average(ends, axis=0, weights=sizes), c + change / 3
    assert len({len(plan.shards[client]) for client in range(3)}) > 1
    state = Run.open(tmp_path / "run").state(plan.layout).tensors
    np.testing.assert_allclose(state["model"], w.ravel(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state["control"], c.ravel(), rtol=1e-4, atol=1e-5)


@BOTH
def test_the_first_round_is_averaging_bit_for_bit(toy_config, tmp_path, option):
    vectors = []
    for name in ("fedavg", f"scaffold:{option}"):
        settings = toy_config(rounds=1, optimizer="sgd", algorithm=name, evaluate_samples=0)
        train(settings, tmp_path / name)
        vectors.append(Run.open(tmp_path / name).result["vector_sha256"])
    assert vectors[0] == vectors[1]


@pytest.mark.parametrize("wire", ["float32", "float16"])
@BOTH
def test_the_servers_variate_is_the_mean_of_the_clients(toy_config, tmp_path, wire, option):
    """c = (1/N) Σ c_i after every round, with a client that fails, others that are not asked, and a stop after each."""
    settings = toy_config(
        labels=6, failing=(2,), fraction=0.67, rounds=6, optimizer="sgd", learning_rate=0.05, evaluate_samples=0,
        algorithm=f"scaffold:{option}", wire=wire,
    )  # fmt: skip
    layout, asked = prepare(settings, Run(tmp_path / "x")).layout, set()
    for number in range(1, 7):
        (row,) = train(settings, tmp_path / "run", resume=number > 1, rounds=1)
        asked |= {client["client"] for client in row["clients"] if client["outcome"] == "ok"}
        run = Run.open(tmp_path / "run")
        own = [run.recall(client, run.generation(client, number)) for client in range(6)]
        own = [kept.get("algorithm/control", torch.zeros(16)) for kept in own]
        assert {client for client in range(6) if own[client].any()} == asked
        control = run.state(layout).tensors["control"]
        torch.testing.assert_close(control, torch.stack(own).mean(0), rtol=1e-5, atol=1e-6)
    assert asked == {0, 1, 3, 4, 5}


def test_links_act_on_the_model_alone(toy_config):
    """Both vectors go down and up; float16 halves the model's bytes and leaves the variate's."""
    settings = toy_config(optimizer="sgd", algorithm="scaffold")
    plan = make_plan(settings)
    assert bytes_planned(settings, plan) == (2 * 64, 2 * 64, 2 * 64)
    assert bytes_planned(replace(settings, wire=(Float16(),)), plan) == (32 + 64, 32 + 64, 32 + 64)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd:momentum=0.9", "sgd:weight_decay=0.1"])
def test_other_optimizers_are_refused(optimizer):
    with pytest.raises(UserError, match="--algorithm scaffold corrects steps of plain SGD, .* use --optimizer sgd"):
        config(optimizer=optimizer).check()
    with pytest.raises(UserError, match="algorithm 'scaffold:3': option is 3; it must be 1 or 2"):
        ALGORITHMS.parse("scaffold:3")
