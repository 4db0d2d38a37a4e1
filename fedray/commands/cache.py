"""fedray cache: what this machine has cached of images and references, and its removal."""

import time
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedray import cache
from fedray.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Cache:
    """List what this machine has cached: images, labels, latents and embeddings, features that scores compare with,
    converted bases, copies of runs at URLs.

    The cache is in $FEDRAY_CACHE, else in ~/.cache/fedray. All of it can be made again, or is in a storage.
    """

    clean: bool = False
    """Remove entries, instead of listing them."""
    unused_days: float = 0.0
    """Only entries that no run has used for so many days."""


def main(arguments: list[str]) -> None:
    """Parse and run `fedray cache`."""
    options = tyro.cli(Cache, args=arguments, prog="fedray cache")
    if not options.unused_days >= 0:
        raise UserError(f"--unused-days {options.unused_days}: it must not be negative.")
    now = time.time()
    found = [entry for entry in cache.entries() if now - entry.used >= options.unused_days * 86_400]
    if options.clean:
        removed = [entry for entry in found if cache.remove(entry)]
        print(f"removed   {len(removed)} entries, {sum(entry.size for entry in removed) / 1e6:,.1f} MB")
        if len(removed) < len(found):
            print(f"kept      {len(found) - len(removed)} entries that another process is at")
        return
    table = Table("entry", "what", "MB", "unused for", title=f"{cache.home()}", title_justify="left")
    for entry in found:
        age = max(0.0, now - entry.used)
        table.add_row(entry.path.name, escape(entry.what), f"{entry.size / 1e6:,.1f}", _duration(age))
    Console().print(table)
    print(f"{len(found)} entries, {sum(entry.size for entry in found) / 1e6:,.1f} MB; remove them with --clean")


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3_600)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} minutes"
