"""What does fedray add to fine-tuning by LoRA? Against the loop of diffusers' train_text_to_image_lora.py.

    python experiments/bench/lora.py

The preset `digits-lora`: the small Stable Diffusion that ships with fedray, rank 8, batch 6, AdamW, on 32 generated
images. fedray's client (weights in, 8 steps, weights out, as in a round) on one thread, against the loop written out
with peft, torch and diffusers: as the script has it, with the VAE and the text encoder in every step, and with latents
and embeddings that are computed once, as fedray computes them before its first step, which does not count. In turns.

Then the shape of Stable Diffusion 1.5 (859,520,964 random weights in bfloat16, adapters in float32), one step of batch
1 on latents of 32x32, VAE and text encoder small and not counted. And a round of two clients on one actor and on two:
the most private memory of the actors, beside the part of the base, which they map, that each counts for.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from measure import Peak, actors_of, spread, table
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

import fedray
from fedray.cluster.connection import connected
from fedray.federation.local import TrainJob, client_update
from fedray.federation.plan import make_plan
from fedray.federation.worker import Shared, Worker, do
from fedray.tasks import embedded
from fedray.tasks.lora import PIPELINE, LoRA

sys.path.append(str(Path(__file__).parents[1]))
from lora_payload import SD15  # noqa: E402 (a script of the folder above)

PRESET = fedray.PRESETS["digits-lora"]
IMAGES = 32
Rate = Callable[[], float]  # seconds a step


def photos(folder: Path, side: int) -> Path:
    """Write generated images with their captions."""
    for index in range(IMAGES):
        pixels = torch.randint(256, (side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        path = folder / f"the digit {index % 4}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    return folder


class Client:
    """fedray's own client, in this process."""

    def __init__(self, config: fedray.Config) -> None:
        self.plan = make_plan(config)
        self.worker = Worker(config, torch.device("cpu"), "bench")
        self.worker.dataset = self.plan.dataset
        self.steps = config.steps(IMAGES)

    def __call__(self) -> float:
        plan = self.plan
        job = TrainJob(0, 0, plan.shards[0], plan.held_out[0])
        shared = Shared({"model": plan.initial.numpy()}, plan.round(self.worker.config, 0))
        row, _ = do(self.worker, client_update, shared, job)
        if "error" in row:
            raise SystemExit(row["trace"])
        return row["seconds"] / self.steps


class Script:
    """The loop of diffusers' train_text_to_image_lora.py, in the dtypes of fedray's task."""

    def __init__(self, task: LoRA, batch: int, steps: int, encoded: bool) -> None:
        folder, self.steps, self.batch, self.encoded = task.folder, steps, batch, encoded
        self.dtype = getattr(torch, task.base_dtype)
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").requires_grad_(False)
        self.text = CLIPTextModel.from_pretrained(folder / "text_encoder").requires_grad_(False)
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=self.dtype)
        self.unet.requires_grad_(False)
        rank, targets = task.largest_rank, ["to_k", "to_q", "to_v", "to_out.0"]
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
        self.layers = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        for parameter in self.layers:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.layers, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        self.schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)
        dataset, tokenizer = task.dataset(), CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.pixels = torch.from_numpy(dataset.images.copy()).float() / 127.5 - 1
        captions = list(dataset.columns["caption"])
        length = tokenizer.model_max_length
        self.tokens = tokenizer(
            captions, max_length=length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids  # fmt: skip
        if encoded:
            with torch.no_grad():
                self.posterior = self.vae.encode(self.pixels).latent_dist
                self.embeddings = self.text(self.tokens)[0]

    def inputs(self, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents and embeddings of a batch."""
        if self.encoded:
            mean, deviation = self.posterior.mean[chosen], self.posterior.std[chosen]
            return mean + deviation * torch.randn_like(mean), self.embeddings[chosen]
        return self.vae.encode(self.pixels[chosen]).latent_dist.sample(), self.text(self.tokens[chosen])[0]

    def __call__(self) -> float:
        started, order = time.perf_counter(), torch.randperm(IMAGES).repeat(self.steps)
        for step in range(self.steps):
            latents, embeddings = self.inputs(order[step * self.batch : (step + 1) * self.batch])
            latents = latents * self.vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),))
            noisy = self.scheduler.add_noise(latents, noise, timesteps)
            predicted = self.unet(noisy.to(self.dtype), timesteps, embeddings.to(self.dtype), return_dict=False)[0]
            F.mse_loss(predicted.float(), noise.float(), reduction="mean").backward()
            torch.nn.utils.clip_grad_norm_(self.layers, 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        return (time.perf_counter() - started) / self.steps


def compare(sides: dict[str, Rate], repeats: int) -> dict[str, list[float]]:
    """Seconds a step, in turns, after a first time that does not count."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, clock in sides.items():
            seconds = clock()
            if repeat:
                found[name].append(seconds)
    return found


def task_of(images: Path, **changes: Any) -> LoRA:
    """The preset's task, on these images, without prompts that are left out, which the script does not know."""
    assert isinstance(PRESET.task, LoRA)
    return replace(PRESET.task, train_data_dir=str(images), proportion_empty_prompts=0.0, **changes)


def config_of(task: LoRA, **changes: Any) -> fedray.Config:
    """The preset, with that task, as little as can be drawn, and no scores."""
    return replace(
        PRESET, task=task, partition=fedray.IID(), evaluate_samples=0, features=None, sampling_steps=1, sampler="ddim",
        keep_optimizer=False, lr_scheduler="constant", actors=0, **changes,
    )  # fmt: skip


def shape_of_sd15(folder: Path) -> Path:
    """Write a pipeline whose U-Net has Stable Diffusion 1.5's shape and random weights, in bfloat16."""
    shutil.copytree(PIPELINE, folder, ignore=shutil.ignore_patterns("unet", "text_encoder"))
    tokens = embedded.tokenizer()
    settings = embedded.text_encoder(tokens).config
    width: Any = SD15["cross_attention_dim"]
    settings.hidden_size, settings.num_attention_heads = width, 12
    CLIPTextModel(settings).save_pretrained(folder / "text_encoder")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel(**SD15)
        unet.to_empty(device="cpu")
        for parameter in unet.parameters():
            parameter.data.uniform_(-0.02, 0.02)
        unet.save_pretrained(folder / "unet")
    finally:
        torch.set_default_dtype(torch.float32)
    return folder


def memory(config: fedray.Config, actors: int) -> tuple[list[int], list[int]]:
    """Peaks of the actors' private memory in a round, in bytes, and of what each counts for of mapped files."""
    with tempfile.TemporaryDirectory() as directory, Peak(lambda: actors_of("ClientActor")) as peak:
        fedray.run(replace(config, actors=actors), Path(directory) / "run")
    assert len(peak.private) == actors
    return list(peak.private.values()), [peak.files[pid] for pid in peak.private]


def main(steps: int = 8, repeats: int = 15, large: bool = True, latents: int = 32, large_repeats: int = 3) -> None:
    """Measure.

    Args:
        steps: of a client in a round.
        repeats: how often each is measured, in turns.
        large: the shape of Stable Diffusion 1.5 too.
        latents: height and width of its latents.
        large_repeats: how often its steps are measured.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        task = task_of(photos(Path(directory) / "photos", 16))
        config = config_of(task, clients=1, local_steps=steps)
        batch = config.train_batch_size
        sides: dict[str, Rate] = {
            "the script's loop": Script(task, batch, steps, encoded=False),
            "the same, encoded once": Script(task, batch, steps, encoded=True),
            "fedray's client": Client(config),
        }
        found = compare(sides, repeats)
        base = found["the script's loop"]
        rows = []
        for name, seconds in found.items():
            ratios = [theirs / ours for ours, theirs in zip(seconds, base, strict=True)]
            rows.append([name, spread([1 / each for each in seconds]), spread(ratios)])
        table([f"digits-lora, batch {batch}", "steps a second", "÷ the script's loop"], rows)
        del sides
        if large:
            measure_large(Path(directory), latents, large_repeats)


def measure_large(directory: Path, latents: int, repeats: int) -> None:
    """Measure a step, and the memory of actors, at the shape of Stable Diffusion 1.5."""
    pipeline, side = shape_of_sd15(directory / "pipeline"), 2 * latents  # the small VAE halves
    task = task_of(
        photos(directory / "large", side), resolution=side, pretrained_model_name_or_path=str(pipeline),
        base_dtype="bfloat16", validation_prompt=("the digit 0",),
    )  # fmt: skip
    config = config_of(task, clients=1, local_steps=1, train_batch_size=1, rounds=1)
    script, client = compare({"": Script(task, 1, 1, encoded=True), "ours": Client(config)}, repeats).values()
    ratios = [ours / theirs for ours, theirs in zip(client, script, strict=True)]
    header = [f"Stable Diffusion 1.5, {latents}x{latents}, a step", "the loop, encoded once, s", "fedray's client, s"]
    table([*header, "ratio"], [["batch 1", spread(script), spread(client), spread(ratios)]])
    with connected(None):
        one, mapped = memory(replace(config, clients=2), 1)
        two, mapped_by_two = memory(replace(config, clients=2), 2)
    rows = [
        [f"{len(private)} actor{'s' * (len(private) > 1)}", f"{sum(private) / 1e9:.2f}", f"{sum(files) / 1e9:.2f}"]
        for private, files in ((one, mapped), (two, mapped_by_two))
    ]
    added = (f"{float(two) - float(one):.2f}" for one, two in zip(rows[0][1:], rows[1][1:], strict=True))
    rows.append(["the second adds", *added])
    table(["Stable Diffusion 1.5, a round of 2 clients", "private memory, GB", "mapped files, their share, GB"], rows)


if __name__ == "__main__":
    tyro.cli(main)
