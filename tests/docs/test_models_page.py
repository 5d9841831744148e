"""The page of supported models says what the kit found, of every family that the kit is run on."""

from __future__ import annotations

import json
import re
from pathlib import Path

from kits import KITS
from tokenfuse.bench.models_page import page

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "docs/results/models.json").read_text("utf-8"))
LOWEST = re.search(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))[1]


def test_the_page_is_current():
    text = (ROOT / "docs/reference/models.md").read_text("utf-8")
    assert text == page(RECORDED), (
        "renew it: python -m tokenfuse.bench.models_page docs/results/models.json "
        "> docs/reference/models.md"
    )


def test_every_family_is_on_it_and_passed():
    newest, *_ = sorted(RECORDED, key=lambda v: tuple(map(int, v.split("."))), reverse=True)
    assert set(RECORDED[newest]) == set(KITS)
    for name, entry in RECORDED[newest].items():
        assert entry["passed"] > 50, name
        assert entry["failed"] == 0, name
    assert any(version.startswith(f"{LOWEST}.") for version in RECORDED)


def test_what_failed_and_what_was_not_run_is_said():
    entry = {
        "model": "Mine",
        "adapter": "mine",
        "modalities": ["image", "video"],
        "frames_as_images": False,
        "attention": ["sdpa"],
        "rope": "1-D",
        "deepstack": True,
        "saliency": False,
        "passed": 7,
        "skipped": 2,
        "failed": 1,
    }
    broken = {"mine": {"reason": "its own forward raises IndexError"}}
    text = page({"5.8.0": broken, "5.9.0": {}, "5.10.0": {"mine": entry}})
    versions = "| transformers 5.10.0 | transformers 5.9.0 | transformers 5.8.0 |"
    assert f"| saliency | batch {versions}" in text
    assert (
        "| mine | `Mine` | `mine` | images, videos | 1-D | yes | – | – "
        "| 7 passed, 2 skipped, **1 failed** | not run | its own forward raises IndexError |"
    ) in text
