"""A run that is killed and resumed, as TensorBoard, wandb, trackio and MLflow have it: read back by each library."""

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import sha, train

from fedray.record.run import Run
from fedray.record.trackers import OURS

pytestmark = pytest.mark.slow
MISSING = [name for name in OURS if importlib.util.find_spec(name) is None]

CONFIG = """
from toy import Toy
from fedray import ByLabel, Config

config = Config(
    task=Toy(), clients=4, partition=ByLabel(), rounds=6, local_epochs=2, train_batch_size=3, learning_rate=0.1,
    held_out_share=0.25, evaluate_samples=4, evaluate_every=2, actors=0,
)
"""
SCRIPT = f"""{CONFIG}
import os, signal, sys
from runs import fit
from fedray.federation.pool import LocalPool

out, names, resume = sys.argv[1], sys.argv[2].split(","), len(sys.argv) > 3
for row in fit(config, LocalPool(config), out, resume=resume, report_to=names):
    if row["round"] == 3 and not resume:
        os.kill(os.getpid(), signal.SIGKILL)
"""
# By the library in a process of its own, since it reads TRACKIO_DIR when it is imported.
TRACKIO = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("fedray")
print(json.dumps({"name": run.name, "config": run.config, "logs": SQLiteStorage.get_logs("fedray", run.name)}))
"""


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Return the folder of all stores, and the run, which was killed after its third round and resumed."""
    place = tmp_path_factory.mktemp("tracked")
    out = place / "run"
    names = ",".join(name for name in OURS if name not in MISSING)
    first = _python(place, SCRIPT, out, names)
    assert first.returncode == -signal.SIGKILL, first.stderr
    second = _python(place, SCRIPT, out, names, "resume")
    assert second.returncode == 0, second.stderr
    assert "shows no new rounds" not in first.stderr + second.stderr
    run = Run.open(out)
    assert [row["round"] for row in run.rows] == [1, 2, 3, 4, 5, 6]
    return place, run


def _python(place, code, *arguments):
    here = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)]),
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(place / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db",
        "COLUMNS": "200",
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | here, cwd=place, capture_output=True, text=True, timeout=300)


def curves_of(run):
    """Return numbers that every store must hold of a run, each under the round that has it."""
    wanted = {}
    for row in run.rows:
        numbers = {"loss": row["loss"], "bytes_up": row["bytes_up"], "held_out/global": row["held_out"]["global"]}
        numbers |= {name: score["value"] for name, score in row["scores"].items()}
        for client in row["clients"]:
            numbers[f"client/{client['client']:03d}/loss"] = client["loss"]
        wanted |= {(name, row["round"]): value for name, value in numbers.items()}
    assert ("client/003/loss", 6) in wanted
    return wanted


def assert_once(found, run, spelled=lambda name: name):
    """Assert that found, {(name, round): [values]}, has each of the run's numbers once."""
    for (name, number), value in curves_of(run).items():
        assert found[spelled(name), number] == [pytest.approx(value, rel=1e-6)], (name, number)
    assert {number for name, number in found if name == "loss"} == set(range(1, 7))


def assert_pictures(found, run):
    """Assert that found, {(name, round): path or bytes}, has the run's pictures, pixel for pixel."""
    wanted = {("partition", 0): run.directory / "partition.png"}
    wanted |= {("samples", number): run.directory / f"samples/round-{number:06d}.png" for number in (2, 4, 6)}
    wanted["nearest", 6] = run.directory / "nearest/round-000006.png"
    assert set(found) == set(wanted)
    for key, path in wanted.items():
        source = BytesIO(found[key]) if isinstance(found[key], bytes) else found[key]
        np.testing.assert_array_equal(np.asarray(Image.open(source)), np.asarray(Image.open(path)))


def installed(name):
    return pytest.mark.skipif(name in MISSING, reason=f"pip install 'fedray[{name}]'")


def test_the_run_is_the_same_without_them(tracked, tmp_path):
    found = {}
    exec(CONFIG, found)
    train(found["config"], tmp_path, report_to=[])
    assert sha(tmp_path) == tracked[1].result["state_sha256"]


@installed("tensorboard")
def test_tensorboard(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, run = tracked
    events = EventAccumulator(str(run.directory / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    found = {}
    for tag in tags["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault((tag, event.step), []).append(event.value)
    assert_once(found, run)
    images = {(tag, each.step): each.encoded_image_string for tag in tags["images"] for each in events.Images(tag)}
    assert_pictures(images, run)
    (settings,) = events.Tensors("settings")
    assert b"| learning_rate | 0.1 |" in settings.tensor_proto.string_val[0]
    assert b"| task.labels | 4 |" in settings.tensor_proto.string_val[0]


@installed("mlflow")
def test_mlflow(tracked):
    from mlflow.tracking import MlflowClient

    place, run = tracked
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    (stored,) = client.search_runs([client.get_experiment_by_name("fedray").experiment_id])
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "run"
    assert stored.data.params["learning_rate"] == "0.1"
    assert stored.data.params["task.labels"] == "4"
    found = {}
    for name in stored.data.metrics:
        for metric in client.get_metric_history(stored.info.run_id, name):
            found.setdefault((name, metric.step), []).append(metric.value)
    assert_once(found, run, lambda name: name.replace("/", "."))
    images = {}
    for folder in ("partition", "samples", "nearest"):
        for file in client.list_artifacts(stored.info.run_id, folder):
            number = int(Path(file.path).stem.removeprefix("round-")) if folder != "partition" else 0
            images[folder, number] = client.download_artifacts(stored.info.run_id, file.path)
    assert_pictures(images, run)


@installed("wandb")
def test_wandb(tracked):
    """By its own protocol: the records of its file, which `wandb sync` uploads."""
    from wandb.proto.wandb_internal_pb2 import Record

    _, run = tracked
    (place,) = run.directory.glob("wandb/offline-run-*")  # one, though two processes have written
    (file,) = place.glob("*.wandb")
    found, images, settings, ids = {}, {}, {}, set()
    for data in _leveldb(file.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "run":
            ids.add(record.run.run_id)
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        for item in record.history.item:
            name, value = "/".join(item.nested_key) or item.key, json.loads(item.value_json)
            number = record.history.step.num
            if name.endswith("/path") and str(value).endswith(".png"):
                images[name.removesuffix("/path"), number] = place / "files" / value
            elif isinstance(value, (int, float)):
                found.setdefault((name, number), []).append(value)
    assert ids == {run.saved["id"]}
    assert settings["learning_rate"] == 0.1
    assert settings["task.labels"] == 4
    assert_once(found, run)
    assert_pictures(images, run)


def _leveldb(contents):
    """Yield the records of a file in LevelDB's log format: blocks of 32 KiB, of chunks of a record."""
    at, parts = 7, []  # the file's own header
    while at + 7 <= len(contents):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", contents[at + 4 : at + 7])
        if kind == 0:  # padding
            at += 32768 - at % 32768
            continue
        parts.append(contents[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            yield b"".join(parts)
            parts = []


@installed("trackio")
def test_trackio(tracked):
    place, run = tracked
    read = _python(place, TRACKIO)
    assert read.returncode == 0, read.stderr
    stored = json.loads(read.stdout.splitlines()[-1])
    assert stored["name"] == f"run-{run.saved['id'][:6]}"
    assert stored["config"]["learning_rate"] == 0.1
    assert stored["config"]["task.labels"] == 4
    found, images = {}, {}
    for log in stored["logs"]:
        for name, value in log.items():
            if isinstance(value, dict) and value.get("_type") == "trackio.image":
                images[name, log["step"]] = place / "trackio/media" / value["file_path"]
            elif isinstance(value, (int, float)):
                found.setdefault((name, log["step"]), []).append(value)
    assert_once(found, run)
    assert_pictures(images, run)


def test_all_of_them_were_tested():
    assert {f"test_{name}" for name in OURS} <= set(globals())
