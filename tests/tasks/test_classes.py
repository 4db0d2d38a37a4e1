"""Class-conditional U-Nets, against diffusers' own called by hand; labels of samples; what is refused."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from runs import sha, train

import fedray
from fedray.algorithms.ditto import Ditto
from fedray.cli import main
from fedray.data.dataset import Dataset
from fedray.data.partition import ByLabel
from fedray.data.sources import DIGITS, digits
from fedray.errors import UserError
from fedray.federation.delivered import model_of, sampling_of
from fedray.federation.evaluation import sample, scored
from fedray.federation.examples import example_gradients
from fedray.federation.pool import LocalPool
from fedray.federation.steps import batch_of
from fedray.record.run import Run
from fedray.seeds import generator
from fedray.tasks.ddpm import DDPM, count_classes
from fedray.vector.optimizer import Optimizer

CLASSES = DDPM(num_class_embeds=10)


@pytest.fixture
def learner():
    torch.manual_seed(0)
    return CLASSES.build(torch.device("cpu"))


@pytest.fixture
def unet(learner):
    """diffusers' network, built as its users do, with the learner's weights."""
    made = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
        norm_num_groups=8, num_class_embeds=10,
    )  # fmt: skip
    made.load_state_dict(learner.unet.state_dict())
    return made


def batch(n=6):
    return batch_of(digits(), np.arange(n))


def test_the_loss_is_that_of_diffusers_network_given_the_labels(learner, unet):
    scheduler, rng = DDPMScheduler(num_train_timesteps=1000), generator(3)
    images = batch()["images"] / 127.5 - 1
    t, noise = torch.randint(1000, (6,), generator=rng), torch.randn(images.shape, generator=rng)
    labels = torch.from_numpy(digits().labels[:6].copy())
    expected = F.mse_loss(unet(scheduler.add_noise(images, noise, t), t, class_labels=labels).sample, noise)
    loss = learner.loss(batch(), generator(3))
    assert loss.item() == expected.item()
    others = batch() | {"labels": (batch()["labels"] + 1) % 10}
    assert learner.loss(others, generator(3)).item() != expected.item()
    loss.backward()
    expected.backward()
    theirs = torch.cat([parameter.grad.reshape(-1) for parameter in unet.parameters()])
    assert torch.equal(learner.flat.gradient, theirs)


def test_samples_are_those_of_diffusers_network_given_the_labels(learner, unet):
    """The loop that diffusers' documentation shows."""
    scheduler, rng = CLASSES.scheduler(), generator(5)
    labels = (7, 0, 7)
    scheduler.set_timesteps(7)
    x = torch.randn(3, 1, 8, 8, generator=rng)
    with torch.no_grad():
        for t in scheduler.timesteps:
            predicted = unet(x, t, class_labels=torch.tensor(labels)).sample
            x = scheduler.step(predicted, t, x, generator=rng).prev_sample
    expected = (x / 2 + 0.5).clamp(0, 1).mul(255).round()
    assert torch.equal(expected, learner.sample(3, generator(5), "ddpm", 7, labels).float())
    turns = learner.sample(12, generator(5), "ddpm", 2)  # by default all classes in turn
    assert torch.equal(turns, learner.sample(12, generator(5), "ddpm", 2, [*range(10), 0, 1]))
    assert not torch.equal(turns, learner.sample(12, generator(5), "ddpm", 2, [0] * 12))


def test_gradients_of_single_examples_see_their_labels(learner):
    examples = batch(3)
    found, _ = example_gradients(learner.flat, lambda: learner.loss(examples, generator(1)))
    table = learner.flat.layout.names.index("class_embedding.weight")
    start = sum(int(np.prod(shape)) for shape in learner.flat.layout.shapes[:table])
    rows = found[:, start : start + 10 * 64].reshape(3, 10, 64).abs().sum(2) > 0
    assert rows.tolist() == [[label == row for row in range(10)] for label in examples["labels"].tolist()]


def test_labels_are_drawn_as_often_as_in_the_data():
    labels = np.repeat([0, 1, 2, 5], [600, 300, 99, 1])
    dataset = Dataset(np.zeros((1000, 1, 2, 2), np.uint8), np.random.default_rng(0).permutation(labels))
    for n in (10, 64, 512, 3000):
        counts = np.bincount(dataset.labels_like(n), minlength=6)
        assert np.abs(counts - n * np.bincount(labels) / 1000).max() <= 2, n
    assert np.array_equal(dataset.labels_like(3000)[:64], dataset.labels_like(64))
    config = replace(fedray.PRESETS["digits"], task=DDPM(num_class_embeds=6))
    assert scored(config, 64, dataset).labels == tuple(dataset.labels_like(64).tolist())


def test_scores_know_the_names_of_classes(tmp_path):
    config = replace(fedray.PRESETS["digits"], task=CLASSES)
    sampling = scored(config, 30, digits())
    assert sampling.prompts == tuple(DIGITS[label] for label in sampling.labels)
    task = folders(tmp_path, ["cat", "dog"])
    assert task.class_names(task.dataset()) == {0: "cat", 1: "dog"}
    apart = replace(task, label_pattern=r"(\d)\.png")  # labels that are in both folders
    assert apart.class_names(apart.dataset()) == {}
    assert scored(replace(config, task=task), 4, task.dataset()).prompts == ("cat", "dog", "cat", "dog")
    unconditional = scored(replace(config, task=DDPM()), 4, digits())
    assert (unconditional.labels, unconditional.prompts) == ((), ())


def folders(root, names, each=4):
    rng = np.random.default_rng(0)
    for name in names:
        (root / "images" / name).mkdir(parents=True)
        for index in range(each):
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(root / "images" / name / f"{index}.png")
    return DDPM("imagefolder", str(root / "images"), num_class_embeds=len(names))


def small(**changes):
    """Four clients of some classes each, two rounds in this process."""
    return replace(
        fedray.PRESETS["digits"], **{
            "task": CLASSES, "partition": ByLabel(), "rounds": 2, "local_epochs": None, "local_steps": 2,
            "evaluate_samples": 16, "sampling_steps": 3, "kid_subset_size": 8, "actors": 0, **changes,
        }
    )  # fmt: skip


def test_a_client_trains_the_classes_that_it_has(tmp_path):
    """By SGD without weight decay, in one round, other rows of the table stay as they were drawn."""
    config = small(
        clients=10, only_client=3, rounds=1, optimizer=Optimizer.parse("sgd"), use_ema=False, keep_optimizer=False,
        adam_weight_decay=0.0, evaluate_samples=0,
    )  # fmt: skip
    train(config, tmp_path / "run")
    model = Run.open(tmp_path / "run").directory / "model"
    after = UNet2DModel.from_pretrained(model, subfolder="unet").class_embedding.weight
    before = build_of(config).unet.class_embedding.weight
    assert [not torch.equal(*pair) for pair in zip(before, after, strict=True)] == [row == 3 for row in range(10)]


def build_of(config):
    from fedray.federation.worker import build

    return build(config, torch.device("cpu"))


def test_the_saved_model_and_its_card_are_for_diffusers(tmp_path, monkeypatch):
    train(small(clients=4), tmp_path / "run")
    run = fedray.Run.open(tmp_path / "run")
    card = (tmp_path / "run/model/README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path / "run")
    DDPMPipeline.set_progress_bar_config(DDPMPipeline, disable=True)
    done = {}
    exec(code.replace("images = pipeline(", "images = pipeline(num_inference_steps=2, "), done)
    assert "| classes | 10 |" in card
    assert len(done["images"]) == len(done["labels"]) == 2
    # With the noise of a batch of the run's own, images are the same.
    pipeline = DDPMPipeline.from_pretrained("model")
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.tensor([4, 9, 4])
    pipeline.unet.forward = partial(pipeline.unet.forward, class_labels=labels)
    theirs = pipeline(batch_size=3, num_inference_steps=3, generator=generator(2, "sample", 0), output_type="np").images
    ours = run.sample(3, seed=2, labels=[4, 9])
    assert np.array_equal(np.rint(theirs[..., 0] * 255), ours[:, 0].numpy())
    assert run.scores["value"].filter(like="accuracy").between(0, 1).all()


@pytest.mark.parametrize("changes", [{"algorithm": Ditto(0.1), "evaluate_personal": True}, {"keep_local": "class_emb"}])
def test_clients_own_models_draw_classes(tmp_path, changes):
    config = small(clients=4, **changes)
    train(config, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    sampling = replace(sampling_of(run, config, 8, 0, labels=[1, 2, 3]), batch_size=2)
    assert sampling.clients == (0, 1, 2, 3)
    assert [job.labels for job in sampling.jobs(False, 8)] == [(1, 2), (3, 1), (2, 3), (1, 2)]
    pool = LocalPool(config)
    _, images = sample(pool, model_of(run, config), sampling)
    _, others = sample(pool, model_of(run, config), replace(sampling, labels=(4,)))
    assert images.shape == (8, 1, 8, 8)
    assert not np.array_equal(images[:2], others[:2])


def test_a_resumed_run_needs_the_same_labels(tmp_path):
    task = folders(tmp_path, ["a", "b", "c"])
    config = small(
        task=task, clients=2, partition=fedray.PRESETS["digits"].partition, evaluate_samples=0, features=None
    )
    train(config, tmp_path / "stopped", rounds=1)
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "stopped", tmp_path / "resumed")
    train(config, tmp_path / "resumed", resume=True)
    assert sha(tmp_path / "resumed") == sha(tmp_path / "whole")
    dataset = task.dataset()
    changed = replace(dataset, labels=dataset.labels[::-1].copy(), source=None)
    with pytest.raises(UserError, match="their labels or captions"):
        fedray.run(config, tmp_path / "stopped", resume=True, dataset=changed)


@pytest.mark.slow
def test_placement_never_matters(ray, tmp_path):
    flags = "train --preset digits --class-conditional --partition dirichlet:0.3 --rounds 2 --local-steps 3 "
    flags += "--evaluate-samples 20 --sampling-steps 3 --eval-batch-size 7 --kid-subset-size 8"
    for actors in (0, 2):
        assert main([*flags.split(), "--actors", str(actors), "--out", str(tmp_path / str(actors))]) == 0
    assert sha(tmp_path / "0") == sha(tmp_path / "2")
    assert Run.open(tmp_path / "0").result["scores"] == Run.open(tmp_path / "2").result["scores"]
    assert (tmp_path / "0/samples.png").read_bytes() == (tmp_path / "2/samples.png").read_bytes()


def test_on_the_command_line(tmp_path, capsys):
    flags = "--class-conditional --clients 2 --rounds 1 --local-steps 1 --evaluate-samples 0 --actors 0"
    assert main(["train", *flags.split(), "--out", str(tmp_path / "run")]) == 0
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["config"]["task"]["num_class_embeds"] == 10
    assert main(["sample", str(tmp_path / "run"), "--label", "3", "5", "--num-images", "4"]) == 0
    assert main(["sample", str(tmp_path / "run"), "--label", "10"]) == 2
    assert "--label 10: the model of" in capsys.readouterr().err
    plain = flags.replace("--class-conditional ", "")
    assert main(["train", *plain.split(), "--out", str(tmp_path / "plain")]) == 0
    assert json.loads((tmp_path / "plain/config.json").read_text())["config"]["task"]["num_class_embeds"] is None
    assert "labels_sha256" not in (tmp_path / "plain/config.json").read_text()
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "plain"), "--label", "1"]) == 2
    assert "--label is for class-conditional models" in capsys.readouterr().err
    # A warm start from a network of other inputs is refused.
    assert (
        main(["train", *plain.split(), "--init-from", str(tmp_path / "run/model"), "--out", str(tmp_path / "b")]) == 2
    )
    assert "num_class_embeds 10, not None" in capsys.readouterr().err


def test_a_configuration_of_diffusers_brings_its_classes(tmp_path, capsys):
    CLASSES.unet().save_config(tmp_path / "unet")
    assert main(["config", "--preset", "digits", "--model-config-name-or-path", str(tmp_path / "unet")]) == 0
    assert "num_class_embeds: 10" in capsys.readouterr().out
    assert main(["config", "--preset", "digits", "--class-conditional"]) == 0
    assert "num_class_embeds: 10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "these images have no labels: put those of each class into a folder"),
        ([3, 3, 3], "these images all have the same label"),
        ([0, -1, 2], "labels from 0 on, and the data has -1"),
    ],
)
def test_data_without_labels_is_refused(labels, message):
    dataset = Dataset(np.zeros((3, 1, 8, 8), np.uint8), None if labels is None else np.array(labels))
    for check in (count_classes, CLASSES.fingerprint):
        with pytest.raises(UserError, match=message):
            check(dataset)
    assert DDPM().fingerprint(dataset) == {}


def test_what_does_not_fit_is_refused_on_the_command_line(tmp_path, capsys):
    folders(tmp_path, [""])
    flat = ["--train-data-dir", str(tmp_path / "images"), "--class-conditional", "--actors", "0"]
    assert main(["train", *flat, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()  # what was decoded left an empty line
    assert "all have the same label" in said
    assert said.count("\n") == 0
    assert main(["train", "--num-class-embeds", "9", "--actors", "0", "--out", str(tmp_path / "run")]) == 2
    assert "--num-class-embeds 9: the images have labels up to 9; say 10" in capsys.readouterr().err
    assert main(["train", "--num-class-embeds", "0", "--out", str(tmp_path / "run")]) == 2
    assert "--num-class-embeds 0: it must be above 0" in capsys.readouterr().err
    assert main(["finetune", "--preset", "digits-lora", "--class-conditional", "--out", str(tmp_path / "run")]) == 2
    assert "--class-conditional: captions are what fine-tuning is given" in capsys.readouterr().err
    assert main(["train", "--malicious", "0.3:labelflip", "--out", str(tmp_path / "run")]) == 2
    assert "this task learns from none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_flipped_labels_change_what_malicious_clients_learn(tmp_path):
    honest = small(clients=4, rounds=1, evaluate_samples=0)
    train(honest, tmp_path / "honest")
    train(replace(honest, malicious="0.25:labelflip"), tmp_path / "flipped")
    assert sha(tmp_path / "honest") != sha(tmp_path / "flipped")
