"""Training options against diffusers' own, closed forms, or the same thing done another way."""

from dataclasses import dataclass, replace

import made
import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from safetensors.torch import load_file

from fedray.algorithms import Algorithm
from fedray.cli import main
from fedray.cluster.alone import run_local_only
from fedray.errors import UserError
from fedray.federation.local import TrainJob, client_update
from fedray.federation.plan import make_plan
from fedray.federation.steps import lr_schedule
from fedray.federation.worker import Shared, Worker
from fedray.presets import PRESETS
from fedray.record.run import Run
from fedray.seeds import generator
from fedray.tasks.ddpm import DDPM
from fedray.tasks.ddpm.learner import DDPMLearner
from fedray.vector.optimizer import LR_SCHEDULERS

NONE = np.array([], int)
DIGITS = replace(
    PRESETS["digits"], rounds=2, local_epochs=None, local_steps=4, evaluate_samples=0, features=None, actors=0
)


def train(config, out, resume=False, rounds=None):
    runs.train(config, out, resume=resume, rounds=rounds)
    return Run.open(out)


def shared(worker):
    """The initial model, which goes down to client 0."""
    model = worker.learner.flat.vector.detach().numpy().copy()
    return Shared({"model": model}, made.round_of({0: 64}, worker.learner.flat.layout, clients=4))


def trained_vector(config, examples=64):
    worker = Worker(config, torch.device("cpu"), "test")
    row, trained = client_update(worker, shared(worker), TrainJob(0, 0, np.arange(examples), NONE))
    return row, trained.payload["model"]


def trained_alone(worker, plan, client, rounds):
    """Train a client round after round, without a server; what it sends after the last."""
    model, average, memory, sent = plan.initial.numpy(), plan.initial.numpy(), {}, {}
    for number in range(rounds):
        round = made.round_of({client: 8}, plan.layout, number=number, clients=1)
        steps = np.array([number * worker.config.steps(len(plan.shards[client]))])
        down = Shared({"model": model, "ema/model": average, "ema/steps": steps}, round)
        row, (sent, _, memory) = client_update(
            worker, down, TrainJob(number, client, plan.shards[client], NONE, memory)
        )
        model, average = sent["model"], sent["ema/model"]
        assert row["bytes_up"] == model.nbytes  # of the average, which a deployment would not send, nothing
    return sent


# The loss


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_losses_are_those_of_diffusers_scripts(kind, gamma):
    torch.manual_seed(0)
    learner = DDPM(prediction_type=kind, snr_gamma=gamma).build(torch.device("cpu"))
    images = torch.randint(256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    loss = learner.loss({"images": images}, generator(3)).item()
    rng = generator(3)
    timesteps = torch.randint(1000, (8,), generator=rng)
    noise = torch.randn(8, 1, 8, 8, generator=rng)
    clean = images.float() / 127.5 - 1
    output = learner.unet(learner.scheduler.add_noise(clean, noise, timesteps), timesteps).sample
    snr = compute_snr(learner.scheduler, timesteps)
    velocity = learner.scheduler.get_velocity(clean, noise, timesteps)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[kind]
    each = F.mse_loss(output, target, reduction="none").mean((1, 2, 3))
    if gamma is None:  # train_unconditional.py
        expected = (snr * each).mean() if kind == "sample" else each.mean()
    else:  # train_text_to_image.py
        weights = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        expected = (weights / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind] * each).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_the_kind_of_prediction_reaches_the_sampler(tmp_path):
    images = {}
    for kind in ("epsilon", "v_prediction", "sample"):
        torch.manual_seed(0)
        learner = DDPM(prediction_type=kind).build(torch.device("cpu"))
        images[kind] = learner.sample(2, generator(0), "ddpm", 5).numpy()
    assert not np.array_equal(images["epsilon"], images["v_prediction"])
    assert not np.array_equal(images["epsilon"], images["sample"])


# The optimizer


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_learning_rates_are_those_of_diffusers(name):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=6, num_training_steps=20)
    ours = lr_schedule(name, 0.1, warmup=6, steps=20)
    for step in range(20):
        assert ours(step) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()


def test_accumulated_batches_are_one_large_batch():
    """Four batches of 16 give the gradient of one of 64, where the loss draws nothing that depends on the batch."""

    class Fixed(DDPMLearner):
        def loss(self, batch, rng):  # noise and timesteps from the images, not from the order of draws
            images = batch["images"].float() / 127.5 - 1
            t = (batch["images"].flatten(1).sum(1) % 1000).long()
            noisy = self.scheduler.add_noise(images, images.flip(-1), t)
            return F.mse_loss(self.unet(noisy, t).sample, images)

    class Task(DDPM):
        def build(self, device):
            return Fixed(self.unet(), self.scheduler(), None, device)

    one = replace(DIGITS, task=Task(), local_steps=2, train_batch_size=64, adam_epsilon=1e-2)
    _, whole = trained_vector(one)
    row, parts = trained_vector(replace(one, train_batch_size=16, gradient_accumulation_steps=4))
    _, other = trained_vector(replace(one, train_batch_size=16))
    assert row["images"] == 128
    assert row["steps"] == 2
    assert np.abs(whole - parts).max() < 1e-5 < np.abs(whole - other).max()


def test_random_flips_mirror_half_of_the_images(monkeypatch):
    seen = []
    config = replace(DIGITS, random_flip=True, local_steps=20, train_batch_size=64)
    worker = Worker(config, torch.device("cpu"), "test")

    def loss(batch, rng):
        seen.append(batch["images"])
        return worker.learner.unet.conv_in.bias.square().sum()

    monkeypatch.setattr(worker.learner, "loss", loss)
    before = worker.dataset.images.copy()
    client_update(worker, shared(worker), TrainJob(0, 0, np.arange(64), NONE))
    originals = {image.tobytes() for image in before[:64]}
    mirrored = {image[..., ::-1].tobytes() for image in before[:64]} - originals
    shown = [image.numpy().tobytes() for images in seen for image in images]
    flipped = np.mean([image in mirrored for image in shown])
    assert all(image in originals | mirrored for image in shown)
    assert abs(flipped - 0.5) < 0.07  # 1,280 draws
    assert np.array_equal(worker.dataset.images, before)


def test_one_clients_average_is_taken_at_every_step(tmp_path):
    """As diffusers' EMAModel takes it, from the weights after each step of the same run, round borders included."""
    config = replace(DIGITS, clients=1, use_ema=True, ema_max_decay=0.75, keep_optimizer=True)
    run = train(config, tmp_path / "run")
    plan = make_plan(config)
    worker = Worker(config, torch.device("cpu"), "test")
    vectors, step = [], worker.step

    def spy():
        vectors.append(worker.learner.flat.vector.detach().clone())
        step()

    worker.step = spy
    trained_alone(worker, plan, 0, 2)
    weights = torch.nn.Parameter(plan.initial.clone())
    theirs = EMAModel([weights], decay=0.75, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    for vector in vectors:
        weights.data.copy_(vector)
        theirs.step([weights])
    assert len(vectors) == 8  # the warm-up ends at the seventh
    server = run.state(plan.layout).tensors
    assert torch.allclose(server["ema/model"], theirs.shadow_params[0], atol=1e-6)
    assert not torch.allclose(server["ema/model"], server["model"], atol=1e-3)
    assert server["ema/steps"].tolist() == [8]


# Precision


@pytest.mark.slow
def test_bf16_trains_resumes_and_differs_from_float32(tmp_path):
    config = replace(DIGITS, mixed_precision="bf16", rounds=3)
    whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "run", rounds=2)
    resumed = train(config, tmp_path / "run", resume=True)
    assert resumed.result["vector_sha256"] == whole.result["vector_sha256"]
    exact = train(replace(config, mixed_precision="no"), tmp_path / "exact")  # in the same process
    assert exact.result["vector_sha256"] != whole.result["vector_sha256"]
    assert [row["loss"] for row in whole.rows] == pytest.approx([row["loss"] for row in exact.rows], rel=0.02)
    kinds = {name: tensor.dtype for name, tensor in load_file(whole.checkpoint()).items()}
    assert kinds == {"model": torch.float32, "ema/model": torch.float32, "ema/steps": torch.int64}


def test_fp16_is_for_gpus():
    with pytest.raises(UserError, match="--mixed-precision fp16 needs a GPU"):
        replace(DIGITS, mixed_precision="fp16").check()
    replace(DIGITS, mixed_precision="fp16", gpus_per_actor=1.0).check()


# The directory


def test_the_last_checkpoints_are_kept(tmp_path):
    run = train(replace(DIGITS, rounds=5, checkpoints_total_limit=2), tmp_path / "run")
    names = sorted(path.name for path in (run.directory / "checkpoints").iterdir())
    assert names == ["round-000004.safetensors", "round-000005.safetensors"]


@pytest.mark.slow
def test_tensorboard_has_the_rows_numbers(tmp_path):
    config = replace(DIGITS, held_out_share=0.1)
    run = train(config, tmp_path / "run")
    runs.assert_curves_equal_rows(run.directory)
    for row in run.rows:
        assert runs.curves(run.directory)["held_out/global", row["round"]] == [np.float32(row["held_out"]["global"])]


# Held-out losses and baselines


def test_held_out_losses_are_measured_at_the_same_noise(toy_config, tmp_path):
    """Rounds without training (a learning rate of nearly 0) have the same held-out loss, and none trains on them."""
    config = toy_config(learning_rate=1e-30, held_out_share=0.25, rounds=3, validation_rounds=2)
    run = train(config, tmp_path / "run")
    assert run.rows[0]["held_out"] == {}
    second, third = (row["held_out"] for row in run.rows[1:])
    assert second["clients"] == pytest.approx(third["clients"], abs=1e-6)
    assert second["local"] == pytest.approx(second["global"], rel=1e-5)
    assert run.rows[0]["examples"] == 4 * 6
    assert len(set(second["clients"].values())) == 4
    assert second["spread"] == pytest.approx(np.std(list(second["clients"].values())))


@dataclass(frozen=True)
class AddOne(Algorithm):
    """Trains by itself, in place."""

    def train(self, local, down, memory):
        local.weights.add_(1.0)
        local.batches = 1


def test_a_method_that_trains_by_itself_begins_at_the_initial_weights(toy_config, tmp_path):
    config = toy_config(algorithm=AddOne(), rounds=2)
    plan = make_plan(config)
    before = plan.initial.clone()
    run = train(config, tmp_path / "run")
    assert torch.equal(run.state(plan.layout).tensors["model"], before + 1 + 1)


def test_local_models_are_better_at_home_than_the_average(toy_config, tmp_path):
    run = train(toy_config(held_out_share=0.25, rounds=2, local_epochs=8), tmp_path / "run")
    held_out = run.rows[-1]["held_out"]
    assert held_out["local"] < 0.5 * held_out["global"]  # each client's label is another


def test_a_client_alone_is_plain_training_on_its_part(toy_config, tmp_path):
    config = toy_config(keep_optimizer=True, use_ema=True, held_out_share=0.25)
    alone = run_local_only(config, tmp_path / "alone")
    assert [run.directory.name for run in alone] == [f"client-{client:04d}" for client in range(4)]
    plan = make_plan(config)
    for client, run in enumerate(alone):
        worker = Worker(config, torch.device("cpu"), "test")
        trained = trained_alone(worker, plan, client, 3)
        server = run.state(plan.layout).tensors
        assert np.array_equal(server["model"].numpy(), trained["model"])
        assert np.array_equal(server["ema/model"].numpy(), trained["ema/model"])
        assert run.result["held_out"]["clients"].keys() == {str(client)}
    weights = [run.state(plan.layout).tensors["model"].mean().item() for run in alone]
    assert weights == sorted(weights)  # each goes to its own label
    before = (alone[0].directory / "result.json").stat().st_mtime_ns
    assert run_local_only(config, tmp_path / "alone")[0].result == alone[0].result
    assert (alone[0].directory / "result.json").stat().st_mtime_ns == before


def test_local_only_by_the_command_line(tmp_path, capsys):
    flags = "--local-only --clients 2 --rounds 1 --local-steps 1 --evaluate-samples 4 --sampling-steps 2 --actors 0"
    assert main(["train", *flags.split(), "--out", str(tmp_path / "alone")]) == 0
    printed = capsys.readouterr().out
    assert "client-0001" in printed
    assert "mean" in printed
    assert main(["train", *flags.split(), "--resume", str(tmp_path / "alone/client-0000")]) == 2
