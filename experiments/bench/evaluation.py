"""What does an evaluation cost? Samples and their scores, against diffusers' pipeline; scores of many features.

    python experiments/bench/evaluation.py

First the samples of the preset `digits` (its U-Net, ancestral sampling in 100 steps) in batches of the same size:
diffusers' `DDPMPipeline` of the saved model, a plain loop with the same scheduler, fedray in one process and on 1, 2
and, where there are cores, 4 actors, one thread each. A first evaluation, in which networks are built and the reference
is made, does not count. Only fedray's second column scores what it samples.

Then the scores of given features, memory-mapped, each in a new process on one thread: seconds, and the most private
memory beyond what the process held before. fedray's Fréchet distance reads features in parts; pytorch-fid's makes both
covariances and takes a matrix square root. Precision, recall, density and coverage are of the first 10,000 features
against 10,000 real ones, as in a run, and are against nobody: the authors' package makes n x n matrices.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from measure import Peak, memory, spread, table

import fedray
from fedray.cluster.connection import connected
from fedray.cluster.pool import open_pool
from fedray.federation.evaluation import Comparison, Scoring, evaluate, open_reference, sample
from fedray.federation.sampling import Sampling
from fedray.federation.worker import Shared, build
from fedray.scores.frechet import frechet_distance, gaussian
from fedray.scores.prdc import manifold, prdc
from fedray.scores.reference import DRAWN

CONFIG = replace(fedray.PRESETS["digits"], sampler="ddpm")
Times = dict[str, list[float]]


def by_pipeline(model: Path, n: int, steps: int) -> None:
    pipeline = DDPMPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    for start in range(0, n, CONFIG.eval_batch_size):
        size = min(CONFIG.eval_batch_size, n - start)
        pipeline(size, generator=rng, num_inference_steps=steps, output_type="np")


@torch.no_grad()
def by_loop(model: Path, n: int, steps: int) -> None:
    unet = UNet2DModel.from_pretrained(model, subfolder="unet")
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    rng = torch.Generator().manual_seed(0)
    for start in range(0, n, CONFIG.eval_batch_size):
        x = torch.randn((min(CONFIG.eval_batch_size, n - start), 1, 8, 8), generator=rng)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x, generator=rng).prev_sample
        ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def by_fedray(actors: int, n: int, steps: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of samples alone, and of samples and scores, by one pool."""
    config = replace(CONFIG, actors=actors, sampling_steps=steps)
    dataset, scoring = config.task.dataset(), Scoring.of(config)
    model = Shared({"model": build(config, torch.device("cpu")).flat.vector.detach().numpy().copy()})
    sampling = Sampling.of(config, n)
    alone, scored = list[float](), list[float]()
    with open_pool(config, dataset) as pool:
        assert scoring is not None
        comparison = Comparison(dataset, scoring, open_reference(scoring, dataset, pool))
        # Every actor builds its networks, whoever is first: the slowest is waited for.
        evaluate(pool, model, replace(sampling, n=max(n, 2 * CONFIG.eval_batch_size * max(1, actors))), comparison)
        for _ in range(repeats):
            for times, work in (
                (alone, lambda: sample(pool, model, sampling)),
                (scored, lambda: evaluate(pool, model, sampling, comparison)),
            ):
                started = time.perf_counter()
                work()
                times.append(time.perf_counter() - started)
    return alone, scored


def samples(n: int, steps: int, repeats: int) -> None:
    """Measure samples and their scores."""
    counts = [1, 2, *([4] if (os.cpu_count() or 1) >= 4 else [])]
    alone: Times = {}
    scored: Times = {}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        build(CONFIG, torch.device("cpu")).save(model)
        for repeat in range(repeats + 1):
            for name, work in (("diffusers' DDPMPipeline", by_pipeline), ("plain loop", by_loop)):
                started = time.perf_counter()
                work(model, n, steps)
                if repeat:  # the first warms up
                    alone.setdefault(name, []).append(time.perf_counter() - started)
    for actors in (0, *counts):
        name = f"fedray, {actors} actor{'s' * (actors > 1)}" if actors else "fedray, one process"
        alone[name], scored[name] = by_fedray(actors, n, steps, repeats)
    one = scored["fedray, 1 actor"]
    rows = []
    for name, times in alone.items():
        both = scored.get(name)
        ratio = spread([a / b for a, b in zip(both, one, strict=True)]) if both else "–"
        goal = "0.55" if name == "fedray, 2 actors" else ""
        rows.append([name, spread(times), spread(both) if both else "–", ratio, goal])
    table([f"{n:,} images, {steps} steps", "samples, s", "samples and scores, s", "÷ 1 actor", "goal"], rows)


# Scores of given features


def frechet_of_fedray(drawn: np.ndarray, real: np.ndarray) -> float:
    return frechet_distance(gaussian(drawn), gaussian(real))


def frechet_of_pytorch_fid(drawn: np.ndarray, real: np.ndarray) -> float:
    from pytorch_fid.fid_score import calculate_frechet_distance

    moments = [(np.mean(x, axis=0), np.cov(x, rowvar=False)) for x in (drawn, real)]
    return float(calculate_frechet_distance(*moments[0], *moments[1]))


def shares(drawn: np.ndarray, real: np.ndarray) -> float:
    found = prdc(manifold(real[:DRAWN]), torch.from_numpy(np.asarray(drawn[:DRAWN])))
    return found[0]["precision"]


SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "Fréchet distance, fedray": frechet_of_fedray,
    "Fréchet distance, pytorch-fid": frechet_of_pytorch_fid,
    "precision to coverage, fedray": shares,
}


def score(name: str, files: tuple[Path, Path], answer: Any) -> None:
    """In a process of its own: put the value of a score, its seconds, and its peak of private memory in bytes."""
    torch.set_num_threads(1)
    drawn, real = (np.load(file, mmap_mode="r") for file in files)
    SCORES[name](drawn[:16, :8], real[:16, :8])  # imports
    before = memory("self")["private"]
    with Peak() as peak:
        started = time.perf_counter()
        value = SCORES[name](drawn, real)
        seconds = time.perf_counter() - started
    answer.put((value, seconds, peak.private["self"] - before))


def scores(n: int, dimensions: int, repeats: int) -> None:
    """Measure scores of features that are given."""
    spawn = multiprocessing.get_context("spawn")
    seconds: Times = {name: [] for name in SCORES}
    held: Times = {name: [] for name in SCORES}
    values: Times = {name: [] for name in SCORES}
    with tempfile.TemporaryDirectory() as directory:
        files = Path(directory) / "drawn.npy", Path(directory) / "real.npy"
        rng = np.random.default_rng(0)
        mixing = rng.standard_normal((dimensions, dimensions), np.float32) / dimensions**0.5
        for file, mean in zip(files, (0.0, 0.1), strict=True):
            made = np.lib.format.open_memmap(file, "w+", np.float32, (n, dimensions))
            for start in range(0, n, 1000):
                part = made[start : start + 1000]
                part[:] = rng.standard_normal(part.shape, np.float32) @ mixing + mean
            made.flush()
        for _ in range(repeats):
            for name in SCORES:
                answer = spawn.Queue()
                process = spawn.Process(target=score, args=(name, files, answer))
                process.start()
                value, took, most = answer.get(timeout=3600)
                process.join()
                values[name].append(value)
                seconds[name].append(took)
                held[name].append(most / 1e9)
    ours, theirs = (values[f"Fréchet distance, {side}"][0] for side in ("fedray", "pytorch-fid"))
    assert abs(ours - theirs) < 1e-3 * theirs, (ours, theirs)
    count = f"{n:,} x {dimensions:,} features, twice"
    rows = [[name, spread(seconds[name]), spread(held[name])] for name in SCORES]
    table([count, "seconds", "private memory, GB"], rows)


def main(
    n: int = 2048, steps: int = 50, features: int = 50_000, dimensions: int = 2048, repeats: int = 2
) -> None:  # fmt: skip
    """Measure.

    Args:
        n: images that are sampled.
        steps: denoising steps of each.
        features: generated, and real, that are scored.
        dimensions: of a feature.
        repeats: how often each is measured.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of processes that are started
    torch.set_num_threads(1)
    with connected(None):
        samples(n, steps, repeats)
    scores(features, dimensions, repeats)


if __name__ == "__main__":
    tyro.cli(main)
