"""The page of supported models says what the kit found, of every family that the kit is run on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import transformers

from kits import KITS
from record import OUTCOMES, digest, kit_tests, write
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


NEWEST = max(RECORDED, key=lambda version: tuple(map(int, version.split("."))))


def test_every_family_is_on_it_and_passed():
    assert set(RECORDED[NEWEST]) == set(KITS)
    for name, entry in RECORDED[NEWEST].items():
        assert entry["passed"] > 50, name
        assert entry["failed"] == 0, name
    assert any(version.startswith(f"{LOWEST}.") for version in RECORDED)


def test_what_was_recorded_is_the_whole_kit_of_today():
    stale = []
    for name, entry in RECORDED[NEWEST].items():
        tests, ran = kit_tests(KITS[name]), sum(entry[outcome] for outcome in OUTCOMES)
        if (entry.get("kit"), ran) != (digest(tests), sum(tests.values())):
            stale.append(name)
    assert not stale, (
        f"the kit has changed since {', '.join(stale)} were recorded, or was not run in full; "
        "renew them: python -m pytest tests/adapters/test_conformance.py --record "
        "docs/results/models.json, then the page"
    )


def test_recording_a_family_leaves_the_others_alone(tmp_path):
    path, cls = tmp_path / "models.json", KITS["llava"]
    before = {"5.1.0": {"llava": {"passed": 1}}, transformers.__version__: {"mine": {"passed": 2}}}
    path.write_text(json.dumps(before))
    tests = kit_tests(cls)
    write(path, {cls: {"passed": 7, "skipped": 1, "failed": 0, "tests": set(tests)}})
    found = json.loads(path.read_text("utf-8"))
    assert found["5.1.0"] == before["5.1.0"]
    assert found[transformers.__version__]["mine"] == {"passed": 2}
    assert found[transformers.__version__]["llava"]["passed"] == 7
    assert found[transformers.__version__]["llava"]["kit"] == digest(tests)


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
        "inside": "sliding windows",
        "tower": None,
        "passed": 7,
        "skipped": 2,
        "failed": 1,
        "kit": "a",
    }
    earlier = entry | {"failed": 0, "kit": "b"}
    broken = {"mine": {"reason": "its own forward raises IndexError"}}
    text = page(
        {"5.7.0": {"mine": earlier}, "5.8.0": broken, "5.9.0": {}, "5.10.0": {"mine": entry}}
    )
    versions = " | ".join(f"transformers 5.{minor}.0" for minor in (10, 9, 8, 7))
    assert f"| DeepStack | batch | {versions} |" in text
    assert f"| inside the tower | inside the LLM | {versions} |" in text
    assert "| mine | – | images, videos | – | – | sliding windows | ✗ | – | ✗ | ✓ |" in text
    assert (
        "| mine | `Mine` | `mine` | 1-D | yes | – "
        "| 7 passed, 2 skipped, **1 failed** | not run | its own forward raises IndexError "
        "| 7 passed, 2 skipped, by an earlier kit |"
    ) in text
