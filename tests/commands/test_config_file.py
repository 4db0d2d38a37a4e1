"""Files of settings, and `fedray config`."""

import json
from dataclasses import replace

import pytest
import yaml

from fedray.cli import main
from fedray.commands.train import asked_for
from fedray.errors import UserError
from fedray.presets import PRESETS
from fedray.record.run import Run

SHORT = "--rounds 1 --local-steps 2 --evaluate-samples 8 --sampling-steps 3 --actors 0"


def read(file, *arguments, command="train"):
    return asked_for(["--config", str(file), *arguments], command, "")[1]


def printed(capsys, *arguments):
    capsys.readouterr()
    assert main(["config", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_reads_back(preset, tmp_path, capsys, photos):
    """With settings of every kind changed; that of its data too, where it needs some."""
    from fedray.tasks.lora import PIPELINE

    flags = (
        "--clients 8 --partition dirichlet:0.5 --wire feedback:topk:0.1 --optimizer sgd:momentum=0.9 --fraction 0.5 "
    )
    flags += "--algorithm fedadam:0.01 --use-ema --local-steps 3 --learning-rate 1e-5 --max-grad-norm None "
    base = PRESETS[preset]
    if "digits" not in base.task.dataset_name:
        flags += f"--train-data-dir {photos} "
    if base.task.name == "lora":
        flags += f"--pretrained-model-name-or-path {PIPELINE} --validation-prompt one two --rank 4 --resolution 16 "
    file = tmp_path / "all.yaml"
    file.write_text(printed(capsys, "--preset", preset, *flags.split()))
    command = "finetune" if base.task.name == "lora" else "train"
    expected = asked_for(["--preset", preset, *flags.split()], command, "")[1]
    assert read(file, command=command) == expected
    assert expected.local_steps == 3
    values = yaml.safe_load(file.read_text())
    assert values["rounds"] == base.rounds
    assert values["learning_rate"] == 1e-5
    assert "address" not in values


def test_a_runs_own_file_is_read_and_flags_come_on_top(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SHORT.split(), "--use-ema", "--wire", "float16", "--out", "run"]) == 0
    config = Run.open("run").config
    assert read("run/config.json") == config
    changed = read("run/config.json", "--clients", "6", "--no-use-ema", "--wire=int8")
    assert (changed.clients, changed.use_ema, changed.wire[0].__class__.__name__) == (6, False, "Int8")
    assert replace(changed, clients=4, use_ema=True, wire=config.wire) == config
    longer = read("run/config.json", "--local-epochs", "3")
    assert (longer.local_epochs, longer.local_steps) == (3, None)


FORMS = {
    "some.yaml": "preset: faces\ntrain-data-dir: x\nmixed_precision: no\nlearning_rate: 1e-4\nrandom_flip: off\n"
    "max_grad_norm: ~\nblock_out_channels: [8, 16, 24]\nout: here\nnum_epochs: 8\n",
    "some.toml": 'preset = "faces"\ntrain_data_dir = "x"\nmixed_precision = "no"\nlearning_rate = 1e-4\n'
    'random_flip = false\nmax_grad_norm = "None"\nblock_out_channels = [8, 16, 24]\nout = "here"\nnum_epochs = 8\n',
    "some.json": json.dumps({
        "preset": "faces", "train_data_dir": "x", "mixed_precision": "no", "learning_rate": 1e-4, "random_flip": False,
        "max_grad_norm": None, "block_out_channels": [8, 16, 24], "out": "here", "num_epochs": 8,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_few_settings_in_each_form(name, tmp_path):
    (tmp_path / name).write_text(FORMS[name])
    asked, config, _ = asked_for(["--config", str(tmp_path / name)], "train", "")
    base = PRESETS["faces"]
    task = replace(base.task, train_data_dir="x", block_out_channels=(8, 16, 24))
    assert config == replace(base, task=task, learning_rate=1e-4, random_flip=False, max_grad_norm=None, rounds=2)
    assert str(asked.out) == "here"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 3", "there is no setting 'learning_rat'; did you mean 'learning_rate'?"),
        ("zzz: 3", "there is no setting 'zzz'; --help-all lists them."),
        ("rounds: many", "rounds 'many': it must be a whole number"),
        ("learning_rate: fast", "learning_rate 'fast': it must be a number"),
        ("use_ema: perhaps", "use_ema 'perhaps': it must be true or false"),
        ("rounds: [1, 2]", "rounds ['1', '2']: it must be one value"),
        ("address: ray:1", "a cluster is joined by the command line"),
        ("task: lora", "say `fedray finetune --config"),
        ("task: dppm", "there is no task 'dppm'"),
        ("preset: digist", "did you mean 'digits'?"),
        ("use_8bit_adam: true", "--use-8bit-adam: say --optimizer Adafactor"),
        ("partition: idd", "did you mean 'iid'?"),
        ("- rounds", "must hold settings"),
        ("a: [", "is no YAML"),
        ("algorithm: {own}:Mine", "if you trust it, name the file again (--code "),
        ("task: {own}:Mine", "if you trust it, name the file again (--code "),
    ],
)
def test_what_a_file_may_not_say(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("raise SystemExit('this file ran')\n")
    (tmp_path / "some.yaml").write_text(text.replace("{own}", str(tmp_path / "own.py")))
    assert main(["train", "--config", "some.yaml"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.py", "some.yaml"]


def test_files_that_are_none(tmp_path):
    (tmp_path / "some.ini").write_text("")
    (tmp_path / "bad.toml").write_text("a =")
    for name, message in (
        ("absent.yaml", "no such file"), ("some.ini", "must end in .yaml, .toml or .json"), ("bad.toml", "no TOML"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)
    (tmp_path / "good.toml").write_text("rounds = 3\n")
    with pytest.raises(UserError, match="--config and --resume are both given"):
        asked_for(["--config", str(tmp_path / "good.toml"), "--resume", str(tmp_path)], "train", "")


OWN = """
from dataclasses import dataclass
from fedray import FedAvg
from fedray.tasks.images import Images
from fedray.tasks.ddpm import DDPM

@dataclass(frozen=True)
class Mine(FedAvg):
    mu: float = 0.5

@dataclass(frozen=True)
class Task(DDPM):
    name = "own"
    depth: int = 3
"""


def test_code_of_the_users_own_is_named_twice(tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    flags = ["--task", f"{own}:Task", "--depth", "7", "--algorithm", f"{own}:Mine:0.25"]
    (tmp_path / "own.yaml").write_text(printed(capsys, *flags))
    config = read(tmp_path / "own.yaml", "--code", str(own))
    assert (type(config.task).__name__, config.task.depth, config.algorithm.mu) == ("Task", 7, 0.25)
    with pytest.raises(UserError, match="name the file again"):
        read(tmp_path / "own.yaml")


@pytest.mark.parametrize("arguments", [["--preset", "digist"], ["--clients", "0"]])
def test_config_refuses_what_train_would(arguments, capsys):
    assert main(["config", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
