"""FedNova against numbers worked out by hand, closed forms and double precision."""

from dataclasses import replace
from types import SimpleNamespace

import made
import numpy as np
import pytest
import torch
from runs import train, trained_client
from toy import Linear

from fedray.algorithms.fednova import FedNova
from fedray.config import Config
from fedray.errors import UserError
from fedray.federation.plan import make_plan
from fedray.record.run import Run


def config(**changes):
    settings = dict(
        task=Linear(), clients=1, local_steps=7, train_batch_size=2, optimizer="sgd", learning_rate=0.01,
        max_grad_norm=None, evaluate_samples=0, actors=0, algorithm="fednova",
    )  # fmt: skip
    return Config(**(settings | changes))


def aggregated(ends, reaches, examples):
    """The server's next model, from 0, of clients that end there."""
    method, round = FedNova(), made.round_of(dict(enumerate(examples)))
    sent, rows = [], []
    for end, reach in zip(ends, reaches, strict=True):
        local = SimpleNamespace(weights=torch.full((2,), end), total_learning_rate=reach)
        tensors, numbers, _ = method.upload(local, {"model": torch.zeros(2)}, {})
        sent.append(tensors)
        rows.append(numbers)
    server = {"model": torch.zeros(2)}
    return method.aggregate(server, made.fold(sent, round, rows=rows), round)["model"].tolist()


def test_two_clients_that_make_one_step_and_three():
    """They move by 1 and 9, of which the mean is 5; normalised, 2 steps of (1 + 3) / 2."""
    for rate in (1.0, 0.01):
        assert aggregated((-1.0, -9.0), (rate, 3 * rate), (5, 5)) == pytest.approx([-4.0] * 2)
    assert aggregated((-1.0, -9.0), (1.0, 3.0), (3, 1)) == pytest.approx([-1.5 * 1.5] * 2)  # weights 3 : 1
    assert aggregated((-1.0, -9.0), (2.0, 2.0), (3, 1)) == pytest.approx([-3.0] * 2)  # equally far: the plain mean


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_what_travels_is_the_mean_gradient_whatever_the_momentum(momentum):
    """‖a‖₁ = [K − ρ (1 − ρ^K) / (1 − ρ)] / (1 − ρ); of a constant gradient, the change is −η ‖a‖₁ g."""
    _, (payload, rows, _) = trained_client(config(optimizer=f"sgd:momentum={momentum}"))
    norm = (7 - momentum * (1 - momentum**7) / (1 - momentum)) / (1 - momentum)
    assert rows["reach"] == pytest.approx(0.01 * norm)
    direction = payload["model"] - np.array(Linear().w).ravel()
    np.testing.assert_allclose(direction, [0.5, 0.5, 1, 1], rtol=1e-4)


def test_schedules_of_the_learning_rate_count():
    """A linear one over a run of one round: η (1 + 6/7 + … + 1/7)."""
    _, (payload, rows, _) = trained_client(config(lr_scheduler="linear", rounds=1))
    assert rows["reach"] == pytest.approx(0.01 * sum(k / 7 for k in range(1, 8)))
    np.testing.assert_allclose(payload["model"] - np.array(Linear().w).ravel(), [0.5, 0.5, 1, 1], rtol=1e-4)


def test_rounds_of_unequal_steps_against_double_precision(tmp_path):
    """Each example's gradient stays the same, so a client's steps add up in any order."""
    rng = np.random.default_rng(2)
    x, t = rng.normal(size=(20, 2)), np.full((20, 2), 1000.0)
    whole = config(
        task=Linear(x=tuple(map(tuple, x)), t=tuple(map(tuple, t))), clients=4, partition="quantity:1", rounds=3,
        local_steps=None, local_epochs=1, train_batch_size=1,
    )  # fmt: skip
    train(whole, tmp_path / "run")
    plan = make_plan(whole)
    sizes = np.array([len(plan.shards[client]) for client in range(4)])
    assert len(set(sizes)) > 2
    gradients = [-np.repeat(x[plan.shards[k]].mean(0)[:, None], 2, axis=1) for k in range(4)]  # of −Σ (x w − t)
    share = sizes / sizes.sum()
    effective = 0.01 * (share * sizes).sum()  # τ η: as many steps as a client has examples
    expected = np.array(Linear().w) - 3 * effective * np.tensordot(share, gradients, 1)
    found = Run.open(tmp_path / "run").state(plan.layout).tensors["model"]
    np.testing.assert_allclose(found, expected.ravel(), rtol=1e-4)
    plain = np.array(Linear().w) - 3 * 0.01 * np.tensordot(share * sizes, gradients, 1)  # FedAvg goes elsewhere
    assert not np.allclose(found, plain.ravel(), rtol=1e-2)


@pytest.mark.parametrize("wire", ["float32", "float16"])
def test_of_equal_steps_it_is_averaging(toy_config, tmp_path, wire):
    """To rounding: the change is divided by K η and multiplied again."""
    vectors = []
    for name in ("fedavg", "fednova"):
        settings = toy_config(optimizer="sgd:momentum=0.9", algorithm=name, wire=wire, evaluate_samples=0)
        train(settings, tmp_path / name)
        vectors.append(Run.open(tmp_path / name).state(make_plan(settings).layout).tensors["model"])
    torch.testing.assert_close(*vectors, rtol=1e-5, atol=1e-6 if wire == "float32" else 1e-3)


def test_what_it_refuses():
    with pytest.raises(UserError, match="--algorithm fednova divides a change .* use --optimizer sgd"):
        config(optimizer="adamw").check()
    with pytest.raises(UserError, match="divides a change"):
        config(optimizer="sgd:momentum=0.9:nesterov=true").check()
    kept = config(optimizer="sgd:momentum=0.9", keep_optimizer=True)
    with pytest.raises(UserError, match="needs momentum that begins at 0 in each round: keep no optimizer"):
        kept.check()
    replace(kept, keep_optimizer=False).check()
    replace(kept, optimizer="sgd").check()  # plain SGD remembers nothing
