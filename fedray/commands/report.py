"""fedray report: one HTML page of runs or sweeps."""

import webbrowser
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tyro

from fedray.errors import UserError
from fedray.record.copies import local
from fedray.storage import located, shown, upload, url_of


@dataclass(frozen=True, kw_only=True)
class Report:
    """Make one page of runs or sweeps: question, answer, tables, curves and samples. It needs no network."""

    places: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs, of sweeps, or folders that hold such; or their URLs."""
    out: Path | None = None
    """The page's file; by default report.html in the first of the directories."""
    open: bool = False
    """Show the page in the web browser."""


def main(arguments: list[str]) -> None:
    """Parse and run `fedray report`."""
    options = tyro.cli(Report, args=arguments, prog="fedray report")
    if not options.places:
        raise UserError("say what to report on: the directory of a run or of a sweep.")
    places = [local(place) for place in options.places]
    first = places[0] if places[0].is_dir() else places[0].parent
    out = first / "report.html" if options.out is None else located(options.out)
    if out.is_dir():
        raise UserError(f"--out {out} is a directory; give the name of a file in it, such as {out / 'report.html'}.")
    if places[0].exists() and not out.parent.is_dir() and url_of(out) is None:
        raise UserError(f"--out {out}: the directory {out.parent} does not exist.")

    if find_spec("plotly") is None:
        raise UserError("the page's charts are drawn by plotly; install it: pip install 'fedray[report]'.")

    from fedray.reports import page  # pandas and plotly take seconds to import: mistakes are told before

    out.parent.mkdir(parents=True, exist_ok=True)
    page.write(places, out)
    upload(out)
    print(f"report    {shown(out)}")
    if options.open:
        webbrowser.open(out.absolute().as_uri())
