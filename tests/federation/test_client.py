"""Local training against plain loops written with diffusers and torch alone."""

from dataclasses import replace

import made
import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from sklearn.datasets import load_digits

from fedray import vector
from fedray.federation.local import TrainJob, client_update
from fedray.federation.steps import clip, lr_schedule, steps_of
from fedray.federation.worker import Shared, Worker, do
from fedray.presets import PRESETS
from fedray.record.run import Run
from fedray.seeds import generator, number

NONE = np.array([], int)  # held-out examples


def plain_loop(rounds, epochs, seed=0, batch=16, lr=4e-3, schedule="constant"):
    """Rounds of plain training on all digits, with one optimizer: no flat vector, no federation."""
    with torch.random.fork_rng():
        torch.manual_seed(number(seed, "init"))
        unet = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
            add_attention=False, norm_num_groups=8,
        )  # fmt: skip
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    order = torch.randperm(1797, generator=generator(seed, "partition"))
    images = torch.from_numpy(load_digits().images).float()[order, None]
    images = (images * (255 / 16)).round() / 127.5 - 1
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8, fused=True)
    learning_rate = get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=rounds * epochs * 113)
    for number_ in range(rounds):
        rng = generator(seed, "train", number_, 0)
        for _ in range(epochs):
            for indices in torch.randperm(1797, generator=rng).split(batch):
                clean = images[indices]
                t = torch.randint(1000, (len(clean),), generator=rng)
                noise = torch.randn(clean.shape, generator=rng)
                loss = F.mse_loss(unet(scheduler.add_noise(clean, noise, t), t).sample, noise)
                optimizer.zero_grad()
                loss.backward()
                flat = torch.cat([p.grad.flatten() for p in parameters])
                norm = torch.linalg.vector_norm(flat)
                for p in parameters:
                    p.grad.mul_(torch.clamp(1.0 / (norm + 1e-6), max=1.0))
                optimizer.step()
                learning_rate.step()
    return torch.nn.utils.parameters_to_vector(parameters).detach()


def digits_config(**changes):
    plain = dict(
        clients=1, rounds=1, local_epochs=1, train_batch_size=16, lr_scheduler="constant", use_ema=False,
        keep_optimizer=False, evaluate_samples=0, features=None, actors=0,
    )  # fmt: skip
    return replace(PRESETS["digits"], **(plain | changes))


def trained(config, out):
    runs.train(config, out)
    run = Run.open(out)
    return run.result["vector_sha256"], run


def shared(worker, client):
    """The initial model, which goes down to one client."""
    model = worker.learner.flat.vector.detach().numpy().copy()
    return Shared({"model": model}, made.round_of({client: 8}, worker.learner.flat.layout))


@pytest.mark.slow
def test_one_client_one_round_is_plain_training_bit_for_bit(tmp_path):
    sha, run = trained(digits_config(), tmp_path / "run")
    assert sha == vector.sha256(plain_loop(rounds=1, epochs=1))
    assert run.result["steps"] == 113
    assert run.result["passes"] == 1


@pytest.mark.slow
def test_centralised_with_a_kept_optimizer_is_one_uninterrupted_plain_run(tmp_path):
    config = digits_config(rounds=3, keep_optimizer=True, lr_scheduler="cosine")
    sha, _ = trained(config, tmp_path / "kept")
    assert sha == vector.sha256(plain_loop(rounds=3, epochs=1, schedule="cosine"))
    fresh, _ = trained(replace(config, keep_optimizer=False), tmp_path / "fresh")
    assert fresh != sha


def test_steps_are_epochs_each_in_a_new_order():
    config = digits_config(local_epochs=None, local_steps=7, train_batch_size=4)
    seen = list(steps_of(10, config, torch.Generator().manual_seed(0)))
    assert [[len(indices) for indices in group] for group in seen] == [[4], [4], [2], [4], [4], [2], [4]]
    first, second = (np.concatenate([group[0] for group in seen[start : start + 3]]) for start in (0, 3))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert not np.array_equal(first, second)


def test_accumulated_batches_do_not_cross_an_epoch():
    config = digits_config(local_epochs=2, train_batch_size=4, gradient_accumulation_steps=2)
    seen = list(steps_of(10, config, torch.Generator().manual_seed(0)))
    assert [[len(indices) for indices in group] for group in seen] == [[4, 4], [2], [4, 4], [2]]
    assert config.steps(10) == 4


def test_the_last_batch_of_an_epoch_can_be_left_out():
    """225 images in batches of 32: the eighth batch has one image, and would be a whole step."""
    config = digits_config(local_epochs=2, train_batch_size=32)
    sizes = [len(group[0]) for group in steps_of(225, config, torch.Generator().manual_seed(0))]
    assert sizes == [*[32] * 7, 1, *[32] * 7, 1]
    dropped = replace(config, drop_last=True)
    sizes = [len(group[0]) for group in steps_of(225, dropped, torch.Generator().manual_seed(0))]
    assert sizes == [32] * 14
    assert (dropped.steps(225), dropped.steps(20), dropped.steps(64)) == (14, 2, 4)  # the only batch is kept


def test_learning_rate_falls_over_the_whole_run():
    linear = lr_schedule("linear", 1.0, warmup=0, steps=50)
    assert [linear(step) for step in (0, 25, 50)] == [1.0, 0.5, 0.0]
    cosine = lr_schedule("cosine", 1.0, warmup=0, steps=50)
    assert [cosine(step) for step in (0, 25, 50)] == pytest.approx([1.0, 0.5, 0.0])


def test_gradients_are_clipped_to_their_norm(toy_config, monkeypatch):
    norms = []

    def spy(gradient, limit):
        clip(gradient, limit)
        norms.append(gradient.norm().item())

    monkeypatch.setattr("fedray.federation.local.clip", spy)
    config = toy_config(max_grad_norm=0.01)
    worker = Worker(config, torch.device("cpu"), "test")
    client_update(worker, shared(worker, 3), TrainJob(0, 3, worker.dataset.labels.nonzero()[0], NONE))
    assert norms
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("size", [1, 7, 1000, 100_003])
@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-3, 1.0, 1e4])
def test_clipping_is_torchs_to_the_bit(size, scale):
    gradient = scale * torch.randn(size, generator=torch.Generator().manual_seed(size))
    vector = torch.nn.Parameter(torch.zeros(size))
    vector.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([vector], 0.7)
    clip(gradient, 0.7)
    assert torch.equal(gradient, vector.grad)


def test_a_job_leaves_threads_and_the_global_generator_alone(toy_config):
    worker = Worker(toy_config(), torch.device("cpu"), "test")
    down = shared(worker, 0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        row, _ = do(worker, client_update, down, TrainJob(0, 0, worker.dataset.labels.nonzero()[0], NONE))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.rand(3), expected)
    assert "error" not in row
    assert row["actor"] == "test"
