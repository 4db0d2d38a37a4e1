"""docs/methods.md: each of its commands is one, and the bytes beside it are those that the command plans."""

import re
import shlex
from pathlib import Path

import pytest

from fedray import menus
from fedray.cli import main

TEXT = (Path(__file__).parents[1] / "docs/methods.md").read_text()
ROWS = [line for line in TEXT.splitlines() if re.search(r"\| `fedray [^`]*` \|$", line)]


def cells(row):
    return [cell.strip() for cell in row.strip("|").split(" | ")]


def command(row):
    return re.findall(r"`(fedray [^`]*)` \|$", row)[0]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: cells(row)[0])
def test_commands_plan_the_bytes_beside_them(row, photos, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = shlex.split(command(row).replace("PHOTOS", shlex.quote(str(photos))))
    assert main([*words[1:], "--dry-run"]) == 0, capsys.readouterr().err
    (down, up) = re.search(r"([\d,]+) down to a client in a round, ([\d,]+) up", capsys.readouterr().out).groups()
    assert [down, up] == [cell for cell in cells(row) if re.fullmatch(r"[\d,]{4,}", cell)]


@pytest.mark.parametrize(
    ("flag", "menu"), [("--algorithm", menus.ALGORITHMS), ("--fold", menus.FOLDS), ("--wire", menus.LINKS)]
)
def test_everything_in_a_menu_has_a_row(flag, menu):
    forms = [form for row in ROWS for form in re.findall(rf"{flag} ([^ `]+)", command(row))]
    named = {name for form in forms for name in re.split("[:,]", form)} | {"fedavg", "mean"}  # these are the defaults
    assert set(menu.classes) <= named
