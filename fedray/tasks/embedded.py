"""A small Stable Diffusion of digits that ships with fedray, to adapt without a download: `digits_pipeline/`.

    python -m fedray.tasks.embedded

makes it, in some twelve minutes on one core: a variational autoencoder, then a U-Net and the text encoder that
conditions it, are trained on scikit-learn's digits 0…5 alone, enlarged to 16×16 RGB. Digits 6…9 it has never seen: they
are what an adapter has to learn. The folder is a `diffusers.StableDiffusionPipeline` like any other.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fedray.data.sources import DIGITS, digits
from fedray.seeds import generator, number
from fedray.tasks.lora import PIPELINE

SEEN = (0, 1, 2, 3, 4, 5)  # the classes that the pipeline was trained on
HELD_OUT = (6, 7, 8, 9)
PROMPT_TOKENS = 32  # one per letter, and two for the start and the end: 30 letters
EMPTY_PROMPTS = 0.1  # the share of training prompts that are empty, for classifier-free guidance


def prompt(label: int) -> str:
    return f"the digit {DIGITS[label]}"


def enlarge(images: Tensor) -> Tensor:
    """Enlarge grey digits, uint8 [n, 1, 8, 8], to RGB, uint8 [n, 3, 16, 16]: repeat each pixel four times."""
    return images.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)


def reduce(images: Tensor) -> Tensor:
    """Reduce RGB, uint8 [n, 3, 16, 16], to grey means, uint8 [n, 1, 8, 8]: the inverse of `enlarge`."""
    return F.avg_pool2d(images.float().mean(1, keepdim=True), 2).round().to(torch.uint8)


def tokenizer() -> CLIPTokenizer:
    """Make CLIP's tokenizer without merges: a token per byte, another for a word's last byte, start and end."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=PROMPT_TOKENS)


def text_encoder(tokens: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_TOKENS,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )


def autoencoder() -> AutoencoderKL:
    """Build the autoencoder: RGB 16×16 → latents [4, 8, 8] → RGB 16×16; 167,959 parameters."""
    return AutoencoderKL(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
    )


def unet() -> UNet2DConditionModel:
    """Build the U-Net, which attends to the prompt in every block."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,  # diffusers' name for the number of heads
        cross_attention_dim=64,
    )


def train(autoencoder_steps: int = 2000, steps: int = 3000, batch_size: int = 64) -> None:
    """Train the pipeline and write its folder beside this file."""
    torch.set_num_threads(1)
    data = digits()
    seen = np.isin(data.column("label"), SEEN)
    images = enlarge(torch.from_numpy(data.images[seen])).float() / 127.5 - 1  # [n, 3, 16, 16] in [−1, 1]
    labels = torch.from_numpy(data.column("label")[seen])
    torch.manual_seed(number(0, "embedded"))
    vae = autoencoder()
    train_autoencoder(vae, images, autoencoder_steps, batch_size)
    torch.manual_seed(number(0, "embedded"))
    tokens, model = tokenizer(), unet()
    text = text_encoder(tokens)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae, text, tokens, model, scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    train_denoiser(pipeline, images, labels, steps, batch_size)
    pipeline.save_pretrained(PIPELINE)
    # vocab.json and merges.txt too: transformers 5 writes only tokenizer.json, which 4 does not read.
    tokens.backend_tokenizer.model.save(str(PIPELINE / "tokenizer"))
    print(f"wrote {PIPELINE.name}, {sum(path.stat().st_size for path in PIPELINE.rglob('*.*')):,} bytes")


def train_autoencoder(vae: AutoencoderKL, images: Tensor, steps: int, batch_size: int) -> None:
    """Train on squared error and a little of the divergence from N(0, 1); scale latents to unit variance as SD does."""
    rng = generator(0, "embedded", "autoencoder")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    started = time.perf_counter()
    for _ in range(steps):
        batch = images[torch.randint(len(images), (batch_size,), generator=rng)]
        posterior = vae.encode(batch).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample(rng)).sample, batch)
        optimizer.zero_grad()
        (error + 1e-5 * posterior.kl().mean()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / vae.encode(images).latent_dist.sample(rng).std().item())
    print(f"autoencoder: {count(vae):,} parameters, {time.perf_counter() - started:.0f} s, squared error {error:.5f}")


def train_denoiser(
    pipeline: StableDiffusionPipeline, images: Tensor, labels: Tensor, steps: int, batch_size: int
) -> None:
    """Minimise ‖ε − ε_θ(z_t, t, text)‖² (Rombach et al. 2022, equation 3), U-Net and text encoder together."""
    rng = generator(0, "embedded", "denoiser")
    vae, text, tokens, model, scheduler = (
        pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.unet, pipeline.scheduler
    )  # fmt: skip
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    prompts = [*(prompt(label) for label in range(10)), ""]
    ids = tokens(prompts, padding="max_length", return_tensors="pt").input_ids  # [11, tokens]; the last is empty
    optimizer = torch.optim.AdamW([*model.parameters(), *text.parameters()], lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.02)
    started = time.perf_counter()
    for step in range(steps):
        batch = torch.randint(len(images), (batch_size,), generator=rng)
        noise = torch.randn((2, batch_size, *posterior.mean.shape[1:]), generator=rng)
        latents = (posterior.mean[batch] + posterior.std[batch] * noise[0]) * vae.config.scaling_factor
        timesteps = torch.randint(len(scheduler), (batch_size,), generator=rng)
        empty = torch.rand(batch_size, generator=rng) < EMPTY_PROMPTS
        states = text(ids[torch.where(empty, 10, labels[batch])]).last_hidden_state
        predicted = model(scheduler.add_noise(latents, noise[1], timesteps), timesteps, states).sample
        loss = F.mse_loss(predicted, noise[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            print(f"step {step + 1}: loss {loss:.4f}, {time.perf_counter() - started:.0f} s", flush=True)
    print(f"U-Net: {count(model):,} parameters; text encoder: {count(text):,}")


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    train()
