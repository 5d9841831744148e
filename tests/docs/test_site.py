"""The built site: nothing unexpanded, no dead links, every page reachable, code inside its box."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
WIDEST = 100
"""Columns of code that a page shows at 1400 pixels without cutting them."""

pytestmark = pytest.mark.skipif(
    find_spec("mkdocs") is None or find_spec("material") is None,
    reason="the site's builder is not installed: make docs installs it",
)


class Page(HTMLParser):
    """Links, ids, links of the navigation, and blocks of code."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.nav, self.blocks = [], set(), [], []
        self._in_nav = self._in_pre = 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if "id" in given:
            self.ids.add(given["id"])
        link = given.get("href") if tag == "a" else given.get("src")
        if link:
            self.links.append(link)
            if self._in_nav:
                self.nav.append(link)
        self._in_nav += tag == "nav"
        if tag == "pre":
            self._in_pre += 1
            self.blocks.append("")

    def handle_endtag(self, tag):
        self._in_nav -= tag == "nav"
        self._in_pre -= tag == "pre"

    def handle_data(self, data):
        if self._in_pre:
            self.blocks[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(target)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    pages = sorted(path for path in target.rglob("*.html") if path.name != "404.html")
    return target, {path: Page(path.read_text("utf-8")) for path in pages}


def within(target, page, link):
    """The file and the anchor that a link of a page leads to, None where it leaves the site."""
    address, anchor = urldefrag(link)
    if urlsplit(link).scheme or link.startswith("//"):
        return None
    path = page if not address else (page.parent / unquote(urlsplit(address).path)).resolve()
    return (path / "index.html" if path.is_dir() else path), unquote(anchor)


def test_no_snippet_is_left_unexpanded(site):
    for path in site[1]:
        assert not re.search(r"-+8\s*&lt;|8 &lt;", path.read_text("utf-8")), path
    guide = site[0] / "how-to/write-an-adapter/index.html"
    assert "Lfm2" in html.unescape(guide.read_text("utf-8"))


def test_no_link_is_dead(site):
    target, pages = site
    dead = []
    for path, page in pages.items():
        for link in page.links:
            found = within(target, path, link)
            if found is None:
                continue
            file, anchor = found
            known = pages.get(file)
            if not file.is_file() or (anchor and known and anchor not in known.ids):
                dead.append(f"{path.relative_to(target)}: {link}")
    assert dead == []


def test_the_navigation_reaches_every_page(site):
    target, pages = site
    home = target / "index.html"
    found = (within(target, home, link) for link in pages[home].nav)
    reached = {file[0] for file in found if file}
    assert {str(path.relative_to(target)) for path in set(pages) - reached} == set()


def test_code_fits_its_box(site):
    target, pages = site
    wide = {
        f"{path.relative_to(target)}: {line}"
        for path, page in pages.items()
        for block in page.blocks
        for line in block.splitlines()
        if len(line) > WIDEST
    }
    assert wide == set()
