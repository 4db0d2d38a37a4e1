"""fedray sample: images from a run's model; and the options it shares with fedray evaluate."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from fedray.commands.terminal import progress
from fedray.config import Config
from fedray.errors import UserError
from fedray.forms import files_named
from fedray.lazy import torch
from fedray.record.run import Run
from fedray.storage import located, shown, upload

if TYPE_CHECKING:
    from fedray.federation.worker import Shared


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Options that `fedray sample` and `fedray evaluate` have in common."""

    seed: int = 0
    """Seed of the noise that the images start from."""
    sampler: str | None = None
    """ddpm, ddim, dpmsolver++, sde-dpmsolver++, unipc, heun or euler; by default the run's (of a pipeline, ddpm)."""
    sampling_steps: int | None = None
    """Denoising steps; by default the run's (of a pipeline, 1000)."""
    actors: int | None = 0
    """Client actors that draw; 0 draws in this process, None takes as many as fit."""
    cpus_per_actor: float = 1.0
    """CPUs of an actor."""
    gpus_per_actor: float = 0.0
    """GPUs of an actor; 0 computes on CPUs."""
    address: str | None = None
    """A running Ray cluster to join (auto, or HOST:PORT)."""
    code: tuple[Path, ...] = ()
    """Files of your own classes that the run names: only those given here, or in another flag, may run."""

    def settings(self, base: Config) -> Config:
        """Change a configuration as the options say."""
        return replace(
            base,
            sampler=self.sampler or base.sampler,
            sampling_steps=base.sampling_steps if self.sampling_steps is None else self.sampling_steps,
            actors=self.actors,
            cpus_per_actor=self.cpus_per_actor,
            gpus_per_actor=self.gpus_per_actor,
            address=self.address,
        )


@dataclass(frozen=True, kw_only=True)
class Sample(Draw):
    """Draw images from a run's model, into one picture."""

    run: tyro.conf.Positional[Path]
    """Directory of the run, or its URL."""
    num_images: int = 64
    """How many images to draw."""
    prompt: tuple[str, ...] = ()
    """What to draw (of fine-tuned models); by default what the run drew."""
    label: tuple[int, ...] = ()
    """Which classes to draw in turn (of class-conditional models); by default all."""
    strength: float = 1.0
    """How much of the adapters to use (of fine-tuned models): 0 is the base."""
    out: Path | None = None
    """File of the picture; by default RUN/samples/sample-seedS.png."""


def main(arguments: list[str]) -> None:
    """Parse and run `fedray sample`."""
    options = tyro.cli(Sample, args=arguments, prog="fedray sample")
    if options.num_images < 1:
        raise UserError(f"--num-images {options.num_images}: it must be above 0.")
    out = located(options.out or options.run / "samples" / f"sample-seed{options.seed}.png")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {out}: the name of the picture must end in .png, .jpg or .webp.")
    run = Run.open(options.run)
    config = replace(options.settings(run.config_with(files_named(arguments))), features=None)
    config.check()
    if "adapters" not in config.task_offers and (options.prompt or options.strength != 1):
        raise UserError(f"--prompt and --strength are for fine-tuned models; {run} is a run of `fedray train`.")
    if not 0 <= options.strength < math.inf:
        raise UserError(f"--strength {options.strength}: it must not be negative.")

    from fedray.cluster.pool import open_pool  # Ray and torch take seconds to import: mistakes are told before
    from fedray.federation.delivered import sampling_of
    from fedray.federation.evaluation import sample
    from fedray.record.pictures import grid

    shared = model_of(run.directory, config, options.strength)
    sampling = sampling_of(run, config, options.num_images, options.seed, options.prompt, options.label)
    with open_pool(config) as pool, progress(config.rounds) as (_, show):
        _, images = sample(pool, shared, sampling, show)
    out.parent.mkdir(parents=True, exist_ok=True)
    grid(torch.from_numpy(images)).save(out)
    upload(out)
    print(f"samples   {shown(out)}")


def model_of(directory: Path, config: Config, strength: float = 1.0) -> Shared:
    """Load the model that a run's samples come from; say so where its last checkpoint is damaged."""
    from fedray.federation import delivered

    run = Run.open(directory)
    shared = delivered.model_of(run, config, strength)
    if run.gone_back:
        print(f"fedray: {run.gone_back}", file=sys.stderr)
    return shared
