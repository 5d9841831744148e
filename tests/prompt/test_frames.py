"""Frames that change places in a prompt take their text along."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
import tokenfuse
from families import FAMILIES
from tokenfuse import FusionPlan, Strategy
from tokenfuse.errors import PromptError
from tokenfuse.prompt.frames import Reordered, chunk_bounds, column_order
from tokenfuse.registry import default_registry

CLOSE, OPEN, LEFT, SECONDS, TOKEN = 1, 2, 3, 4, 9


class Reversed(Strategy):
    """Keeps every token, and lets the last frame stand first, the first one last."""

    name: ClassVar[str] = "reversed"

    def plan(self, tokens):
        frames = torch.arange(tokens.grid[0])
        plan = FusionPlan.identity(tokens.num_tokens)
        return plan if len(frames) == 1 else replace(plan, frame_order=frames.flip(0))


def timed(*digits, tokens=2):
    """Ids of frames with timestamps, and where each frame's tokens stand."""
    ids, frames = [50, 51], []
    for number in digits:
        ids += [LEFT, *number, SECONDS, OPEN]
        frames.append((len(ids), len(ids) + tokens))
        ids += [TOKEN] * tokens + [CLOSE]
    return ids, frames


def test_a_timestamp_goes_with_its_frame_whatever_its_length():
    ids, frames = timed([20], [20, 21], [20, 21, 22])
    ids += [CLOSE, 52]
    bounds = chunk_bounds(ids, frames)
    chunks = [ids[a:b] for a, b in pairwise(bounds)]
    assert [chunk[0] for chunk in chunks] == [LEFT] * 3
    assert [chunk[-1] for chunk in chunks] == [CLOSE] * 3
    assert ids[bounds[-1] :] == [CLOSE, 52]


def test_frames_in_one_block_have_no_text():
    assert chunk_bounds([5, 9, 9, 9, 9, 6], [(1, 3), (3, 5)]) == [1, 3, 5]


def test_a_newline_between_frames_may_be_missing_before_the_first():
    # "Frame1: … \n Frame2: …": the word that begins each frame is found.
    ids = [50, 30, 31, 9, 9, 1, 40, 30, 32, 9, 9, 1, 40, 30, 33, 9, 9, 1, 60]
    bounds = chunk_bounds(ids, [(3, 5), (9, 11), (15, 17)])
    assert bounds == [1, 6, 12, 18]


def test_a_first_frame_with_other_text_is_refused():
    ids, frames = timed([20], [21])
    ids[2] = 77
    with pytest.raises(PromptError, match="order: time"):
        chunk_bounds([*ids, 52], frames)


@given(st.data())
def test_a_column_order_moves_whole_chunks_and_nothing_else(data):
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
    frames = data.draw(st.permutations(range(len(sizes))))
    bounds = [3]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    order = column_order((2, bounds[-1] + 2), [Reordered(1, bounds, frames)])
    assert order[0].tolist() == list(range(bounds[-1] + 2))
    expected = [c for f in frames for c in range(bounds[f], bounds[f + 1])]
    assert order[1].tolist() == [0, 1, 2, *expected, bounds[-1], bounds[-1] + 1]


def test_the_processors_own_prompt_reads_as_if_the_frames_were_written_in_that_order():
    inputs = models.one_video(patches=3)
    short = tokenfuse.compress(models.build(), inputs, Reversed())
    tokenizer = models.processor().tokenizer
    before, after = (tokenizer.decode(x["input_ids"][0]) for x in (inputs, short))
    pad = "<|video_pad|>"
    stamps = [part for part in before.split("<|vision_start|>") if "seconds" in part]
    times = [text[text.rindex("<", 0, text.index(" seconds")) :] for text in stamps]
    assert len(times) == 3
    places = [after.index(time) for time in times]
    assert places == sorted(places, reverse=True)
    assert after.count(pad) == before.count(pad)
    assert sorted(after) == sorted(before)
    # The question still stands last.
    assert after[-20:] == before[-20:]


def test_the_timestamp_behind_a_frame_of_glm4v_goes_with_it():
    family = FAMILIES["glm4v"]
    adapter = default_registry().adapter(family.build("sdpa"))
    inputs = family.prompt([[("text", 1), ("video", 1), ("text", 2)]], "left")
    ids = inputs["input_ids"][0].tolist()
    here = adapter.read(inputs).here["video"][0].nonzero().flatten().tolist()
    frames = [(here[i], here[i + 5] + 1) for i in range(0, len(here), 6)]
    bounds = adapter.frame_bounds(ids, frames)
    config = adapter.model.config
    chunks = [ids[a:b] for a, b in pairwise(bounds)]
    stamps = [chunk[-1] for chunk in chunks]
    assert [chunk[0] for chunk in chunks] == [config.image_start_token_id] * 3
    assert [chunk[7] for chunk in chunks] == [config.image_end_token_id] * 3
    assert stamps == [stamps[0], stamps[0] + 1, stamps[0] + 2], "one second after the other"
    assert ids[bounds[-1]] == config.video_end_token_id
    without = [token for token in ids if token != config.video_end_token_id]
    with pytest.raises(PromptError, match="order: time"):
        adapter.frame_bounds(without, frames)
