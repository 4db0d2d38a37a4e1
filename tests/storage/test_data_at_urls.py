"""Images and pipelines at URLs: the bits of those in a folder, fetched once a node, and again when they change."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fedray import DDPM, cache
from fedray.config import Config
from fedray.errors import UserError
from fedray.federation.worker import Worker
from fedray.storage import Store, folder, url_of
from fedray.tasks.lora import PIPELINE
from fedray.tasks.lora.pipelines import base_sha256, pipeline_folder


def photo(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def photos(tmp_path, place):
    """Twelve images of two labels, with captions, in a folder and at a URL."""
    store = Store(f"{place}/photos")
    metadata = "file_name,text\n"
    for index in range(12):
        name = f"{'ab'[index % 2]}/{index}.png"
        metadata += f"{name},the {index}th\n"
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(photo(index))
        store.write(name, photo(index))
    (tmp_path / "photos/metadata.csv").write_text(metadata)
    store.write("metadata.csv", metadata.encode())
    return tmp_path / "photos", store.url


def test_images_at_a_url_are_those_of_the_folder(photos, node):
    here, there = (DDPM("imagefolder", str(place), resolution=8).dataset() for place in photos)
    assert here.sha256 == there.sha256
    np.testing.assert_array_equal(here.images, there.images)
    np.testing.assert_array_equal(here.labels, there.labels)
    assert {name: list(column) for name, column in here.columns.items()} == {
        name: list(column) for name, column in there.columns.items()
    }


def test_they_are_fetched_once_a_node_and_again_when_they_change(photos, node, monkeypatch):
    task, store = DDPM("imagefolder", photos[1], resolution=8), Store(photos[1])
    first = task.dataset()
    with monkeypatch.context() as patched:
        patched.setattr("fedray.storage._fetch", None)
        assert task.dataset().sha256 == first.sha256
    node("another")
    assert task.dataset().sha256 == first.sha256
    store.write("a/0.png", photo(99))
    changed = task.dataset()
    assert changed.sha256 != first.sha256
    np.testing.assert_array_equal(changed.images[0, 0], np.array(Image.open(io.BytesIO(photo(99)))))
    store.remove(["a/2.png"])
    store.write("metadata.csv", b"file_name\n" + b"".join(f"{n}\n".encode() for n in task_names(store)))
    assert len(task.dataset()) == 11


def task_names(store):
    return sorted(name for name in store.list() if name.endswith(".png"))


def test_a_worker_without_the_data_decodes_them_from_the_storage(photos, node):
    config = Config(task=DDPM("imagefolder", photos[1], resolution=8), local_epochs=1)
    dataset = config.task.dataset()
    absent = dataset.source._replace(place=cache.home() / "none")
    node("another")
    worker = Worker(config, torch.device("cpu"), "there", absent, dataset.sha256)
    np.testing.assert_array_equal(worker.dataset.images, dataset.images)
    Store(photos[1]).write("a/0.png", photo(99))
    node("a third")
    worker = Worker(config, torch.device("cpu"), "there", absent, dataset.sha256)
    with pytest.raises(ValueError, match="not those of the run"):
        worker.dataset  # noqa: B018


def test_what_was_damaged_in_the_cache_is_fetched_again(photos, node):
    first = folder(photos[1], "")
    (first / "a/0.png").write_bytes(photo(1))
    for seal in cache.home().glob("*/seal.json"):
        os.utime(seal, (0, 0))
    again = folder(photos[1], "")
    assert (again / "a/0.png").read_bytes() == photo(0)


def test_mistakes_name_the_url(photos, place, node):
    with pytest.raises(UserError, match=f"--train-data-dir {place}/none does not exist: there is no object below it"):
        DDPM("imagefolder", f"{place}/none", resolution=8).dataset()
    with pytest.raises(UserError, match="metadata.csv is one object, not a folder"):
        DDPM("imagefolder", f"{photos[1]}/metadata.csv", resolution=8).dataset()
    Store(photos[1]).write("a/0.png", b"no image")
    with pytest.raises(UserError, match=f"{photos[1]}: 1 of 12 images cannot be read: a/0.png"):
        DDPM("imagefolder", photos[1], resolution=8).dataset()
    with pytest.raises(UserError, match=f"{photos[1]}/a has no images|1 of"):
        DDPM("imagefolder", f"{photos[1]}/a", resolution=8).dataset()


def test_objects_do_not_lead_out_of_the_cache(bucket, tmp_path):
    store = Store(f"{bucket}/photos")
    store.fs.pipe_file(f"{store.root}/a/../../../../evil.png", photo(0))
    with pytest.raises(UserError, match="which is no name for a file"):
        folder(store.url, "--train-data-dir ")
    assert not list(tmp_path.rglob("evil.png"))


def test_a_pipeline_at_a_url_is_that_of_the_folder(place, node):
    store = Store(f"{place}/sd")
    for path in PIPELINE.rglob("*"):
        if path.is_file():
            store.write(path.relative_to(PIPELINE).as_posix(), path)
    found = pipeline_folder(f"{place}/sd")
    assert url_of(found) == f"{place}/sd"
    assert base_sha256(found) == base_sha256(PIPELINE)
    assert pipeline_folder.__wrapped__(f"{place}/sd") == found
