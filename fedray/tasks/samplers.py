"""Samplers of diffusion models, by name: diffusers' schedulers, and the loop that samples pixels with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedray.lazy import torch

if TYPE_CHECKING:
    Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sampler:
    """A scheduler of diffusers: its class, and what fedray sets of it and of its steps."""

    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)


SAMPLERS = {
    "ddpm": Sampler("DDPMScheduler"),
    # Without this it clips its estimate of the image and goes on with the noise of the unclipped one: on digits, worse
    # with more steps. `DDIMPipeline` takes the same argument.
    "ddim": Sampler("DDIMScheduler", step={"use_clipped_model_output": True}),
    "dpmsolver++": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "sde-dpmsolver++": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": Sampler("UniPCMultistepScheduler"),
    "heun": Sampler("HeunDiscreteScheduler"),  # two evaluations of the network a step
    "euler": Sampler("EulerDiscreteScheduler"),
}


def make_sampler(name: str, config: Any) -> Any:
    """Make the scheduler of that name from another one's configuration."""
    import diffusers

    sampler = SAMPLERS[name]
    return getattr(diffusers, sampler.scheduler).from_config(config, **sampler.settings)


def sample_pixels(
    predict: Predict, noise: torch.Tensor, scheduler: Any, name: str, steps: int, rng: torch.Generator
) -> torch.Tensor:
    """Sample images, uint8 [n, c, h, w] on the CPU, as the pipelines of diffusers do that have no latent space.

    Args:
        predict: the network, of noisy images [n, c, h, w] and a timestep.
        noise: standard normal [n, c, h, w], on the network's device.
        scheduler: of `make_sampler`, of that name.
        rng: of further noise; drawing on the CPU is diffusers' own practice.
    """
    scheduler.set_timesteps(steps, device=noise.device)
    # Some solvers are deterministic and take no generator.
    stochastic = "generator" in inspect.signature(scheduler.step).parameters
    extra = {**SAMPLERS[name].step, **({"generator": rng} if stochastic else {})}
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), t), t, x, **extra).prev_sample
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
