"""Samplers of diffusion models, by name: diffusers' schedulers."""

from typing import Any

SAMPLERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def make_sampler(name: str, config: Any) -> Any:
    """Make the scheduler of that name from another one's configuration."""
    import diffusers

    return getattr(diffusers, SAMPLERS[name]).from_config(config)
