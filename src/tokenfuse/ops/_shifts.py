"""The local window shift by shift: the clearest form, slow as it is, and fast once compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tokenfuse.ops.similarity import NO_MATCH, is_sound, to_steps

Match = tuple[Tensor, Tensor, Tensor]


def by_shifts(frames: Tensor, reference: Tensor, window: int) -> Match:
    """``window_match``, one shift of the window after the other.

    Each compares all tokens with those at one distance in their reference frames.
    """
    count, height, width, _ = frames.shape
    reach = window // 2
    place = torch.arange(height * width, device=frames.device).view(height, width)
    best = torch.full((count, height, width), -torch.inf, device=frames.device)
    index = place.expand(count, -1, -1)
    own = best
    near = frames.index_select(0, reference)
    # In row-major order, so that of equals the first wins.
    for down in range(-min(reach, height - 1), min(reach, height - 1) + 1):
        for right in range(-min(reach, width - 1), min(reach, width - 1) + 1):
            rows = slice(max(0, -down), min(height, height - down))
            cols = slice(max(0, -right), min(width, width - right))
            there = (
                slice(rows.start + down, rows.stop + down),
                slice(cols.start + right, cols.stop + right),
            )
            similar = _cosine(frames[:, rows, cols], near[:, there[0], there[1]])
            whole = torch.full_like(best, -torch.inf)
            whole[:, rows, cols] = similar
            matched = torch.zeros_like(place)
            matched[rows, cols] = place[there]
            better = whole > best
            index = torch.where(better, matched, index)
            best = torch.where(better, whole, best)
            if down == right == 0:
                own = whole
    return best, torch.where(best == NO_MATCH, place, index), own


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Of each vector with the one at its place, as ``similarity.cosine`` has it."""
    x, y = x.to(torch.float32), y.to(torch.float32)
    x_norm, y_norm = x.square().sum(-1).sqrt(), y.square().sum(-1).sqrt()
    similar = to_steps((x * y).sum(-1) / x_norm / y_norm)
    return torch.where(is_sound(x_norm) & is_sound(y_norm), similar, NO_MATCH)


@functools.cache
def compiled() -> Callable[[Tensor, Tensor, int], Match]:
    """``by_shifts``, compiled once in this process; each new shape is compiled when it comes."""
    made: Callable[[Tensor, Tensor, int], Match]
    made = torch.compile(by_shifts, fullgraph=True, dynamic=False)
    return made
