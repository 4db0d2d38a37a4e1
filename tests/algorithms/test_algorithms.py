"""Seeds, partitions, cohorts, codecs and rules: functions of data."""

import hashlib

import numpy as np
import pytest
import torch

from fedray.algorithms.rules import FedAvg, ServerState, Update
from fedray.data.dataset import Dataset
from fedray.data.partition import IID, PARTITIONS, ByLabel, Dirichlet
from fedray.data.sources import digits
from fedray.errors import UserError, pick, short
from fedray.federation import cohort
from fedray.seeds import generator, number
from fedray.wire.codecs import CODECS, Float16, Float32

# Seeds


def test_a_seed_is_the_hash_of_its_key():
    digest = hashlib.sha256(b"(7, 'train', 2, 3)").digest()
    assert number(7, "train", 2, 3) == int.from_bytes(digest[:8], "little") // 2
    draws = {tuple(torch.rand(2, generator=generator(seed, "train", r)).tolist()) for seed in (0, 1) for r in (0, 1)}
    assert len(draws) == 4


# Data and partitions


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    dataset = digits()
    assert dataset.images.shape == (1797, 1, 8, 8)
    assert dataset.images.dtype == np.uint8
    assert np.array_equal(np.rint(dataset.images[:, 0] / 255 * 16), load_digits().images)


def blank(labels):
    return Dataset(np.zeros((len(labels), 1, 2, 2), np.uint8), np.asarray(labels))


@pytest.mark.parametrize("clients", [1, 3, 4, 100, 1797])
@pytest.mark.parametrize("partition", [IID(), ByLabel(), Dirichlet(0.05), Dirichlet(100.0)], ids=str)
def test_every_example_has_one_owner_and_no_client_is_empty(partition, clients):
    shards = partition.split(digits(), clients, generator(0, "partition"))
    assert len(shards) == clients
    assert sorted(np.concatenate([shards[client] for client in range(clients)])) == list(range(1797))
    assert shards.sizes.min() >= 1
    assert shards.sizes.sum() == 1797


@pytest.mark.parametrize("partition", [IID(), ByLabel(), Dirichlet(0.5)], ids=str)
def test_a_partition_is_a_function_of_its_seed(partition):
    one, same, other = (partition.split(digits(), 5, generator(seed, "partition")).indices for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_iid_gives_equal_parts_of_every_label():
    shards = IID().split(digits(), 4, generator(0, "partition"))
    assert shards.sizes.tolist() == [450, 449, 449, 449]
    counts = np.stack([np.bincount(digits().labels[shards[client]], minlength=10) for client in range(4)])
    # Hypergeometric: mean 45 a cell, standard deviation 5.5; 5 deviations.
    assert np.abs(counts - 45).max() < 28


def test_by_label_gives_few_labels():
    labels = np.repeat(np.arange(10), 20)
    shards = ByLabel().split(blank(labels), 5, generator(0, "partition"))
    assert [set(labels[shards[client]].tolist()) for client in range(5)] == [{2 * c, 2 * c + 1} for c in range(5)]


def test_dirichlet_is_as_skewed_as_alpha_says():
    labels = np.repeat(np.arange(200), 100)
    for alpha in (0.1, 1.0, 10.0):
        shards = Dirichlet(alpha).split(blank(labels), 5, generator(0, "partition"))
        shares = np.stack([np.bincount(labels[shards[client]], minlength=200) for client in range(5)]) / 100
        # The variance of a share of Dir(α) over C clients is (C − 1) / C² / (Cα + 1).
        assert shares.var() == pytest.approx(4 / 25 / (5 * alpha + 1), rel=0.15)


def test_labels_are_needed_for_partitions_by_label():
    unlabelled = Dataset(np.zeros((4, 1, 2, 2), np.uint8))
    for partition in (ByLabel(), Dirichlet(1.0)):
        with pytest.raises(UserError, match="needs a column 'label', and of its images this dataset knows nothing"):
            partition.split(unlabelled, 2, generator(0))
    assert len(IID().split(unlabelled, 2, generator(0))) == 2


# Cohorts


def test_cohorts():
    assert cohort.choose(5, 1.0, generator(0)) == [0, 1, 2, 3, 4]
    assert len(cohort.choose(1000, 0.001, generator(0))) == 1
    drawn = [cohort.choose(10, 0.3, generator(0, round)) for round in range(2000)]
    assert all(len(set(clients)) == 3 and clients == sorted(clients) for clients in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=10)
    assert np.abs(counts - 600).max() < 5 * (2000 * 0.3 * 0.7) ** 0.5


# Short forms


@pytest.mark.parametrize(
    ("text", "menu"),
    [
        ("iid", PARTITIONS),
        ("dirichlet:0.1", PARTITIONS),
        (f"dirichlet:{1 / 3}:Smiling", PARTITIONS),
        ("float16", CODECS),
    ],
)
def test_short_forms_are_read_as_they_are_written(text, menu):
    assert short(pick("thing", text, menu), menu) == text


def test_wrong_names_get_the_nearest():
    with pytest.raises(UserError, match="no partition 'by-lable'; did you mean 'by-label'"):
        pick("partition", "by-lable", PARTITIONS)
    with pytest.raises(UserError, match="at most a million"):
        pick("partition", "dirichlet:1e308", PARTITIONS)
    for text in (
        "dirichlet",
        "dirichlet:1:2:3",
        "dirichlet:x",
        "dirichlet:0",
        "dirichlet:nan",
        "iid:3",
    ):
        with pytest.raises(UserError, match=text):
            pick("partition", text, PARTITIONS)


# Codecs


def test_float32_is_exact_and_counts_its_bytes():
    start, trained = torch.randn(1000), torch.randn(1000)
    payload = Float32().encode_update(trained, start)
    assert payload.nbytes == 4000
    assert torch.equal(Float32().decode_update(payload, start), trained)
    assert torch.equal(Float32().decode_model(Float32().encode_model(start)), start)


def test_float16_adds_a_rounded_difference_to_the_master():
    rng = np.random.default_rng(0)
    master = rng.normal(size=1000).astype(np.float32)
    start = master.astype(np.float16).astype(np.float32)
    trained = start + rng.normal(size=1000, scale=1e-4).astype(np.float32)
    codec = Float16()
    down = codec.encode_model(torch.from_numpy(master))
    assert down.nbytes == 2000
    assert np.array_equal(codec.decode_model(down).numpy(), start)
    up = codec.encode_update(torch.from_numpy(trained), torch.from_numpy(start))
    assert up.nbytes == 2000
    expected = master + (trained - start).astype(np.float16).astype(np.float32)
    assert np.array_equal(codec.decode_update(up, torch.from_numpy(master)).numpy(), expected)
    # Rounding the weights themselves would lose an update of this size in two thirds of them.
    assert np.abs(expected - master - (trained - start)).max() < 1e-6


def test_float16_refuses_what_overflows():
    with pytest.raises(OverflowError, match="use --codec float32"):
        Float16().encode_update(torch.tensor([70_000.0]), torch.zeros(1))


# FedAvg


def fedavg(vectors, examples):
    updates = [Update(k, v, n) for k, (v, n) in enumerate(zip(vectors, examples, strict=True))]
    return FedAvg().step(ServerState(3, torch.zeros_like(vectors[0])), updates)


def test_fedavg_is_the_mean_weighted_by_examples():
    vectors = [torch.randn(500, generator=generator(0, k)) for k in range(7)]
    examples = [3, 1, 100, 20, 7, 55, 14]
    after = fedavg(vectors, examples)
    exact = np.average(np.stack([v.double().numpy() for v in vectors]), axis=0, weights=examples)
    assert np.abs(after.vector.numpy() - exact).max() < 1e-6


def test_fedavg_of_one_client_is_its_vector_bit_for_bit():
    vector = torch.randn(500, generator=generator(1))
    vector[0] = -0.0
    after = fedavg([vector], [17]).vector
    assert after.numpy().tobytes() == vector.numpy().tobytes()
    assert after.data_ptr() != vector.data_ptr()


def test_clients_without_examples_do_not_shift_the_mean():
    vectors = [torch.randn(50, generator=generator(2, k)) for k in range(4)]
    assert torch.equal(fedavg(vectors, [0, 5, 0, 3]).vector, fedavg(vectors[1::2], [5, 3]).vector)
    assert torch.equal(FedAvg().step(ServerState(0, vectors[0]), []).vector, vectors[0])


def test_fedavg_holds_one_update_at_a_time():
    alive = []

    def updates():
        import weakref

        for client in range(20):
            vector = torch.zeros(10)
            alive.append(weakref.ref(vector))
            yield Update(client, vector, 1)
            del vector
            assert sum(ref() is not None for ref in alive) <= 1

    FedAvg().step(ServerState(0, torch.zeros(10)), updates())
