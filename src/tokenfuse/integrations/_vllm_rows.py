"""What rows of vLLM's encoder carry beside their features: integers that every dtype holds."""

from __future__ import annotations

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
    t, h, w = grid
    visual = positions[:, 0] < 0
    place = torch.arange(t * h * w)
    inside = torch.stack([place * 0, place // w % h, place % w], dim=-1)
    # Before a frame stand its own text and that of earlier ones, and each earlier frame's extent.
    frames_before = torch.cumsum(torch.diff(visual.long(), prepend=torch.zeros(1).long()) == 1, 0)
    extent = max(h, w)
    text_before = torch.cumsum(~visual, 0)
    found = positions + ((frames_before - visual.long()) * extent)[:, None]
    starts = text_before + (frames_before - 1) * extent
    found[visual] = starts[visual][:, None] + inside
    return found
