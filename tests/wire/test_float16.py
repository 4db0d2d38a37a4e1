"""Links against NumPy."""

import made
import numpy as np
import pytest
import torch

from fedray.algorithms.folds import Mean
from fedray.wire import Wire, counted
from fedray.wire.float16 import Float16

ROUND = made.round_of({0: 3, 1: 1})


def test_without_a_link_messages_are_exact_and_their_bytes_are_counted():
    wire, start, trained = Wire(), torch.randn(1000), torch.randn(1000)
    assert not wire.lossy
    down = wire.send({"model": start}, ROUND)
    assert torch.equal(wire.arrive(down, ROUND)["model"], start)
    up, kept = wire.encode({"model": trained}, {}, ROUND, 0)
    assert counted(down, frozenset()) == counted(up, frozenset()) == 4000
    assert torch.equal(wire.decode(up, ROUND)["model"], trained)
    assert kept == {}


def test_float16_adds_a_rounded_difference_to_the_master():
    rng = np.random.default_rng(0)
    master = rng.normal(size=1000).astype(np.float32)
    start = master.astype(np.float16).astype(np.float32)
    trained = start + rng.normal(size=1000, scale=1e-4).astype(np.float32)
    wire, server = Wire((Float16(),)), {"model": torch.from_numpy(master)}
    assert wire.lossy
    down = wire.send(server, ROUND)
    assert counted(down, frozenset()) == 2000
    received = wire.arrive(down, ROUND)["model"]
    assert np.array_equal(received.numpy(), start)
    up, kept = wire.encode({"model": torch.from_numpy(trained) - received}, {}, ROUND, 0)
    assert counted(up, frozenset()) == 2000
    assert kept == {}
    folded = made.fold([wire.decode(up, ROUND)["model"]], made.round_of({0: 3}))
    after = wire.finish(folded, server, ROUND).mean("model").numpy()
    expected = master + (trained - start).astype(np.float16).astype(np.float32)
    assert np.array_equal(after, expected)
    # Rounding the weights themselves would lose an update of this size in two thirds of them.
    assert np.abs(after - master - (trained - start)).max() < 1e-6


def test_float16_adds_the_mean_of_rounded_differences_to_the_master_once():
    rng = np.random.default_rng(1)
    master = rng.normal(size=1000).astype(np.float32)
    start = master.astype(np.float16).astype(np.float32)
    trained = [start + rng.normal(size=1000, scale=1e-4).astype(np.float32) for _ in range(2)]
    wire, server = Wire((Float16(),)), {"model": torch.from_numpy(master)}
    vectors = []
    for client, vector in enumerate(trained):
        up, _ = wire.encode({"model": torch.from_numpy(vector - start)}, {}, ROUND, client)
        vectors.append(wire.decode(up, ROUND)["model"])
    after = wire.finish(made.fold(vectors, ROUND), server, ROUND).mean("model").numpy()
    halves = [(vector - start).astype(np.float16).astype(np.float64) for vector in trained]
    exact = master.astype(np.float64) + np.average(halves, axis=0, weights=[3, 1])
    # One rounding to float32, and that of the mean of differences, which are ten thousand times smaller.
    assert np.abs(after - exact).max() <= np.abs(exact).max() * 2**-24 + 1e-10
    assert np.array_equal(server["model"].numpy(), master)


def test_uploads_that_a_fold_keeps_are_models_again():
    master, difference = torch.randn(34), torch.randn(34).half().float()
    wire, round = Wire((Float16(),)), made.round_of({0: 3}, adapters=object())
    folded = wire.finish(made.fold([difference], round, Mean()), {"model": master}, round)
    assert torch.equal(folded.uploads[0].tensors["model"], master + difference)


def test_float16_refuses_what_overflows():
    with pytest.raises(OverflowError, match="the update .* use wire float32"):
        Wire((Float16(),)).encode({"model": torch.tensor([70_000.0])}, {}, ROUND, 0)
    with pytest.raises(OverflowError, match="the model .* use wire float32"):
        Wire((Float16(),)).send({"model": torch.tensor([70_000.0])}, ROUND)
