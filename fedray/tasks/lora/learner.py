"""The network of the task `lora`, its loss and its samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from fedray.data.dataset import Dataset
from fedray.shelf import Shelf
from fedray.tasks import Batch
from fedray.tasks.ddpm.learner import sent, weighted_loss
from fedray.tasks.graphs import Graphed
from fedray.tasks.lora.pipelines import embed, encoders_key, unet_folder, variant
from fedray.tasks.samplers import make_sampler
from fedray.vector import FlatParameters
from fedray.vector.adapters import adapters

if TYPE_CHECKING:
    from fedray.tasks.lora import LoRA

VERSION = 1  # of how images and captions are encoded: part of the cache's key


def _place(index: int, mirrored: bool) -> str:
    """Return what an image's latents are called."""
    return f"{index}-mirrored" if mirrored else str(index)


def _named(caption: str) -> str:
    """Return what a caption's embedding is called."""
    return f"caption-{hashlib.sha256(caption.encode()).hexdigest()[:32]}"


class LoRALearner:
    """A frozen U-Net with adapters on a device. The VAE and the text encoder come and go."""

    def __init__(self, task: LoRA, device: torch.device, trains: Callable[[str], bool]) -> None:
        self.task, self.device = task, device
        self.dtype = getattr(torch, task.base_dtype)
        self.folder = task.folder
        # Not by `register_to_config`: what the file leaves out would stay a default, which samplers of it forget.
        target = {} if task.prediction_type is None else {"prediction_type": task.prediction_type}
        self.scheduler = DDPMScheduler.from_pretrained(self.folder, subfolder="scheduler", **target)
        self.alphas_cumprod = self.scheduler.alphas_cumprod.to(device)
        self.scaling_factor = AutoencoderKL.load_config(self.folder, subfolder="vae").get("scaling_factor", 0.18215)
        base, files = unet_folder(self.folder, task.base_dtype, task.variant)
        unet = UNet2DConditionModel.from_pretrained(base, torch_dtype=self.dtype, variant=files)
        self.unet = unet.requires_grad_(False).to(device)
        if task.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        alpha: Any = task.largest_rank if task.lora_alpha is None else task.lora_alpha
        self.unet.add_adapter(
            LoraConfig(
                r=task.largest_rank,
                lora_alpha=alpha,
                lora_dropout=task.lora_dropout,
                target_modules=list(task.target_modules),
                init_lora_weights="gaussian",
            )
        )
        for name, parameter in self.unet.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(trains(name))
        self.flat = FlatParameters(self.unet)
        self.network = Graphed(self.unet, possible=not (task.gradient_checkpointing or task.sizes))
        self.adapters = adapters(self.unet, self.flat.layout, task.scale, task.ranks)
        self._encoders: tuple[AutoencoderKL, CLIPTextModel, CLIPTokenizer] | None = None
        self._encoded: dict[str, Shelf] = {}  # by the SHA-256 of a dataset's images: its latents and embeddings
        self._shelf: Shelf | None = None  # of the dataset that was prepared last
        self._class_images = task.class_images()

    # What training needs of images and captions, computed once on each node

    @torch.no_grad()
    def prepare(self, dataset: Dataset, indices: np.ndarray, mirrored: bool) -> None:
        """Encode examples and captions that this node has not yet; then the VAE and the text encoder leave memory.

        What is kept of an image are the mean and the standard deviation of its latents, from which training draws.
        """
        sides = (False, True) if mirrored else (False,)
        shelf = self._shelf = self._shelf_of(dataset)
        captions = {"", *(str(dataset.columns["caption"][index]) for index in indices)}
        self._encode(dataset, [(int(index), side) for index in indices for side in sides])
        if self._class_images is not None and self.task.class_prompt is not None:
            self._encode(self._class_images, [(index, False) for index in range(len(self._class_images))])
            captions.add(self.task.class_prompt)
        if missing := sorted(caption for caption in captions if _named(caption) not in shelf):
            _, text_encoder, tokenizer = self._encode_with()
            for caption in missing:
                shelf[_named(caption)] = embed(caption, text_encoder, tokenizer, self.device).cpu().numpy()
        self._encoders = None

    def _shelf_of(self, dataset: Dataset) -> Shelf:
        if dataset.sha256 not in self._encoded:
            where = [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
            if self.device.type == "cuda":
                where = [torch.cuda.get_device_name(self.device)]
            key = ["latents", VERSION, dataset.sha256, encoders_key(self.folder, self.task.variant)]
            if self.task.sizes and dataset.buckets is not None:
                key.append(dataset.buckets.sha256)
            what = f"latents and embeddings of {len(dataset):,} images"
            self._encoded[dataset.sha256] = Shelf(what, [*key, self.task.base_dtype, *where])
        return self._encoded[dataset.sha256]

    def _encode(self, dataset: Dataset, wanted: list[tuple[int, bool]]) -> None:
        """Encode images, or their mirror images, that are not kept."""
        shelf = self._shelf_of(dataset)
        missing = [each for each in wanted if _place(*each) not in shelf]
        if not missing:
            return
        vae, _, _ = self._encode_with()
        buckets = dataset.buckets if self.task.sizes else None
        for index, side in missing:  # one at a time: a batch's other images would change the bits
            source = (dataset.images if buckets is None else buckets)[index]
            pixels = torch.from_numpy(source[..., ::-1].copy() if side else source.copy())[None]
            found = vae.encode((pixels.to(self.device).float() / 127.5 - 1).to(self.dtype)).latent_dist
            shelf[_place(index, side)] = torch.stack([found.mean[0], found.std[0]]).float().cpu().numpy()

    def latents(self, examples: Sequence[tuple[int, bool]], of_the_class: Sequence[int] = ()) -> list[np.ndarray]:
        """Map the latents of prepared examples: the mean and the standard deviation of each, [2, 4, h / 8, w / 8].

        Args:
            examples: their indices, and whether they are mirrored.
            of_the_class: indices of class images, whose latents come after those.
        """
        assert self._shelf is not None
        kept = [self._shelf[_place(*each)] for each in examples]
        if self._class_images is not None:
            shelf = self._shelf_of(self._class_images)
            kept += [shelf[_place(index, False)] for index in of_the_class]
        return kept

    def embeddings(self, captions: Sequence[str]) -> Tensor:
        """Return the embeddings of prepared captions: [n, tokens, width]."""
        assert self._shelf is not None
        return sent(torch.from_numpy(np.stack([self._shelf[_named(caption)] for caption in captions])), self.device)

    def _encode_with(self) -> tuple[AutoencoderKL, CLIPTextModel, CLIPTokenizer]:
        if self._encoders is None:
            transformers.utils.logging.disable_progress_bar()
            vae_folder, text_folder = self.folder / "vae", self.folder / "text_encoder"
            files = [variant(folder, self.task.variant) for folder in (vae_folder, text_folder)]
            vae = AutoencoderKL.from_pretrained(vae_folder, torch_dtype=self.dtype, variant=files[0])
            text_encoder = CLIPTextModel.from_pretrained(text_folder, dtype=self.dtype, variant=files[1])
            tokenizer = CLIPTokenizer.from_pretrained(self.folder / "tokenizer")
            self._encoders = (vae.to(self.device).eval(), text_encoder.eval().to(self.device), tokenizer)
        return self._encoders

    # Learning and drawing

    def loss(self, batch: Batch, rng: torch.Generator) -> Tensor:
        """Return the DDPM's loss in the VAE's latent space, given the caption (Rombach et al. 2022, equation 3).

        In training with class images, as many of them are drawn as the batch has examples, and their loss is added
        (prior preservation, Ruiz et al. 2023, equation 2). Images of several sizes are a call of the network each; the
        loss is the mean over all of them.
        """
        examples = list(zip(batch["index"].tolist(), batch["mirrored"].tolist(), strict=True))
        captions, n, of_the_class = list(batch["prompts"]), len(examples), list[int]()
        if self.task.proportion_empty_prompts and torch.is_grad_enabled():
            left_out = torch.rand(n, generator=rng) < self.task.proportion_empty_prompts
            captions = ["" if empty else caption for empty, caption in zip(left_out.tolist(), captions, strict=True)]
        if self._class_images is not None and self.task.class_prompt is not None and torch.is_grad_enabled():
            of_the_class = torch.randint(len(self._class_images), (n,), generator=rng).tolist()
            captions += [self.task.class_prompt] * n
        self.unet.train(torch.is_grad_enabled())  # dropout, in training only
        latents = self.latents(examples, of_the_class)
        sizes: dict[tuple[int, ...], list[int]] = {}
        for position, each in enumerate(latents):
            sizes.setdefault(each.shape, []).append(position)
        loss: Tensor | None = None
        for members in sizes.values():  # in their order in the batch; one, without buckets
            own = sum(position < n for position in members)  # the others are of the class
            few = [latents[position] for position in members], [captions[position] for position in members]
            instance, prior = self._losses(*few, own, rng)
            weight = (len(members) - own) / n * self.task.prior_loss_weight
            for share, part in ((own / n, instance), (weight, prior)):
                if part is not None:
                    loss = share * part if loss is None else loss + share * part
        assert loss is not None
        return loss

    def _losses(
        self, kept: Sequence[np.ndarray], captions: Sequence[str], own: int, rng: torch.Generator
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the mean losses of latents of one size: of the first `own`, and of the others; None of none."""
        mean, deviation = sent(torch.from_numpy(np.stack(kept, 1)), self.device)
        latents = (mean + deviation * self._normal(mean.shape, rng)) * self.scaling_factor
        noise = self._normal(latents.shape, rng)
        if self.task.noise_offset:
            noise = noise + self.task.noise_offset * self._normal((*latents.shape[:2], 1, 1), rng)
        timesteps = sent(torch.randint(len(self.alphas_cumprod), (len(latents),), generator=rng), self.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        predicted = self.network(noisy.to(self.dtype), timesteps, self.embeddings(captions).to(self.dtype)).float()
        kind = self.scheduler.config.prediction_type
        target = self.scheduler.get_velocity(latents, noise, timesteps) if kind == "v_prediction" else noise
        alpha = self.alphas_cumprod[timesteps]

        def of(part: slice) -> Tensor | None:
            if not len(alpha[part]):
                return None
            return weighted_loss(predicted[part], target[part], alpha[part], kind, self.task.snr_gamma)

        return of(slice(0, own)), of(slice(own, None))

    def _normal(self, shape: Sequence[int], rng: torch.Generator) -> Tensor:
        return sent(torch.randn(tuple(shape), generator=rng), self.device)

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, sampler: str, steps: int, prompts: Sequence[str] = ()) -> Tensor:
        """Sample n images, uint8 [n, 3, h, w]: image i for prompt i modulo their number.

        Args:
            prompts: by default the task's validation prompts.
        """
        prompts = prompts or self.task.validation_prompt
        if not prompts:
            raise ValueError("say what to sample: there are no prompts, and the task has no validation prompts")
        pipeline = self.pipeline(sampler)
        pipeline.set_progress_bar_config(disable=True)
        self.unet.eval()
        size = self.task.resolution
        drawn = pipeline(
            [prompts[index % len(prompts)] for index in range(n)],
            num_inference_steps=steps, guidance_scale=self.task.guidance_scale, generator=rng,
            height=size, width=size, output_type="pt",
        ).images  # fmt: skip
        return (drawn.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu()

    def pipeline(self, sampler: str) -> StableDiffusionPipeline:
        """Make a Stable Diffusion pipeline with the current adapters."""
        vae, text_encoder, tokenizer = self._encode_with()
        scheduler = make_sampler(sampler, self.scheduler.config)
        return StableDiffusionPipeline(
            vae, text_encoder, tokenizer, self.unet, scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip

    def set_base(self, change: Tensor) -> None:
        """Compute with the base's weights changed by this much (float32, in the form of `adapters.changes`)."""
        self.network.release()
        self.adapters.change_base(self.unet, change.to(self.device))

    def load(self, directory: Path) -> None:
        """Take over the adapters that `save` wrote. Raises ValueError where they are of other layers or ranks."""
        found = StableDiffusionPipeline.lora_state_dict(directory)[0]
        found = {name.removeprefix("unet."): weight for name, weight in found.items()}
        if not any(".lora_A." in name for name in found):  # written before diffusers had peft's names
            found = convert_unet_state_dict_to_peft(found)
        mine = get_peft_model_state_dict(self.unet)
        if {name: weight.shape for name, weight in mine.items()} != {name: w.shape for name, w in found.items()}:
            raise ValueError("its adapters are of other layers, or of another rank")
        set_peft_model_state_dict(self.unet, found)  # in place: parameters stay views of the vector

    def save(self, directory: Path) -> None:
        """Write pytorch_lora_weights.safetensors, for `StableDiffusionPipeline.load_lora_weights`.

        If the base has changed too, write a whole pipeline instead, with everything merged into it.
        """
        if self.adapters.base_has_changed:
            self.unet.fuse_lora()
            self.unet.unload_lora()
            whole = self.pipeline("ddpm")
            kind = json.loads((self.folder / "model_index.json").read_text())["scheduler"][1]
            whole.scheduler = getattr(diffusers, kind).from_pretrained(self.folder, subfolder="scheduler")
            if self.task.prediction_type is not None:
                whole.scheduler.register_to_config(prediction_type=self.task.prediction_type)
            whole.save_pretrained(directory)
            return
        weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
        StableDiffusionPipeline.save_lora_weights(
            directory,
            unet_lora_layers={name: weight.contiguous().cpu().clone() for name, weight in weights.items()},
            unet_lora_adapter_metadata=self.unet.peft_config["default"].to_dict(),
        )
