"""FedAvg, and the fold that makes its mean."""

import weakref

import made
import numpy as np
import pytest
import torch
from runs import train
from toy import Linear

from fedray.algorithms import Upload
from fedray.algorithms.fedavg import FedAvg
from fedray.algorithms.folds import Mean
from fedray.config import Config
from fedray.federation.plan import make_plan
from fedray.record.run import Run
from fedray.seeds import generator


def fedavg(vectors, examples):
    round = made.round_of(dict(enumerate(examples)), number=3)
    return FedAvg().aggregate({"model": torch.zeros_like(vectors[0])}, made.fold(vectors, round), round)["model"]


def test_fedavg_is_the_mean_weighted_by_examples():
    vectors = [torch.randn(500, generator=generator(0, k)) for k in range(7)]
    examples = [3, 1, 100, 20, 7, 55, 14]
    after = fedavg(vectors, examples)
    exact = np.average(np.stack([v.double().numpy() for v in vectors]), axis=0, weights=examples)
    assert np.abs(after.numpy() - exact).max() < 1e-6


def test_fedavg_of_one_client_is_its_vector_bit_for_bit():
    vector = torch.randn(500, generator=generator(1))
    vector[0] = -0.0
    after = fedavg([vector], [17])
    assert after.numpy().tobytes() == vector.numpy().tobytes()
    assert after.data_ptr() != vector.data_ptr()


def test_clients_without_examples_do_not_shift_the_mean():
    vectors = [torch.randn(50, generator=generator(2, k)) for k in range(4)]
    assert torch.equal(fedavg(vectors, [0, 5, 0, 3]), fedavg(vectors[1::2], [5, 3]))


def test_what_is_no_model_counts_alike_for_all_clients():
    round = made.round_of({0: 3, 1: 1})
    folded = made.fold([{"model": torch.ones(2) * k, "control": torch.ones(2) * k} for k in range(2)], round)
    assert folded.mean("model").tolist() == [0.25, 0.25]
    assert folded.mean("control").tolist() == [0.5, 0.5]
    assert (round.total("model"), round.total("control")) == (4, 2)


def test_the_fold_holds_one_upload_at_a_time():
    alive, fold, round = [], Mean(), made.round_of(dict.fromkeys(range(20), 1))
    partial = fold.start(round)
    for client in range(20):
        vector = torch.zeros(10)
        alive.append(weakref.ref(vector))
        partial = fold.add(partial, Upload(client, {"model": vector}, {"model": 1}), round)
        del vector
        assert sum(ref() is not None for ref in alive) == 0
    fold.result(partial, round)


@pytest.mark.parametrize("adapters", [None, object()])
@pytest.mark.parametrize("cut", [0, 1, 3, 7])
def test_merged_partials_are_the_partial_of_all(adapters, cut):
    vectors = [torch.randn(500, generator=generator(3, k)) for k in range(7)]
    round = made.round_of(dict(zip(range(7), [3, 1, 100, 20, 7, 55, 14], strict=True)), adapters=adapters)
    fold, uploads = Mean(), made.uploads(vectors, round)
    partials = []
    for part in (uploads[:cut], uploads[cut:]):
        partial = fold.start(round)
        for upload in part:
            partial = fold.add(partial, upload, round)
        partials.append(partial)
    whole, merged = made.fold(vectors, round), fold.result(fold.merge(*partials[::-1], round), round)
    assert merged.weights == whole.weights == {"model": 200}
    assert merged.survivors == whole.survivors == list(range(7))
    assert merged.rows == whole.rows
    assert [upload.client for upload in merged.uploads] == ([] if adapters is None else list(range(7)))
    assert (merged.mean("model") - whole.mean("model")).abs().max() < 1e-6
    if cut in (0, 7):  # the partial of nothing changes nothing
        assert torch.equal(merged.mean("model"), whole.mean("model"))


def test_merging_does_not_touch_what_clients_sent():
    round = made.round_of({0: 1, 1: 1})
    fold, vectors = Mean(), [torch.zeros(3), torch.ones(3)]
    first, second = (fold.add(fold.start(round), upload, round) for upload in made.uploads(vectors, round))
    assert fold.result(fold.merge(first, second, round), round).mean("model").tolist() == [0.5] * 3
    assert [vector.tolist() for vector in vectors] == [[0] * 3, [1] * 3]


def test_equal_shards_and_a_full_batch_each_are_one_step_on_all_data(tmp_path):
    """Three clients of four examples, against autograd in double precision on all twelve."""
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(12, 2)), rng.normal(size=(12, 2))
    task = Linear(x=tuple(map(tuple, x)), t=tuple(map(tuple, t)), squared=True)
    config = Config(
        task=task, clients=3, rounds=1, local_steps=1, train_batch_size=4, optimizer="sgd", learning_rate=0.1,
        max_grad_norm=None, evaluate_samples=0, actors=0,
    )  # fmt: skip
    train(config, tmp_path / "run")
    w = torch.tensor(task.w, dtype=torch.float64, requires_grad=True)
    ((torch.from_numpy(x) @ w - torch.from_numpy(t)).square() / 2).sum(1).mean().backward()
    found = Run.open(tmp_path / "run").state(make_plan(config).layout).tensors["model"]
    np.testing.assert_allclose(found, (w - 0.1 * w.grad).detach().ravel(), rtol=1e-6)
