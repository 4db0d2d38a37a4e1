"""What trackers show is what the rows say; and what befalls them does not befall the run."""

import numpy as np
import pytest
from runs import assert_curves_equal_rows, crc32c, curves, fit, sha, train

from fedray.federation.pool import LocalPool
from fedray.record.run import Run


def test_the_checksum_is_that_of_the_standard():
    """RFC 3720, B.4."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_curves_equal_rows_when_a_run_is_stopped_and_resumed(toy_config, tmp_path):
    config = toy_config(rounds=5, held_out_share=0.25, evaluate_every=2)
    for number in range(1, 3):
        train(config, tmp_path, resume=number > 1, rounds=2)
        assert_curves_equal_rows(tmp_path)
        (path,) = (tmp_path / "tensorboard").iterdir()
        with open(path, "ab") as file:  # killed while it was written
            file.write(b"\x4b\0\0\0\0")
    train(config, tmp_path, resume=True)
    assert_curves_equal_rows(tmp_path)
    found, rows = curves(tmp_path), Run.open(tmp_path).rows
    for row in rows:
        assert found["held_out/global", row["round"]] == [np.float32(row["held_out"]["global"])]
    assert {step for _, step in found} == {1, 2, 3, 4, 5}


def test_a_run_goes_on_while_tensorboard_cannot_be_written(toy_config, tmp_path):
    config = toy_config(rounds=5)
    train(config, tmp_path / "quiet")
    place = tmp_path / "run/tensorboard"

    def in_the_way():
        for row in fit(config, LocalPool(config), tmp_path / "run"):
            if row["round"] == 2:  # a file in its place
                place.rename(tmp_path / "aside")
                place.write_text("")
            if row["round"] == 4:
                place.unlink()

    with pytest.warns(UserWarning, match="TensorBoard shows no new rounds for now") as warned:
        in_the_way()
    assert len(warned) == 1
    assert sha(tmp_path / "run") == sha(tmp_path / "quiet")
    assert_curves_equal_rows(tmp_path / "run")


def test_an_event_that_is_written_in_part_is_written_again(toy_config, tmp_path, monkeypatch):
    """As on a disk that is full for a while: so many bytes fit, and then none."""
    import fedray.record.trackers.tensorboard as module

    class Full:
        def __init__(self, path, mode, buffering):
            self.file = open(path, mode, buffering)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            return self.file.write(data[:7])

    def filling():
        config = toy_config()
        for row in fit(config, LocalPool(config), tmp_path):
            if row["round"] == 1:
                monkeypatch.setattr(module, "open", Full, raising=False)
            if row["round"] == 2:
                monkeypatch.undo()

    with pytest.warns(UserWarning, match="could not be written in full"):
        filling()
    assert_curves_equal_rows(tmp_path)


def test_a_tracker_of_another_kind(toy_config, tmp_path):
    """One that fails at every third call still has every round in the end, once, and in order."""

    class Flaky:
        def __init__(self):
            self.shown, self.calls = [], 0

        def fail(self):
            self.calls += 1
            if self.calls % 3 == 1:
                raise ConnectionError(f"away at call {self.calls}")

        def start(self, run):
            self.fail()
            return self.shown[-1] if self.shown else None

        def log(self, entry):
            self.fail()
            self.shown.append(entry.round)

        def finish(self):
            pass

    flaky = Flaky()
    with pytest.warns(UserWarning, match="Flaky shows no new rounds for now: away at call 1") as warned:
        train(toy_config(rounds=8), tmp_path, report_to=[flaky])
    assert len(warned) == 1
    assert flaky.shown == list(range(9))
    assert not (tmp_path / "tensorboard").exists()


def test_no_picture_is_shown_through_a_link(toy_config, tmp_path):
    """A run directory may come from anyone."""

    class Told:
        def start(self, run):
            self.pictures = {}

        def log(self, entry):
            self.pictures |= {(entry.round, name): path for name, path in entry.pictures.items()}

        def finish(self):
            pass

    train(toy_config(rounds=4, evaluate_every=1), tmp_path / "run", rounds=2)
    (tmp_path / "secret").write_text("mine")
    for name in ("samples/round-000001.png", "partition.png"):
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / name).symlink_to(tmp_path / "secret")
    told = Told()
    train(toy_config(rounds=4, evaluate_every=1), tmp_path / "run", resume=True, report_to=[told])
    assert set(told.pictures) == {(number, "samples") for number in (2, 3, 4)}
