"""Where the rows of an item stand, and how they carry it through vLLM in any dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenfuse.tokens import Grid

BASE = 128
DIGITS = 3
"""Integers below BASE ** DIGITS, some two million, in digits that every float dtype holds."""
CARRIED = 5
"""Integers of a row: time, row and column from the item's start on, the row's number in the item,
and how many rows of the prompt's layout stand before the item's first visual token.
"""


class Item(NamedTuple):
    """An item as the uncompressed prompt has it.

    ``ids (L,)``: with text that the family writes among its tokens; ``positions (L, 3)``: time, row
    and column, the first token at 0; ``frames (L,)``: to which frame each belongs.
    """

    ids: Tensor
    positions: Tensor
    frames: Tensor

    @property
    def extent(self) -> int:
        """How far behind its start the text after an item goes on."""
        return int(self.positions.max()) + 1


def block(grid: Grid, visual: int, factor: float = 1.0) -> Item:
    """Visual tokens alone, their frames ``factor`` positions apart."""
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    positions = torch.stack(axes, dim=-1).flatten(0, 2)
    frames = positions[:, 0].clone()
    positions[:, 0] = (frames.double() * factor).long()
    return Item(torch.full_like(frames, visual), positions, frames)


def stamped(ids: Tensor, grid: Grid, visual: int, end: int) -> Item:
    """Frames of visual tokens with text before each and a marker ``end`` behind it."""
    here = ids == visual
    text = torch.where(here, -1, torch.cumsum(~here, 0) - 1)
    ends = ids == end
    frames = torch.cumsum(ends, 0) - ends.long()
    return Item(ids, with_frames(text[:, None].expand(-1, 3), grid), frames)


def to_digits(values: Tensor) -> Tensor:
    """``(N, CARRIED)`` integers as ``(N, CARRIED * DIGITS)``."""
    powers = BASE ** torch.arange(DIGITS, device=values.device)
    return (values[..., None] // powers % BASE).flatten(1)


def from_digits(digits: Tensor) -> Tensor:
    """What ``to_digits`` has written, in any dtype."""
    powers = BASE ** torch.arange(DIGITS, device=digits.device)
    whole = digits.round().long().view(len(digits), CARRIED, DIGITS)
    return (whole * powers).sum(-1)


def with_frames(positions: Tensor, grid: Grid) -> Tensor:
    """Positions ``(N, 3)`` of a video with its text, frame by frame.

    ``positions``: those of the text if there was no video, -1 for visual tokens. Each frame takes
    as many positions as its longer side, and the text behind it goes on from there.
    """
    visual = positions[:, 0] < 0
    inside = block(grid, 0, factor=0).positions
    # Before a frame stand its own text and that of earlier ones, and each earlier frame's extent.
    frames_before = torch.cumsum(torch.diff(visual.long(), prepend=torch.zeros(1).long()) == 1, 0)
    extent = max(grid[1:])
    text_before = torch.cumsum(~visual, 0)
    found = positions + ((frames_before - visual.long()) * extent)[:, None]
    starts = text_before + (frames_before - 1) * extent
    found[visual] = starts[visual][:, None] + inside
    return found
