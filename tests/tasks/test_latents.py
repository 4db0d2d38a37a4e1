"""Latents and embeddings on this node: computed once, by whichever process needs them first, to the same bits."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from runs import sha, train
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from fedray import cache
from fedray.federation.plan import make_plan
from fedray.federation.steps import batch_of
from fedray.federation.worker import build
from fedray.presets import PRESETS
from fedray.tasks.lora import PIPELINE

ACTORS_CACHE = os.environ["FEDRAY_CACHE"]  # Ray's processes begin with what the session has


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def config(photos):
    """Two rounds of two steps in this process."""
    task = replace(PRESETS["digits-lora"].task, train_data_dir=str(photos))
    return replace(
        PRESETS["digits-lora"], task=task, rounds=2, local_steps=2, train_batch_size=2, lr_scheduler="constant",
        evaluate_samples=0, features=None, sampling_steps=2, validation_rounds=2, num_validation_images=1, actors=0,
    )  # fmt: skip


@pytest.fixture
def encoded(monkeypatch):
    """How many images and captions were encoded."""
    counts = {"images": 0, "captions": 0}
    encode, embed = AutoencoderKL.encode, CLIPTextModel.forward

    def encoding(vae, pixels, *rest, **more):
        counts["images"] += len(pixels)
        return encode(vae, pixels, *rest, **more)

    def embedding(model, tokens, *rest, **more):
        counts["captions"] += len(tokens)
        return embed(model, tokens, *rest, **more)

    monkeypatch.setattr(AutoencoderKL, "encode", encoding)
    monkeypatch.setattr(CLIPTextModel, "forward", embedding)
    return counts


def prepared(config, mirrored=True, **task):
    """A learner that has prepared all examples, and the dataset."""
    config = replace(config, task=replace(config.task, **task))
    dataset = config.task.dataset()
    learner = build(config, torch.device("cpu"))
    learner.prepare(dataset, np.arange(len(dataset)), mirrored)
    return learner, dataset


def test_they_are_those_of_diffusers(config):
    learner, dataset = prepared(config)
    vae = AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae")
    text, tokenizer = (part for part in learner._encode_with()[1:])
    for _ in range(2):
        for index in (0, 5, 15):
            for side in (False, True):
                pixels = torch.from_numpy(dataset.images[index].copy())[None].float() / 127.5 - 1
                with torch.no_grad():
                    found = vae.encode(pixels.flip(-1) if side else pixels).latent_dist
                (kept,) = learner.latents([(index, side)])
                assert np.array_equal(kept, torch.cat([found.mean, found.std]).numpy())
        for caption in ("", dataset.columns["caption"][0]):
            ids = tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt").input_ids
            with torch.no_grad():
                assert torch.equal(learner.embeddings([caption]), text(ids)[0])
        learner, _ = prepared(config)  # then from the cache


def test_a_second_run_encodes_nothing_and_ends_in_the_same_bits(config, encoded, tmp_path):
    config = replace(config, random_flip=True, held_out_share=0.25)
    train(config, tmp_path / "first")
    plan = make_plan(config)
    assert encoded["images"] == 2 * len(plan.shards.indices) + len(plan.held_out.indices)
    first = encoded.copy()
    train(replace(config, seed=config.seed), tmp_path / "second")
    assert encoded["images"] == first["images"]
    assert sha(tmp_path / "first") == sha(tmp_path / "second")
    # Another partition of the same images shares all but what was held out.
    train(replace(config, clients=2, held_out_share=0.0, rounds=1), tmp_path / "third")
    assert encoded["images"] == 2 * len(plan.dataset)


def test_a_resumed_run_goes_on_from_the_cache(config, encoded, tmp_path):
    train(config, tmp_path / "whole")
    train(config, tmp_path / "stopped", rounds=1)
    images = encoded["images"]
    train(config, tmp_path / "stopped", resume=True)
    assert encoded["images"] == images == 16
    assert sha(tmp_path / "whole") == sha(tmp_path / "stopped")


def test_what_is_damaged_is_encoded_again_and_nothing_else(config, encoded, tmp_path, capsys):
    train(config, tmp_path / "first")
    (shelf,) = (entry.path for entry in cache.entries() if "latents" in entry.what)
    assert len(list(shelf.glob("[0-9]*.npy"))) == 16
    damaged, gone, caption = shelf / "3.npy", shelf / "7.npy", min(shelf.glob("caption-*.npy"))
    for path in (damaged, caption):
        path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    gone.unlink()
    before = encoded.copy()
    train(config, tmp_path / "second")
    assert encoded["images"] - before["images"] == 2
    assert " ".join(capsys.readouterr().err.split()).count("is damaged") == 2  # lines are wrapped
    assert sha(tmp_path / "first") == sha(tmp_path / "second")


def test_each_thing_that_the_bits_depend_on_is_in_the_key(config, encoded, tmp_path, monkeypatch):
    prepared(config, mirrored=False)

    def again(**task):
        before = encoded.copy()
        prepared(config, mirrored=False, **task)
        return encoded["images"] - before["images"], encoded["captions"] - before["captions"]

    assert again() == (0, 0)
    assert again(rank=2, snr_gamma=5.0, validation_prompt=("x",)) == (0, 0)  # which encoders do not see
    assert again(base_dtype="bfloat16") == (16, 5)
    assert again(resolution=32) == (16, 5)
    assert again(crop=8) == (16, 5)
    assert again(instance_prompt="a digit") == (0, 1)  # of the same images
    shutil.copytree(PIPELINE, tmp_path / "copy")
    assert again(pretrained_model_name_or_path=str(tmp_path / "copy")) == (0, 0)  # the same contents elsewhere
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        weights = load_file(tmp_path / "copy" / part)
        name = min(weights)
        weights[name] = weights[name] * 1.5
        save_file(weights, tmp_path / "copy" / part, {"format": "pt"})
        assert again(pretrained_model_name_or_path=str(tmp_path / "copy")) == (16, 5)
    monkeypatch.setattr("fedray.tasks.lora.learner.VERSION", 99)
    assert again() == (16, 5)
    monkeypatch.setattr("diffusers.__version__", "99.0")
    assert again() == (16, 5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert again() == (16, 5)


def test_mirror_images_are_encoded_when_they_are_wanted(config, encoded):
    prepared(config, mirrored=False)
    assert encoded["images"] == 16
    learner, _ = prepared(config, mirrored=True)
    assert encoded["images"] == 32
    plain, turned = learner.latents([(0, False), (0, True)])
    assert not np.array_equal(plain, turned)


def test_class_images_are_kept_apart(config, encoded, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "class").mkdir()
    for index in range(3):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "class" / f"{index}.png")
    extra = {"class_data_dir": str(tmp_path / "class"), "class_prompt": "a digit"}
    losses = []
    for _ in range(2):
        learner, dataset = prepared(config, mirrored=False, **extra)
        batch = batch_of(dataset, np.arange(4))
        losses.append(learner.loss(batch, torch.Generator().manual_seed(0)).item())
        assert encoded["images"] == 16 + 3
    assert losses[0] == losses[1]
    names = [entry.what for entry in cache.entries() if "latents" in entry.what]
    assert sorted(names) == ["latents and embeddings of 16 images", "latents and embeddings of 3 images"]


@pytest.mark.slow
def test_actors_share_them(ray, config, tmp_path, monkeypatch):
    """Two actors end in the bits of this process, and encode no more than it: another run of the node needs none."""
    from fedray import run

    config = replace(config, task=replace(config.task, crop=13))  # images that no other test has
    train(config, tmp_path / "here")
    monkeypatch.setenv("FEDRAY_CACHE", ACTORS_CACHE)
    before = {entry.path for entry in cache.entries()}
    run(replace(config, actors=2), tmp_path / "there")
    (shelf,) = (entry.path for entry in cache.entries() if "latents" in entry.what and entry.path not in before)
    made = {path.name: path.stat().st_mtime_ns for path in shelf.glob("*.npy")}
    assert len([name for name in made if name[0].isdigit()]) == 16
    assert sha(tmp_path / "there") == sha(tmp_path / "here")
    run(replace(config, actors=2), tmp_path / "again")
    assert {path.name: path.stat().st_mtime_ns for path in shelf.glob("*.npy")} == made
    assert sha(tmp_path / "again") == sha(tmp_path / "here")
