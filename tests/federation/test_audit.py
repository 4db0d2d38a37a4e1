"""Membership inference: the statistics against closed forms and simulation, and a model that was made to memorise."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from memory import Denoiser, Memory
from runs import train
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import nn

from fedray.commands.audit import spent
from fedray.config import Config
from fedray.data.dataset import Dataset
from fedray.errors import UserError
from fedray.federation import fit
from fedray.federation.audit import DRAWS, audit, audit_canaries, kinds, measured
from fedray.federation.copying import audit_copies
from fedray.federation.examples import Private
from fedray.federation.fit import prepare
from fedray.federation.pool import LocalPool
from fedray.federation.sampling import Sampling
from fedray.federation.uploads import audit_uploads, masked, ongoing
from fedray.federation.worker import model
from fedray.privacy import Release, epsilon, release_of
from fedray.record.run import Run
from fedray.scores.canaries import chance, epsilon_bound, exposures, leak
from fedray.scores.membership import area, attack, pooled, true_positive_rate
from fedray.scores.nearest import excess
from fedray.vector import FlatParameters
from fedray.wire.privacy import Noise


def test_the_area_is_that_of_scikit_learn_and_of_normal_losses():
    rng = np.random.default_rng(0)
    members, others = rng.normal(-1, 1, 400).round(1), rng.normal(0, 1, 300).round(1)  # with ties
    found = area(members, others)
    truth = np.r_[np.ones(400), np.zeros(300)]
    assert found[0] == pytest.approx(roc_auc_score(truth, -np.r_[members, others]), abs=1e-12)
    assert found[1] < stats.norm.cdf(1 / 2**0.5) < found[2]
    assert area(np.zeros(5), np.zeros(7))[0] == 0.5
    assert area(np.zeros(5), np.ones(7))[0] == 1


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, truth, held = np.random.default_rng(1), stats.norm.cdf(0.5 / 2**0.5), 0
    for _ in range(400):
        _, low, high = area(rng.normal(-0.5, 1, 60), rng.normal(0, 1, 80))
        held += low <= truth <= high
    assert stats.binomtest(held, 400, 0.95).pvalue > 1e-4


def test_without_a_leak_p_is_uniform_and_rates_are_those_of_guessing():
    rng = np.random.default_rng(2)
    found = [attack(rng.exponential(size=150), rng.exponential(size=200)) for _ in range(100)]
    assert stats.kstest([each.p for each in found], "uniform").pvalue > 1e-3
    assert np.mean([each.rates[0.01][0] for each in found]) == pytest.approx(2 / 201, abs=4 * 0.011 / 100**0.5)
    assert list(found[0].rates) == [0.01]  # 200 are too few for 0.1 %
    inside = np.mean([each.auc[1] <= 0.5 <= each.auc[2] for each in found])
    assert inside > 0.8


def test_a_rate_at_few_false_positives_of_normal_losses():
    rng = np.random.default_rng(3)
    value, low, high, p = true_positive_rate(rng.normal(-2, 1, 20_000), rng.normal(0, 1, 20_000), 0.01)
    truth = stats.norm.cdf(2 + stats.norm.ppf(0.01))
    assert value == pytest.approx(truth, abs=0.03)
    assert low < value < high
    assert p < 1e-6


def test_the_interval_of_a_rate_holds_at_its_threshold_also_where_that_is_the_least_loss():
    """At 0.1 % of 1,000; its p is negative hypergeometric: how many members come before the first of the others."""
    rng, held, small = np.random.default_rng(13), 0, 0
    for _ in range(150):
        members, others = rng.normal(-2, 1, 1000), rng.normal(0, 1, 1000)
        _, low, high, _ = true_positive_rate(members, others, 0.001)
        held += low <= stats.norm.cdf(others.min() + 2) <= high
        value, _, _, p = true_positive_rate(members + 2, others, 0.001)
        assert p == pytest.approx(stats.nhypergeom.sf(round(1000 * value) - 1, 2000, 1000, 1), rel=1e-6)
        small += p <= 0.05
    assert stats.binomtest(held, 150, 0.95).pvalue > 1e-4
    assert stats.binomtest(small, 150, 0.05, alternative="greater").pvalue > 1e-4


def test_attacks_on_clients_are_pooled_without_mixing_their_images():
    """p is uniform where clients' losses differ and nobody leaks; of one client it is Mann and Whitney's."""
    rng, found = np.random.default_rng(4), []
    sizes = np.array([[3, 2], [10, 4], [5, 5], [1, 3], [8, 6]])
    for _ in range(400):
        levels = rng.normal(0, 10, len(sizes))
        areas = [area(rng.normal(x, 1, m), rng.normal(x, 1, n))[0] for x, (m, n) in zip(levels, sizes, strict=True)]
        found.append(pooled(np.array(areas), sizes, rng)[1])
    assert stats.kstest(found, "uniform").pvalue > 1e-3
    members, others = rng.normal(-0.3, 1, 50), rng.normal(0, 1, 60)
    value, p = pooled(np.array([area(members, others)[0]]), np.array([[50, 60]]), rng)
    expected = stats.mannwhitneyu(members, others, alternative="less", use_continuity=False, method="asymptotic")
    assert value == (area(members, others)[0], None, None)  # no interval of one client
    assert p == pytest.approx(expected.pvalue, rel=1e-9)


@pytest.mark.parametrize("m", [19, 60, 256])
def test_samples_that_are_new_are_no_copies(m):
    """p is uniform, where its steps are made even by a draw; the nominal share is that of new images."""
    rng, found, shares = np.random.default_rng(5), [], []
    place = max(1, int(0.05 * (m + 1)))
    for _ in range(600):
        drawn, real = rng.exponential(size=100), rng.exponential(size=m)
        within = int((drawn < np.sort(real)[place - 1]).sum())
        high = excess(drawn, real)
        low = stats.betabinom.sf(within, 100, place, m + 1 - place)
        assert high == pytest.approx(stats.betabinom.pmf(np.arange(within, 101), 100, place, m + 1 - place).sum())
        found.append(rng.uniform(low, high))
        shares.append(within / 100)
    assert stats.kstest(found, "uniform").pvalue > 1e-3
    assert np.mean(shares) == pytest.approx(place / (m + 1), abs=4 * np.std(shares) / 600**0.5)
    assert excess(np.zeros(100), rng.exponential(size=m) + 1) < 1e-9


# Canaries


def test_exposure_is_the_rank_in_bits():
    each, most = exposures(np.array([0.0, 1.5, 9.0]), np.array([3.0, 1.0, 2.0]))
    assert most == 2
    assert each.tolist() == [2, 1, 0]  # ranks 1, 2, 4 of four
    assert exposures(np.array([1.0, 2.0]), np.array([1.0, 1.0, 2.0]))[0].tolist() == [1, 2 - np.log2(3.5)]  # with ties
    rng = np.random.default_rng(6)
    found = [exposures(rng.random(50), rng.random(63))[0].mean() for _ in range(300)]
    guess = 6 - np.log2(np.arange(1, 65)).mean()
    assert np.mean(found) == pytest.approx(guess, abs=4 * np.std(found) / 300**0.5)


def test_the_chance_of_right_guesses_is_binomial_and_more_with_delta():
    accuracy = 1 / (1 + np.exp(-1))
    assert chance(100, 40, 30, 1.0, 0.0) == pytest.approx(stats.binom.sf(29, 40, accuracy))
    assert chance(100, 40, 30, 0.0, 0.0) == pytest.approx(stats.binom.sf(29, 40, 0.5))
    assert chance(100, 40, 0, 1.0, 0.0) == 1
    more = chance(100, 40, 30, 1.0, 1e-4) - chance(100, 40, 30, 1.0, 0.0)
    within = [stats.binom.cdf(29, 40, accuracy) - stats.binom.cdf(29 - i, 40, accuracy) for i in range(1, 31)]
    assert more == pytest.approx(2 * 100 * 1e-4 * max(w / i for i, w in enumerate(within, 1)), rel=1e-9)


@pytest.mark.parametrize("truth", [0.0, 0.5, 2.0])
def test_the_bound_is_above_what_randomised_response_proves_as_seldom_as_it_says(truth):
    """Each coin is told rightly with probability e^ε / (1 + e^ε): ε-differential privacy, and not less."""
    rng, above, found = np.random.default_rng(7), 0, []
    for _ in range(300):
        planted = rng.random(400) < 0.5
        told = planted ^ (rng.random(400) < 1 / (1 + np.exp(truth)))
        losses = 0.1 * rng.random(400) - told
        found.append(epsilon_bound(losses, planted, 0.0, 0.9))
        above += found[-1] > truth
    assert stats.binomtest(above, 300, 0.1, alternative="greater").pvalue > 1e-4
    assert np.mean(found) > 0.6 * truth
    everything = np.arange(200) < 100
    all_right = epsilon_bound((~everything).astype(float), everything, 0.0, 0.999)
    accuracy = (0.001 / 4) ** (1 / 200)  # of so many right guesses by chance, in one of four sizes
    assert all_right == pytest.approx(np.log(accuracy / (1 - accuracy)), rel=1e-6)
    assert epsilon_bound(np.zeros(1), np.array([True]), 0.0) == 0


def test_equal_losses_tell_nothing_about_canaries():
    """Ties are ordered by the canaries' numbers, of which the coins know nothing."""
    rng, planted = np.random.default_rng(8), np.random.default_rng(9).random(300) < 0.5
    found = leak(np.zeros(300), planted, 1e-5, rng)
    assert found.epsilon == 0
    assert found.attack.auc[0] == 0.5


def test_half_of_the_canaries_are_trained_on_at_clients_of_their_own_where_clients_are_hidden(toy_config, tmp_path):
    config = toy_config(labels=6, clients=26, canaries=20, partition="iid", evaluate_samples=0, test_share=0.1)
    config = replace(config, wire="clip:1,noise:1")
    plan = prepare(config, Run(tmp_path / "x"))
    canaries = plan.canaries
    assert 3 <= canaries.planted.sum() <= 17
    assert canaries.clients.tolist() == list(range(6, 26))
    assert set(plan.images_of(range(26))[0]) == {index for index in plan.shards.indices if index < 48}
    for client, index in zip(canaries.clients, canaries.indices, strict=True):
        assert set(plan.shards[client]) == {index}
        assert len(plan.shards[client]) == pytest.approx(plan.shards.sizes[:6].mean(), abs=1)
        assert len(plan.test[client]) == 0
    images = plan.examples.images
    assert set(np.unique(images[48:])) == {0, 255}
    assert len(np.unique(images[48:].reshape(20, -1), axis=0)) > 5
    rows = train(config, tmp_path / "run")
    absent = set(canaries.clients[~canaries.planted].tolist())
    for row in rows:
        assert set(row["dropped"]) == absent
        assert {client["client"] for client in row["clients"]} == set(range(26)) - absent
    assert (tmp_path / "run/partition.csv").exists()


def test_else_canaries_are_among_clients_images(toy_config, tmp_path):
    config = toy_config(labels=6, canaries=20, evaluate_samples=0)
    plan = prepare(config, Run(tmp_path / "x"))
    held = [set(plan.shards[client]) for client in range(6)]
    for index, client, planted in zip(plan.canaries.indices, plan.canaries.clients, plan.canaries.planted, strict=True):
        assert [index in each for each in held] == [planted and client == k for k in range(6)]
    train(config, tmp_path / "run")
    other = prepare(replace(config, seed=1), Run(tmp_path / "y")).canaries
    assert other.planted.tolist() != plan.canaries.planted.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"canaries": -1}, "--canaries -1: it must not be negative"),
        ({"canaries": 3, "only_client": 1}, "leave --only-client out"),
        ({"canaries": 3, "malicious": "0.5:signflip"}, "leave --malicious out"),
        ({"canaries": 4, "wire": "clip:1,noise:1"}, "there are 4 clients in all; raise --clients"),
    ],
)
def test_canaries_that_nobody_could_hold(toy_config, changes, message):
    with pytest.raises(UserError, match=message):
        toy_config(**changes).check()


@dataclass(frozen=True)
class Centre:
    """Learns the centre of its images: each moves the model towards itself, and no other method hides less."""

    name: ClassVar[str] = "centre"

    def check(self, sampler, steps):
        pass

    def dataset(self):
        rng = np.random.default_rng(0)
        return Dataset(rng.integers(0, 2, (64, 1, 32, 32)).astype(np.uint8) * 255)

    def build(self, device):
        return CentreLearner()


class CentreLearner:
    def __init__(self):
        self.network = nn.Linear(1, 1024, bias=False)
        nn.init.zeros_(self.network.weight)
        self.flat = FlatParameters(self.network)

    def prepare(self, dataset, indices, mirrored):
        pass

    def loss(self, batch, rng):
        x = batch["images"].flatten(1).float() / 127.5 - 1
        return (self.network(torch.ones(len(x), 1)) - x).square().sum(1).mean() / 2

    def save(self, directory):
        directory.mkdir()


def with_canaries(seed, **settings):
    return Config(
        task=Centre(), canaries=400, local_steps=1, learning_rate=0.5, optimizer="sgd", max_grad_norm=None, seed=seed,
        delta=1e-6, evaluate_samples=0, test_share=0.2, actors=0, **settings,
    )  # fmt: skip


def canaries_of(tmp_path, noise, seed):
    """Train on canaries at clients of their own; return the settings, and ε as it is proved."""
    config = with_canaries(seed, clients=408, wire=f"clip:1,noise:{noise}", rounds=1, train_batch_size=8)
    train(config, tmp_path)
    return config, epsilon({release_of(config): config.rounds}, config.delta)


def canary_examples_of(tmp_path, noise, seed):
    """Train on canaries among the examples of a client that adds the noise itself, in each of two rounds."""
    config = with_canaries(seed, clients=1, algorithm=f"dpsgd:1:{noise}", rounds=2, train_batch_size=500)
    train(config, tmp_path)
    return config, Run.open(tmp_path).result["example_privacy"]["epsilon"]


def opened(config, tmp_path):
    plan = prepare(config, Run(tmp_path / "x"))
    return LocalPool(config), model(Run.open(tmp_path).state(plan.layout).tensors), plan


def shown(config, tmp_path):
    return audit_canaries(*opened(config, tmp_path), config.delta, 0)


def a_quarter_of_the_noise(monkeypatch):
    """Noise whose standard deviation is a quarter of what the accountant is told."""
    finish, finish_examples = Noise.finish, Private.finish

    def weaker(self, total, weight, round, survivors):
        return finish(self, total, weight, replace(round, deviation=round.deviation / 4), survivors)

    def weaker_of_examples(self, gradient):
        self.multiplier /= 4
        finish_examples(self, gradient)
        self.multiplier *= 4

    monkeypatch.setattr(Noise, "finish", weaker)
    monkeypatch.setattr(Private, "finish", weaker_of_examples)


@pytest.mark.slow
@pytest.mark.parametrize(("trained", "noise"), [(canaries_of, 3.0), (canary_examples_of, 5.0)])
def test_canaries_contradict_the_accountant_only_where_noise_is_missing(tmp_path, monkeypatch, trained, noise):
    """Neither in one of ten runs, nor in all: ten on canaries of their own are one on 4,000. Bounds of 99.9 %."""
    monkeypatch.setattr(fit, "_draw_partition", lambda *given: None)  # a second for each run

    def bound(name):
        losses, planted, proved, each_found = [], [], [], []
        for seed in range(10):
            config, each = trained(tmp_path / f"{name}{seed}", noise, seed)
            pool, last, plan = opened(config, tmp_path / f"{name}{seed}")
            losses.append(stats.rankdata(measured(pool, last, plan.canaries.indices)))
            planted.append(plan.canaries.planted)
            proved.append(each)
            each_found.append(epsilon_bound(losses[-1], planted[-1], config.delta))
        assert 0.5 < min(proved) == max(proved) < 2
        whole = epsilon_bound(np.concatenate(losses), np.concatenate(planted), config.delta)
        return [*each_found, whole], proved[0]

    found, proved = bound("whole")
    assert len(found) == 10 + 1
    assert max(found) <= proved
    a_quarter_of_the_noise(monkeypatch)
    found, proved = bound("weaker")
    assert found[-1] > proved


@pytest.mark.slow
def test_canaries_find_examples_where_there_is_no_noise(tmp_path):
    config, proved = canary_examples_of(tmp_path / "run", 0, 0)
    found = shown(config, tmp_path / "run")
    assert proved is None
    assert found.attack.auc[0] >= 0.9
    assert found.epsilon > 1


@pytest.mark.slow
def test_canaries_find_the_leak_where_there_is_no_noise(tmp_path):
    config, proved = canaries_of(tmp_path / "run", 0, 0)
    found = shown(config, tmp_path / "run")
    assert proved == float("inf")
    assert found.attack.auc[0] >= 0.9
    assert found.epsilon > 1
    assert found.exposure[0] > 5


def test_canaries_that_are_clients_are_compared_with_what_is_proved_of_clients(tmp_path):
    """Also where clients add noise themselves, which hides an example and not all copies of it that a client holds."""
    config = Config(
        task=Centre(), clients=8, canaries=4, algorithm="dpsgd:1:9", wire="clip:1,noise:2", rounds=2, local_steps=1,
        optimizer="sgd", max_grad_norm=None, evaluate_samples=0, test_share=0.2, actors=0,
    )  # fmt: skip
    train(config, tmp_path / "run")
    plan, run = prepare(config, Run(tmp_path / "x")), Run.open(tmp_path / "run")
    proved = epsilon({Release(2.0, 8, 8, 1.0): 2}, config.delta)
    assert spent(run, config, plan) == proved
    assert run.result["example_privacy"]["epsilon"] < proved / 2


# A model


def audited(tmp_path, steps):
    config = Config(
        task=Memory(), clients=2, rounds=1, local_steps=steps, train_batch_size=64, learning_rate=3e-3,
        evaluate_samples=0, test_share=0.5, actors=0,
    )  # fmt: skip
    rows = train(config, tmp_path / f"{steps}")
    plan = prepare(config, Run(tmp_path / "x"))
    state = Run.open(tmp_path / f"{steps}").state(plan.layout)
    return audit(LocalPool(config), model(state.tensors), plan, rows, 0, 1000)


def test_a_model_that_memorises_is_caught_and_one_that_has_seen_little_is_not(tmp_path):
    found, about = audited(tmp_path, 1500)
    assert about == {"trained_on": 32, "not_trained_on": 32, "draws": DRAWS}
    assert found.auc[0] >= 0.95
    assert found.p < 1e-6
    new, _ = audited(tmp_path, 1)
    assert new.auc[1] < 0.5 < new.auc[2]
    assert new.p > 1e-3


def test_losses_are_measured_at_the_same_timesteps_and_noises(tmp_path):
    assert audited(tmp_path, 1) == audited(tmp_path / "again", 1)


def test_without_images_held_out_there_is_nothing_to_compare_with(toy_config, tmp_path):
    config = toy_config(evaluate_samples=0)
    plan = prepare(config, Run(tmp_path / "x"))
    with pytest.raises(UserError, match="needs --test-share"):
        audit(LocalPool(config), model({"model": plan.initial}), plan, both_took_part(), 0, 10)


def both_took_part():
    return [{"clients": [{"client": client, "outcome": "ok"} for client in range(2)]}]


def test_only_images_of_clients_that_took_part_were_trained_on(toy_config, tmp_path):
    """Client k holds label k; client 1 fails."""
    config = toy_config(
        labels=6, failing=(1,), evaluate_samples=0, test_share=0.5, canaries=9, fraction=0.5, rounds=1,
    )  # fmt: skip
    rows = train(config, tmp_path / "run")
    plan = prepare(config, Run(tmp_path / "x"))
    members, others = kinds(plan, rows)
    assert set(rows[0]["cohort"]) == {1, 2, 5}
    labels = plan.dataset.labels
    assert sorted(labels[members]) == np.repeat([2, 5], 4).tolist()
    assert sorted(labels[others]) == np.repeat([2, 5], 4).tolist()
    assert not set(members) & set(others)
    lost = [row | {"clients": [each | {"outcome": "it broke"} for each in row["clients"]]} for row in rows]
    with pytest.raises(UserError, match="no client has taken part"):
        kinds(plan, lost)


# Uploads


def uploads_of(tmp_path, **changes):
    config = Config(
        clients=2, rounds=1, train_batch_size=16, evaluate_samples=0, test_share=0.5, actors=0,
        **{"task": Memory(), "local_steps": 800, "learning_rate": 3e-3, "lr_scheduler": "cosine"} | changes,
    )  # fmt: skip
    train(config, tmp_path)
    plan = prepare(config, Run(tmp_path / "x"))
    config = ongoing(config)
    return audit_uploads(LocalPool(config), config, plan, Run.open(tmp_path), (5, 100), 0)


@pytest.mark.slow
def test_a_client_that_memorises_is_caught_by_its_upload(tmp_path):
    found = uploads_of(tmp_path / "run")
    assert list(found.clients) == [0, 1]
    assert min(found.clients.values()) >= 0.9
    assert found.auc[0] == pytest.approx(np.mean(list(found.clients.values())))
    assert found.p < 1e-6
    assert found.p_largest == 2 * attack(np.arange(16), np.arange(16, 32)).p  # of two clients, each told entirely
    assert found.auc[1] is None
    assert found.rates == {}  # 32 images are too few for 1 %


@pytest.mark.parametrize("wire", ["float32", "float16", "clip:1,noise:1"])
def test_a_client_that_learns_next_to_nothing_is_not(tmp_path, wire):
    found = uploads_of(tmp_path / "run", local_steps=1, learning_rate=1e-4, wire=wire, task=Memory(count=600))
    assert min(found.p, found.p_largest, found.rates[0.01][3]) > 1e-3
    assert found.rates[0.01][1] < 0.05  # of 200 images of each kind


def test_of_masked_uploads_the_server_sees_uniform_numbers(toy_config):
    assert masked(toy_config(fold="secure:0.5"))
    assert not masked(toy_config(fold="mean"))
    assert not masked(toy_config(fold="median"))


def test_uploads_are_those_that_a_next_round_would_send(toy_config, tmp_path, monkeypatch):
    """The same weights as in a run of one more round, of methods with memories, and whatever is sent."""
    from fedray.federation import uploads

    config = toy_config(
        evaluate_samples=0, test_share=0.25, algorithm="scaffold", optimizer="sgd", wire="feedback:topk:0.5", rounds=2
    )
    train(config, tmp_path / "run")
    seen = []
    monkeypatch.setattr(uploads, "losses_at", lambda worker, indices: seen.append(
        worker.learner.flat.vector.detach().clone()) or np.zeros(len(indices)))  # fmt: skip
    plan = prepare(config, Run(tmp_path / "x"))
    audit_uploads(LocalPool(config), config, plan, Run.open(tmp_path / "run"), (9, 100), 0)
    before, after = seen[0], torch.stack(seen[1::2])
    assert all(torch.equal(each, before) for each in seen[::2])
    train(replace(config, rounds=3), tmp_path / "longer")
    state = Run.open(tmp_path / "longer").state(plan.layout)
    assert torch.allclose(after.mean(0), state.tensors["model"], atol=1e-6)


def test_a_client_without_images_held_out_is_not_attacked(toy_config, tmp_path):
    config = toy_config(evaluate_samples=0)
    train(config, tmp_path / "run")
    plan = prepare(config, Run(tmp_path / "x"))
    with pytest.raises(UserError, match="no client has held out any images of its own"):
        audit_uploads(LocalPool(config), config, plan, Run.open(tmp_path / "run"), (5, 100), 0)


# Copies


@dataclass(frozen=True)
class Shop(Memory):
    """Draws images anew, but for a share that it copies from those that it was trained on."""

    name: ClassVar[str] = "shop"
    count: int = 800
    copied: float = 0.0

    def build(self, device):
        learner = Denoiser()

        def sample(n, rng, sampler, steps):
            own, k = torch.from_numpy(self.dataset().images), round(self.copied * n)
            return torch.cat([own[learner.trained[:k]], 255 * torch.randint(2, (n - k, 1, 4, 4), generator=rng)]).byte()

        learner.sample = sample
        return learner


@pytest.mark.parametrize("copied", [0.0, 0.3])
def test_copies_are_found_in_pixels_and_in_features(tmp_path, copied):
    config = Config(task=Shop(copied=copied), clients=2, local_steps=1, test_share=0.3, evaluate_samples=0, actors=0)
    plan, pool = prepare(config, Run(tmp_path / "x")), LocalPool(config)
    pool.worker.learner.trained = torch.from_numpy(plan.images_of(range(2))[0])
    mixed = torch.from_numpy(np.random.default_rng(1).normal(size=(16, 24)).astype(np.float32))
    pool.worker.features = lambda images: images.flatten(1).float() @ mixed
    features = pool.worker.features(torch.from_numpy(plan.dataset.images)).numpy()
    sampling = Sampling(200, "ddpm", 1, 50, 0)
    initial = model({"model": plan.initial})
    found = audit_copies(pool, initial, plan, both_took_part(), sampling, features)
    assert list(found) == ["pixels", "features"]
    for each in found.values():
        assert each.expected == 0.05
        if copied:
            assert each.share >= 0.3
            assert each.p < 1e-6
            assert np.array_equal(each.images[:60], each.nearest[:60])
        else:
            assert each.p > 1e-3
    assert list(audit_copies(pool, initial, plan, both_took_part(), sampling, None)) == ["pixels"]


# The command


@pytest.mark.slow
def test_a_run_of_digits_is_audited_from_the_command_line(tmp_path, capsys):
    from fedray import cli

    run = str(tmp_path / "run")
    short = "--rounds 1 --local-steps 1 --evaluate-samples 0 --test-share 0.9 --actors 0 --canaries 30 --out"
    assert cli.main(["train", *short.split(), run]) == 0
    options = "--images 120 --clients 3 --samples 64 --sampling-steps 2"
    assert cli.main(["audit", run, *options.split()]) == 0
    said = capsys.readouterr().out
    assert "area under the curve" in said
    assert "true positives at 1.0% false ones" in said
    saved = json.loads((tmp_path / "run/audit.json").read_text())
    assert 0.3 < saved["auc"][0] < 0.7
    assert saved["trained_on"] == saved["not_trained_on"] == 120
    for line in (
        "uploads of 3 clients",
        "canaries: exposure, of",
        "no noise proves one",
        "copies, by features",
        "5% of held-out images",
    ):
        assert line in said
    assert len(saved["uploads"]["clients"]) == 3
    assert saved["canaries"]["count"] == 30
    assert saved["canaries"]["epsilon"] == 0
    assert set(saved["copies"]) == {"pixels", "features"}
    for name in ("audit-pixels.png", "audit-features.png"):
        assert (tmp_path / "run" / name).exists()
    assert cli.main(["audit", run, "--images", "1"]) == 2
