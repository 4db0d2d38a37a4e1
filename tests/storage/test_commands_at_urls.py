"""What users type, with URLs: runs that are read, stopped and taken over from another node, and mistakes."""

import re
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from PIL import Image
from runs import sha, train

import fedray
from fedray.cli import main
from fedray.commands import cache as cache_command
from fedray.data.sources import digits
from fedray.record.following import goes_on
from fedray.record.manifests import now
from fedray.record.run import Run
from fedray.storage import Store, located

TOY = Path(__file__).parents[1] / "toy.py"
TRAIN = f"train --task {TOY}:Toy --partition by-label --local-steps 2 --features None --evaluate-samples 4 --actors 0"
DIGITS = "--rounds 2 --local-steps 2 --evaluate-samples 8 --sampling-steps 3 --actors 0"


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "fedray", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(true, process):
    deadline = time.monotonic() + 240
    while not true():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


@pytest.mark.slow
def test_a_run_is_read_from_another_node(bucket, node, capsys, tmp_path):
    out = f"{bucket}/runs/a"
    assert main(["train", *DIGITS.split(), "--out", out]) == 0
    printed = capsys.readouterr().out
    assert f"run       {out}\n" in printed
    assert f"sample {out} --num-images" in printed
    whole = Run.open(out)
    node("another")
    assert main(["runs", f"{bucket}/runs"]) == 0
    printed = capsys.readouterr().out
    assert out in printed
    assert "complete" in printed
    assert not (located(out) / "checkpoints").exists()  # tables need none
    rounds, problems = fedray.load(f"{bucket}/runs")
    assert list(rounds["directory"]) == [out, out]
    assert not problems
    assert main(["report", f"{bucket}/runs"]) == 0
    assert f"report    {bucket}/runs/report.html" in capsys.readouterr().out
    assert b"samples" in Store(f"{bucket}/runs").read("report.html")
    assert main(["sample", out, "--num-images", "4", "--sampling-steps", "2"]) == 0
    assert f"samples   {out}/samples/sample-seed0.png" in capsys.readouterr().out
    there = Store(out).read("samples/sample-seed0.png")
    node("first node")
    assert main(["sample", out, "--num-images", "4", "--sampling-steps", "2", "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == there
    assert main(["evaluate", out, "--samples", "8", "--sampling-steps", "2"]) == 0
    assert f"{out}: 8 samples" in capsys.readouterr().out
    assert main(["attach", out]) == 0
    assert Run.open(out).result == whole.result
    assert fedray.summary({"a": out})["loss"]["a"] == whole.result["loss"]


def test_copies_are_listed_and_removed(bucket, node, toy_config, capsys):
    train(toy_config(rounds=1), f"{bucket}/a")
    cache_command.main([])
    assert f"copy of the run {bucket}/a" in capsys.readouterr().out.replace("\n", "")
    run = Run(f"{bucket}/a")
    with run.locked():
        cache_command.main(["--clean"])
        assert (run.directory / "config.json").exists()
    cache_command.main(["--clean"])
    assert not run.directory.exists()
    assert Run.open(f"{bucket}/a").result is not None


def test_clients_that_train_alone_are_runs_below_the_url(bucket, node, capsys):
    out = f"{bucket}/alone"
    alone = [*TRAIN.split(), "--clients", "2", "--labels", "2", "--rounds", "2", "--local-only", "--out", out]
    assert main(alone) == 0
    assert f"table     {out}/summary.csv" in capsys.readouterr().out
    assert Store(out).exists("summary.csv")
    began = {name for name in Store(out).list() if "manifest" in name}
    assert {name.split("/")[0] for name in began} == {"client-0000", "client-0001"}
    node("another")
    assert main(alone) == 0  # goes on, with nothing left to do
    assert {name for name in Store(out).list() if "manifest" in name} == began
    assert set(fedray.load(out).rounds["directory"]) == {f"{out}/client-0000", f"{out}/client-0001"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_resumed_on_another_node_it_has_the_bits_of_a_run_at_a_path(bucket, node, tmp_path, capsys):
    """Both the run and its images are in the storage; it is killed in its third round, and goes on with two actors."""
    images = digits()
    for index in range(60):
        path = tmp_path / "photos" / str(images.labels[index]) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.images[index, 0]).save(path)
        Store(f"{bucket}/photos").write(path.relative_to(tmp_path / "photos").as_posix(), path)
    settings = "--dataset-name imagefolder --resolution 8 --clients 3 --rounds 6 --local-epochs 6 --features None "
    settings += "--evaluate-samples 0 --actors 0 --algorithm scaffold --optimizer sgd"
    here = tmp_path / "here"
    assert main(["train", *settings.split(), "--train-data-dir", str(tmp_path / "photos"), "--out", str(here)]) == 0
    out = f"{bucket}/runs/a"
    process = start("train", *settings.split(), "--train-data-dir", f"{bucket}/photos", "--out", out)
    store = Store(out)
    wait_until(lambda: "checkpoints/round-000002.safetensors" in now(store)[1].files, process)
    process.kill()
    process.communicate()
    assert Run.open(out).result is None
    node("another")
    resume = ["train", "--resume", out, "--actors", "0"]
    assert main(resume) == 2
    assert re.search(
        rf"fedray: {out} is being written by .+ \(process {process.pid}, .+ say --take-over\.", capsys.readouterr().err
    )
    assert main(["runs", out]) == 0
    assert "goes on" in capsys.readouterr().out
    # In a process of its own: a Ray that this one has knows nothing of the storage.
    process = start("train", "--resume", out, "--take-over", "--actors", "2", "--cpus-per-actor", "0.5")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert sha(Run.open(out).directory) == sha(here)
    assert len(Run.open(out).rows) == 6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_is_attached_to_and_stopped_from_another_node(bucket, node, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fedray.record.following.REMOTE", 0.5)
    out = f"{bucket}/a"
    process = start(*TRAIN.split(), "--rounds", "1000", "--slow", "0", "--pause", "0.2", "--out", out)
    wait_until(lambda: "rounds.jsonl" in now(Store(out))[1].files, process)
    node("another")
    assert goes_on(Run.open(out))
    assert main(["stop", out]) == 0
    printed = capsys.readouterr().out
    rounds = len(Run.open(out).rows)
    assert f"stopped after round {rounds}\n" in printed
    assert f"--resume {out}" in printed
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped, as `fedray stop` asked" in errors
    assert not Store(out).exists("stop")
    assert main(["stop", out]) == 2
    assert f"no process is writing the run at {out}" in capsys.readouterr().err
    assert main(["attach", out]) == 1
    assert f"ended after round {rounds} of 1000" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_at_a_url_goes_on_from_another_node(ray, bucket, node, tmp_path, capsys):
    file = tmp_path / "question.py"
    file.write_text(
        f"from fedray import Config\nfrom fedray.own import load_file\nToy = load_file({str(TOY)!r}).Toy\n"
        "BASE = Config(task=Toy(), rounds=1, local_steps=1, evaluate_samples=0)\n"
        "SPACE = {'seed': [0, 1]}\n"
    )
    out = f"{bucket}/sweep"
    sweep = ["sweep", str(file), "--out", out]
    # In a process of its own, so that the Ray that it starts knows of this storage.
    done = subprocess.run([sys.executable, "-m", "fedray", *sweep], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    names = set(Store(out).list())
    assert {"question.sweep.json", "question.csv", "results.parquet"} <= names
    rounds = fedray.load(out).rounds
    assert len(rounds) == 2
    node("another")
    assert main(sweep) == 2
    assert f"{out} holds this sweep already" in capsys.readouterr().err
    began = {name for name in Store(out).list() if "manifest" in name}
    assert main([*sweep, "--resume"]) == 0
    assert {name for name in Store(out).list() if "manifest" in name} == began  # nothing was run again
    assert set(fedray.load(out).rounds["run"]) == set(rounds["run"])


def test_mistakes_are_one_sentence(bucket, node, monkeypatch, capsys):
    def told(*arguments):
        assert main([*map(str, arguments)]) == 2
        errors = capsys.readouterr().err.strip()
        assert errors.startswith("fedray: ")
        assert "\n" not in errors
        return errors

    new = [*TRAIN.split(), "--out"]
    assert "s3://no-such-bucket/a: there is no bucket no-such-bucket" in told(*new, "s3://no-such-bucket/a")
    assert f"there is no run at {bucket}/none" in told("train", "--resume", f"{bucket}/none")
    assert "there is no storage xyz:// that fsspec knows" in told(*new, "xyz://bucket/a")
    assert f"there are no results at {bucket}/none" in told("report", f"{bucket}/none")
    assert f"there are no runs at {bucket}/none" in told("runs", f"{bucket}/none")
    assert "is no URL of a storage" in told(*new, "s3://bucket/../a")
    assert "--take-over is for runs at URLs" in told(*new, "runs/a", "--take-over")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert "no credentials were found (Unable to locate credentials); set them" in told(*new, f"{bucket}/a")
    code = "import sys; sys.modules['s3fs'] = None; from fedray.cli import main; sys.exit(main(sys.argv[1:]))"
    ran = subprocess.run([sys.executable, "-c", code, "runs", f"{bucket}/a"], capture_output=True, text=True)
    assert ran.returncode == 2
    missing = (
        r"fedray: .+/a needs a Python package that is not installed \(it comes with fedray\[s3\]\): Install s3fs.+\n"
    )
    assert re.fullmatch(missing, ran.stderr)
