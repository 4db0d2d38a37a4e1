"""The per-node cache: what is damaged is made again, it is nobody else's, and it can be listed and emptied."""

import fcntl
import os
import re
import stat
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fedray import DDPM, Config, cache
from fedray.cli import main
from fedray.data.dataset import is_cached
from fedray.errors import UserError
from fedray.federation.worker import Worker


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def task(tmp_path):
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(6):
            pixels = rng.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{index}.png")
    return DDPM("imagefolder", str(tmp_path / "photos"), resolution=8)


def contents(dataset):
    return dataset.images.copy(), dataset.labels.copy(), {name: list(each) for name, each in dataset.columns.items()}


def files(home):
    return sorted(path for path in home.glob("*/*") if path.name != cache.SEAL)


def age(home, seconds):
    for seal in home.glob(f"*/{cache.SEAL}"):
        then = time.time() - seconds
        os.utime(seal, (then, then))


def cut(tenths):
    return lambda content: content[: len(content) * tenths // 10]


def flip(tenths):
    def flipped(content):
        index = min(len(content) - 1, len(content) * tenths // 10)
        return content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]

    return flipped


DAMAGES = {f"cut at {k}": cut(k) for k in range(10)} | {f"flipped at {k}": flip(k) for k in range(11)}


@pytest.mark.parametrize("damage", [*DAMAGES.values(), lambda content: bytes(len(content))], ids=[*DAMAGES, "zeros"])
def test_an_entry_with_any_damage_is_made_again(task, home, capsys, damage):
    expected = contents(task.dataset())
    entries = files(home)
    assert {path.name for path in entries} == {"images.npy", "about.json", "labels.npy", "columns.parquet"}
    for path in entries:
        kept = path.stat()
        path.write_bytes(damage(path.read_bytes()))
        os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
        capsys.readouterr()
        found = contents(task.dataset())
        assert np.array_equal(found[0], expected[0])
        assert np.array_equal(found[1], expected[1])
        assert found[2] == expected[2]
        assert f"{path.name} in the cache is damaged; it is made again" in capsys.readouterr().err, path
    task.dataset()
    assert capsys.readouterr().err == ""


def test_a_lost_file_and_a_damaged_seal(task, home, capsys):
    expected = contents(task.dataset())
    for damage in (lambda entry: (entry / "images.npy").unlink(), lambda entry: (entry / cache.SEAL).write_text("[]")):
        (path,) = home.glob("*/images.npy")
        damage(path.parent)
        assert np.array_equal(contents(task.dataset())[0], expected[0])
        assert f"{cache.SEAL} in the cache is damaged; it is made again" in capsys.readouterr().err


def test_files_of_several_chunks_have_sums_of_all_their_bytes(monkeypatch, tmp_path, home):
    monkeypatch.setattr(cache, "CHUNK", 10)
    place = cache.kept("numbers", ["numbers"], lambda aside: (aside / "n").write_bytes(bytes(range(25))))
    assert cache._damage(place) == ""
    for index in range(25):
        content = bytearray(range(25))
        content[index] ^= 128
        (place / "n").write_bytes(content)
        assert cache._damage(place) == "n", index


def test_actors_rely_on_a_check_of_the_last_hour_and_make_it_after_that(task, home):
    config = Config(task=task, local_steps=1)
    dataset = task.dataset()
    worker = lambda: Worker(config, torch.device("cpu"), "test", dataset.source, dataset.sha256)  # noqa: E731
    (path,) = home.glob("*/images.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"?")
    assert is_cached(dataset.source.place)
    age(home, 7200)
    assert not is_cached(dataset.source.place)
    assert worker().dataset.sha256 == dataset.sha256  # it made them again
    assert path.read_bytes() == whole
    assert is_cached(dataset.source.place)
    for seal in home.glob(f"*/{cache.SEAL}"):
        assert time.time() - seal.stat().st_mtime < 60


def test_an_actor_whose_nodes_cache_was_emptied_loads_its_data_anew(task, home):
    config = Config(task=task, local_steps=1)
    dataset = task.dataset()
    (entry,) = (entry for entry in cache.entries() if (entry.path / "images.npy").exists())
    assert cache.remove(entry)
    worker = Worker(config, torch.device("cpu"), "test", dataset.source, dataset.sha256)
    assert np.array_equal(worker.dataset.images, dataset.images)


def test_the_cache_is_the_users_own(task, home, monkeypatch):
    old = os.umask(0o022)
    try:
        task.dataset()
    finally:
        os.umask(old)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    for path in home.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    for path in home.iterdir() if os.getuid() == 0 else ():  # what root made is trusted
        os.chown(path, 54321, 54321)
    with pytest.raises(UserError, match=r"is not a directory of yours; remove it, or set FEDRAY_CACHE"):
        task.dataset()


def test_links_in_the_cache_are_not_followed(home, tmp_path):
    make = lambda aside: (aside / "n").write_text("ours")  # noqa: E731
    place = cache.kept("numbers", ["numbers"], make)
    (tmp_path / "precious").write_text("keep me")
    lock = place.with_suffix(".lock")
    lock.unlink()
    lock.symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"\.lock in the cache is a link, which fedray never makes; remove it"):
        cache.kept("numbers", ["numbers"], make)
    assert (tmp_path / "precious").read_text() == "keep me"
    lock.unlink()
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not a directory of yours"):
        cache.kept("numbers", ["numbers"], make)


def test_entries_are_listed_and_removed(task, home, capsys):
    dataset = task.dataset()
    (home / "not-ours").mkdir()
    (home / "not-ours/thesis.txt").write_text("precious")
    (home / ("0" * 24)).mkdir()
    (home / ("1" * 24 + ".aside")).mkdir()
    capsys.readouterr()
    assert main(["cache"]) == 0
    listed = capsys.readouterr().out
    assert "labels" in listed
    assert re.search(r"decoding .*photos", listed)
    assert listed.count("of an older version, or not complete") == 2
    assert "4 entries" in listed
    age(home, 3 * 86_400)
    for name in ("0" * 24, "1" * 24 + ".aside"):
        assert (home / name).is_dir()
    assert main(["cache", "--clean", "--unused-days", "4"]) == 0
    assert "removed   0 entries" in capsys.readouterr().out
    assert main(["cache", "--clean", "--unused-days", "2"]) == 0
    assert "removed   2 entries" in capsys.readouterr().out
    assert main(["cache", "--clean"]) == 0
    assert [path.name for path in home.iterdir()] == ["not-ours"]
    assert len(np.unique(dataset.images)) > 10  # what is mapped stays
    assert main(["cache", "--clean", "--unused-days", "-1"]) == 2


def test_an_entry_that_is_being_made_is_not_removed(home, capsys):
    def make(aside):
        (aside / "n").write_text("half of it")
        assert main(["cache", "--clean"]) == 0
        assert "kept      1 entries that another process is at" in capsys.readouterr().out

    assert (cache.kept("numbers", ["numbers"], make) / "n").read_text() == "half of it"


def test_a_lock_that_was_removed_while_one_waited_is_made_anew(home):
    """Else two processes would hold two locks of one entry."""
    place = home / ("2" * 24)
    with cache.locked(place, "numbers") as path:
        path.unlink()
        with cache.locked(place, "numbers") as again, open(again) as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
