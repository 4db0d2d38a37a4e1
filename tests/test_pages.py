"""What the pages quote is what fedray says, and the commands that they show are ones that it takes."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import tyro

import fedray
from fedray import PRESETS, cli
from fedray.record.run import Run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


@cache
def said():
    """All texts in fedray's source, and the files that start clusters; a value that is put in is …"""
    found = [path.read_text() for path in [ROOT / "cluster.yaml", *(ROOT / "experiments/cluster").iterdir()]]
    for path in Path(fedray.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(str(getattr(part, "value", "…")) if isinstance(part, ast.Constant) else "…"
                                     for part in node.values))  # fmt: skip
    return found


def quoted(page):
    """What stands in quotation marks in the first column of a page's tables."""
    return [
        text
        for line in (ROOT / page).read_text().splitlines()
        if line.startswith("| ")
        for text in re.findall(r'"([^"]+)"', line.split(" | ")[0])
    ]


def is_said(message):
    return any(message in text for text in said())


def test_messages_that_are_quoted_are_said():
    messages = quoted("docs/troubleshooting.md")
    assert len(messages) > 15
    for message in messages:
        assert is_said(message), message
    assert not is_said("at most … fitt")
    assert not is_said("client actors end and again")


def commands(page):
    """The lines of a page that call fedray: in blocks, and those in backticks that are whole."""
    text = page.read_text().replace("\\\n", " ")
    blocks = "".join(re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    inline = re.findall(r"`((?:\.venv/bin/)?fedray [a-z]+ [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in [*blocks.splitlines(), *inline]:
        found = re.search(r"(?:^|[\s/'\"])fedray (([a-z]+)\b.*)$", re.split(" [#>]", line)[0])
        if found and found[2] in cli.COMMANDS and not re.search(r"…|\.\.\.|\||\[", found[1]):
            whole = found[1].count("'") % 2 == found[1].count('"') % 2 == 0  # or in quotes that began before it
            yield found[1] if whole else found[1].rstrip("'\" ")


SHOWN = [(page, command) for page in PAGES for command in dict.fromkeys(commands(page))]


class Parsed(Exception):
    """The command was parsed: it is not to be run."""


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that has begun, for each command that trains."""
    places = {}
    for command, preset in (("train", "digits"), ("finetune", "sd")):
        places[command] = tmp_path_factory.mktemp("begun") / command
        Run(places[command]).create(PRESETS[preset], {}, {})
    return places


@pytest.fixture
def parse(monkeypatch, begun, tmp_path):
    """Parse a command with fedray's own parser; what files a page names is not there."""
    real = tyro.cli

    def parsed(*arguments, **options):
        real(*arguments, **options)
        raise Parsed

    def take(command):
        words = shlex.split(command)
        if words[0] in begun and "--resume" in words:
            words[words.index("--resume") + 1] = str(begun[words[0]])
        monkeypatch.setattr(tyro, "cli", parsed)
        try:
            cli.main(words)
        except Parsed:
            return True
        except SystemExit as end:
            return end.code == 0  # of --help
        finally:
            monkeypatch.setattr(tyro, "cli", real)
        return False

    return take


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=[f"{page.stem}-{n}" for n, (page, _) in enumerate(SHOWN)])
def test_commands_of_the_pages_are_parsed(page, command, parse, capsys):
    file = re.search(r"(\S+\.(?:py|yaml))\b", command)
    if file and not (ROOT / file[1]).exists():
        pytest.skip(f"a file of the reader's own: {file[1]}")
    assert parse(command), capsys.readouterr().err


def test_a_command_with_a_mistake_is_not_parsed(parse):
    assert len(SHOWN) > 40
    for command in ("train --clints 4", "stop", "attach runs/a runs/b", "runs --adress auto", "trian"):
        assert not parse(command)
