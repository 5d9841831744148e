"""The order of a prompt's columns where whole frames of a video change places.

Some models write text around each frame of a video: a timestamp, and markers. A frame then goes
with its text, as one chunk. In others the tokens of a video stand in one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tokenfuse.errors import PromptError


class Reordered(NamedTuple):
    """A video whose frames change places.

    ``row``: of the batch. ``bounds``: the column in which each frame's chunk begins, and the one
    behind the last, T + 1. ``order``: the frames in their new order, T.
    """

    row: int
    bounds: Sequence[int]
    order: Sequence[int]


def chunk_bounds(ids: Sequence[int], frames: Sequence[tuple[int, int]]) -> list[int]:
    """Where the chunk of each frame begins, and the last one ends: T + 1 columns.

    ``ids``: those of the prompt. ``frames``: the first column of each frame's tokens and the one
    behind its last. What follows every frame alike, such as an end marker, closes its chunk; all
    other text between two frames belongs to the later one.

    Raises PromptError where the text before the first frame is not like that before the others.
    """
    starts, ends = zip(*frames, strict=True)
    gaps = [ids[end:start] for end, start in zip(ends, starts[1:], strict=False)]
    if not any(gaps):
        return [*starts, ends[-1]]
    behind = ids[ends[-1] : ends[-1] + max(map(len, gaps))]
    close = _shared([*gaps, behind])
    heads = [gap[close:] for gap in gaps]
    bounds = [start - len(head) for start, head in zip(starts[1:], heads, strict=True)]
    return [_first_bound(ids[: starts[0]], heads), *bounds, ends[-1] + close]


def column_order(shape: tuple[int, int], videos: Sequence[Reordered]) -> Int[Tensor, "B L"]:
    """The caller's column that stands in each place, for prompts ``(B, L)`` of this shape."""
    batch, length = shape
    order = torch.arange(length).repeat(batch, 1)
    for row, bounds, frames in videos:
        chunks = [order[row, a:b] for a, b in pairwise(bounds)]
        order[row, bounds[0] : bounds[-1]] = torch.cat([chunks[frame] for frame in frames])
    return order


def _first_bound(before: Sequence[int], heads: Sequence[Sequence[int]]) -> int:
    """Where the first frame's text begins, among the ids ``before`` its tokens.

    ``heads``: the text before each other frame. It begins with the same token, or where a newline
    stands between frames, with the one after that.
    """
    if not any(heads):
        return len(before)
    for token in heads[0][: min(2, _shared(heads) or 1)]:
        # Timestamps grow, so that the first has no more tokens than the last.
        for place in range(len(before) - 1, max(-1, len(before) - 2 - max(map(len, heads))), -1):
            if before[place] == token:
                return place
    raise PromptError(
        "the frames of a video stand with text between them, and the text before the first frame "
        "begins otherwise than that before the others, so that frames cannot change places; "
        "expected the processor's own text around every frame: let the video stand alone in its "
        "line, or keep frames in the order of time (order: time)"
    )


def _shared(parts: Sequence[Sequence[int]]) -> int:
    """How many ids all parts begin with alike."""
    count = 0
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count
