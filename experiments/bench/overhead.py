"""What does fedray cost over a plain training loop?

    python experiments/bench/overhead.py

The digits preset on two actors, against two bare processes that at the same time make the same steps with diffusers
and torch alone (no Ray, no flat vector, no messages). The measurements alternate on the same
machine, several times; the result is seconds per round, without the first, and their ratio.
"""

import multiprocessing
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from diffusers import DDPMScheduler, UNet2DModel
from measure import spread, table
from sklearn.datasets import load_digits

import fedray
from fedray.cluster.connection import connected

CONFIG = replace(fedray.PRESETS["digits"], actors=2, evaluate_samples=0, features=None)
STEPS = CONFIG.steps(1797 // CONFIG.clients)  # of a client in a round


def plain(rounds: int, together, seconds) -> None:
    """One of two bare processes: two clients' steps in each round, as one would write them."""
    torch.set_num_threads(1)
    images = torch.from_numpy(load_digits().images).float()[:449, None] / 8 - 1
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False, norm_num_groups=8,
    )  # fmt: skip
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=CONFIG.learning_rate, fused=True)
    for _ in range(rounds):
        together.wait()  # the end of a round is the end of its slowest client, as in a federation
        started = time.perf_counter()
        for _ in range(CONFIG.clients // 2):
            for _ in range(CONFIG.local_epochs or 1):
                for indices in torch.randperm(len(images)).split(CONFIG.train_batch_size):
                    clean = images[indices]
                    t = torch.randint(1000, (len(clean),))
                    noise = torch.randn(clean.shape)
                    loss = F.mse_loss(unet(scheduler.add_noise(clean, noise, t), t).sample, noise)
                    optimizer.zero_grad()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
                    optimizer.step()
        together.wait()
        seconds.put(time.perf_counter() - started)


def time_plain(rounds: int) -> list[float]:
    """Seconds of each round of the two bare processes together."""
    spawn = multiprocessing.get_context("spawn")
    together, seconds = spawn.Barrier(2), spawn.Queue()
    processes = [spawn.Process(target=plain, args=(rounds, together, seconds)) for _ in range(2)]
    for process in processes:
        process.start()
    times = [seconds.get(timeout=600) for _ in range(2 * rounds)]
    for process in processes:
        process.join()
    return times[2:]


def time_fedray(rounds: int) -> list[float]:
    """Seconds of each round of fedray, saving the checkpoint included."""
    with tempfile.TemporaryDirectory() as directory:
        run = fedray.run(replace(CONFIG, rounds=rounds), Path(directory) / "run")
        return [row["seconds"]["round"] + row["seconds"]["save"] for row in run.rows[1:]]


def main(rounds: int = 15, repeats: int = 4) -> None:
    """Measure.

    Args:
        rounds: rounds in each measurement, of which the first is left out.
        repeats: how often each is measured, in turns.
    """
    measured: dict[str, list[list[float]]] = {"plain": [], "fedray": []}
    with connected(None):
        for repeat in range(repeats):
            for name, clock in (("plain", time_plain), ("fedray", time_fedray)):
                times = clock(rounds)
                measured[name].append(times)
                print(f"{repeat + 1}/{repeats} {name:7} {statistics.median(times):.3f} s per round")
    medians = {name: [statistics.median(times) for times in repeats] for name, repeats in measured.items()}
    ratios = [ours / theirs for ours, theirs in zip(medians["fedray"], medians["plain"], strict=True)]
    cells = [spread(medians["plain"]), spread(medians["fedray"]), spread(ratios), "1.10"]
    table(
        ["", "two plain loops, s a round", "fedray, two actors", "ratio", "goal"],
        [[f"{CONFIG.clients} clients x {STEPS} steps", *cells]],
    )


if __name__ == "__main__":
    tyro.cli(main)
