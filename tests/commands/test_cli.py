"""What users type, and what they are told."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fedray
from fedray.cli import main
from fedray.record.run import Run

HAS_GPU = torch.cuda.is_available()
SHORT = "--rounds 1 --local-steps 2 --evaluate-samples 8 --sampling-steps 3 --actors 0"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *SHORT.split(), "--out", str(out)]) == 0
    return out


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedray {fedray.__version__}\n"
    assert main([]) == 0
    assert "fedray train" in capsys.readouterr().out


def test_version_needs_neither_torch_nor_ray():
    code = "import sys, fedray.cli; fedray.cli.main(['--version']); print({'torch', 'ray'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("set()\n")


def test_train_ends_with_table_picture_and_next_command(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *SHORT.split(), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for words in (
        "round 1/1  loss 0.",
        "fd[digits]",
        "MB up",
        f"samples   {out}/samples.png",
        f"sample {out} --num-images",
    ):
        assert words in printed
    assert Image.open(out / "samples.png").size == (8 * 52 + 4, 52 + 4)


def test_local_steps_replace_the_presets_epochs(run):
    config = Run.open(run).config
    assert config.local_steps == 2
    assert config.local_epochs is None
    assert config.train_batch_size == 32  # the preset's
    assert Run.open(run).result["steps"] == 8


@pytest.mark.slow
def test_model_is_loaded_by_diffusers_alone(run):
    code = f"""
import torch
from diffusers import DDPMPipeline
pipeline = DDPMPipeline.from_pretrained({str(run / "model")!r})
print(sum(p.numel() for p in pipeline.unet.parameters()), pipeline.scheduler.config.num_train_timesteps)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "159697 1000\n"


def test_sample(run, tmp_path, capsys):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        flags = f"--num-images 4 --seed {seed} --sampler ddim --sampling-steps 3 --out {tmp_path / name}.png"
        assert main(["sample", str(run), *flags.split()]) == 0
    a, b, c = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert main(["sample", str(run), "--num-images", "2"]) == 0
    assert (run / "samples" / "sample-seed0.png").exists()


@pytest.mark.parametrize("wire", ["--wire float16", "--codec float16"])
def test_dry_run_tells_the_plan_and_trains_nothing(tmp_path, monkeypatch, capsys, wire):
    monkeypatch.chdir(tmp_path)
    flags = f"--clients 8 --fraction 0.5 --rounds 3 --local-epochs 2 {wire} --train-batch-size 25"
    assert main(["train", "--dry-run", *flags.split()]) == 0
    printed = capsys.readouterr().out
    for words in ("8, of which 4", "1,797 in all", "159,697", "319,394", "3.8 MB", "216 in all; 54 sequential"):
        assert words in printed, words
    assert list(tmp_path.iterdir()) == []


def test_resume_continues_and_takes_no_new_settings(run, capsys):
    assert main(["train", "--resume", str(run)]) == 0  # complete: shows the result again
    assert "fd[digits]" in capsys.readouterr().out
    assert main(["train", "--resume", str(run), "--learning-rate", "0.5"]) == 2
    assert "--learning-rate is 0.5 now, but was 0.004" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--preset", "digits"]) == 2
    assert main(["train", "--resume", str(run), "--out", "elsewhere"]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--clients 1798", "--clients 1798: there are only 1797 examples"),
        ("--clients 0", "--clients 0: it must be above 0"),
        ("--rounds 0", "--rounds 0: it must be above 0"),
        ("--rounds -3", "--rounds -3: it must be above 0"),
        ("--local-epochs 0", "--local-epochs 0: it must be above 0"),
        ("--local-steps 0", "--local-steps 0: it must be above 0"),
        ("--train-batch-size 0", "--train-batch-size 0: it must be above 0"),
        ("--fraction 0", "--fraction 0.0: it must be above 0 and at most 1"),
        ("--fraction 1.5", "--fraction 1.5: it must be above 0 and at most 1"),
        ("--local-epochs 2 --local-steps 3", "both given; give one"),
        ("--preset digist", "did you mean 'digits'?"),
        ("--preset celeba", "--dataset-name celeba needs --train-data-dir"),
        ("--sampler dpm", "did you mean 'ddpm'?"),
        ("--lr-scheduler cosin", "did you mean 'cosine'?"),
        pytest.param("--gpus-per-actor 1", "this machine has no GPU", marks=pytest.mark.skipif("HAS_GPU")),
        ("--evaluate-samples 1", "at least 2 images"),
        ("--partition idd", "did you mean 'iid'?"),
        ("--partition dirichlet:0", "alpha must be above 0"),
        ("--wire float61", "did you mean 'float16'?"),
        ("--codec float61", "did you mean 'float16'?"),
        ("--algorithm fedavf", "did you mean 'fedavg'?"),
        ("--rule fedavf", "did you mean 'fedavg'?"),
        ("--fold maen", "did you mean 'mean'?"),
        ("--optimizer sgdd", "did you mean 'sgd'?"),
        ("--optimizer sgd:momentum=-1", "Invalid momentum value"),
        ("--local-only --only-client 0", "--local-only trains every client alone, and --only-client one of them"),
        ("--resume nowhere", "there is no run at nowhere: the directory does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--actors", "0", *flags.split()]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert "Traceback" not in printed.err + printed.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rounds many", "many"),
        ("--rouns 3", "--rounds"),
    ],
)
def test_flags_that_cannot_be_read(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["train", *flags.split()])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    printed = capsys.readouterr()
    assert message in printed.err + printed.out
    assert "Traceback" not in printed.err + printed.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "no command 'trian'; did you mean 'train'?"),
        ("train --out {run}", "holds another run"),
        ("train --out {run}/config.json", "is not an empty directory"),
        ("train --actors 0 --out {run}/config.json/run", "cannot be written: Not a directory"),
        ("sample {run}/nothing", "the directory does not exist"),
        ("sample {run}/model", "it has no config.json"),
        ("sample {run} --num-images 0", "--num-images 0"),
        ("sample {run} --out grid.txt", "must end in .png"),
        ("sample {run} --sampler rectified", "there is no sampler 'rectified'"),
        ("sample {run} --sampling-steps 1001", "between 1 and the 1000 steps"),
        ("evaluate {run} --samples 1", "at least 2"),
    ],
)
def test_mistakes_of_other_commands(run, arguments, message, capsys):
    before = sorted(run.rglob("*"))
    assert main(arguments.format(run=run).split()) == 2
    assert message in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


def test_a_mistake_exits_with_2():
    ran = subprocess.run([sys.executable, "-m", "fedray", "trian"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
