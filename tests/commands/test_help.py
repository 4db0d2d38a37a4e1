"""Help, and completion by shells."""

import contextlib
import dataclasses
import re
import shutil
import subprocess

import pytest

from fedray.cli import COMMANDS, main
from fedray.commands.completion import CLASSES, parser
from fedray.commands.flags import documentation, flags_of
from fedray.commands.help import GROUPS
from fedray.commands.sweep import Flags
from fedray.commands.train import Finetune, Train
from fedray.config import Config
from fedray.tasks.ddpm import DDPM
from fedray.tasks.lora import LoRA


def help_of(capsys, *arguments):
    capsys.readouterr()
    with contextlib.suppress(SystemExit):
        assert main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("command", "cls", "task"), [("train", Train, DDPM), ("finetune", Finetune, LoRA)])
def test_the_short_help_has_what_most_use_and_the_long_one_all(command, cls, task, capsys):
    short, whole = help_of(capsys, command, "--help"), help_of(capsys, command, "--help-all")
    names = {flag.name for flag in flags_of(cls, task)}
    in_short = set(re.findall(r"^  (--[a-z0-9-]+)", short, re.MULTILINE))
    in_whole = {name for line in whole.splitlines() for name in re.findall(r"^│ (--[a-z0-9-]+)", line)}
    # tyro shows an alias first, and --no-… beside its flag.
    assert {name for name in names if not re.search(rf"{name}\b", whole)} == set()
    assert in_whole - names <= {"--rule", "--codec"}
    assert in_short < names
    assert 25 <= len(in_short) <= 45
    assert f"--help-all has {len(names) - len(in_short)} more" in short
    assert len(short.splitlines()) < 90 < len(whole.splitlines())
    assert [title for title in GROUPS if f"\n{title}:\n" in short] == list(GROUPS)
    assert "[4]" in next(line for line in short.splitlines() if line.startswith("  --clients INT"))


def test_help_shows_the_presets_values(capsys):
    shown = help_of(capsys, "train", "--preset", "celeba", "--help")
    assert re.search(r"--rounds INT .*\[10\]", shown)
    assert re.search(r"--wire NAME .*\n.*\[float16\]", help_of(capsys, "finetune", "--help"))


def test_what_is_given_by_its_place_is_in_the_first_line(capsys):
    assert help_of(capsys, "sweep", "--help").startswith("usage: fedray sweep EXPERIMENT [OPTIONS]\n")
    assert help_of(capsys, "config", "--help").startswith("usage: fedray config [OPTIONS]\n")


def test_every_group_names_flags_that_there_are():
    fields = {
        flag.field for cls, task in ((Train, DDPM), (Finetune, LoRA), (Flags, DDPM)) for flag in flags_of(cls, task)
    }
    for names in GROUPS.values():
        assert set(names.split()) <= fields


@pytest.mark.parametrize("cls", [Config, DDPM, LoRA], ids=lambda cls: cls.__name__)
def test_every_setting_is_documented(cls):
    found = documentation(cls)
    assert {field.name for field in dataclasses.fields(cls)} - set(found) <= {"task", "channels"}
    assert all(found.values())


def test_every_command_can_be_completed():
    assert sorted(CLASSES) == sorted(COMMANDS)
    commands = next(action for action in parser()._actions if action.choices)
    assert list(commands.choices) == list(CLASSES)
    assert "--learning-rate" in commands.choices["train"].format_help()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["tr"], ["train"]),
        (["train", "--lear"], ["--learning-rate"]),
        (["train", "--no-use"], ["--no-use-ema"]),
        (["finetune", "--ran"], ["--random-flip", "--rank"]),
        (["train", "--lr-scheduler", "cos"], ["cosine", "cosine_with_restarts"]),
        (["train", "--partition", "di"], ["dirichlet"]),
        (["sample", "--num"], ["--num-images"]),
        (["completion", "z"], ["zsh"]),
    ],
    ids=" ".join,
)
def test_bash_completes(typed, expected, tmp_path, capsys):
    """The script that is printed, in bash itself."""
    (tmp_path / "fedray").write_text(help_of(capsys, "completion", "bash"))
    words = " ".join(f"'{word}'" for word in ["fedray", *typed])
    script = f"source {tmp_path}/fedray; COMP_WORDS=({words}); COMP_CWORD={len(typed)}; _shtab_fedray; "
    script += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert sorted(set(done.stdout.split())) == expected


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_scripts_for_other_shells(shell, tmp_path, capsys):
    script = help_of(capsys, "completion", shell)
    assert "learning-rate" in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)
    assert main(["completion", "fsh"]) == 2
    assert "there is no shell 'fsh'" in capsys.readouterr().err
