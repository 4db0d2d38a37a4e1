"""Entries of the cache that grow: what is damaged is not there, what is open is not removed."""

import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from fedray import cache
from fedray.cli import main
from fedray.errors import UserError
from fedray.shelf import MAPPED, Shelf

ARRAY = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 7


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_one_process_adds_another_maps():
    first, second = Shelf("things", ["a", 1]), Shelf("things", ["a", 1])
    assert "x" not in second
    with pytest.raises(KeyError):
        second["x"]
    first["x"] = ARRAY
    for shelf in (first, second, Shelf("things", ["a", 1])):
        assert isinstance(shelf["x"], np.memmap)
        assert not shelf["x"].flags.writeable
        assert np.array_equal(shelf["x"], ARRAY)
    assert "x" not in Shelf("things", ["a", 2])
    assert first.place.stat().st_mode & 0o077 == 0


def cut(tenths):
    return lambda data: data[: len(data) * tenths // 10]


def flip(tenths):
    def flipped(data):
        index = min(len(data) - 1, len(data) * tenths // 10)
        return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]

    return flipped


DAMAGES = {f"cut at {k}": cut(k) for k in range(10)} | {f"flipped at {k}": flip(k) for k in range(11)}


@pytest.mark.parametrize("damage", [*DAMAGES.values(), lambda data: bytes(len(data))], ids=[*DAMAGES, "zeros"])
def test_a_damaged_array_is_not_there_until_it_is_made_again(capsys, damage):
    Shelf("things", "key")["x"] = ARRAY
    path = cache.place_of("key") / "x.npy"
    path.write_bytes(damage(path.read_bytes()))
    found = Shelf("things", "key")
    assert "x" not in found
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert f"things: {path} in the cache is damaged; it is made again" in said
    found["x"] = ARRAY
    assert np.array_equal(Shelf("things", "key")["x"], ARRAY)
    assert capsys.readouterr().err == ""


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_counts(home):
    program = """
import numpy as np, os, pathlib
from fedray.shelf import Shelf
shelf = Shelf("things", "key")
shelf["whole"] = np.ones(3)
pathlib.Path.replace = lambda *_: os._exit(9)
shelf["half"] = np.ones(3)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 9
    shelf = Shelf("things", "key")
    assert ("whole" in shelf, "half" in shelf) == (True, False)
    shelf["half"] = ARRAY
    assert np.array_equal(shelf["half"], ARRAY)


def test_it_is_listed_and_removed_once_nobody_has_it_open(capsys):
    shelf = Shelf("latents of 3 images", "key")
    shelf["x"] = ARRAY
    assert main(["cache"]) == 0
    assert "latents of 3 images" in capsys.readouterr().out
    (entry,) = cache.entries()
    assert (entry.path, entry.what) == (shelf.place, shelf.what)
    assert entry.size > ARRAY.nbytes
    assert main(["cache", "--clean"]) == 0
    assert "kept 1 entries" in re.sub(r"\s+", " ", capsys.readouterr().out)
    assert np.array_equal(Shelf("latents of 3 images", "key")["x"], ARRAY)
    then = time.time() - 9 * 86_400
    os.utime(shelf.place / cache.SEAL, (then, then))
    assert cache.entries()[0].used == pytest.approx(then)
    Shelf("latents of 3 images", "key")  # to open it is to use it
    assert time.time() - cache.entries()[0].used < 60
    del shelf
    assert main(["cache", "--clean"]) == 0
    assert cache.entries() == []
    assert "x" not in Shelf("latents of 3 images", "key")


def test_many_arrays_do_not_use_up_files():
    """A mapping holds its file open, and many systems allow a process 1,024."""
    shelf = Shelf("things", "key")
    shelf["x"] = ARRAY
    data = (shelf.place / "x.npy").read_bytes()
    for index in range(MAPPED + 5):
        (shelf.place / f"{index}.npy").write_bytes(data)
        assert shelf[str(index)][0, 0, 1] == ARRAY[0, 0, 1]
    with open("/proc/self/maps") as maps:
        assert sum(str(shelf.place) in line for line in maps) <= MAPPED < 512
    assert np.array_equal(shelf["0"], ARRAY)


def test_an_entry_of_somebody_elses_is_refused(home, tmp_path):
    home.mkdir(mode=0o700)
    (tmp_path / "elsewhere").mkdir()
    cache.place_of("key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not a directory of yours"):
        Shelf("things", "key")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_disk_that_cannot_be_written_is_a_sentence(monkeypatch):
    shelf = Shelf("things", "key")

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(UserError, match=r"things: .* cannot be written \(No space left on device\); set FEDRAY_CACHE"):
        shelf["x"] = ARRAY
