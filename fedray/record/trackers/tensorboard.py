"""A run as an event file of TensorBoard, written in this thread: no queue can fill up."""

import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedray.files import durably
from fedray.record.trackers import Entry, Tracked


class TensorBoard:
    """One event file in RUN/tensorboard: a record for each round. It is made anew when a run is resumed."""

    path = Path()

    def start(self, run: Tracked) -> None:
        """Write a new file, and remove those before it."""
        directory = run.directory / "tensorboard"
        directory.mkdir(exist_ok=True)
        before = list(directory.iterdir())
        # The name of a file as TensorBoard knows it; a later one is read after an earlier.
        self.path = directory / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        settings = {"step": 0, "wall_time": run.started, "summary": {"value": [text("settings", run.settings.items())]}}
        # A reader that has shown the file before forgets what it read there.
        first: list[dict[str, Any]] = [{"file_version": "brain.Event:2"}, {"session_log": {"status": 1}}]  # 1: START
        with durably(self.path) as aside:
            aside.write_bytes(b"".join(map(record, [*first, settings])))
        for path in before:
            path.unlink()

    def log(self, entry: Entry) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in entry.scalars.items() if entry.round]
        values += [image(name, path) for name, path in entry.pictures.items()]
        if entry.table:
            values.append(text("scores", [list(row.values()) for row in entry.table], list(entry.table[0])))
        written = record({"step": entry.round, "wall_time": entry.time, "summary": {"value": values}})
        with open(self.path, "ab", buffering=0) as file:
            if file.write(written) != len(written):
                raise OSError(f"{self.path} could not be written in full (is the disk full?)")

    def finish(self) -> None:
        pass


def image(name: str, path: Path) -> dict[str, Any]:
    """Return a PNG file as the fields of a summary's value."""
    from PIL import Image

    with Image.open(path) as picture:
        width, height = picture.size
        depth = len(picture.getbands())
    data = {"height": height, "width": width, "colorspace": depth, "encoded_image_string": path.read_bytes()}
    return {"tag": name, "image": data}


def text(name: str, rows: Any, head: Any = ("setting", "value")) -> dict[str, Any]:
    """Return a table as the fields of a summary's value, as the text plugin shows it: in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines)
    tensor = {"dtype": 7, "string_val": [table.encode()], "tensor_shape": {"dim": [{"size": 1}]}}  # 7: DT_STRING
    return {"tag": name, "tensor": tensor, "metadata": {"plugin_data": {"plugin_name": "text"}}}


def record(fields: Mapping[str, Any]) -> bytes:
    """Return an `Event` as a TFRecord: its length and bytes, a checksum after each."""
    from tensorboardX.proto.event_pb2 import Event  # takes long to import
    from tensorboardX.record_writer import masked_crc32c

    data = Event(**fields).SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in (length, data))
