"""Pages include files by lines that the site's builder reads, and that no formatter changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
LIKE_AN_INCLUDE = re.compile(r"-\s*8\s*<")
INCLUDE = re.compile(r'--8<-- "([^"\s]+)"')
# Blocks with these words behind their fence are formatted as Python by ruff.
FORMATTED = re.compile(r"^```(?:python|py|pyi|python3|py3)\b[^\n]*\n(.*?)^```", re.DOTALL | re.M)


def mistakes(page):
    """What is wrong with the includes of a page's text."""
    found = []
    for line in filter(LIKE_AN_INCLUDE.search, page.splitlines()):
        include = INCLUDE.fullmatch(line)
        if include is None:
            found.append(f"{line!r} includes nothing")
        elif not (ROOT / include[1]).is_file():
            found.append(f"{include[1]} is no file")
    for block in filter(LIKE_AN_INCLUDE.search, FORMATTED.findall(page)):
        found.append(f"{block!r} is formatted as Python: begin it with ``` {{ .python }}")
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_include_is_one(path):
    assert not mistakes(path.read_text("utf-8"))


def test_the_guide_shows_the_whole_plug_in():
    guide = (ROOT / "docs/how-to/write-an-adapter.md").read_text("utf-8")
    shown = {Path(path).name for path in INCLUDE.findall(guide)}
    assert shown == {"lfm2_vl.py", "plugin.py", "pyproject.toml"}


GOOD = '``` { .python title="README.md" }\n--8<-- "README.md"\n```\n'


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (GOOD.replace("--8<-- ", "--8 < --"), "includes nothing"),
        (GOOD.replace("--8<-- ", "-- 8<--"), "includes nothing"),
        (GOOD.replace('"README.md"\n`', '"nowhere.md"\n`'), "nowhere.md is no file"),
        (GOOD.replace("{ .python", "python").replace(" }", "").replace("``` ", "```"), "as Python"),
    ],
)
def test_a_mangled_include_is_found(page, said):
    assert not mistakes(GOOD)
    (mistake,) = mistakes(page)
    assert said in mistake
