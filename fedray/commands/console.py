"""Tables on the terminal, and whole in files."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

WIDEST = 10_000  # columns


def show(table: Table) -> None:
    """Print a table; where the output is no terminal, as wide as it is: in a file nothing is cut or folded."""
    console = Console()
    if not console.is_terminal:
        options = console.options.update(max_width=WIDEST)
        console.width = max(console.width, Measurement.get(console, options, table).maximum)
    console.print(table)
