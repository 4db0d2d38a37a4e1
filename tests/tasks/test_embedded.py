import warnings

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from fedray.data.sources import DIGITS, digits
from fedray.scores.digits import classifier
from fedray.tasks.embedded import HELD_OUT, SEEN, enlarge, prompt, reduce
from fedray.tasks.lora import PIPELINE


@pytest.fixture(scope="module")
def pipeline():
    loaded = StableDiffusionPipeline.from_pretrained(PIPELINE, local_files_only=True)
    loaded.scheduler = DPMSolverMultistepScheduler.from_config(loaded.scheduler.config)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def samples(pipeline, prompts, seed=0):
    """uint8 [n, 3, 16, 16]."""
    rng = torch.Generator().manual_seed(seed)
    images = pipeline(prompts, num_inference_steps=10, guidance_scale=3.0, generator=rng, output_type="np").images
    return torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)


def accuracy(pipeline, classes, each):
    """The share of samples that the classifier takes for what the prompt says."""
    labels = torch.tensor(classes).repeat_interleave(each)
    with torch.no_grad():
        found = classifier()(reduce(samples(pipeline, [prompt(label) for label in labels.tolist()]))).argmax(1)
    return (found == labels).float().mean().item()


def test_folder_is_complete_and_small(pipeline):
    assert sum(path.stat().st_size for path in PIPELINE.rglob("*") if path.is_file()) <= 8_000_000
    assert all(parameter.dtype == torch.float32 for parameter in pipeline.unet.parameters())
    assert pipeline.safety_checker is None


def test_loads_without_a_warning(caplog, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for log in (diffusers_logging, transformers_logging):
            log.enable_propagation()
        try:
            StableDiffusionPipeline.from_pretrained(PIPELINE, local_files_only=True)
        finally:
            for log in (diffusers_logging, transformers_logging):
                log.disable_propagation()
    assert not caplog.records


def test_each_letter_is_a_token_and_prompts_fit(pipeline):
    for label in range(10):
        tokens = pipeline.tokenizer(prompt(label)).input_ids
        assert len(tokens) == len("thedigit" + DIGITS[label]) + 2 <= pipeline.tokenizer.model_max_length
    assert len({tuple(pipeline.tokenizer(prompt(label)).input_ids) for label in range(10)}) == 10


def test_reduce_inverts_enlarge():
    images = torch.from_numpy(digits().images)
    large = enlarge(images)
    assert large.shape == (1797, 3, 16, 16)
    assert large.dtype == torch.uint8
    assert torch.equal(reduce(large), images)
    uneven = large.clone()
    uneven[:, :, ::2] = 0  # half of each 2×2 is black
    torch.testing.assert_close(reduce(uneven).double(), images.double() / 2, atol=0.5, rtol=0)


def test_autoencoder_keeps_the_digits_it_has_not_seen(pipeline):
    data = digits()
    for classes in (SEEN, HELD_OUT):
        chosen = np.isin(data.labels, classes)
        with torch.no_grad():
            images = enlarge(torch.from_numpy(data.images[chosen])).float() / 127.5 - 1
            decoded = pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mode()).sample
            grey = reduce(((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
            found = classifier()(grey).argmax(1).numpy()
        assert (found == data.labels[chosen]).mean() > 0.97


def test_draws_what_it_has_seen_and_not_what_it_has_not(pipeline):
    assert accuracy(pipeline, SEEN, 7) >= 0.85
    assert accuracy(pipeline, HELD_OUT, 7) <= 0.25


def test_the_same_seed_gives_the_same_images(pipeline):
    prompts = [prompt(3), prompt(5)]
    assert torch.equal(samples(pipeline, prompts), samples(pipeline, prompts))
    assert not torch.equal(samples(pipeline, prompts), samples(pipeline, prompts, seed=1))
