"""The documentation as a site: it builds without a warning, links lead somewhere, and nothing is fetched."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import fedray

ROOT = Path(__file__).parents[1]
NAMES = sorted(dir(fedray))
FETCHED = {"script": "src", "img": "src", "iframe": "src", "link": "href"}


class Parts(HTMLParser):
    """A page's anchors, its links, and what a browser fetches for it."""

    def __init__(self, page):
        super().__init__()
        self.anchors, self.links, self.fetched = set(), set(), set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if "id" in found:
            self.anchors.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.add(found["href"])
        if tag in FETCHED and found.get(FETCHED[tag]) and found.get("rel") not in ("next", "prev", "canonical"):
            self.fetched.add(found[FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {page: Parts(page) for page in site.rglob("*.html") if page.name != "404.html"}


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere(pages):
    checked, dead = 0, []
    for page, parts in pages.items():
        for link in parts.links:
            path, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            there = (page.parent / path).resolve() if path else page
            if not there.is_file() or (anchor and there.suffix == ".html" and anchor not in pages[there].anchors):
                dead.append((page.name, link))
            checked += 1
    assert not dead
    assert checked > 500


@pytest.mark.slow
def test_the_site_fetches_nothing(site, pages):
    for page, parts in pages.items():
        for link in parts.fetched:
            assert not re.match(r"([a-z]+:)?//", link), link
            assert (page.parent / unquote(link).partition("?")[0]).resolve().is_relative_to(site)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", sheet.read_text()), sheet


@pytest.mark.slow
def test_every_public_name_is_documented(site, pages):
    assert {f"fedray.{name}" for name in NAMES} <= pages[site / "reference.html"].anchors


def test_every_public_name_has_a_docstring():
    for name in set(NAMES) - {"PRESETS", "SMOKE"}:
        text = getattr(fedray, name).__doc__
        assert text, name
        assert not text.startswith(f"{name}("), name  # a dataclass's own


def test_every_page_is_in_the_order():
    order = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in ROOT.glob("docs/*.md") if f": {page.name}\n" not in order] == []
