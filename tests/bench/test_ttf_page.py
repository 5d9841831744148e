"""The page of what ``ttf`` removes of real videos, and what holds on their features."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenfuse.bench.ttf_page import main, read, section
from tokenfuse.errors import ConfigError
from tokenfuse.strategies.ttf import TTF

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parents[1] / "data"
PAGE = Path(__file__).parents[2] / "docs/results/ttf-reduction.md"
SLICES = sorted(DATA.glob("*-slice.safetensors"))


@pytest.mark.parametrize("path", SLICES, ids=lambda path: path.stem)
def test_a_slice_asked_again_gives_the_committed_tables(path):
    assert section(path.stem, *read(path)) in PAGE.read_text("utf-8")


def test_the_page_of_the_slices_is_made_by_its_command():
    text = main([str(path) for path in SLICES])
    assert text.count("\n## ") == len(SLICES) == 2
    assert text.startswith("# What `ttf` removes")


@given(
    st.sampled_from(SLICES),
    st.fixed_dictionaries(
        {
            "anchor": st.sampled_from(["auto", "first", 3]),
            "segments": st.sampled_from(["single", "auto"]),
            "reanchor": st.sampled_from([0.3, 0.5, 0.7, 0.9]),
            "guard": st.sampled_from(["none", "motion"]),
            "window": st.sampled_from([1, 3, 5]),
            "min_tokens_per_frame": st.sampled_from([0, 5]),
        }
    ),
    st.booleans(),
)
def test_a_higher_threshold_removes_no_more_of_a_real_video(path, options, chained):
    tokens, _ = read(path)
    if chained:
        options |= {"reference": "previous", "anchor": "first"}
    kept = [
        TTF(threshold=threshold, **options).plan(tokens).keep_mask
        for threshold in torch.linspace(0.3, 1.0, 8).tolist()
    ]
    assert all(bool((more | ~fewer).all()) for fewer, more in itertools.pairwise(kept))


@pytest.mark.parametrize("content", [b"", b"no safetensors file"])
def test_what_holds_no_features_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="no safetensors file with features"):
        read(path)
