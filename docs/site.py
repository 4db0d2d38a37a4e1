"""Hooks of mkdocs: files outside docs/ that are pages, or that pages link to, become part of the site."""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "", "CHANGELOG.md": "", "experiments/LOG.md": ""}
LINK = re.compile(r"(\]\()([^)\s:#]+)")  # [text](path#anchor), and pictures


def place(path: Path) -> str:
    """Return where a file of the repository is in the site."""
    name = path.relative_to(ROOT).as_posix()
    return PAGES.get(name) or name.removeprefix("docs/")


def source(name: str) -> Path:
    """Return the file of the repository that is at this place in the site."""
    outside = {place(ROOT / page): page for page in PAGES}
    return ROOT / outside.get(name, f"docs/{name}")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and the files outside it that pages link to."""
    for page in PAGES:
        files.append(File.generated(config, place(ROOT / page), abs_src_path=str(ROOT / page)))
    linked = {
        (source(page.src_uri).parent / target).resolve()
        for page in files.documentation_pages()
        for _, target in LINK.findall(page.content_string)
    }
    for path in sorted(linked):
        if path.is_file() and files.get_file_from_path(place(path)) is None:
            files.append(File.generated(config, place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links lead to where files are in the site."""
    here = source(page.file.src_uri).parent
    start = os.path.dirname(page.file.src_uri) or "."

    def there(found: re.Match[str]) -> str:
        path = (here / found[2]).resolve()
        return found[1] + (os.path.relpath(place(path), start) if path.is_relative_to(ROOT) else found[2])

    return LINK.sub(there, markdown)
