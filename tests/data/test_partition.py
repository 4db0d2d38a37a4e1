"""Who holds which examples: functions of a dataset and a seed."""

import math

import numpy as np
import pytest

from fedray.data.dataset import Dataset
from fedray.data.partition import IID, ByLabel, Dirichlet, Quantity, hold_out
from fedray.data.sources import digits
from fedray.errors import UserError
from fedray.seeds import generator


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


@pytest.mark.parametrize(("each", "share"), [(4, 0.1), (1, 0.4), (3, 0.5), (30, 0.1)])
def test_small_clients_together_hold_out_their_share(each, share):
    """Rounded for each client alone, a tenth of four examples is none, at every client."""
    shards = IID().split(blank(range(100 * each)), 100, generator(0))
    if each == 1:
        with pytest.raises(UserError, match="is to be held out, and that is none"):
            hold_out(shards, (share, 0.0), generator(0))
        return
    counts = np.stack([hold_out(shards, (share, 0.0), generator(seed))[1].sizes for seed in range(200)])
    assert counts.mean() == pytest.approx(share * each, abs=0.02)
    assert counts.min() >= math.floor(share * each)
    assert counts.max() <= math.ceil(share * each)
    assert np.abs(counts.sum(1) - share * each * 100).max() <= 1
    assert np.ptp(counts.mean(0)) < 0.3  # not always the same clients


@pytest.mark.parametrize("shares", [(0.5, 0.4), (0.3, 0.3), (0.0, 0.9)])
def test_every_client_keeps_an_example_to_train_on(shares):
    shards = Quantity(0.1).split(blank(range(60)), 20, generator(1))
    assert shards.sizes.min() == 1
    for seed in range(50):
        parts = hold_out(shards, shares, generator(seed))
        assert parts[0].sizes.min() >= 1
        assert sum(part.sizes for part in parts).tolist() == shards.sizes.tolist()
