"""The Python in the README and the guides runs as it stands, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import tokenfuse
from tokenfuse.inference.inputs import video_inputs
from tokenfuse.inference.load import load
from tokenfuse.inference.video import read_video
from tokenfuse.micro import CHECKPOINT, SAMPLE, SAMPLE_QUESTION

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/index.md",
    "docs/tutorial.md",
    "docs/how-to/configure.md",
    "docs/how-to/compare-strategies.md",
    "docs/how-to/use-a-model.md",
    "docs/how-to/write-a-strategy.md",
    "docs/how-to/write-an-adapter.md",
)


@pytest.mark.parametrize("page", PAGES)
def test_python_in_the_pages_runs(page, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert blocks
    monkeypatch.chdir(ROOT)
    model, processor = load(CHECKPOINT)
    names = {
        "tokenfuse": tokenfuse,
        "model": model,
        "processor": processor,
        "video": read_video(SAMPLE),
        "inputs": video_inputs(processor, read_video(SAMPLE), SAMPLE_QUESTION),
        "torch": torch,
        "features": torch.randn(16 * 14 * 14, 32),
    }
    for block in blocks:
        exec(compile(block, page, "exec"), names)
