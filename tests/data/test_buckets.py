"""Images in sizes of several aspect ratios: which size, which pixels, in whichever cache; and training on them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import find_nearest_bucket, parse_buckets_string
from PIL import Image
from runs import sha, train

import fedray
from fedray import cache
from fedray.algorithms.dpsgd import DPSGD
from fedray.cli import main
from fedray.data.buckets import nearest, sizes_in
from fedray.data.images import Form, decode
from fedray.data.partition import IID
from fedray.data.sources import image_folder
from fedray.errors import UserError
from fedray.federation.fit import prepare
from fedray.federation.steps import batch_of
from fedray.federation.worker import build
from fedray.presets import PRESETS
from fedray.record.run import Run
from fedray.tasks.lora import LoRA

BUCKETS = "16,16;12,20;20,12;8,32"
SHAPES = [(16, 16), (24, 40), (40, 24), (12, 21), (33, 30), (50, 31), (20, 12), (9, 9)]  # heights and widths


def save(path, height, width, seed=0, **options):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    image.save(path, **options)
    return image


@pytest.fixture
def pictures(tmp_path):
    for label in "ab":
        (tmp_path / "pictures" / label).mkdir(parents=True)
    for index, (height, width) in enumerate(SHAPES):
        save(tmp_path / "pictures" / "ab"[index % 2] / f"{index}.png", height, width, index)
    return tmp_path / "pictures"


@pytest.fixture
def config(pictures):
    task = replace(
        PRESETS["digits-lora"].task, train_data_dir=str(pictures), aspect_ratio_buckets=BUCKETS,
        proportion_empty_prompts=0.0,
    )  # fmt: skip
    return replace(
        PRESETS["digits-lora"], task=task, partition=IID(), clients=2, rounds=2, local_steps=3, train_batch_size=3,
        lr_scheduler="constant", keep_optimizer=False, evaluate_samples=0, features=None, sampling_steps=2,
        validation_rounds=2, num_validation_images=1, held_out_share=0.25, random_flip=True, actors=0,
    )  # fmt: skip


def test_sizes_are_read_and_chosen_as_diffusers_does():
    for text in (BUCKETS, "672,1568; 1024,1024", " 8 , 8 "):
        assert list(sizes_in(text)) == parse_buckets_string(text)
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes = [tuple(map(int, size)) for size in rng.integers(1, 6, (4, 2)) * 4]
        height, width = map(int, rng.integers(1, 40, 2))
        assert nearest(height, width, sizes) == find_nearest_bucket(height, width, sizes)


@pytest.mark.parametrize("text", ["", "16", "16,0", "16,16;", "16x16", "16,16;16,16", "a,b", "-8,8"])
def test_what_is_no_list_of_sizes(text):
    with pytest.raises(ValueError, match="HEIGHT,WIDTH|twice"):
        sizes_in(text)


@pytest.mark.parametrize(
    ("shape", "size", "box"),
    [
        ((40, 24), (20, 12), (0, 0, 24, 40)),  # the aspect ratio that it has: all of it
        ((40, 30), (20, 12), (3, 0, 27, 40)),  # too wide: left and right go
        ((46, 24), (20, 12), (0, 3, 24, 43)),  # too high: above and below
        ((10, 6), (20, 12), (0, 0, 6, 10)),  # enlarged
    ],
)
def test_the_largest_part_in_the_centre_is_kept(tmp_path, shape, size, box):
    image = save(tmp_path / "one.png", *shape)
    expected = np.asarray(image.crop(box).resize(size[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    found = decode(tmp_path / "one.png", Form(16, 3), size)
    assert np.array_equal(found, expected)
    assert np.array_equal(decode(tmp_path / "one.png", Form(16, 3)), decode(tmp_path / "one.png", Form(8, 3), (16, 16)))


def test_each_image_is_in_its_bucket_and_the_squares_stay(pictures):
    sizes = sizes_in(BUCKETS)
    plain, found = (image_folder(pictures, Form(16, 3, None, chosen)) for chosen in ((), sizes))
    assert plain.buckets is None
    assert np.array_equal(plain.images, found.images)
    assert plain.sha256 == found.sha256
    names = [pictures / str(name) for name in found.columns["file_name"]]
    for index, path in enumerate(names):
        height, width = SHAPES[int(path.stem)]
        size = sizes[find_nearest_bucket(height, width, sizes)]
        assert np.array_equal(found.buckets[index], decode(path, Form(16, 3), size))
    assert {array.shape[2:] for array in found.buckets.arrays} < set(sizes)  # 8×32 has nobody
    assert all(isinstance(array, np.memmap) for array in found.buckets.arrays)
    again = image_folder(pictures, Form(16, 3, None, sizes))
    assert again.buckets.sha256 == found.buckets.sha256
    save(pictures / "a/0.png", 16, 17, 99)
    assert image_folder(pictures, Form(16, 3, None, sizes)).buckets.sha256 != found.buckets.sha256


def test_turned_unreadable_and_left_out_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90°: what is stored as 12×20 is 20×12
    save(tmp_path / "a.jpg", 12, 20, exif=exif)
    (tmp_path / "b.png").write_bytes(b"no image")
    for index in range(4):
        save(tmp_path / f"c{index}.png", 12, 20, index)
    form = Form(16, 3, None, sizes_in("20,12;12,20"))
    dataset = image_folder(tmp_path, form, skip_unreadable=True)
    assert [dataset.buckets[index].shape[1:] for index in range(5)] == [(20, 12), *[(12, 20)] * 4]
    few = image_folder(tmp_path, form, skip_unreadable=True, limit=3)
    for index, name in enumerate(few.columns["file_name"]):
        row = list(dataset.columns["file_name"]).index(name)
        assert np.array_equal(few.buckets[index], dataset.buckets[row])


def test_damaged_buckets_are_made_again(pictures, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "cache"))
    form = Form(16, 3, None, sizes_in(BUCKETS))
    first = image_folder(pictures, form)
    expected = [first.buckets[index].copy() for index in range(len(SHAPES))]
    path = Path(first.buckets.arrays[1].filename)
    path.write_bytes(path.read_bytes()[:-50] + bytes(50))
    again = image_folder(pictures, form)
    assert "bucket-1.npy in the cache is damaged" in capsys.readouterr().err.replace("\n", " ")
    for index, image in enumerate(expected):
        assert np.array_equal(again.buckets[index], image)


def test_the_loss_is_the_mean_over_a_batch_of_several_sizes(config):
    """By hand: each size's share, its noise drawn in the order in which sizes come in the batch."""
    dataset = config.task.dataset()
    learner = build(config, torch.device("cpu"))
    learner.prepare(dataset, np.arange(len(SHAPES)), True)
    for b in (parameter for name, parameter in learner.unet.named_parameters() if ".lora_B." in name):
        torch.nn.init.normal_(b, std=0.05)
    batch = batch_of(dataset, np.arange(5))
    found = learner.loss(batch, torch.Generator().manual_seed(3))
    found.backward()
    gradient = learner.flat.gradient.clone()
    rng, sizes, total = torch.Generator().manual_seed(3), {}, 0.0
    for index in range(5):
        sizes.setdefault(dataset.buckets[index].shape, []).append(index)
    assert len(sizes) > 1
    vae, text, tokenizer = learner._encode_with()
    scheduler = DDPMScheduler.from_pretrained(learner.folder, subfolder="scheduler")
    learner.flat.gradient.zero_()
    for members in sizes.values():
        pixels = torch.from_numpy(np.stack([dataset.buckets[index] for index in members])).float() / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
            captions = [dataset.columns["caption"][index] for index in members]
            tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
            states = text(tokens)[0]
        shape = posterior.mean.shape
        latents = (posterior.mean + posterior.std * torch.randn(shape, generator=rng)) * vae.config.scaling_factor
        noise = torch.randn(shape, generator=rng)
        t = torch.randint(1000, (len(members),), generator=rng)
        errors = (learner.unet(scheduler.add_noise(latents, noise, t), t, states).sample - noise).square()
        total = total + errors.flatten(1).mean(1).sum() / 5
    total.backward()
    assert found.item() == pytest.approx(total.item(), rel=1e-5)
    assert torch.allclose(gradient, learner.flat.gradient, rtol=1e-3, atol=1e-7)


def test_class_images_are_squares_beside_them(config, pictures):
    extra = {"class_data_dir": str(pictures / "a"), "class_prompt": "a"}
    losses = {}
    for weight in (0.0, 1.0, 2.0):
        learner = build(
            replace(config, task=replace(config.task, **extra, prior_loss_weight=weight)), torch.device("cpu")
        )
        dataset = config.task.dataset()
        learner.prepare(dataset, np.arange(8), False)
        losses[weight] = learner.loss(batch_of(dataset, np.arange(8)), torch.Generator().manual_seed(0)).item()
    assert losses[2.0] - losses[0.0] == pytest.approx(2 * (losses[1.0] - losses[0.0]), rel=1e-4)
    assert losses[1.0] > losses[0.0] > 0


def test_buckets_of_one_square_are_a_run_without(config, tmp_path, photos):
    """Photos that are 16×16 already: to the bit."""
    task = replace(config.task, train_data_dir=str(photos), aspect_ratio_buckets="16,16")
    train(replace(config, task=task), tmp_path / "one")
    train(replace(config, task=replace(task, aspect_ratio_buckets=None)), tmp_path / "none")
    assert sha(tmp_path / "one") == sha(tmp_path / "none")


def test_a_run_is_resumed_to_the_same_bits(config, pictures, tmp_path):
    train(config, tmp_path / "whole")
    train(config, tmp_path / "stopped", rounds=1)
    shutil.copytree(tmp_path / "stopped", tmp_path / "changed")
    train(config, tmp_path / "stopped", resume=True)
    assert sha(tmp_path / "whole") == sha(tmp_path / "stopped")
    assert "buckets_sha256" in Run.open(tmp_path / "whole").saved
    train(replace(config, task=replace(config.task, aspect_ratio_buckets=None)), tmp_path / "squares")
    assert sha(tmp_path / "whole") != sha(tmp_path / "squares")
    # Other pixels beyond the central square are other data.
    with Image.open(pictures / "b/1.png") as image:
        pixels = np.asarray(image).copy()
    pixels[:, :2] = 255 - pixels[:, :2]
    Image.fromarray(pixels).save(pictures / "b/1.png")
    with pytest.raises(UserError, match="not those of the run|changed|differ"):
        train(config, tmp_path / "changed", resume=True)


@pytest.mark.slow
def test_placement_never_matters(ray, config, tmp_path):
    train(config, tmp_path / "here")
    fedray.run(replace(config, actors=2), tmp_path / "there")
    assert sha(tmp_path / "here") == sha(tmp_path / "there")


def test_what_cannot_be_is_one_sentence(config, tmp_path, capsys):
    def refused(text, **changes):
        with pytest.raises(UserError, match=text):
            prepare(replace(config, **changes), Run(tmp_path / "run"))

    def task(**changes):
        return replace(config.task, **changes)

    refused("--aspect-ratio-buckets 16,15: sides must be multiples of 4", task=task(aspect_ratio_buckets="16,15"))
    refused("16: it must be HEIGHT,WIDTH;HEIGHT,WIDTH", task=task(aspect_ratio_buckets="16"))
    refused("--crop keeps a square", task=task(crop=8))
    refused("--canaries 2: they are squares", canaries=2)
    refused("single examples have gradients where all have one size", algorithm=DPSGD(1.0, 1.0), local_epochs=None)
    with pytest.raises(UserError, match="were not decoded from files"):
        config.task.fingerprint(replace(config.task.dataset(), source=None))
    arguments = ["finetune", "--preset", "digits-lora", "--train-data-dir", str(config.task.train_data_dir)]
    assert main([*arguments, "--aspect_ratio_buckets", "16,16;12,18", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip().endswith("sides must be multiples of 4 for this VAE and U-Net.")
    assert LoRA().sizes == ()
    assert not (tmp_path / "run").exists()
    assert cache.home().exists()
