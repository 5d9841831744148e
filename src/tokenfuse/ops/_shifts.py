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

    Each compares all tokens with those at one distance in their reference frames. At the border
    the grid's last row and column stand in for what lies beyond and are then left out, so that
    all shifts have one shape: a compiler makes one loop of them, in which a token is read once.
    """
    _, height, width, _ = frames.shape
    reach = window // 2
    rows = torch.arange(height, device=frames.device)[:, None]
    cols = torch.arange(width, device=frames.device)
    place = rows * width + cols
    x = frames.to(torch.float32)
    norm = x.square().sum(-1).sqrt()
    near, near_norm = frames.index_select(0, reference), norm.index_select(0, reference)
    best = torch.full_like(norm, -torch.inf)
    index = place.expand(best.shape)
    own = best
    # In row-major order, so that of equals the first wins.
    for down in range(-min(reach, height - 1), min(reach, height - 1) + 1):
        for right in range(-min(reach, width - 1), min(reach, width - 1) + 1):
            i, j = rows + down, cols + right
            there = i.clamp(0, height - 1), j.clamp(0, width - 1)
            y, y_norm = near[:, *there].to(torch.float32), near_norm[:, *there]
            # As ``similarity.cosine`` has it.
            similar = to_steps((x * y).sum(-1) / norm / y_norm)
            similar = torch.where(is_sound(norm) & is_sound(y_norm), similar, NO_MATCH)
            inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
            similar = torch.where(inside, similar, -torch.inf)
            better = similar > best
            index = torch.where(better, place + down * width + right, index)
            best = torch.where(better, similar, best)
            if down == right == 0:
                own = similar
    return best, torch.where(best == NO_MATCH, place, index), own


@functools.cache
def compiled() -> Callable[[Tensor, Tensor, int], Match]:
    """``by_shifts``, compiled once in this process for all sizes.

    Compiled anew for another dtype or window and for one reference frame or many; beyond torch's
    own limit of such variants (``torch._dynamo.config.recompile_limit``) torch warns and runs it
    uncompiled.
    """
    made: Callable[[Tensor, Tensor, int], Match] = torch.compile(by_shifts, dynamic=True)
    return made
