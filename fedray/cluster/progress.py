"""Progress of a sweep, on a terminal or in a notebook."""

import html
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedray.cluster.directories import Trial
from fedray.cluster.trials import images_planned
from fedray.record.run import Row
from fedray.reports.progress import Live, table
from fedray.scores.metrics import deciding

SHOWN = 20  # trials in a notebook


Measured = Mapping[str, float]  # loss and scores


class News(NamedTuple):
    """Progress of one trial. `outcome`: waiting, running, complete, failed or stopped."""

    trial: Trial
    outcome: str
    rounds: int  # complete ones
    measured: Measured = MappingProxyType({})  # of the last round, where that has come


OnNews = Callable[[News], None]


def measured_in(rows: list[Row]) -> Measured:
    """Return what the last row has measured, and of scores the last that any has."""
    scores: Row = next((row["scores"] for row in reversed(rows) if row["scores"]), {})
    found = {name: score["value"] for name, score in scores.items()}
    return found | {"loss": rows[-1]["loss"]} if rows and rows[-1]["loss"] is not None else found


@contextmanager
def followed(examples: int, on_news: OnNews | None) -> Iterator[OnNews]:
    """Yield what is given; where nothing is, and somebody looks on, progress."""
    console = Console()
    if on_news is not None:
        yield on_news
    elif console.is_jupyter:
        page = Page(examples)
        try:
            yield page.on_news
        finally:
            page.end()
    elif console.is_terminal:
        with on_terminal(examples) as made:
            yield made
    else:
        yield lambda news: None


class Board:
    """What is known of the trials of a sweep, by the name of their directories, in the order that they were told in."""

    def __init__(self, examples: int) -> None:
        self.examples = examples  # of the dataset
        self.latest: dict[str, News] = {}

    def add(self, news: News) -> None:
        """Take note of news; what was measured last stays."""
        name = news.trial.directory.name
        before = self.latest.get(name)
        self.latest[name] = news._replace(measured={**(before.measured if before else {}), **news.measured})

    @property
    def over(self) -> list[News]:
        """Trials that are."""
        return [news for news in self.latest.values() if news.outcome not in ("waiting", "running")]

    def images(self) -> tuple[float, int]:
        """Return how many images have been trained on, and how many will be at most."""
        done, total = 0.0, 0
        for news in self.latest.values():
            planned = images_planned(news.trial.config, self.examples)
            done += planned * (1 if news in self.over else news.rounds / news.trial.config.rounds)
            total += planned
        return done, total


@contextmanager
def on_terminal(examples: int) -> Iterator[OnNews]:
    """Show a line per running trial, and one for the sweep with the time left, by the images that trials train on."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, transient=True) as bar:
        whole = bar.add_task("starting", total=None)
        board, lines = Board(examples), dict[str, TaskID]()

        def on_news(news: News) -> None:
            name, rounds = news.trial.directory.name, news.trial.config.rounds
            board.add(news)
            if news.outcome == "running":
                lines[name] = lines.get(name) or bar.add_task(name, total=rounds)
                bar.update(lines[name], completed=news.rounds, description=f"{name}  round {news.rounds}/{rounds}")
            elif name in lines:
                bar.remove_task(lines.pop(name))
            if news.outcome not in ("running", "waiting"):
                bar.console.print(f"{news.outcome:9} {name}  {news.rounds} of {rounds} rounds", highlight=False)
            done, total = board.images()
            text = f"{len(board.over)} of {len(board.latest)} trials"
            bar.update(whole, total=total, completed=done, description=text)

        yield on_news


class Page(Live):
    """Progress as HTML in a notebook: a bar for the sweep, and a table of its trials that moves."""

    def __init__(self, examples: int) -> None:
        self.board = Board(examples)
        self.began = time.monotonic()
        self.ended = False
        super().__init__()

    def on_news(self, news: News) -> None:
        self.board.add(news)
        self.change(now=news.outcome != "running")

    def end(self) -> None:
        """Leave the table, without the bars."""
        self.ended = True
        self.change(now=True)

    def html(self) -> str:
        every, over = list(self.board.latest.values()), self.board.over
        done, total = self.board.images()
        bar = "" if self.ended or not total else f'<progress value="{done:g}" max="{total:g}"></progress> '
        text = f"{len(over)} of {len(every)} trials, {time.monotonic() - self.began:.0f} s" if every else "starting"
        order = ("running", "failed", "waiting", "stopped", "complete")
        shown = every if len(every) <= SHOWN else sorted(every, key=lambda news: order.index(news.outcome))[:SHOWN]
        scores = deciding(dict.fromkeys(name for news in every for name in news.measured if name != "loss"))
        names = ["loss", *([scores] if scores else [])]
        lines = [self._line(news, names) for news in shown]
        more = f"<div>… and {len(every) - len(shown)} more</div>" if len(shown) < len(every) else ""
        return f"<div>{bar}{text}</div>{table(['trial', '', 'rounds', *names], lines) if lines else ''}{more}"

    def _line(self, news: News, names: list[str]) -> list[str]:
        rounds = news.trial.config.rounds
        bar = f'<progress value="{news.rounds}" max="{rounds}"></progress> ' if news.outcome == "running" else ""
        values = [f"{news.measured[name]:.4g}" if name in news.measured else "" for name in names]
        return [html.escape(news.trial.directory.name), news.outcome, f"{bar}{news.rounds} of {rounds}", *values]
