"""What feature networks can judge: asked by every command before anything is trained or generated."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fedray
from fedray.cli import main
from fedray.cluster.trials import Experiment
from fedray.cluster.tune import sweep
from fedray.data.images import Form, decode
from fedray.data.sources import digits
from fedray.errors import UserError
from fedray.scores import networks
from fedray.scores.digits import sure
from fedray.tasks.embedded import HELD_OUT, enlarge, prompt
from fedray.tasks.images import Images

DATA = Path(__file__).parents[3] / "shared/data"
SHORT = "--clients 2 --rounds 1 --local-steps 1 --sampling-steps 2 --evaluate-samples 4 --actors 0 --kid-subset-size 2"
REFUSED = "--features digits judges only images of digits, and its classifier recognises 0% of these; choose other"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """16 smooth colour pictures of 16×16 in two folders, whose names are captions that name a digit."""
    root = tmp_path_factory.mktemp("photos")
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand((16, 3, 4, 4), generator=rng)
    pictures = (F.interpolate(coarse, size=16, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    for index, picture in enumerate(pictures):
        folder = root / ("one dog" if index % 2 else "the cat number nine")
        folder.mkdir(exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{index:02d}.png")
    return root


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "cache"))


def folder_of_digits(root, size, names):
    """Digits of the classes that the embedded pipeline has not seen, enlarged to size×size in RGB."""
    for label, name in zip(HELD_OUT, names, strict=True):
        (root / name).mkdir(parents=True)
        chosen = enlarge(torch.from_numpy(digits().images[digits().labels == label][:6]))
        for index, image in enumerate(chosen.repeat_interleave(size // 16, 2).repeat_interleave(size // 16, 3)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / name / f"{index}.png")
    return root


def test_finetuning_on_photos_is_not_scored_by_the_digit_classifier(photos, tmp_path, capsys):
    """The preset names the digit classifier; captions that happen to name digits make no digits of photos."""
    command = ["finetune", "--preset", "digits-lora", "--train-data-dir", str(photos), *SHORT.split()]
    assert main([*command, "--partition", "iid", "--out", str(tmp_path / "run")]) == 2
    assert REFUSED in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*command, "--partition", "iid", "--dry-run"]) == 2
    assert REFUSED in capsys.readouterr().err


@pytest.mark.skipif(not (DATA / "dogs").is_dir(), reason="needs ../shared/data/dogs")
def test_finetuning_on_photos_of_dogs_is_not_scored_by_the_digit_classifier(tmp_path, capsys):
    command = ["finetune", "--preset", "digits-lora", "--train-data-dir", str(DATA / "dogs"), *SHORT.split()]
    assert main([*command, "--partition", "iid", "--out", str(tmp_path / "run")]) == 2
    assert REFUSED in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("resolution", [8, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_classifier_recognises_no_photo(resolution, channels):
    paths = sorted((DATA / "dogs").rglob("*.jp*g")) + sorted((DATA / "faces").rglob("*.p*"))[::4]
    assert len(paths) > 100
    images = np.stack([decode(path, Form(resolution, channels)) for path in paths])
    features = networks.load("digits", None, torch.device("cpu"))(torch.from_numpy(images))
    assert sure(features).float().mean() < 0.02
    with pytest.raises(UserError, match="judges only images of digits"):
        networks.check("digits", None, images)


def test_training_evaluating_and_sweeping_ask_too(photos, tmp_path, capsys):
    data = ["--dataset-name", "imagefolder", "--train-data-dir", str(photos), "--resolution", "8"]
    train = ["train", *data, *SHORT.split(), "--out", str(tmp_path / "run")]
    assert main(train) == 2  # the preset names the digit classifier
    assert REFUSED in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*train, "--features", "None"]) == 0
    for target, flags in (
        (tmp_path / "run", []),
        (tmp_path / "run/model", data),
        (photos, ["--dataset-name", "imagefolder", "--train-data-dir", str(photos)]),
    ):
        capsys.readouterr()
        assert main(["evaluate", str(target), "--features", "digits", "--sampling-steps", "2", *flags]) == 2
        assert REFUSED in capsys.readouterr().err
    base = replace(fedray.Run.open(tmp_path / "run").config, features="digits")
    with pytest.raises(UserError, match="judges only images of digits"):
        sweep(Experiment(base, {"seed": [0, 1]}), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("size", [16, 64])
def test_digits_that_were_enlarged_are_judged_whatever_their_folders_are_called(tmp_path, size):
    for root, names in ((tmp_path / "named", [prompt(label) for label in HELD_OUT]), (tmp_path / "other", "abcd")):
        folder = folder_of_digits(root, size, names)
        dataset = Images("imagefolder", str(folder), resolution=size, channels=3).dataset()
        networks.check("digits", None, dataset.images)


def test_what_is_not_like_a_digit_is_refused():
    images = digits().images
    networks.check("digits", None, images)
    networks.check("digits", None, images[:3])
    noise = np.random.default_rng(0).integers(0, 256, (300, 1, 8, 8), np.uint8)
    for wrong in (255 - images, noise, images[..., ::-1], np.zeros_like(images), np.concatenate([noise, images[:300]])):
        with pytest.raises(UserError, match="judges only images of digits"):
            networks.check("digits", None, wrong)
    with pytest.raises(UserError, match="cannot take images of 1×7×7: digits are 8×8, or a multiple of it"):
        networks.check("digits", None, images[..., :7, :7])


def test_other_features_judge_any_images(tmp_path):
    (tmp_path / "mine.py").write_text("def half(images): return images.flatten(1)[:, :8] / 2\n")
    noise = np.random.default_rng(0).integers(0, 256, (30, 3, 8, 8), np.uint8)
    networks.check(f"{tmp_path}/mine.py:half", None, noise)


def test_dinov2_is_the_class_token_of_the_resized_image(tmp_path):
    """Against transformers' model on images that PIL resized, as in the authors' code."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=224,
                          initializer_range=0.3)  # fmt: skip
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dino")
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), np.uint8)
    images[2] = images[2, :1]  # grey
    name = networks.absolute(f"dinov2:{tmp_path}/dino")
    network = networks.network_of(name)
    assert (network.score_name("fd"), network.runs_code) == ("fd[dinov2]", False)
    found = network.load(torch.device("cpu"))(torch.from_numpy(images))
    large = [Image.fromarray(image.transpose(1, 2, 0)).resize((224, 224), Image.Resampling.BICUBIC) for image in images]
    pixels = np.stack(large).transpose(0, 3, 1, 2) / 255
    mean, std = (np.array(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = model(torch.from_numpy((pixels - mean) / std).float()).pooler_output
    assert found.shape == (3, 16)
    apart = (expected[0] - expected[1]).abs().max()
    assert apart > 0.1
    assert (found - expected).abs().max() < 0.05 * apart  # PIL rounds between its two passes
    grey = network.load(torch.device("cpu"))(torch.from_numpy(images[2:, :1]))
    assert torch.allclose(grey, found[2:], atol=1e-4)
    with pytest.raises(UserError, match="no DINOv2 model could be loaded"):
        networks.check(f"dinov2:{tmp_path}", None, images)


def test_a_network_says_the_names_of_its_scores():
    names = {
        ("digits", "fd"): "fd[digits]", ("inception", "fd"): "fid", ("inception", "kid"): "kid",
        ("inception-64", "fd"): "fid[64]", ("inception-768", "precision"): "precision[768]",
        ("clip:somewhere/model", "fd"): "fd[clip]", ("/a/halves.pt", "kid"): "kid[halves]",
        ("/a/mine.py:half", "fd"): "fd[half]", ("package.module:half", "fd"): "fd[half]",
    }  # fmt: skip
    for (name, metric), expected in names.items():
        assert networks.network_of(name).score_name(metric) == expected
