"""The book builds without a warning from notebooks executed at the smallest scale, and works offline."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

SOURCES = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=["']((?:https?:)?//[^"']+)["'][^>]*>""")


@pytest.fixture(scope="module")
def html(executed_notebooks, notebook_folder, tmp_path_factory):
    """The folder of the built pages; the same command as in the Snakefile's rule."""
    failed = [name for name, ended in executed_notebooks.items() if ended.returncode]
    assert not failed, f"notebooks that did not run: {failed}"
    folder = tmp_path_factory.mktemp("book")
    shutil.copytree(ROOT / "book", folder / "book")
    shutil.copytree(notebook_folder, folder / "book" / "notebooks")
    builder = str(Path(sys.executable).with_name("jupyter-book"))
    command = [builder, "build", "-q", "-W", "-n", "--keep-going", "--path-output", str(folder), str(folder / "book")]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-5000:]
    return folder / "_build" / "html"


def pages_of(html):
    return sorted(html.rglob("*.html"))


def test_book_has_a_first_page_and_a_search(html):
    assert (html / "index.html").is_file()
    assert (html / "search.html").is_file()
    assert (html / "searchindex.js").is_file()


def test_every_notebook_has_a_page(html):
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        assert (html / "notebooks" / f"{path.stem}.html").is_file()


def fetched(text):
    """Addresses of scripts, style sheets and images that a page takes from the network; a link to read is none."""
    tags = [(match.group(0), match.group(1)) for match in SOURCES.finditer(text)]
    return [address for tag, address in tags if not re.search(r"""rel=["'](?:canonical|license|author)""", tag)]


def test_the_search_for_addresses_finds_them():
    assert fetched('<script defer src="https://cdn.example.org/mathjax.js"></script>')
    assert fetched('<link rel="stylesheet" href="//cdn.example.org/a.css">')
    assert not fetched('<link rel="canonical" href="https://example.org/"><a href="https://doi.org/1">paper</a>')
    assert not fetched('<script src="_static/mathjax.js"></script>')


def test_pages_fetch_nothing_from_the_network(html):
    found = {str(page.relative_to(html)): fetched(page.read_text(encoding="utf-8")) for page in pages_of(html)}
    assert {page: addresses for page, addresses in found.items() if addresses} == {}


def test_local_scripts_and_styles_exist(html):
    pattern = re.compile(r"""<(?:script|link)\b[^>]*?\b(?:src|href)=["']([^"':]+\.(?:js|css))(?:\?[^"']*)?["']""")
    missing = {
        f"{page.relative_to(html)}: {address}"
        for page in pages_of(html)
        for address in pattern.findall(page.read_text(encoding="utf-8"))
        if not (page.parent / address).is_file()
    }
    assert missing == set()


def test_mathematics_has_its_script(html):
    pages = [page.read_text(encoding="utf-8") for page in pages_of(html)]
    with_mathematics = [text for text in pages if 'class="math' in text]
    assert with_mathematics
    script = re.compile(r"""<script[^>]+src=["'][^"']*(?:mathjax|tex-)[^"']*["']""", re.IGNORECASE)
    assert all(script.search(text) for text in with_mathematics)
