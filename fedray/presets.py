"""Settings to start from."""

from dataclasses import replace

from fedray.config import Config
from fedray.data.partition import ByFolder
from fedray.data.sources import CELEBA_CROP
from fedray.tasks.ddpm import DDPM
from fedray.tasks.lora import PIPELINE, LoRA
from fedray.wire.float16 import Float16

SMOKE = {"rounds": 2, "test_share": 0.9, "evaluate_samples": 32, "sampling_steps": 4, "kid_subset_size": 16}
"""With these the preset "digits" takes seconds: for trying out, and for tests."""

# The U-Net of diffusers' train_unconditional.py: 113,673,219 parameters.
UNCONDITIONAL = DDPM(
    dataset_name="imagefolder",
    resolution=64,
    channels=3,
    block_out_channels=(128, 128, 256, 256, 512, 512),
    attention=(False, False, False, False, True, False),
    mid_block_attention=True,
    layers_per_block=2,
    norm_num_groups=32,
)

PRESETS = {
    # A size at which a laptop draws recognisable digits in minutes: 159,697 parameters.
    "digits": Config(
        task=DDPM(),
        rounds=40,
        local_epochs=4,
        train_batch_size=32,
        learning_rate=4e-3,
        lr_scheduler="cosine",
        use_ema=True,
        ema_max_decay=0.995,
        keep_optimizer=True,
        sampling_steps=100,
        evaluate_samples=512,
        features="digits",
        kid_subset_size=256,
    ),
    # 32×32 grey faces, 1.8 million parameters; a person is a client.
    "faces": Config(
        task=DDPM(
            dataset_name="imagefolder",
            resolution=32,
            block_out_channels=(32, 64, 96),
            attention=(False, False, True),
            mid_block_attention=True,
        ),
        clients=40,
        partition=ByFolder(),
        held_out_share=0.2,
        test_share=0.1,
        rounds=20,
        local_epochs=4,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        random_flip=True,
        use_ema=True,
        ema_max_decay=0.997,
        sampling_steps=100,
    ),
    # Chen 2024, section 3.1.
    "celeba": Config(
        task=replace(UNCONDITIONAL, dataset_name="celeba", crop=CELEBA_CROP),
        rounds=10,
        local_epochs=4,
        learning_rate=1e-4,
        evaluate_samples=64,
    ),
    # What diffusers' train_unconditional.py does when it is told nothing but its data: that network, at 64 pixels.
    "unconditional": Config(
        task=UNCONDITIONAL,
        rounds=100,
        local_epochs=1,
        train_batch_size=16,
        learning_rate=1e-4,
        lr_scheduler="cosine",
        lr_warmup_steps=500,
        evaluate_samples=16,
        evaluate_every=10,
        eval_batch_size=16,
    ),
    # Chen 2024, section 3.2: rank 8, four clients of four photos, 200 rounds; the learning rate is diffusers'.
    "sd": Config(
        task=LoRA(),
        wire=(Float16(),),
        rounds=200,
        local_epochs=1,
        train_batch_size=1,
        learning_rate=1e-4,
        adam_beta1=0.9,
        adam_weight_decay=1e-2,
        sampler="dpmsolver++",
        sampling_steps=25,
        evaluate_samples=4,
        validation_rounds=50,
    ),
    # The small Stable Diffusion that ships with fedray: it knows the digits 0 to 5.
    "digits-lora": Config(
        task=LoRA(
            pretrained_model_name_or_path=str(PIPELINE),
            resolution=16,
            guidance_scale=3.0,
            proportion_empty_prompts=0.1,
        ),
        partition=ByFolder(),
        rounds=80,
        local_steps=8,
        train_batch_size=6,
        learning_rate=1e-2,
        lr_scheduler="cosine",
        keep_optimizer=True,
        validation_rounds=20,
        adam_beta1=0.9,
        adam_weight_decay=1e-2,
        sampler="dpmsolver++",
        sampling_steps=20,
        evaluate_samples=200,
        eval_batch_size=40,
        kid_subset_size=50,
        features="digits",
    ),
}
"""Configurations to start from, by name: what `--preset` means."""
