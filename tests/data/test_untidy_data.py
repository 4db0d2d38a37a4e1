"""Data as people have it: values that are missing, links, lists that are cut short, disks that are full."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from runs import curves, fit

import fedray
from fedray.cli import main
from fedray.data import images, partition_picture, sources
from fedray.data.dataset import Dataset
from fedray.data.images import Form
from fedray.data.partition import ByAttribute, Dirichlet
from fedray.data.sources import digits
from fedray.errors import UserError
from fedray.federation.plan import make_plan
from fedray.federation.pool import LocalPool
from fedray.federation.worker import Worker
from fedray.seeds import generator

FORM = Form(8, 1)
SMALL = (
    "train --preset faces --partition iid --clients 2 --resolution 8 --block-out-channels 8 --attention False "
    "--no-mid-block-attention --rounds 2 --local-steps 1 --sampling-steps 2 --evaluate-samples 4 --actors 0 "
    "--held-out-share 0 --test-share 0"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path):
    """Twelve digits in two folders."""
    for index, image in enumerate(digits().images[:12]):
        folder = tmp_path / "photos" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(folder / f"{index:02d}.png")
    return tmp_path / "photos"


def metadata(photos, **columns):
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    pd.DataFrame({"file_name": names, **columns}).to_csv(photos / "metadata.csv", index=False)


# Values that are missing


def test_missing_values_lose_no_example_and_stop_no_run(photos, tmp_path):
    age = [10, 20, None, 10, 20, None, 30, 30, 30, 10, 10, 10]
    city = ["x", None, "y", "x", "y", None, "x", "x", "y", "y", "x", "y"]
    metadata(photos, age=age, city=city, test=[True, False] * 6)
    dataset = sources.image_folder(photos, FORM)
    np.testing.assert_array_equal(dataset.column("age"), np.array(age, float))
    assert dataset.column("city").tolist() == [one or "" for one in city]
    oldest = ByAttribute("age").split(dataset, 3, generator(0, "partition"))
    assert [set(dataset.column("age")[oldest[client]]) - {30.0} for client in range(2)] == [{10.0}, {20.0, 10.0}]
    for column in ("age", "city"):
        for partition in (Dirichlet(0.5, column), ByAttribute(column)):
            shards = partition.split(dataset, 3, generator(0, "partition"))
            assert sorted(shards.indices) == list(range(12))
    assert main([*SMALL.split(), "--train-data-dir", str(photos), "--out", str(tmp_path / "run")]) == 0
    report = pd.read_csv(tmp_path / "run/partition.csv")
    assert report["city "].sum() * 6 == pytest.approx(2)  # two of six in a client
    assert (report["train"] + report["held out"] + report["test"]).sum() == 12
    assert report["test (column)"].mean() == pytest.approx(0.5)


def test_a_missing_label_is_named(photos):
    metadata(photos, label=[1, 2, None, *range(9)])
    with pytest.raises(UserError, match=r"metadata.csv: 1 labels are missing, the first that of a/04.png"):
        sources.image_folder(photos, FORM)


def test_lists_among_the_columns_are_left_out(photos):
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    lines = [json.dumps({"file_name": name, "box": [1, 2], "more": {"a": 1}, "mood": "calm"}) for name in names]
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    assert set(sources.image_folder(photos, FORM).columns) == {"folder", "file_name", "mood"}


def test_metadata_lies_beside_its_images(photos):
    for folder in "ab":
        names = sorted(path.name for path in (photos / folder).iterdir())
        moods = [f"{folder}{index}" for index in range(len(names))]
        pd.DataFrame({"file_name": names, "mood": moods}).to_csv(photos / folder / "metadata.csv", index=False)
    assert sources.image_folder(photos, FORM).column("mood").tolist() == [f"{f}{i}" for f in "ab" for i in range(6)]
    (photos / "b/metadata.csv").unlink()
    with pytest.raises(UserError, match="metadata.csv lacks 6 of 12 images, the first of them b/01.png"):
        sources.image_folder(photos, FORM)


def test_parquet_as_pandas_writes_it(photos, tmp_path):
    contents = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(photos.rglob("*.png"))]
    pd.DataFrame({"image": contents, "label": range(12)}).to_parquet(tmp_path / "digits.parquet")
    dataset = sources.hugging_face(str(tmp_path / "digits.parquet"), FORM)
    assert np.array_equal(dataset.images, sources.image_folder(photos, FORM).images)
    assert dataset.labels.tolist() == list(range(12))


# Files


def test_folders_with_the_same_names_and_times_are_not_confused(tmp_path):
    for name, grey in (("one", 10), ("other", 240)):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8), grey).save(tmp_path / name / "0.pgm")
        os.utime(tmp_path / name / "0.pgm", (0, 0))
    assert [sources.image_folder(tmp_path / name, FORM).images.mean() for name in ("one", "other")] == [10, 240]


def test_links_are_followed_and_hidden_files_are_not_data(photos, tmp_path):
    shutil.move(photos / "b", tmp_path / "elsewhere")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "a/circle").symlink_to(photos)
    (photos / ".ipynb_checkpoints").mkdir()
    for hidden in (photos / ".ipynb_checkpoints/x.png", photos / "a/._00.png"):
        hidden.write_text("")
    dataset = sources.image_folder(photos, FORM)
    assert len(dataset) == 12
    assert set(dataset.column("folder")) == {"a", "linked"}
    (photos / "a/broken.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"1 of 13 images cannot be read: a/broken.png"):
        sources.image_folder(photos, FORM)


def test_an_image_that_could_not_be_opened_once_is_tried_again(photos, monkeypatch):
    decode = images.decode

    def refuse(source, form):
        if source.name == "04.png":
            raise PermissionError(13, "Permission denied")
        return decode(source, form)

    monkeypatch.setattr(images, "decode", refuse)
    with pytest.raises(UserError, match=r"1 of 12 images cannot be read: a/04.png \(.*Permission denied"):
        sources.image_folder(photos, FORM)
    monkeypatch.setattr(images, "decode", decode)
    assert len(sources.image_folder(photos, FORM)) == 12


def test_floating_point_images_are_refused_by_name(photos):
    Image.fromarray(np.ones((8, 8), np.float32)).save(photos / "a/f.tiff")
    with pytest.raises(UserError, match=r"a/f.tiff \(its pixels are floating-point numbers"):
        sources.image_folder(photos, FORM)


def test_a_full_disk_and_a_cache_that_cannot_be_written(photos, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
        with pytest.raises(UserError, match=r"takes 0.00 GB, and .* has 0.00 GB free; set FEDRAY_CACHE"):
            sources.image_folder(photos, FORM)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written .*; set FEDRAY_CACHE"):
        sources.image_folder(photos, FORM)


# CelebA's lists


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list_attr_celeba.txt", "2\n", "has no names of attributes in its second line"),
        ("list_attr_celeba.txt", "2\nSmiling Male\n1.jpg 1 -1\n2.jpg 1\n", "the line of 2.jpg does not have 2 numbers"),
        ("identity_CelebA.txt", "1.jpg 5\n2.jpg\n", "the line of 2.jpg does not have 1 numbers"),
        ("list_eval_partition.txt", "1.jpg 0\n2.jpg 7\n", "the split of 2.jpg is none of 0, 1 and 2"),
    ],
)
def test_celeba_lists_that_are_cut_short(tmp_path, name, text, message):
    (tmp_path / "img_align_celeba").mkdir()
    for index in (1, 2):
        Image.new("L", (8, 8), index).save(tmp_path / f"img_align_celeba/{index}.jpg")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        sources.celeba(tmp_path, FORM)


# What a run is held to


@pytest.mark.slow
def test_actors_need_the_images_no_more(ray, photos, tmp_path):
    task = fedray.DDPM("imagefolder", str(photos), resolution=8, block_out_channels=(8,), attention=(False,))
    config = fedray.Config(
        task=task, clients=2, rounds=1, local_steps=1, evaluate_samples=2, sampling_steps=2, actors=2
    )  # fmt: skip
    dataset = task.dataset()
    shutil.rmtree(photos)
    assert fedray.run(config, tmp_path / "run", dataset=dataset).result["rounds"] == 1


def test_a_node_with_other_images_is_found_out(photos):
    config = fedray.Config(task=fedray.DDPM("imagefolder", str(photos), resolution=8), local_steps=1)
    here = config.task.dataset()
    elsewhere = here.source._replace(place=photos / "nowhere")
    assert len(Worker(config, torch.device("cpu"), "test", elsewhere, here.sha256).dataset) == 12
    (photos / "a/00.png").unlink()
    with pytest.raises(ValueError, match="not those of the run"):
        _ = Worker(config, torch.device("cpu"), "test", elsewhere, here.sha256).dataset


@pytest.mark.parametrize("change", ["images", "labels"])
def test_a_run_whose_data_changed_is_not_resumed(photos, tmp_path, capsys, change):
    command = [*SMALL.split(), "--train-data-dir", str(photos), "--partition", "by-label"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    os.remove(tmp_path / "run/result.json")
    if change == "images":
        Image.new("L", (8, 8), 200).save(photos / "a/new.png")
    else:
        metadata(photos, label=list(range(12))[::-1])
    before = (tmp_path / "run/rounds.jsonl").read_text()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert re.search("the images of the run at .*, their labels or captions, .* have changed", capsys.readouterr().err)
    assert (tmp_path / "run/rounds.jsonl").read_text() == before


def test_the_report_counts_the_values_of_a_column_that_has_many(tmp_path):
    identity = np.repeat(np.arange(100), 3)
    dataset = Dataset(np.zeros((300, 1, 2, 2), np.uint8), None, {"identity": identity})
    shards = fedray.ByFolder().split(dataset, 4, generator(0, "partition"))
    table = partition_picture.table(dataset, {"train": shards})
    assert table["different values of identity"].tolist() == [25] * 4


def test_a_relative_cache(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDRAY_CACHE", "here")
    assert main([*SMALL.split(), "--train-data-dir", str(photos), "--out", str(tmp_path / "run")]) == 0
    assert len(list((tmp_path / "here").glob("*/images.npy"))) == 1


def test_a_run_is_not_put_among_its_images(photos, capsys):
    command = [*SMALL.split(), "--train-data-dir", str(photos)]
    assert main([*command, "--out", str(photos / "runs/one")]) == 2
    assert "lies below --train-data-dir" in capsys.readouterr().err
    assert not (photos / "runs").exists()


MEASURE = """
import sys, torch
from dataclasses import replace
from pathlib import Path
import numpy as np
from fedray import DDPM
from fedray.algorithms import Round
from fedray.federation.local import TrainJob, client_update
from fedray.federation.worker import Shared, Worker
from fedray.presets import PRESETS
from fedray.data.dataset import Source

task = DDPM("imagefolder", sys.argv[1])
config = replace(PRESETS["digits"], task=task, local_epochs=None, local_steps=20, keep_optimizer=False)
worker = Worker(config, torch.device("cpu"), "test", Source(Path(sys.argv[2]), sys.argv[3]), sys.argv[3])
model = worker.learner.flat.vector.detach().numpy().copy()
down = Shared({"model": model}, Round(0, 0, (0,), 4, {0: int(sys.argv[4])}, worker.learner.flat.layout))
client_update(worker, down, TrainJob(0, 0, np.arange(int(sys.argv[4])), np.array([], int)))
# Not the file's pages: those are one copy for the node, whoever has mapped them.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")))
"""


@pytest.mark.slow
def test_an_actors_private_memory_does_not_grow_with_the_dataset(tmp_path):
    """Of a folder of 100 and one of 40,000 images, with a list of attributes; a client holds 100 of them."""
    Image.fromarray(digits().images[0][0]).save(tmp_path / "one.png")
    used = {}
    for n in (100, 40_000):
        folder = tmp_path / str(n)
        for index in range(n):
            if index % 1000 == 0:
                (folder / f"{index:06d}").mkdir(parents=True)
            os.link(tmp_path / "one.png", folder / f"{index - index % 1000:06d}" / f"{index:06d}.png")
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.png"))]
        flags = {f"attribute{k}": np.arange(n) % (k + 2) == 0 for k in range(40)}
        pd.DataFrame({"file_name": names, **flags}).to_csv(folder / "metadata.csv", index=False)
        source = sources.image_folder(folder, Form(8, 1)).source
        command = [sys.executable, "-c", MEASURE, str(folder), str(source.place), source.sha256, "100"]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        used[n] = int(ran.stdout) * 1024
    assert used[40_000] - used[100] < 6e6  # a process's own use varies by a few MB; the paths alone would be 20


# Losses


def test_aggregated_is_measured_on_the_cohort(toy_config, tmp_path):
    config = toy_config(held_out_share=0.25, fraction=0.5, rounds=2)
    for row in fedray.run(config, tmp_path / "run").rows:
        found = row["held_out"]
        assert len(found["clients"]) == 4
        assert found["aggregated"] == pytest.approx(np.mean([found["clients"][str(c)] for c in row["cohort"]]))
        assert found["aggregated"] != pytest.approx(found["global"])


def test_clients_too_small_to_hold_anything_out(toy_config, tmp_path):
    """A tenth of four examples is one for some clients and none for the others."""
    config = toy_config(held_out_share=0.1, each=4)
    held_out = make_plan(config).held_out.sizes
    assert 0 < held_out.sum() < 4
    run = fedray.run(config, tmp_path / "run")
    measured = [sorted(map(int, row["held_out"]["clients"])) for row in run.rows]
    assert measured == [held_out.nonzero()[0].tolist()] * 3
    assert "NaN" not in (tmp_path / "run/rounds.jsonl").read_text()


def test_curves_are_on_disk_while_the_run_goes_on(toy_config, tmp_path):
    config = toy_config()
    row = next(fit(config, LocalPool(config), tmp_path / "run"))
    assert curves(tmp_path / "run")["loss", 1] == pytest.approx([row["loss"]])


# Clients alone


@pytest.mark.slow
def test_clients_alone_side_by_side_are_the_same_runs(ray, toy_config, tmp_path):
    config = toy_config(keep_optimizer=True)
    rows = []
    here = fedray.run_local_only(config, tmp_path / "here")
    there = fedray.run_local_only(replace(config, actors=2), tmp_path / "there", on_row=rows.append)
    assert [run.result["vector_sha256"] for run in here] == [run.result["vector_sha256"] for run in there]
    assert len(rows) == 4 * 3
    assert {row["clients"][0]["actor"] for row in rows} == {"actor 0", "actor 1"}
    for wrong, message in (({"only_client": 1}, "--only-client and --local-only"), ({}, "holds another run")):
        with pytest.raises(UserError, match=message):
            fedray.run_local_only(replace(config, **wrong), tmp_path / "here/client-0000")
    with pytest.raises(UserError, match="--learning-rate is 0.5 now, but was 0.1"):
        fedray.run_local_only(replace(config, learning_rate=0.5), tmp_path / "here")


def test_a_client_alone_that_fails_stops_the_others(toy_config, tmp_path):
    with pytest.raises(fedray.RunError, match="no client returned a model. Client 1: ValueError"):
        fedray.run_local_only(toy_config(failing=(1,)), tmp_path / "alone")
    assert (tmp_path / "alone/client-0000/result.json").exists()
    assert not (tmp_path / "alone/client-0002").exists()
