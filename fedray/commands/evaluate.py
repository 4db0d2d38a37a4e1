"""fedray evaluate: scores of a run's model, of a pipeline, or of a folder of images."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from fedray.actors import open_pool
from fedray.choices import UserError
from fedray.commands.sample import Draw, model_of
from fedray.commands.terminal import print_scores, progress
from fedray.config import Config
from fedray.evaluation import evaluate, judge, look_for_copies, open_reference
from fedray.images import form_of
from fedray.plan import Plan, make_plan
from fedray.record import Run
from fedray.scores import networks
from fedray.scores.nearest import LOOKED_AT
from fedray.tasks.images import Images
from fedray.tasks.pretrained import Pretrained
from fedray.worker import Weights


@dataclass(frozen=True, kw_only=True)
class Evaluate(Draw):
    """Score a run's model, a diffusers pipeline or a folder of images.

    A run is scored against its own data; a pipeline or a folder against --dataset-name and --train-data-dir.
    """

    target: tyro.conf.Positional[Path]
    """Directory of a run, of a pipeline (unconditional, in pixel space), or of images."""
    samples: int | None = None
    """How many images to score; by default as many as the run did, of a pipeline 2048, of a folder all."""
    features: str | None = None
    """What scores are measured on: inception (inception-768, -192, -64), digits, FILE.pt, MODULE:FUNCTION or
    FILE.py:FUNCTION; by default the run's."""
    inception_weights: str | None = None
    """File of Inception's weights (pytorch-fid's); by default torch's hub cache."""
    kid_subset_size: int | None = None
    """Images in each of the 100 subsets that the kernel distance is averaged over; by default the run's, or 1000."""
    dataset_name: str | None = None
    """What to score a pipeline or a folder against: digits, imagefolder, celeba, a .parquet file, a hub name."""
    train_data_dir: str | None = None
    """Folder of those images."""
    crop: int | None = None
    """Side of the central square that is kept of each of those images."""

    def settings(self, base: Config) -> Config:
        config = super().settings(base)
        given = {name: getattr(self, name) for name in ("features", "inception_weights", "kid_subset_size")}
        config = replace(config, **{name: value for name, value in given.items() if value is not None})
        if config.features is None:
            raise UserError(f"{self.target}: say what to measure on, with --features inception, digits or your own.")
        config.check()
        return config

    def against(self, **form: int) -> dict[str, Any]:
        """The images to score against, in the form of those that are scored."""
        if self.dataset_name is None:
            raise UserError(f"{self.target}: say what to score against, with --dataset-name (and --train-data-dir).")
        return {
            "dataset_name": self.dataset_name, "train_data_dir": self.train_data_dir, "crop": self.crop
        } | form  # fmt: skip


def main(arguments: list[str]) -> None:
    """Parse and run `fedray evaluate`."""
    asked = tyro.cli(Evaluate, args=arguments, prog="fedray evaluate")
    if asked.samples is not None and asked.samples < 2:
        raise UserError(f"--samples {asked.samples}: a score needs at least 2.")
    if (asked.target / "model_index.json").is_file():
        _evaluate_pipeline(asked)
    elif asked.target.is_dir() and not (asked.target / "config.json").is_file():
        _evaluate_folder(asked)
    else:
        _evaluate_run(asked)


def _evaluate_run(asked: Evaluate) -> None:
    run = Run.open(asked.target)
    if asked.dataset_name or asked.train_data_dir or asked.crop:
        raise UserError(
            f"{asked.target} is a run, which is scored against its own data; leave out --dataset-name, "
            f"--train-data-dir and --crop."
        )
    config = asked.settings(run.config)
    n = config.evaluate_samples if asked.samples is None else asked.samples
    if n < 1:
        raise UserError(f"the run at {asked.target} was not evaluated; say how many samples (--samples).")
    plan = make_plan(replace(config, evaluate_samples=n))
    run.check_data(plan.data)
    _evaluate_model(asked, config, plan, model_of(asked.target, config), n)


def _evaluate_pipeline(asked: Evaluate) -> None:
    unet = Pretrained(pipeline=str(asked.target)).load().unet.config
    reference = asked.against(resolution=unet.sample_size, channels=unet.in_channels)
    task = Pretrained(pipeline=str(asked.target.absolute()), **reference)
    n = asked.samples or 2048
    config = asked.settings(Config(task=task, clients=1, local_steps=1, evaluate_samples=n))
    plan = make_plan(config)
    _evaluate_model(asked, config, plan, Weights(plan.initial.numpy()), n)


def _evaluate_model(asked: Evaluate, config: Config, plan: Plan, model: Weights, n: int) -> None:
    """Draw, score, and look for copies where the run held images out."""
    with open_pool(config, plan.dataset) as pool, progress(config.rounds) as (_, show):
        against = open_reference(config, plan.dataset, pool, show)
        found = evaluate(pool, model, n, config, plan.dataset, against, {}, LOOKED_AT, asked.seed, show=show)
        if len(plan.unseen):
            share, _, _ = look_for_copies(pool, found.images, plan.shards.indices, plan.unseen, show)
            found.scores["copies"] = share.to_json()
    print_scores(f"{asked.target}: {n} samples, {config.sampler}-{config.sampling_steps}", found)


def _evaluate_folder(asked: Evaluate) -> None:
    resolution, channels = form_of(asked.target)
    real = Images(**asked.against(resolution=resolution, channels=channels))
    folder = Images("imagefolder", str(asked.target), resolution=resolution, channels=channels)
    base = asked.settings(Config(task=real, local_steps=1))
    assert base.features is not None
    found = []
    for task in (real, folder):
        config, dataset = replace(base, task=task), task.dataset()
        networks.check(base.features, base.inception_weights, dataset.images)
        with open_pool(config, dataset) as pool, progress(1) as (_, show):
            found.append((dataset, open_reference(config, dataset, pool, show)))
    (against, reference), (drawn, judged) = found
    n = asked.samples or len(drawn)
    if n > len(drawn):
        raise UserError(f"--samples {n}: {asked.target} has {len(drawn)} images.")
    evaluation = judge(judged.features[:n], drawn.images, n, base, against, reference, {})
    print_scores(f"{asked.target}: {n} images", evaluation)
