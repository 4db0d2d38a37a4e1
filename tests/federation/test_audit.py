"""Membership inference: the statistics against closed forms and simulation, and a model that was made to memorise."""

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from runs import train
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import nn

from fedray.config import Config
from fedray.data.dataset import Dataset
from fedray.errors import UserError
from fedray.federation.audit import DRAWS, audit
from fedray.federation.fit import prepare
from fedray.federation.pool import LocalPool
from fedray.federation.worker import model
from fedray.record.run import Run
from fedray.scores.membership import area, attack, true_positive_rate
from fedray.vector import FlatParameters


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
    found = [attack(rng.exponential(size=150), rng.exponential(size=200), rng) for _ in range(100)]
    assert stats.kstest([each.p for each in found], "uniform").pvalue > 1e-3
    assert np.mean([each.rates[0.01][0] for each in found]) == pytest.approx(2 / 201, abs=4 * 0.011 / 100**0.5)
    assert list(found[0].rates) == [0.01]  # 200 are too few for 0.1 %
    inside = np.mean([each.auc[1] <= 0.5 <= each.auc[2] for each in found])
    assert inside > 0.8


def test_a_rate_at_few_false_positives_of_normal_losses():
    rng = np.random.default_rng(3)
    value, low, high = true_positive_rate(rng.normal(-2, 1, 20_000), rng.normal(0, 1, 20_000), 0.01, rng)
    truth = stats.norm.cdf(2 + stats.norm.ppf(0.01))
    assert value == pytest.approx(truth, abs=0.03)
    assert low < truth < high


# A model


@dataclass(frozen=True)
class Memory:
    """A small denoiser of images that are noise: nothing can be learned of them but the images themselves."""

    name: ClassVar[str] = "memory"
    count: int = 64

    def check(self, sampler, steps):
        pass

    def dataset(self):
        rng = np.random.default_rng(0)
        return Dataset(rng.integers(0, 2, (self.count, 1, 4, 4)).astype(np.uint8) * 255)

    def build(self, device):
        return Denoiser()


class Denoiser:
    def __init__(self):
        self.network = nn.Sequential(nn.Linear(17, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 16))
        self.flat = FlatParameters(self.network)

    def prepare(self, dataset, indices, mirrored):
        pass

    def loss(self, batch, rng):
        x = batch["images"].flatten(1).float() / 127.5 - 1
        t, noise = torch.rand(len(x), 1, generator=rng), torch.randn(x.shape, generator=rng)
        noisy = (1 - t).sqrt() * x + t.sqrt() * noise
        return (self.network(torch.cat([noisy, t], 1)) - noise).square().mean()

    def sample(self, n, rng, sampler, steps):
        raise NotImplementedError

    def save(self, directory):
        directory.mkdir()


def audited(tmp_path, steps):
    config = Config(
        task=Memory(), clients=2, rounds=1, local_steps=steps, train_batch_size=64, learning_rate=3e-3,
        evaluate_samples=0, test_share=0.5, actors=0,
    )  # fmt: skip
    train(config, tmp_path / f"{steps}")
    plan = prepare(config, Run(tmp_path / "x"))
    state = Run.open(tmp_path / f"{steps}").state(plan.layout)
    return audit(LocalPool(config), model(state.tensors), plan, 0, 1000)


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
        audit(LocalPool(config), model({"model": plan.initial}), plan, 0, 10)


@pytest.mark.slow
def test_a_run_of_digits_is_audited_from_the_command_line(tmp_path, capsys):
    from fedray import cli

    run = str(tmp_path / "run")
    short = "--rounds 1 --local-steps 1 --evaluate-samples 0 --test-share 0.9 --actors 0 --no-use-ema --out"
    assert cli.main(["train", *short.split(), run]) == 0
    assert cli.main(["audit", run, "--images", "120"]) == 0
    said = capsys.readouterr().out
    assert "area under the curve" in said
    assert "true positives at 1.0% false ones" in said
    saved = json.loads((tmp_path / "run/audit.json").read_text())
    assert 0.3 < saved["auc"][0] < 0.7
    assert saved["trained_on"] == saved["not_trained_on"] == 120
    assert cli.main(["audit", run, "--images", "1"]) == 2
