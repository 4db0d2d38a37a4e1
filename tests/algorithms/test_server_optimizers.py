"""FedAvgM, FedAdagrad, FedAdam and FedYogi: closed forms, and PyTorch's own optimizers where they can do the same."""

import math
from dataclasses import replace

import made
import pytest
import torch
from runs import sha, train

from fedray.algorithms import Upload
from fedray.algorithms.fedavgm import FedAvgM
from fedray.algorithms.fedopt import FedAdagrad, FedAdam, FedYogi
from fedray.algorithms.folds import Mean
from fedray.errors import UserError
from fedray.menus import ALGORITHMS
from fedray.wire import Wire
from fedray.wire.float16 import Float16

EXACT, HALF = Wire(), Wire((Float16(),))


def step(algorithm, server, vectors, examples, wire=EXACT):
    """Send the model, receive the clients' vectors, fold and aggregate: the server's next state."""
    round, fold = made.round_of(dict(enumerate(examples))), Mean()
    received = wire.arrive(wire.send(algorithm.broadcast(server, round), round), round)["model"]
    partial = fold.start(round)
    for client, vector in enumerate(vectors):
        vector = torch.as_tensor(vector, dtype=torch.float32).expand_as(received)
        payload, _ = wire.encode({"model": vector - received if wire.lossy else vector}, {}, round, client)
        tensors = wire.decode(payload, round)
        partial = fold.add(partial, Upload(client, tensors, {"model": round.weight(client, "model")}), round)
    return algorithm.aggregate(server, wire.finish(fold.result(partial, round), server, round), round)


def begun(algorithm, model, **state):
    """The first state from a model, with other values of what the server keeps."""
    first = algorithm.init(torch.tensor(model), made.round_of({0: 1}).layout)
    return first | {name: torch.full_like(first[name], value) for name, value in state.items()}


# Two clients with examples 1 and 3, whose mean is 0.6 or 1; that of equal weights would be 0.4 or 0.
@pytest.mark.parametrize(("wire", "tolerance"), [(EXACT, 1e-6), (HALF, 1e-3)], ids=["float32", "float16"])
@pytest.mark.parametrize(
    ("algorithm", "model", "state", "vectors", "expected"),
    [
        (FedAdagrad(0.1, tau=0.5), 0.1, {"v": 0.0}, (0.0, 0.8), 0.15),
        (FedAdam(0.1, 0.9, 0.99, 1e-3), 0.0, {"v": 0.0}, (-2.0, 2.0), 0.0990099),
        (FedAdam(0.1, 0.9, 0.99, 1e-3), 0.0, {}, (-2.0, 2.0), 0.0990050),  # v begins at τ²
        (FedYogi(0.1, 0.9, 0.99, 1e-3), 0.0, {"v": 0.0}, (-2.0, 2.0), 0.0990099),
        (FedAvgM(1.0, 0.9), 0.0, {}, (-2.0, 2.0), 1.0),
    ],
)
def test_first_steps(algorithm, model, state, vectors, expected, wire, tolerance):
    server = begun(algorithm, [model, model], **state)
    after = step(algorithm, server, vectors, (1, 3), wire)
    assert after["model"].tolist() == pytest.approx([expected] * 2, rel=tolerance)
    equal = step(
        algorithm, server, [server["model"] + (0.25 * vectors[0] + 0.75 * vectors[1] - model)] * 2, (5, 5), wire
    )
    assert equal["model"].tolist() == pytest.approx([expected] * 2, rel=tolerance)


def test_no_bias_is_corrected():
    """Corrected, FedAdam's first step would be η Δ / (|Δ| + τ)."""
    server = begun(FedAdam(0.1), [0.0, 0.0])
    assert step(FedAdam(0.1), server, (1.0,), (1,))["model"].tolist() == pytest.approx([0.0990050] * 2, rel=1e-6)
    assert pytest.approx(0.0999001, rel=1e-6) == 0.1 / 1.001


@pytest.mark.parametrize("wire", [EXACT, HALF], ids=["float32", "float16"])
def test_momentum_of_a_constant_change(wire):
    """After T rounds Σ (1 − β^t) / (1 − β) Δ: 2.9 for β = 0.9 and T = 2."""
    server, rounds = begun(FedAvgM(1.0, 0.9), [0.0, 0.0]), 6
    for number in range(1, rounds + 1):
        server = step(FedAvgM(1.0, 0.9), server, (server["model"] - 2, server["model"] + 2), (1, 3), wire)
        expected = sum((1 - 0.9**t) / (1 - 0.9) for t in range(1, number + 1))
        assert server["model"].tolist() == pytest.approx([expected] * 2, rel=1e-3 if wire.lossy else 1e-6)
        if number == 2:
            assert expected == pytest.approx(2.9)


@pytest.mark.parametrize("wire", [EXACT, HALF], ids=["float32", "float16"])
def test_momentum_counts_examples(wire):
    """Of clients at 1 and 3 with weights 1 : 2."""
    server = begun(FedAvgM(1.0, 0.9), [0.0, 0.0])
    assert step(FedAvgM(1.0, 0.9), server, (1.0, 3.0), (4, 8), wire)["model"].tolist() == pytest.approx([7 / 3] * 2)


def changes(rounds=20, size=50):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=rng) * 0.1 for _ in range(rounds)]


def trajectory(algorithm, changes):
    """The model after each round, of clients that all make the given change."""
    server = algorithm.init(torch.zeros_like(changes[0]), made.round_of({0: 1}).layout)
    for change in changes:
        before = {name: tensor.clone() for name, tensor in server.items()}
        after = step(algorithm, server, (server["model"] + change,) * 2, (1, 3))
        assert all(torch.equal(server[name], tensor) for name, tensor in before.items())  # not changed in place
        server = after
        yield server["model"]


def test_momentum_is_that_of_pytorch():
    weights = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    theirs = torch.optim.SGD([weights], lr=0.7, momentum=0.9)
    for change, found in zip(changes(), trajectory(FedAvgM(0.7, 0.9), changes()), strict=True):
        weights.grad = -change.double()
        theirs.step()
        torch.testing.assert_close(found.double(), weights.detach(), rtol=1e-5, atol=1e-6)


def test_adagrad_is_that_of_pytorch():
    weights = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    theirs = torch.optim.Adagrad([weights], lr=0.1, initial_accumulator_value=0.01**2, eps=0.01)
    for change, found in zip(changes(), trajectory(FedAdagrad(0.1, tau=0.01), changes()), strict=True):
        weights.grad = -change.double()
        theirs.step()
        torch.testing.assert_close(found.double(), weights.detach(), rtol=1e-5, atol=1e-6)


def test_adam_is_that_of_pytorch_without_its_correction():
    """What PyTorch corrects is undone by a learning rate and an ε of each step."""
    beta1, beta2, tau = 0.8, 0.95, 0.01
    weights = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    theirs = torch.optim.Adam([weights], betas=(beta1, beta2))
    weights.grad = torch.zeros_like(weights)
    theirs.step()  # makes its state
    theirs.state[weights]["step"].zero_()
    theirs.state[weights]["exp_avg_sq"].fill_(tau**2)
    found = trajectory(FedAdam(0.1, beta1, beta2, tau), changes())
    for number, (change, model) in enumerate(zip(changes(), found, strict=True), 1):
        root = math.sqrt(1 - beta2**number)
        theirs.param_groups[0].update(lr=0.1 * (1 - beta1**number) / root, eps=tau / root)
        weights.grad = -change.double()
        theirs.step()
        torch.testing.assert_close(model.double(), weights.detach(), rtol=1e-5, atol=1e-6)


def test_yogi_moves_its_scale_towards_the_square_by_a_share_of_the_square():
    """One coordinate at a time, in double precision."""
    models = list(trajectory(FedYogi(0.1, 0.8, 0.95, 0.01), changes(size=5)))
    for coordinate in range(5):
        w, m, v = 0.0, 0.0, 0.01**2
        for change, found in zip(changes(size=5), models, strict=True):
            delta = change[coordinate].item()
            m = 0.8 * m + 0.2 * delta
            v += 0.05 * delta**2 if v < delta**2 else -0.05 * delta**2
            w += 0.1 * m / (math.sqrt(v) + 0.01)
            assert found[coordinate].item() == pytest.approx(w, rel=1e-4, abs=1e-6)


def test_momentum_0_with_learning_rate_1_is_averaging_bit_for_bit(toy_config, tmp_path):
    for name, wire in {"exact": "float32", "half": "float16"}.items():
        config = toy_config(rounds=4, wire=wire)
        train(config, tmp_path / f"{name}-plain")
        train(replace(config, algorithm="fedavgm:1:0"), tmp_path / f"{name}-none")
        models = [torch.load(tmp_path / f"{name}-{which}/model/network.pt")["weight"] for which in ("plain", "none")]
        assert torch.equal(*models)
    train(replace(config, algorithm="fedavgm:1:0.5"), tmp_path / "some")
    assert not torch.equal(models[0], torch.load(tmp_path / "some/model/network.pt")["weight"])
    assert sha(tmp_path / "some") != sha(tmp_path / "half-plain")


def test_values_are_given_in_order_or_by_name():
    assert ALGORITHMS.parse("fedadam:0.01") == FedAdam(learning_rate=0.01)
    assert ALGORITHMS.parse("fedadam:0.3:tau=0.1:beta1=0") == FedAdam(0.3, 0.0, 0.99, 0.1)
    assert ALGORITHMS.parse("ema:0.999:fedyogi:0.01:0.5").algorithm == FedYogi(0.01, 0.5)
    assert ALGORITHMS.form(FedAvgM(0.5)) == "fedavgm:0.5"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("fedadam:0", "learning_rate is 0.0; it must be above 0"),
        ("fedyogi:beta2=1", "beta2 is 1.0; it must be at least 0 and below 1"),
        ("fedadagrad:tau=nan", "tau is nan; it must be above 0"),
        ("fedavgm:1:-0.1", "beta is -0.1; it must be at least 0 and below 1"),
    ],
)
def test_what_they_refuse(text, why):
    with pytest.raises(UserError, match=f"algorithm '{text}': {why}"):
        ALGORITHMS.parse(text)
