"""How a run ends: what `fedray train` says, its exit code, and what it leaves. Real processes, real signals."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from killing import needs_mounts
from runs import CHAOS, assert_curves_equal_rows, train

from fedray.cli import main
from fedray.commands.interrupts import interruptible
from fedray.record.following import ask_to_stop
from fedray.record.run import Run

TOY = Path(__file__).parents[1] / "toy.py"
TRAIN = f"train --task {TOY}:Toy --partition by-label --local-steps 2 --features None --evaluate-samples 0"
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


def start(*arguments, cwd=None):
    command = [sys.executable, "-m", "fedray", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, start_new_session=True, **pipes)


def wait_for(process, pattern, out):
    """Wait until there is such a file."""
    deadline = time.monotonic() + 240
    while not list(out.glob(pattern)):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def descendants(process):
    return psutil.Process(process.pid).children(recursive=True)


def assert_gone(processes):
    """Assert that none of them outlives the run."""
    _, left = psutil.wait_procs(processes, timeout=30)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


def hint(errors):
    """Return the arguments of the command that the run was told to be continued with."""
    (command,) = re.findall(r"(?:Continue this run with|Follow it with|Go on with): (.*)", errors)
    return shlex.split(command)[1:]


@pytest.fixture
def gate(tmp_path):
    """A file: as long as it is there, clients are slow."""
    gate = tmp_path / "gate"
    gate.touch()
    return gate


@pytest.fixture
def slow(gate):
    """Flags of a run in which a client takes a second."""
    return [*TRAIN.split(), *f"--slow 0 1 2 3 --gate {gate} --rounds 3".split()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main([*TRAIN.split(), "--rounds", "3", "--actors", "0", "--out", str(out)]) == 0
    return Run.open(out).result["vector_sha256"]


def assert_is_whole(out, whole):
    assert Run.open(out).result["vector_sha256"] == whole  # slow clients train as others do
    assert [row["round"] for row in Run.open(out).rows] == [1, 2, 3]
    assert_curves_equal_rows(out)
    assert not list(out.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_stopped_in_this_process(tmp_path, whole, slow, gate, number, code):
    out = tmp_path / "a run"
    process = start(*slow, "--actors", "0", "--out", out)
    wait_for(process, "rounds.jsonl", out)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert "stopping; once more to end at once" in errors
    assert 1 <= len(Run.open(out).rows) < 3
    assert Run.open(out).result is None
    gate.unlink()
    assert main([*hint(errors)]) == 0
    assert_is_whole(out, whole)


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize(("number", "code"), SIGNALS if CHAOS else SIGNALS[:1])
def test_stopped_on_a_private_ray(tmp_path, whole, slow, gate, number, code):
    """To the process group, as a terminal sends Ctrl-C: no process stays."""
    process = start(*slow, "--actors", "2", "--cpus-per-actor", "0.5", "--out", tmp_path / "run")
    wait_for(process, "rounds.jsonl", tmp_path / "run")
    others = descendants(process)
    assert others
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert_gone(others)
    assert Run.open(tmp_path / "run").result is None
    gate.unlink()
    assert main([*hint(errors), "--actors", "0"]) == 0
    assert_is_whole(tmp_path / "run", whole)


@pytest.mark.slow
def test_twice_ends_at_once_and_can_be_resumed(tmp_path, whole, slow, gate):
    process = start(*slow, "--actors", "1", "--out", tmp_path / "run")
    wait_for(process, "rounds.jsonl", tmp_path / "run")
    others = descendants(process)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (143, -signal.SIGTERM)  # a shell says 143 to both; the latter on its last steps
    assert "Traceback" not in errors
    assert_gone(others)
    gate.unlink()
    assert main(["train", "--resume", str(tmp_path / "run"), "--code", str(TOY), "--actors", "0"]) == 0
    assert_is_whole(tmp_path / "run", whole)


@pytest.mark.slow
def test_on_a_cluster_it_goes_on_and_can_be_followed(ray, tmp_path, whole, slow, gate):
    address = ray.get_runtime_context().gcs_address
    process = start(*slow, "--actors", "1", "--address", address, "--out", tmp_path / "run")
    wait_for(process, "rounds.jsonl", tmp_path / "run")
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The run goes on on the cluster." in errors
    assert "Continue" not in errors
    assert hint(errors) == ["train", "--resume", str(tmp_path / "run"), "--address", address, "--code", str(TOY)]
    rounds = len(Run.open(tmp_path / "run").rows)
    gate.unlink()
    wait_for(process=type("Over", (), {"poll": lambda self: None})(), pattern="result.json", out=tmp_path / "run")
    assert rounds < 3
    assert main(["train", "--resume", str(tmp_path / "run"), "--code", str(TOY)]) == 0
    assert_is_whole(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_sweep_is_stopped_and_goes_on(ray, tmp_path, gate):
    experiment = tmp_path / "seeds.py"
    experiment.write_text(
        f'"""Do seeds differ?"""\nfrom fedray import ByLabel, Config\nfrom fedray.own import load_file\n'
        f"Toy = load_file({str(TOY)!r}).Toy\n"
        f"TASK = Toy(slow=(0, 1, 2, 3), gate={str(gate)!r})\n"
        "BASE = Config(task=TASK, partition=ByLabel(), rounds=2, local_steps=4, evaluate_samples=0)\n"
        'SPACE = {"seed": [0, 1]}\n'
    )
    process = start("sweep", experiment, "--out", tmp_path / "out", "--address", "local", cwd=tmp_path)
    wait_for(process, "*/rounds.jsonl", tmp_path / "out")
    others = descendants(process)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 143
    assert "Traceback" not in errors
    assert_gone(others)
    assert not list((tmp_path / "out").glob("*/result.json"))
    assert not list((tmp_path / "out").glob("*/failed.txt"))
    gate.unlink()
    assert main(hint(errors)) == 0
    assert len(list((tmp_path / "out").glob("*/result.json"))) == 2


@pytest.mark.slow
def test_clients_alone_are_stopped_within_a_round(tmp_path):
    flags = "--slow 0 1 2 3 --rounds 2 --actors 0 --local-only --local-steps 1000"
    process = start(*TRAIN.split(), *flags.split(), "--out", tmp_path / "run")
    wait_for(process, "client-0000/tensorboard/*", tmp_path / "run")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)  # a round takes eight minutes
    assert process.returncode == 130


def test_the_second_signal_ends_a_process_that_does_not_stop():
    child = os.fork()
    if child == 0:
        with interruptible() as caught:
            for number in (signal.SIGTERM, signal.SIGINT):
                try:
                    os.kill(os.getpid(), number)
                    time.sleep(10)
                except KeyboardInterrupt:
                    if caught != [signal.SIGTERM]:
                        os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def test_a_signal_that_is_ignored_stays_ignored():
    """As a shell has it for jobs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible() as caught:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        assert caught == []
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_that_fails_says_how_to_go_on(tmp_path, capsys):
    flags = ["--failing", "0", "1", "2", "3", "--actors", "0", "--out", str(tmp_path / "run")]
    assert main([*TRAIN.split(), *flags]) == 1
    errors = capsys.readouterr().err
    assert (
        "fedray: round 1: no client returned a model. Client 0: ValueError: this client's camera is broken." in errors
    )
    assert hint(errors) == ["train", "--resume", str(tmp_path / "run"), "--code", str(TOY)]
    assert main(hint(errors)) == 1


def test_more_rounds_on_the_command_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "run"), "--actors", "0"]
    more = ["train", "--resume", str(tmp_path / "run"), "--code", str(TOY), "--actors", "0", "--rounds"]
    assert main([*TRAIN.split(), "--rounds", "2", *out]) == 0
    assert main([*more, "4"]) == 0
    assert "round 3/4" in capsys.readouterr().out
    assert main([*more, "3"]) == 2
    assert "has done 4 already; ask for more" in capsys.readouterr().err
    assert len(Run.open(tmp_path / "run").rows) == 4


FULL = """
import os, subprocess, sys, warnings
from dataclasses import replace
from pathlib import Path
sys.path[:0] = [{tests!r}]
import toy
from runs import assert_curves_equal_rows, sha, train
from fedray.config import Config
from fedray.data.partition import ByLabel
from fedray.errors import RunError, UserError
from fedray.record import run as record_run
from fedray.record.run import Run

place = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], check=True)
warnings.simplefilter("ignore")
task = toy.Toy(size=20_000)
config = Config(task=task, clients=4, partition=ByLabel(), rounds=3, local_epochs=1, learning_rate=0.1,
                evaluate_samples=4, actors=0, keep_optimizer=True)
train(config, place / "whole")
hashed = sha(place / "whole")
stopped = 0
for spare in (record_run.SPARE, -10**9):  # with the check of each checkpoint, and without
    record_run.SPARE = spare
    for free in range(0, 2600, {step}):  # kB
        run, filler = place / "run", place / "filler"
        space = os.statvfs(place)
        filler.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - free * 1000)))
        record_run.Run.check_disk, right = lambda self, needed: None, record_run.Run.check_disk
        begun = True
        try:
            train(config, run)
        except RunError as error:
            stopped += 1
            assert any(word in str(error) for word in ("No space left", "are free", "cannot be written")), error
        except UserError as error:
            begun = False
            assert "cannot be written: No space left on device" in str(error), error
        filler.unlink()
        record_run.Run.check_disk = right
        train(config, run, resume=begun)
        assert sha(run) == hashed, (spare, free)
        assert [row["round"] for row in Run.open(run).rows] == [1, 2, 3]
        assert_curves_equal_rows(run)
        assert not list(run.rglob("*.part"))
        subprocess.run(["rm", "-r", str(run)], check=True)
print("stopped", stopped)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_mounts
def test_a_full_disk_at_every_level(tmp_path):
    """A file system of 8 MB: the run stops with a sentence, and goes on to the same end when there is space."""
    code = FULL.format(tests=str(TOY.parent), step=200)
    command = ["unshare", "-rm", sys.executable, "-c", code, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert int(re.search(r"stopped (\d+)", ran.stdout)[1]) >= 10


READ_ONLY = """
import subprocess, sys, warnings
from pathlib import Path
sys.path[:0] = [{tests!r}]
import toy
from runs import assert_curves_equal_rows, fit, sha, train
from fedray.config import Config
from fedray.data.partition import ByLabel
from fedray.errors import RunError
from fedray.federation.pool import LocalPool
from fedray.record.run import Run

place = Path(sys.argv[1])
checkpoints = str(place / "run/checkpoints")
warnings.simplefilter("ignore")
config = Config(task=toy.Toy(), clients=4, partition=ByLabel(), rounds=4, local_epochs=1, learning_rate=0.1,
                evaluate_samples=4, actors=0, keep_optimizer=True)
train(config, place / "whole")
try:
    for row in fit(config, LocalPool(config), place / "run"):
        if row["round"] == 2:
            for how in (["--bind", checkpoints], ["-o", "remount,bind,ro"]):
                subprocess.run(["mount", *how, checkpoints], check=True)
except RunError as error:
    print(error)
subprocess.run(["umount", checkpoints], check=True)
print(len(Run.open(place / "run").rows))
train(config, place / "run", resume=True)
assert sha(place / "run") == sha(place / "whole")
assert [row["round"] for row in Run.open(place / "run").rows] == [1, 2, 3, 4]
assert_curves_equal_rows(place / "run")
assert not list((place / "run").rglob("*.part"))
"""


@pytest.mark.slow
@needs_mounts
def test_a_file_system_that_becomes_read_only_in_a_run(tmp_path):
    code = READ_ONLY.format(tests=str(TOY.parent))
    command = ["unshare", "-rm", sys.executable, "-c", code, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
    sentence, rows = ran.stdout.splitlines()
    assert sentence.endswith("Read-only file system; the run's complete rounds are kept.")
    assert rows == "2"


@pytest.mark.slow
@pytest.mark.parametrize("actors", [0, 1])
def test_asked_to_stop_by_another_process(tmp_path, whole, slow, gate, capsys, actors):
    out = tmp_path / "run"
    process = start(*slow, "--actors", actors, "--out", out)
    wait_for(process, "rounds.jsonl", out)
    follower = start("attach", out)
    assert main(["runs", str(tmp_path)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "goes on" in line]
    assert re.search(r"[1-3]/3", line)
    assert main(["stop", str(out)]) == 0
    told = capsys.readouterr().out
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped, as `fedray stop` asked" in errors
    printed, errors = follower.communicate(timeout=60)
    assert follower.returncode == 1
    assert "round 1/3" in printed
    assert "can be resumed" in errors
    assert main(["runs", str(tmp_path)]) == 0
    assert "stopped" in capsys.readouterr().out
    gate.unlink()
    assert main([*hint(told), "--actors", "0", "--task", f"{TOY}:Toy"]) == 0
    assert_is_whole(out, whole)
    capsys.readouterr()
    assert main(["stop", str(out)]) == 2
    assert "no process is writing the run" in capsys.readouterr().err
    assert main(["attach", str(out)]) == 0  # to a complete run: its rounds
    assert "round 3/3" in capsys.readouterr().out
    assert main(["runs", str(tmp_path)]) == 0
    assert "complete" in capsys.readouterr().out


def test_a_request_to_stop_that_came_too_late_stops_no_later_run(toy_config, tmp_path):
    run = Run(tmp_path / "run")
    first = train(toy_config(), run.directory, rounds=1)
    ask_to_stop(run)
    assert len(first) == 1
    assert len(train(toy_config(), run.directory, resume=True)) == 2
    assert not (run.directory / "stop").exists()


def test_what_is_no_run_is_told(tmp_path, capsys):
    for command in ("stop", "attach"):
        assert main([command, str(tmp_path)]) == 2
        assert "there is no run at" in capsys.readouterr().err
    assert main(["runs", str(tmp_path / "nothing")]) == 2
    assert "it is no directory" in capsys.readouterr().err
