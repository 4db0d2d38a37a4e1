"""Progress of sweeps: in a notebook one element that moves, in a script nothing."""

import re
from pathlib import Path

import nbformat
import pytest

from fedray.cluster.directories import Sweep, Trial
from fedray.cluster.progress import Board, News, Page, followed, measured_in
from fedray.reports.run import Run


@pytest.fixture
def displayed(monkeypatch):
    """What a notebook's page shows, by element, each time that it changes."""
    shown = []

    class Place:
        def __init__(self, value):
            self.states = [value.data]

        def update(self, value):
            self.states.append(value.data)

    def display(value, display_id):
        shown.append(Place(value))
        return shown[-1]

    monkeypatch.setattr("IPython.display.display", display)
    return shown


def trials(toy_config, count, **changes):
    return [Trial(toy_config(seed=seed, **changes), {"seed": seed}, Path(f"seed-{seed}")) for seed in range(count)]


def cells(page):
    return [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)][1:]


def test_a_notebook_shows_one_table_of_trials_that_moves(toy_config, displayed):
    first, second, third = trials(toy_config, 3)
    page = Page(examples=32)
    for trial in (first, second, third):
        page.on_news(News(trial, "waiting", 0))
    page.on_news(News(first, "running", 1, {"loss": 0.5, "fd[digits]": 7.0}))
    page.on_news(News(second, "running", 2, {"loss": 0.25}))
    page.change(now=True)
    (place,) = displayed
    bar = re.search(r'value="([\d.]+)" max="([\d.]+)"', place.states[-1])
    assert float(bar[1]) / float(bar[2]) == pytest.approx(3 / 9)
    inner = '<progress value="1" max="3"></progress> 1 of 3'
    assert cells(place.states[-1]) == [
        ["seed-0", "running", inner, "0.5", "7"],
        ["seed-1", "running", '<progress value="2" max="3"></progress> 2 of 3', "0.25", ""],
        ["seed-2", "waiting", "0 of 3", "", ""],
    ]
    page.on_news(News(first, "running", 2, {"loss": 0.4}))  # not scored: the score stays
    page.on_news(News(first, "complete", 3, {"loss": 0.3}))
    page.on_news(News(second, "failed", 2))
    page.on_news(News(third, "stopped", 1))
    page.end()
    assert cells(place.states[-1]) == [
        ["seed-0", "complete", "3 of 3", "0.3", "7"],
        ["seed-1", "failed", "2 of 3", "0.25", ""],
        ["seed-2", "stopped", "1 of 3", "", ""],
    ]
    assert "3 of 3 trials" in place.states[-1]
    assert "<progress" not in place.states[-1]


def test_of_many_trials_those_that_run_or_failed_are_shown(toy_config, displayed):
    page = Page(examples=32)
    every = trials(toy_config, 50)
    for trial in every:
        page.on_news(News(trial, "waiting", 0))
    for trial in every[:30]:
        page.on_news(News(trial, "complete", 3))
    page.on_news(News(every[30], "failed", 1))
    page.on_news(News(every[31], "running", 1))
    page.change(now=True)
    rows = cells(displayed[0].states[-1])
    assert [row[0] for row in rows[:2]] == ["seed-31", "seed-30"]
    assert len(rows) == 20
    assert "… and 30 more" in displayed[0].states[-1]
    assert "31 of 50 trials" in displayed[0].states[-1]


def test_names_are_text(toy_config, displayed):
    page = Page(examples=32)
    page.on_news(News(Trial(toy_config(), {}, Path("<b>x")), "complete", 3))
    assert "<b>" not in displayed[0].states[-1]


def test_work_is_counted_in_images(toy_config):
    """Of clients that are four times as many rounds: four times the work."""
    board = Board(32)
    short, long = trials(toy_config, 1)[0], trials(toy_config, 2, rounds=12)[1]
    board.add(News(short, "complete", 3))
    board.add(News(long, "running", 0))
    done, total = board.images()
    assert done / total == pytest.approx(1 / 5)


def test_a_script_sees_nothing_and_who_listens_is_told(capsys):
    with followed(32, None) as on_news:
        on_news(None)
    assert capsys.readouterr().out == ""
    heard = []
    with followed(32, heard.append) as on_news:
        on_news("news")
    assert heard == ["news"]


def test_what_was_measured_is_of_the_last_rows():
    rows = [{"loss": 2.0, "scores": {"kid": {"value": 3.0}}}, {"loss": 1.0, "scores": {}}]
    assert measured_in(rows) == {"loss": 1.0, "kid": 3.0}
    assert measured_in([{"loss": None, "scores": {}}]) == {}
    assert measured_in([]) == {}


def test_the_repr_of_a_sweep(tmp_path):
    done = Sweep([Run(tmp_path / "a"), Run(tmp_path / "b")], {}, {"c": "it has no <camera>"})
    assert repr(done) == "<fedray.Sweep · 2 complete · 1 missing>"
    page = done._repr_html_()
    assert "2 complete · 1 missing" in page
    assert "<td>c</td><td>missing</td><td>it has no &lt;camera&gt;</td>" in page


NOTEBOOK = """
import fedray
from dataclasses import replace
small = {**fedray.SMOKE, "rounds": 2, "local_epochs": None, "local_steps": 1}
config = replace(fedray.PRESETS["digits"], **small, actors=0)
done = fedray.sweep(fedray.Experiment(config, {"seed": [0, 1, 2]}), "sweep")
---
done
"""


@pytest.mark.slow
def test_a_sweep_in_a_notebook_is_one_table_and_no_lines(tmp_path):
    from nbclient import NotebookClient

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text.strip()) for text in NOTEBOOK.split("---")])
    NotebookClient(book, resources={"metadata": {"path": str(tmp_path)}}, timeout=500).execute()
    first, second = (cell.outputs for cell in book.cells)
    (page,) = first  # nothing printed, by nobody
    rows = cells(page.data["text/html"])
    assert [row[1:3] for row in rows] == [["complete", "2 of 2"]] * 3
    scores = {Run(path).directory.name: Run(path).rows[-1]["scores"]["fd[digits]"]["value"]
              for path in (tmp_path / "sweep").glob("seed-*")}  # fmt: skip
    assert {row[0]: row[4] for row in rows} == {name: f"{value:.4g}" for name, value in scores.items()}
    assert "<progress" not in page.data["text/html"]
    assert second[0].data["text/plain"] == "<fedray.Sweep · 3 complete>"
    assert second[0].data["text/html"].count("2 of 2 rounds") == 3
