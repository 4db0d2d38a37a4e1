"""The numbers of the rows as an event file of TensorBoard, written in this thread: no queue can fill up."""

import socket
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedray.files import durably
from fedray.record.run import Row


class TensorBoard:
    """One event file in `directory`, a function of the rows: one record for each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory

    def restart(self, rows: Iterable[Row]) -> None:
        """Write a new file, and remove those before it."""
        self.directory.mkdir(exist_ok=True)
        before = list(self.directory.iterdir())
        # The name of a file as TensorBoard knows it; a later one is read after an earlier.
        self.path = self.directory / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        # A reader that has shown the file before forgets what it read there.
        first: list[dict[str, Any]] = [{"file_version": "brain.Event:2"}, {"session_log": {"status": 1}}]  # 1: START
        with durably(self.path) as aside:
            aside.write_bytes(b"".join(map(record, [*first, *map(event, rows)])))
        for path in before:
            path.unlink()

    def add(self, row: Row) -> None:
        with open(self.path, "ab", buffering=0) as file:
            written = record(event(row))
            if file.write(written) != len(written):
                raise OSError(f"{self.path} could not be written in full (is the disk full?)")


def event(row: Row) -> dict[str, Any]:
    """Return a row's numbers as the fields of an `Event`."""
    held_out = {f"held_out/{name}": value for name, value in row["held_out"].items() if name != "clients"}
    scalars = {"loss": row["loss"], "seconds": row["seconds"]["round"], "bytes": row["bytes_down"] + row["bytes_up"]}
    scores = {name: score["value"] for name, score in row["scores"].items()}
    shown = {name: value for name, value in (scalars | held_out | scores).items() if value is not None}
    values = [{"tag": name, "simple_value": value} for name, value in shown.items()]
    return {"step": row["round"], "wall_time": row.get("time", 0.0), "summary": {"value": values}}


def record(fields: Mapping[str, Any]) -> bytes:
    """Return an `Event` as a TFRecord: its length and bytes, a checksum after each."""
    from tensorboardX.proto.event_pb2 import Event  # takes long to import
    from tensorboardX.record_writer import masked_crc32c

    data = Event(**fields).SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in (length, data))
