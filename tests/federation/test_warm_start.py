"""Runs that start from the weights of another run, or of a folder that diffusers loads."""

from dataclasses import replace

import pytest
import torch
from runs import train
from safetensors.torch import load_file, save_file

from fedray.algorithms.lora import FedEx
from fedray.config import Config
from fedray.errors import UserError
from fedray.federation.plan import make_plan
from fedray.federation.worker import build
from fedray.presets import PRESETS
from fedray.record.run import Run
from fedray.tasks.ddpm import DDPM
from fedray.vector import sha256

SMALL = {"rounds": 1, "local_steps": 1, "evaluate_samples": 0, "actors": 0}
UNET = {"block_out_channels": (8,), "attention": (False,)}


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("warm") / "run"
    train(Config(task=DDPM(**UNET), use_ema=True, **SMALL), out)
    return out


@pytest.fixture
def lora_config(photos):
    task = replace(PRESETS["digits-lora"].task, train_data_dir=str(photos))
    return replace(PRESETS["digits-lora"], task=task, features=None, train_batch_size=2, **SMALL)


def test_a_run_goes_on_from_what_another_delivers(toy_config, tmp_path):
    first = toy_config(rounds=2, use_ema=True, ema_max_decay=0.5, evaluate_samples=0)
    train(first, tmp_path / "first")
    second = toy_config(rounds=1, evaluate_samples=0, init_from=str(tmp_path / "first"))
    plan = make_plan(second)
    delivered = Run.open(tmp_path / "first").state(plan.layout).tensors["ema/model"]
    assert torch.equal(plan.initial, delivered)
    assert not torch.equal(plan.initial, make_plan(replace(second, init_from=None)).initial)
    train(second, tmp_path / "second")
    assert Run.open(tmp_path / "second").saved["init_sha256"] == sha256(delivered)
    assert sha256(delivered) == Run.open(tmp_path / "first").result["delivered_sha256"]


def test_what_was_spent_before_is_told(toy_config, tmp_path):
    """A run without noise, one with noise that starts from it, and one that starts from that."""
    noisy = toy_config(rounds=1, evaluate_samples=0, wire="clip:1,noise:2")
    train(replace(noisy, wire="float32"), tmp_path / "plain")
    train(replace(noisy, init_from=str(tmp_path / "plain")), tmp_path / "middle")
    train(replace(noisy, init_from=str(tmp_path / "middle")), tmp_path / "last")
    results = {name: Run.open(tmp_path / name).result for name in ("plain", "middle", "last")}
    assert "started_from" not in results["plain"]
    plain = {"run": "plain", "privacy": None, "example_privacy": None}
    assert results["middle"]["started_from"] == plain
    spent = results["middle"]["privacy"]
    told = {"epsilon": spent["epsilon"], "delta": 1e-5, "neighbours": "one client more or less"}
    middle = {"run": "middle", "privacy": told, "example_privacy": None, "started_from": plain}
    assert results["last"]["started_from"] == middle
    card = (tmp_path / "last/model/README.md").read_text()
    assert f"of the run middle, on top: ε = {spent['epsilon']:.4g} at δ = 1e-05 for one client" in card
    assert "of the run plain, on top: no ε is known" in card
    assert "of the run" not in (tmp_path / "plain/model/README.md").read_text()


def test_a_source_that_changes_is_noticed(toy_config, tmp_path):
    source = toy_config(rounds=1, evaluate_samples=0)
    train(source, tmp_path / "source")
    config = toy_config(rounds=3, evaluate_samples=0, init_from=str(tmp_path / "source"))
    train(config, tmp_path / "run", rounds=1)
    train(replace(source, rounds=2), tmp_path / "source", resume=True)
    with pytest.raises(UserError, match="what it started from"):
        train(config, tmp_path / "run", resume=True)


def test_a_folder_of_diffusers_gives_the_same_weights_as_its_run(digits_run):
    config = Config(task=DDPM(**UNET), **SMALL)
    from_run = make_plan(replace(config, init_from=str(digits_run))).initial
    assert torch.equal(make_plan(replace(config, init_from=str(digits_run / "model"))).initial, from_run)
    assert not torch.equal(from_run, make_plan(config).initial)


@pytest.mark.parametrize(
    ("source", "task", "message"),
    [
        ("run/model", DDPM(block_out_channels=(16,), attention=(False,)), "its U-Net has block_out_channels"),
        ("run", DDPM(block_out_channels=(16,), attention=(False,)), "of another model|other|differ"),
        ("absent", DDPM(**UNET), "no such directory"),
        ("run/samples", DDPM(**UNET), "no such directory"),
        ("empty", DDPM(**UNET), "does not fit this network"),
    ],
)
def test_weights_that_do_not_fit(digits_run, tmp_path, source, task, message):
    (tmp_path / "empty").mkdir()
    place = tmp_path / "empty" if source == "empty" else digits_run.parent / source
    with pytest.raises(UserError, match=message) as error:
        make_plan(Config(task=task, init_from=str(place), **SMALL))
    assert str(error.value).startswith(f"--init-from {place}: ")


def test_other_tasks_start_from_their_own_runs_only(toy_config, tmp_path):
    (tmp_path / "pipeline").mkdir()
    with pytest.raises(UserError, match="this task loads nothing else"):
        make_plan(toy_config(init_from=str(tmp_path / "pipeline")))
    with pytest.raises(UserError, match="start from fresh weights"):
        toy_config(layers=2, share="0", init_from=str(tmp_path)).check()


@pytest.mark.slow
def test_adapters_go_on_from_a_run_and_from_its_file(lora_config, tmp_path):
    config = replace(lora_config, rounds=1)
    train(config, tmp_path / "run")
    state = Run.open(tmp_path / "run").state(make_plan(config).layout).tensors["model"]
    for source in ("run", "run/model"):
        assert torch.equal(make_plan(replace(config, init_from=str(tmp_path / source))).initial, state)
    file = tmp_path / "run/model/pytorch_lora_weights.safetensors"
    save_file({name: weight[:4] for name, weight in load_file(file).items()}, file)
    with pytest.raises(UserError, match="its adapters are of other layers, or of another rank"):
        make_plan(replace(config, init_from=str(tmp_path / "run/model")))
    train(replace(config, algorithm=FedEx()), tmp_path / "fedex")
    with pytest.raises(UserError, match="the run changed its base too"):
        make_plan(replace(config, init_from=str(tmp_path / "fedex")))


@pytest.mark.slow
def test_gradient_checkpoints_change_no_bit(lora_config):
    """Of a step's gradient; activations are computed twice."""
    gradients, calls = [], []
    for checkpointing in (False, True):
        config = replace(lora_config, task=replace(lora_config.task, gradient_checkpointing=checkpointing))
        learner = build(config, torch.device("cpu"))
        count = 0

        def forward(*_):
            nonlocal count
            count += 1

        learner.unet.up_blocks[0].resnets[0].register_forward_pre_hook(forward)
        data = config.task.dataset()
        learner.prepare(data, range(2), False)
        batch = {"index": torch.arange(2), "mirrored": torch.zeros(2, dtype=torch.bool), "prompts": ["a", "b"]}
        batch["prompts"] = list(data.columns["caption"][:2])
        learner.loss(batch, torch.Generator().manual_seed(0)).backward()
        gradients.append(learner.flat.gradient.clone())
        calls.append(count)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)
    assert calls == [1, 2]
