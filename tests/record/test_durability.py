"""A power cut takes whatever was not flushed: what counts is flushed before anything relies on it."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from runs import train

from fedray.files import is_content, remove_leftovers
from fedray.record.run import Run


def test_files_are_flushed_before_they_are_renamed_and_their_directories_after(toy_config, tmp_path, monkeypatch):
    """In each thread; and in this order: the memories of a round, its checkpoint, its row."""
    seen = []  # (thread, what, inode, name)

    def note(what, inode, name):
        seen.append((threading.get_ident(), what, inode, name))

    def fsync(descriptor, right=os.fsync):
        right(descriptor)
        note("flush", os.fstat(descriptor).st_ino, os.readlink(f"/proc/self/fd/{descriptor}"))

    def replace(path, target, right=Path.replace):
        inode = path.stat().st_ino
        right(path, target)
        note("rename", inode, str(target))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    out = tmp_path / "run"
    config = toy_config(keep_optimizer=True, evaluate_samples=0)
    train(config, out)
    for thread in {each[0] for each in seen}:
        mine = [each[1:] for each in seen if each[0] == thread]
        for index, (what, inode, name) in enumerate(mine):
            if what == "rename":
                assert mine[index - 1][:2] == ("flush", inode), name
                assert mine[index + 1][:2] == ("flush", Path(name).parent.stat().st_ino), name
    done = [name for _, what, _, name in seen if what == "rename" or name.endswith("rounds.jsonl")]
    memories, checkpoints, rows = (
        [index for index, name in enumerate(done) if part in name] for part in ("/clients/", "/checkpoints/", "rounds.")
    )
    assert [len(each) for each in (memories, checkpoints, rows)] == [12, 3, 3]
    for number in range(3):
        assert max(memories[4 * number : 4 * number + 4]) < checkpoints[number] < rows[number]
    assert len(Run.open(out).rows) == 3


@pytest.mark.slow
def test_what_safetensors_leaves_when_it_is_killed_is_removed(tmp_path):
    """It writes to a file of its own first."""
    write = (
        "import numpy, sys; from safetensors.numpy import save_file; save_file({'a': numpy.ones(10**8)}, sys.argv[1])"
    )
    process = subprocess.Popen([sys.executable, "-c", write, str(tmp_path / "a.safetensors")])
    while not (left := list(tmp_path.iterdir())):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert [is_content(path) for path in left] == [False]
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
