"""Tables of measurements: on the terminal, and for `all.py` in a file."""

import json
import os
import statistics
from pathlib import Path

FILE = "FEDRAY_BENCH_TABLES"  # of the environment: where `all.py` wants the tables


def spread(values: list[float], digits: int = 3) -> str:
    """Write the median of some values, and the least and the largest."""
    middle, least, most = (f"{value:,.{digits}g}" for value in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({least} to {most})"


def table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table in Markdown, and keep it."""
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    print(text)
    if FILE in os.environ:
        path = Path(os.environ[FILE])
        kept = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*kept, text]))
