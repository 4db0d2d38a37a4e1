"""Sampling: how images are divided into batches, and what a task's `sample` must give."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import toy
from runs import train

from fedray.errors import UserError
from fedray.federation.evaluation import prompts_of, sample
from fedray.federation.pool import LocalPool
from fedray.federation.sampling import Sampling, check_sample
from fedray.federation.worker import model as model_of


def test_images_are_divided_into_batches_with_their_prompts():
    sampling = Sampling(n=7, sampler="ddim", steps=3, batch_size=3, seed=5, prompts=("a", "b"))
    jobs = list(sampling.jobs(features=True, keep=4))
    assert [(job.batch, job.size, job.keep) for job in jobs] == [(0, 3, 4), (1, 3, 1), (2, 1, 0)]
    assert [prompt for job in jobs for prompt in job.prompts] == list("abababa")
    assert {(job.sampler, job.steps, job.seed, job.features) for job in jobs} == {("ddim", 3, 5, True)}
    assert [job.prompts for job in replace(sampling, prompts=()).jobs(False, 0)] == [(), (), ()]


def test_sets_are_drawn_one_after_another_the_first_as_if_alone():
    sampling = Sampling(n=4, sampler="ddim", steps=3, batch_size=3, seed=5, prompts=("a", "b", "c"))
    three = list(replace(sampling, repeats=3).jobs(features=False, keep=6))
    assert three[:2] == list(sampling.jobs(features=False, keep=6))
    assert [(job.batch, job.size, job.keep) for job in three] == [
        (0, 3, 6), (1, 1, 3), (2, 3, 2), (3, 1, 0), (4, 3, 0), (5, 1, 0)
    ]  # fmt: skip
    assert [job.prompts for job in three] == [("a", "b", "c"), ("a",)] * 3


@pytest.mark.parametrize(
    ("images", "gave"),
    [
        (torch.zeros(2, 3, 4, 4), r"a float32 tensor \[2, 3, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), r"an? int64 tensor \[2, 3, 4, 4\]"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), r"a uint8 tensor \[2, 4, 4\]"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), r"a uint8 tensor \[2, 4, 4, 3\]"),
        (torch.zeros(3, 3, 4, 4, dtype=torch.uint8), r"a uint8 tensor \[3, 3, 4, 4\]"),
        (torch.zeros(2, 3, 0, 4, dtype=torch.uint8), r"a uint8 tensor \[2, 3, 0, 4\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8, device="meta"), r"a uint8 tensor \[2, 3, 4, 4\] on meta"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"a uint8 ndarray \[2, 3, 4, 4\]"),
        ([torch.zeros(3, 4, 4)] * 2, "a list of 2"),
        (None, "a NoneType"),
    ],
)
def test_a_sample_that_is_no_images_is_named(images, gave):
    expected = r", and must give a uint8 tensor \[2, 1 or 3 channels, height, width\] on the CPU\."
    with pytest.raises(UserError, match=f"the task 'mine': its learner's sample gave {gave}{expected}"):
        check_sample(images, 2, "mine")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_of_images_is_let_through(channels):
    check_sample(torch.zeros(2, channels, 5, 4, dtype=torch.uint8), 2, "mine")


def test_wrong_samples_are_named_where_they_are_made(toy_config, monkeypatch):
    monkeypatch.setattr(toy.ToyLearner, "sample", lambda self, n, rng, sampler, steps: torch.zeros(n, 2))
    config = toy_config()
    with pytest.raises(UserError, match=r"the task 'toy': .* gave a float32 tensor \[4, 2\]"):
        sample(LocalPool(config), model_of({"model": torch.zeros(16)}), Sampling.of(config, 4))


def test_a_task_gets_prompts_if_it_knows_them(toy_config, monkeypatch):
    """A task of a user's own has neither `prompts` nor a parameter for them."""
    config = toy_config(eval_batch_size=2)
    model, dataset = model_of({"model": torch.zeros(16)}), config.task.dataset()
    assert prompts_of(config, dataset) == ()
    sample(LocalPool(config), model, Sampling.of(config, 3))
    seen = []
    plain = toy.ToyLearner.sample

    def with_prompts(self, n, rng, sampler, steps, prompts=()):
        seen.append(prompts)
        return plain(self, n, rng, sampler, steps)

    monkeypatch.setattr(toy.ToyLearner, "sample", with_prompts)
    monkeypatch.setattr(toy.Toy, "prompts", lambda self, dataset: ("a", "b", "c"), raising=False)
    sample(LocalPool(config), model, Sampling.of(config, 3, prompts_of(config, dataset)))
    assert seen == [("a", "b"), ("c",)]


@dataclass(frozen=True)
class Floats(toy.Toy):
    """A task whose learner samples floats."""

    def build(self, device):
        learner = super().build(device)
        sample = learner.sample
        learner.sample = lambda *arguments: sample(*arguments).float()
        return learner


def test_a_task_whose_samples_cannot_be_drawn_is_refused_before_round_1(toy_config, tmp_path):
    config = replace(toy_config(), task=Floats())
    said = r"the task 'toy': its learner's sample gave a float32 tensor \[1, 1, 2, 2\], and must give a uint8 tensor"
    with pytest.raises(UserError, match=said):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert len(train(replace(config, evaluate_samples=0), tmp_path / "run")) == 3  # then nothing is drawn
