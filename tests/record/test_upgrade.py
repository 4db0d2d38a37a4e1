"""Runs of the format before named state: read by every command, continued by none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import sha, train
from safetensors.torch import load_file

from fedray.cli import main
from fedray.config import Config
from fedray.federation.fit import prepare
from fedray.record.run import Run
from fedray.reports.results import load

OLD = Path(__file__).parent / "format_1"  # two rounds of 2 clients on digits, with an average, by codec float16


@pytest.fixture
def old(tmp_path):
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def test_its_settings_have_todays_names(old):
    saved = json.loads((old / "config.json").read_text())
    assert "format" not in saved
    assert saved["config"]["codec"] == "float16"
    config = Run.open(old).config
    assert config.to_json()["wire"] == "float16"
    assert config.to_json()["algorithm"] == "fedavg"
    assert config.use_ema
    frame = load(old).rounds
    assert frame["wire"].tolist() == ["float16"] * 2
    assert not {"rule", "codec"} & set(frame)


def test_its_state_has_todays_names(old):
    config = Run.open(old).config
    layout = prepare(config, Run(old.parent / "other")).layout
    state = Run.open(old).state(layout)
    stored = load_file(old / "checkpoints/round-000002.safetensors")
    assert state.round == 2
    assert set(state.tensors) == {"model", "ema/model"}
    for name, prefix in (("model", ""), ("ema/model", "ema.")):
        views = layout.views(state.tensors[name])
        assert all(torch.equal(view, stored[prefix + key]) for key, view in views.items())


@pytest.mark.slow
def test_it_is_sampled_evaluated_and_reported_on(old, capsys):
    assert main(["sample", str(old), "--num-images", "4", "--sampling-steps", "2"]) == 0
    assert (old / "samples/sample-seed0.png").exists()
    assert main(["evaluate", str(old), "--samples", "16", "--sampling-steps", "2", "--kid-subset-size", "8"]) == 0
    assert "fd[digits]" in capsys.readouterr().out
    assert main(["report", str(old)]) == 0


def test_it_is_not_continued(old, capsys):
    (old / "result.json").unlink()
    assert main(["train", "--resume", str(old), "--actors", "0"]) == 2
    said = capsys.readouterr().err
    assert "was begun by another version of fedray (format 1, now 2)" in said
    assert said.count("\n") == 1


def test_what_todays_version_writes_is_read_as_it_is(toy_config):
    values = toy_config(algorithm="ema:0.5", wire="float16").to_json()
    assert values["algorithm"] == "ema:0.5:fedavg"
    plain = Config(local_epochs=1, algorithm="ema:0.5", wire="float16")
    assert Config.from_json(json.loads(json.dumps(plain.to_json()))) == plain


def test_a_run_that_was_begun_before_a_setting_existed_goes_on(toy_config, tmp_path):
    config = toy_config(evaluate_samples=0)
    train(config, tmp_path / "run", rounds=1)
    path = tmp_path / "run/config.json"
    saved = json.loads(path.read_text())
    for name in ("cohort", "target_epsilon", "delta", "max_epsilon", "secure_noise"):
        del saved["config"][name]
    path.write_text(json.dumps(saved))
    train(config, tmp_path / "run", resume=True)
    train(config, tmp_path / "whole")
    assert sha(tmp_path / "run") == sha(tmp_path / "whole")
