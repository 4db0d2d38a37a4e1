import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline

from fedray.errors import UserError
from fedray.presets import PRESETS
from fedray.seeds import generator
from fedray.tasks.ddpm import DDPM
from fedray.tasks.samplers import SAMPLERS, make_sampler


def parameters(task):
    with torch.device("meta"):
        return sum(p.numel() for p in task.unet().parameters())


def test_networks_are_the_stated_ones():
    assert parameters(PRESETS["digits"].task) == 159_697
    assert parameters(PRESETS["celeba"].task) == 113_673_219  # the paper's 433 MiB in float32
    assert parameters(PRESETS["celeba"].task) * 4 == 454_692_876


def test_noise_schedule_is_the_papers():
    alphas = DDPM().scheduler().alphas_cumprod
    assert len(alphas) == 1000
    assert alphas[499].item() == pytest.approx(0.0785872, abs=1e-7)
    assert alphas[999].item() == pytest.approx(4.03583e-5, rel=1e-4)


@pytest.fixture
def learner():
    torch.manual_seed(0)
    return DDPM().build(torch.device("cpu"))


def test_loss_is_the_distance_to_the_noise(learner):
    """Written out in float64 NumPy: x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, and the network's own prediction."""
    images = torch.randint(256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    loss = learner.loss({"images": images}, generator(3))
    rng = generator(3)
    t = torch.randint(1000, (6,), generator=rng)
    epsilon = torch.randn(6, 1, 8, 8, generator=rng).numpy()
    alpha = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t.numpy()].reshape(6, 1, 1, 1)
    noisy = np.sqrt(alpha) * (images.numpy() / 127.5 - 1) + np.sqrt(1 - alpha) * epsilon
    predicted = learner.unet(torch.from_numpy(noisy).float(), t).sample.detach().numpy()
    assert loss.item() == pytest.approx(((predicted - epsilon) ** 2).mean(), rel=1e-5)
    loss.backward()
    assert learner.flat.gradient.abs().sum() > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_are_reproducible(learner, sampler):
    one, same, other = (learner.sample(4, generator(seed), sampler, 5) for seed in (0, 0, 1))
    assert one.shape == (4, 1, 8, 8)
    assert one.dtype == torch.uint8
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def load(folder):
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("sampler", "scheduler", "settings"),
    [
        ("ddpm", "DDPMScheduler", {}),
        ("dpmsolver++", "DPMSolverMultistepScheduler", {}),
        ("sde-dpmsolver++", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
@pytest.mark.parametrize("steps", [7, 20])
def test_samples_are_those_of_the_pipeline_that_loads_the_model(learner, tmp_path, sampler, scheduler, settings, steps):
    learner.save(tmp_path / "model")
    pipeline = load(tmp_path / "model")
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, **settings)
    theirs = pipeline(batch_size=3, generator=generator(5), num_inference_steps=steps, output_type="np").images
    ours = learner.sample(3, generator(5), sampler, steps)
    np.testing.assert_array_equal(np.rint(theirs[..., 0] * 255), ours[:, 0].numpy())


@pytest.mark.parametrize("steps", [7, 20])
def test_ddim_samples_are_those_of_its_pipeline(learner, tmp_path, steps):
    learner.save(tmp_path / "model")
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    settings = dict(num_inference_steps=steps, use_clipped_model_output=True, output_type="np")
    theirs = pipeline(batch_size=3, generator=generator(5), **settings).images
    ours = learner.sample(3, generator(5), "ddim", steps)
    np.testing.assert_array_equal(np.rint(theirs[..., 0] * 255), ours[:, 0].numpy())


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [("unipc", "UniPCMultistepScheduler"), ("heun", "HeunDiscreteScheduler"), ("euler", "EulerDiscreteScheduler")],
)
@pytest.mark.parametrize("steps", [7, 20])
def test_solvers_without_a_pipeline_sample_what_their_documentation_does(learner, tmp_path, sampler, scheduler, steps):
    """diffusers has no unconditional pipeline for these; this is the loop that its documentation shows."""
    learner.save(tmp_path / "model")
    pipeline = load(tmp_path / "model")
    solver = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    solver.set_timesteps(steps)
    x = torch.randn(3, 1, 8, 8, generator=generator(5)) * solver.init_noise_sigma
    with torch.no_grad():
        for t in solver.timesteps:
            x = solver.step(pipeline.unet(solver.scale_model_input(x, t), t).sample, t, x).prev_sample
    theirs = (x / 2 + 0.5).clamp(0, 1).mul(255).round()[:, 0]
    np.testing.assert_array_equal(theirs, learner.sample(3, generator(5), sampler, steps)[:, 0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_keep_the_time_grid_of_training(sampler):
    """A solver made from a fresh scheduler would take its own default, from 999 down."""
    scheduler = make_sampler(sampler, DDPM().scheduler().config)
    scheduler.set_timesteps(20)
    assert scheduler.config.timestep_spacing == "leading"
    assert scheduler.timesteps.max() <= 950


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": "digit"}, "did you mean 'digits'"),
        ({"attention": (True,)}, "--attention has 1 entries for 2 blocks"),
        ({"block_out_channels": (12, 32)}, "multiples of --norm-num-groups"),
        ({"resolution": 7}, "cannot be halved"),
        ({"norm_num_groups": 0}, "--norm-num-groups 0: it must be above 0"),
        ({"block_out_channels": (-8, 8)}, "must be above 0"),
        ({"layers_per_block": 0}, "--layers-per-block 0: it must be above 0"),
        ({"prediction_type": "eps"}, "did you mean 'epsilon'"),
        ({"channels": 4}, "it must be 1 .grey. or 3"),
        ({"ddpm_num_steps": 10}, "--sampling-steps 20"),
        ({"ddpm_beta_schedule": "liner"}, "did you mean 'linear'"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        DDPM(**changes).check("ddpm", 20)
    with pytest.raises(UserError, match="did you mean 'ddim'"):
        DDPM().check("dim", 20)


def test_images_must_have_the_stated_form():
    with pytest.raises(UserError, match="the digits are 8×8 and grey, not 16×16"):
        DDPM(resolution=16).dataset()
