"""Gradients of single examples against a loop of backward passes, their clip against its definition, and the steps."""

import json
import random
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from memory import Memory, memory_config
from runs import AnySize, sha, train, trained
from scipy import stats
from torch import nn

import fedray
from fedray.algorithms.dpsgd import DPSGD
from fedray.algorithms.fedavg import FedAvg
from fedray.config import Config
from fedray.errors import RunError, UserError
from fedray.federation.blocks import Pace
from fedray.federation.budget import spent, try_of
from fedray.federation.examples import Private, clipped_sum, drawn_steps, example_gradients, rate_of
from fedray.federation.fit import prepare
from fedray.federation.local import LocalTraining, TrainJob
from fedray.federation.pool import LocalPool
from fedray.federation.steps import batch_of
from fedray.federation.worker import Worker
from fedray.privacy import Release, epsilon
from fedray.record.run import Run
from fedray.seeds import generator
from fedray.tasks.lora import PIPELINE, LoRA
from fedray.vector import Layout


class Flat:
    """The flat parameters of a network of any dtype."""

    def __init__(self, module):
        named = dict(module.named_parameters())
        self.module = module
        self.layout = Layout(tuple(named), tuple(tuple(parameter.shape) for parameter in named.values()))
        self.vector = torch.cat([parameter.detach().reshape(-1) for parameter in named.values()])


class Network(nn.Module):
    """What layers there are: convolutions, norms, an embedding, attention, a time that scales all."""

    def __init__(self):
        super().__init__()
        self.into, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.embedding, self.attention = nn.Embedding(10, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x, t, scale=1.0):
        x = self.norm(self.into(x)).relu() + self.embedding(t)[:, :, None, None]
        x = x.flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return {"sample": scale * self.out(x.mean(1))}


def test_they_are_those_of_a_loop_in_float64():
    torch.manual_seed(0)
    network = Network().double()
    flat = Flat(network)
    x, t, y = torch.randn(7, 2, 5, 5).double(), torch.arange(7), torch.randn(7, 3).double()

    def loss(rows):
        return (network(x[rows], t[rows], scale=0.7)["sample"] - y[rows]).square().sum(1).mean()

    found, mean = example_gradients(flat, lambda: loss(slice(None)))
    for index in range(7):
        network.zero_grad()
        loss([index]).backward()
        expected = torch.cat([parameter.grad.reshape(-1) for parameter in network.parameters()])
        assert torch.allclose(found[index], expected, rtol=1e-9, atol=1e-12)
    assert mean == pytest.approx(loss(slice(None)).item())
    assert "forward" not in vars(network)


def one_by_one(learner, loss, size):
    """Gradients of the same draws: of what the network gives, all but one example's is detached."""
    found = []
    for index in range(size):
        mask = torch.arange(size) == index

        def only(module, inputs, output, mask=mask):
            sample = output.sample
            wide = mask.view(-1, *[1] * (sample.ndim - 1))
            output.sample = torch.where(wide, sample, sample.detach())
            return output

        hook = learner.flat.module.register_forward_hook(only)
        learner.flat.gradient.zero_()
        loss().backward()
        hook.remove()
        found.append(size * learner.flat.gradient.clone())
    return torch.stack(found)


def compared(task, size=4):
    dataset, learner = task.dataset(), task.build(torch.device("cpu"))
    with torch.no_grad():
        learner.flat.vector.add_(0.02 * torch.randn(len(learner.flat.vector), generator=generator(0)))
    indices = np.arange(size)
    learner.prepare(dataset, indices, False)

    def loss():
        return learner.loss(batch_of(dataset, indices), generator(0, "test"))

    expected = one_by_one(learner, loss, size)
    learner.flat.gradient.zero_()
    found, mean = example_gradients(learner.flat, loss)
    assert not learner.flat.gradient.any()
    assert found.shape == expected.shape == (size, len(learner.flat.vector))
    lengths = expected.norm(dim=1)
    assert lengths.min() > 0
    assert ((found - expected).norm(dim=1) / lengths).max() < 1e-4
    assert mean == pytest.approx(loss().item(), rel=1e-6)
    learner.flat.check()


@pytest.mark.slow
def test_of_a_u_net():
    compared(replace(fedray.PRESETS["digits"].task, attention=(False, True), mid_block_attention=True))


@pytest.mark.slow
def test_of_adapters(photos):
    compared(LoRA(pretrained_model_name_or_path=str(PIPELINE), resolution=16, train_data_dir=str(photos), rank=2))


def test_the_clip_is_its_definition_and_no_example_moves_the_sum_by_more():
    gradients = torch.randn(9, 50, generator=generator(0)) * torch.logspace(-3, 3, 9)[:, None]
    gradients[4] = 0
    expected = sum(g * min(1, 0.5 / max(np.linalg.norm(g), 1e-300)) for g in gradients.double().numpy())
    assert np.allclose(clipped_sum(gradients, 0.5).numpy(), expected, rtol=2e-5, atol=1e-6)
    for index in range(9):
        others = gradients[np.arange(9) != index]
        moved = (clipped_sum(gradients, 0.5) - clipped_sum(others, 0.5)).double().norm()
        assert moved <= 0.5 * (1 + 1e-6)
    assert torch.equal(clipped_sum(gradients[:3], 1e3), gradients[:3].sum(0)) or torch.allclose(
        clipped_sum(gradients[:3], 1e3), gradients[:3].sum(0), rtol=1e-5
    )
    huge = torch.full((1, 50), 1e30)
    assert clipped_sum(huge, 0.5).double().norm() <= 0.5


def test_each_example_is_drawn_by_itself():
    config = Config(task=Memory(), local_steps=1, train_batch_size=5, gradient_accumulation_steps=2)
    assert rate_of(config, 40) == 0.25
    assert rate_of(config, 8) == 1
    steps = list(drawn_steps(config, 40, 2000, np.random.default_rng(0).random))
    assert max(len(batch) for step in steps for batch in step) == 5
    drawn = np.array([np.bincount(np.concatenate([*step, []]).astype(int), minlength=40) for step in steps])
    assert drawn.max() == 1
    counts = np.bincount(drawn.sum(1), minlength=41)
    kept = stats.binom.pmf(np.arange(41), 40, 0.25) * 2000 > 5
    expected = stats.binom.pmf(np.arange(41), 40, 0.25)[kept]
    assert stats.chisquare(counts[kept], expected / expected.sum() * counts[kept].sum()).pvalue > 1e-4
    assert stats.chisquare(drawn.sum(0)).pvalue > 1e-4
    assert abs(np.corrcoef(drawn[:, 3], drawn[:, 7])[0, 1]) < 4 / 2000**0.5


def test_without_noise_and_with_every_example_it_is_a_plain_step():
    """q = 1, and a clip that is never reached: a full batch of SGD."""
    config = memory_config(train_batch_size=64, algorithm="dpsgd:1e6:0", local_steps=1)
    worker, plan = Worker(config, torch.device("cpu"), "test"), prepare(config, Run("/nowhere/at/all"))
    worker.load(plan.initial)
    flat, rng = worker.learner.flat, generator(config.seed, "train", 0, 0)
    ((drawn,),) = drawn_steps(config, 32, 1, np.random.default_rng(0).random)
    assert drawn.tolist() == list(range(32))
    worker.learner.loss(batch_of(worker.dataset, plan.shards[0][drawn]), rng).backward()
    expected = 0.05 * flat.gradient.clone()
    local = LocalTraining(worker, plan.round(config, 0), TrainJob(0, 0, plan.shards[0], plan.shards[0][:0]))
    local.protect(1e6, 0.0)
    local.run(lambda gradient: None)
    moved = plan.initial - flat.vector.detach()
    assert (moved - expected).norm() < 1e-4 * expected.norm()


def test_a_step_is_the_noisy_mean_of_clipped_gradients():
    """Of one step of SGD without momentum: its change over the learning rate, less the clipped sum, is the noise."""
    config = memory_config(local_steps=1, algorithm="dpsgd:0.1:3")
    worker = Worker(config, torch.device("cpu"), "test")
    plan = prepare(config, Run("/nowhere/at/all"))
    moved = {}
    for multiplier in (0.0, 3.0):
        worker.load(plan.initial)
        local = LocalTraining(worker, plan.round(config, 0), TrainJob(0, 0, plan.shards[0], plan.shards[0][:0]))
        local.protect(0.1, multiplier)
        local.run(lambda gradient: None)
        moved[multiplier] = (plan.initial - worker.learner.flat.vector.detach()) / 0.05
    expected = rate_of(config, 32) * 32
    assert moved[0.0].norm() * expected <= 0.1 * local.images * (1 + 1e-4)
    noise = (moved[3.0] - moved[0.0]).numpy() * expected / (3 * 0.1)
    assert len(noise) > 10_000
    assert stats.kstest(noise, "norm").pvalue > 1e-4


def test_noise_and_draws_are_others_for_another_model(tmp_path, monkeypatch):
    """Two runs of one seed; a client fails in the second, so that round 2 starts from another model."""
    right = Private.finish

    def finish(private, gradient):
        before = gradient.clone()
        right(private, gradient)
        key = (private.round.number, private.client, private.step)
        runs[-1][key] = (gradient * private.expected - before).numpy(), taken[-1]

    def drawn(private, examples):
        numbers = draw(private, examples)
        taken.append(numbers)
        return numbers

    draw, runs, taken = Private.draw, [], []
    monkeypatch.setattr(Private, "finish", finish)
    monkeypatch.setattr(Private, "draw", drawn)
    for name, dropout in (("all", 0.0), ("fewer", 0.5)):
        runs.append({})
        train(memory_config(algorithm="dpsgd:0.5:1.5", clients=3, dropout_rate=dropout), tmp_path / name)
    both = sorted(set(runs[0]) & set(runs[1]))
    assert {number for number, _, _ in both} == {0, 1}
    for key in both:
        (noise, draws), (other, others) = runs[0][key], runs[1][key]
        assert np.allclose(noise, other, atol=1e-4) == np.array_equal(draws, others) == (key[0] == 0)
        assert abs(np.corrcoef(noise, other)[0, 1]) < 0.05 or key[0] == 0


def test_every_client_has_an_epsilon_of_its_own(tmp_path):
    config = memory_config(
        algorithm="dpsgd:0.5:1.5", partition="quantity:0.5", clients=4, cohort="poisson:0.6", rounds=4
    )
    rows = train(config, tmp_path / "run")
    taken, client_of = {}, {}

    def draw(n):
        return n, min(8, n), min(8, n) / n

    for row in rows:
        for client in row["clients"]:
            taken[client["client"]] = taken.get(client["client"], 0) + 6
            client_of[client["client"]] = client
            expected = epsilon({Release(1.5, *draw(client["examples"])): taken[client["client"]]}, 1e-5)
            assert client["epsilon"] == expected
        assert row["example_privacy"]["epsilon"] == max(each["epsilon"] for each in client_of.values())
    result = Run.open(tmp_path / "run").result["example_privacy"]
    assert set(result["clients"]) == set(map(str, taken))
    assert result["epsilon"] == max(result["clients"].values())
    assert len(set(result["clients"].values())) > 1
    train(config, tmp_path / "cut", rounds=2)
    train(config, tmp_path / "cut", resume=True)
    assert sha(tmp_path / "cut") == sha(tmp_path / "run")
    assert Run.open(tmp_path / "cut").result["example_privacy"] == result


@pytest.mark.parametrize("form", ["dpsgd:1:1", "dpsgd:1:1:scaffold", "ema:0.9:dpsgd:1:1:fedadam:0.01"])
def test_the_same_in_random_blocks_with_a_client_that_fails(tmp_path, monkeypatch, form):
    """State, memories and rows; and after a stop."""
    right = Private.finish

    def finish(private, gradient):
        if private.client == 2:
            raise ValueError("the camera is on fire")
        right(private, gradient)

    monkeypatch.setattr(Private, "finish", finish)
    config = memory_config(algorithm=form, clients=5, rounds=3, local_steps=2)
    plan = prepare(config, Run(tmp_path / "x"))
    expected = trained(config, plan, LocalPool(config), Pace())
    assert [outcome for _, outcome, *_ in expected[2][0]].count("ok") == 4
    for seed in range(3):
        assert trained(config, plan, LocalPool(config), AnySize(random.Random(seed))) == expected
    train(config, tmp_path / "whole")
    train(config, tmp_path / "cut", rounds=1)
    train(config, tmp_path / "cut", resume=True)
    assert sha(tmp_path / "cut") == sha(tmp_path / "whole")


def test_numbers_that_were_published():
    """q = 0.04, σ = 1.5 and 2,250 steps; q = 0.01, σ = 4 and 10,000 steps: as in tests/test_accounting.py."""
    config = Config(task=Memory(), clients=1, local_steps=225, rounds=10, train_batch_size=4, algorithm="dpsgd:1:1.5")
    assert spent(config, 1.5, np.array([100]), config.rounds) == pytest.approx(7.32933, abs=5e-6)
    assert try_of(config, 1.5, 100).epsilon(10, 1e-5) == spent(config, 1.5, np.array([100]), 10)
    config = replace(config, local_steps=1000, train_batch_size=10, delta=1e-5)
    assert round(spent(config, 4.0, np.array([1000]), config.rounds), 3) == 1.035
    assert spent(config, 0.0, np.array([1000]), 1) == float("inf")


def test_around_other_methods(tmp_path):
    for form in ("dpsgd:1:1:fedprox:0.1", "dpsgd:1:1:scaffold", "ema:0.9:dpsgd:1:1:fedadam:0.01"):
        config = memory_config(algorithm=form, rounds=1)
        (row,) = train(config, tmp_path / form.replace(":", "-"))
        assert row["example_privacy"]["epsilon"] > 0
    config = memory_config(algorithm="dpsgd:1:1", wire="clip:1,noise:1", fold="secure:1:bits=22:limit=1", rounds=1)
    (row,) = train(config, tmp_path / "both")
    assert row["example_privacy"]["epsilon"] > 0
    assert row["privacy"]["epsilon"] > 0


@dataclass(frozen=True)
class Other(Memory):
    """The same with another network."""

    name: ClassVar[str] = "other memory"
    kind: str = ""

    def build(self, device):
        learner = super().build(device)
        module = learner.network
        if self.kind == "norm":
            module[1] = nn.BatchNorm1d(128)
        elif self.kind == "dropout":
            module[1] = nn.Dropout(0.1)
        elif self.kind == "twice":
            right = learner.loss
            learner.loss = lambda batch, rng: right(batch, rng) + right(batch, rng)
        return learner


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": Other(kind="norm")}, "1 is a BatchNorm1d, which mixes a batch's examples; use GroupNorm"),
        ({"task": Other(kind="dropout")}, "1 drops out at random"),
        ({"mixed_precision": "bf16"}, "leave --mixed-precision out"),
        ({"algorithm": "dpsgd:1:1:fedprox-adaptive"}, "needs more of its clients than noise"),
        ({"algorithm": "dpsgd:0:1"}, "norm is 0.0; it must be above 0"),
        ({"algorithm": "dpsgd:1:5:dpsgd:1:0.01"}, "there is dpsgd in it already; once is enough"),
        ({"algorithm": "dpsgd:1:5:ema:0.9:dpsgd:1:0.01"}, "there is dpsgd in it already; once is enough"),
        ({"algorithm": "dpsgd:1:-1"}, "noise is -1.0; it must be not negative"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(memory_config(**({"algorithm": "dpsgd:1:1"} | changes)), Run(tmp_path / "run"))


def test_a_method_of_ones_own_cannot_make_more_steps_than_count(tmp_path):
    @dataclass(frozen=True)
    class Longer(FedAvg):
        def train(self, local, down, memory):
            super().train(local, down, memory)
            super().train(local, down, memory)

    with pytest.raises(UserError, match="makes more than the 6 steps of a client that noise hides"):
        train(memory_config(algorithm=DPSGD(1.0, 5.0, Longer()), rounds=1), tmp_path / "run")


def test_a_method_of_ones_own_cannot_lower_the_noise_either(tmp_path):
    @dataclass(frozen=True)
    class Twice(FedAvg):
        def train(self, local, down, memory):
            local.protect(1.0, 0.01)
            super().train(local, down, memory)

    with pytest.raises(UserError, match="asks for noise on examples twice"):
        train(memory_config(algorithm=DPSGD(1.0, 5.0, Twice()), rounds=1), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": Other(kind="twice")}, "calls its network 2 times"),
        ({"algorithm": "ditto:0.5:dpsgd:1:1"}, "looks at examples without noise"),
    ],
)
def test_and_what_shows_only_in_training(tmp_path, changes, message):
    with pytest.raises((UserError, RunError), match=message):
        train(memory_config(**({"algorithm": "dpsgd:1:1"} | changes)), tmp_path / "run")


def test_a_client_that_draws_nothing_sends_its_noise(tmp_path):
    config = memory_config(task=Memory(count=64), train_batch_size=1, clients=1, local_steps=1, algorithm="dpsgd:1:1")
    config = replace(config, rounds=8)
    rows = train(config, tmp_path / "run")
    assert min(row["images"] for row in rows) == 0
    assert all(json.loads(json.dumps(row["loss"])) > 0 for row in rows)
    expected = epsilon({Release(1.0, 64, 1, 1 / 64): 8}, 1e-5)
    assert rows[-1]["clients"][0]["epsilon"] == expected


def test_results_the_page_and_the_card_say_what_is_spent(tmp_path, capsys):
    from fedray.record.card import model_card
    from fedray.reports import page
    from fedray.reports.progress import progress
    from fedray.reports.results import summary

    config = memory_config(algorithm="dpsgd:1:2")
    rows = train(config, tmp_path / "run")
    with progress(2) as (on_row, _):
        on_row(rows[0])
    assert f"ε of examples {rows[0]['example_privacy']['epsilon']:.3g} (δ 1e-05)" in capsys.readouterr().out
    frame = fedray.load(tmp_path / "run").rounds
    assert frame["example_privacy.epsilon"].tolist() == [row["example_privacy"]["epsilon"] for row in rows]
    run = Run.open(tmp_path / "run")
    command = ["fedray", "train", "--seed", "81549", "--seed=81549", "--clients", "2"]
    card = model_card(config.to_json(), run.result, command)
    assert f"ε at most {run.result['example_privacy']['epsilon']:.4g} at δ = 1e-05 for one example of a client" in card
    assert "the run's seed, which must stay secret" in card
    assert "81549" not in card
    assert "`fedray train --clients 2`" in card
    assert summary({"run": tmp_path / "run"}).loc["run", "ε of examples"] == run.result["example_privacy"]["epsilon"]
    page.write([tmp_path / "run"], tmp_path / "page.html")
    assert "Privacy of examples at the end" in (tmp_path / "page.html").read_text()
    plain = {name: value for name, value in run.result.items() if name != "example_privacy"}
    assert "--seed 81549" in model_card(config.to_json(), plain, ["fedray", "train", "--seed", "81549"])


@pytest.mark.parametrize("wire", ["float32", "clip:1,noise:1"])
def test_secure_noise_is_of_the_system(tmp_path, wire):
    """Also where sums are noisy, the noise on examples is other every time; from the seed it is not."""
    for secure in (True, False):
        config = memory_config(algorithm="dpsgd:1:1", rounds=1, secure_noise=secure, wire=wire)
        config.check()
        losses = [train(config, tmp_path / f"{secure}-{repeat}")[0]["loss"] for repeat in range(2)]
        assert (losses[0] == losses[1]) != secure  # of what clients trained on, before noise on the sum
        assert (sha(tmp_path / f"{secure}-0") == sha(tmp_path / f"{secure}-1")) != secure
        assert Run.open(tmp_path / f"{secure}-0").result["example_privacy"]["repeatable"] != secure


@pytest.mark.slow
def test_canaries_and_noisy_gradients_are_the_same_on_two_actors(ray, tmp_path):
    """Of a dataset that is cached: actors open it, and plant the canaries that this process does."""
    config = replace(
        fedray.PRESETS["digits"], rounds=1, local_epochs=None, local_steps=2, test_share=0.9, evaluate_samples=0,
        canaries=8, algorithm="dpsgd:1:1", use_ema=False, actors=0,
    )  # fmt: skip
    fedray.run(config, tmp_path / "here")
    fedray.run(replace(config, actors=2), tmp_path / "there")
    assert sha(tmp_path / "there") == sha(tmp_path / "here")
    assert any(client["images"] for client in Run.open(tmp_path / "there").rows[0]["clients"])
