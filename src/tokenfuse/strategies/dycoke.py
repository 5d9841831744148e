"""DyCoke's temporal stage."""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from tokenfuse.ops.select import spread, top, true_indices
from tokenfuse.ops.similarity import rowwise
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Budgeted, Need
from tokenfuse.strategies._fields import KeepRatio
from tokenfuse.strategies._inside import Layer
from tokenfuse.strategies._layers import CachePruning, StepState
from tokenfuse.tokens import Grid, VisualTokens

WINDOW = 4
"""Frames of which the first stays whole."""
ALIKE = 0.9
"""Cosine of the attention of two steps from which on the choice stays."""


class DyCoke(Budgeted):
    """Keep every fourth frame whole, and of the three between what differs from earlier ones.

    Source: DyCoke, arXiv 2411.15024, its temporal token merging (which drops and does not average).

    With ``cache_layer`` (3 in the paper) its second stage acts while an answer is written: at each
    step the layers from that one on read no visual tokens but the share ``cache_keep_ratio`` (0.3)
    that the new token attended to most in the layer before. While the attention of steps that
    follow each other is alike (a cosine of 0.9 or more) the choice stays, where the published code
    reads everything again. Nothing is removed from the cache, so that it saves no memory; what is
    shown later is chosen from as well. A model called step by step, without ``generate``, chooses
    at every step.

    In each window of four frames the first stays whole. The second and the third are compared with
    the first, the fourth with the third, place by place, and each keeps its ``frame_keep_ratio``
    least similar tokens (the lowest index on ties; the whole part of that number, at least one).
    The last window may be shorter. A zero vector is at right angles to everything.

    ``frame_keep_ratio`` is one minus the published merging ratio: 0.3 where the authors evaluate,
    though their model builder has the reverse, 0.7. In the published code the third frame of the
    last window stays whole, an odd last frame is lost, up to four frames raise an error, and tokens
    leave in order of similarity; all this is mended.

    ``keep_ratio`` keeps exactly ⌈keep_ratio · N⌉ tokens: the first frames whole, the same number
    of each frame between, and what is left over for the least similar of all. Where that is not
    enough for one token of each frame between, those still keep one, and the first frames share
    the rest evenly, as evenly spaced tokens. A budget below one token per frame keeps one of each
    first frame, and one of the frames between that hold the least similar; a budget below one per
    window keeps one of evenly spaced first frames. An item of one frame, such as an image, stays as
    it is.

    Never synchronises with the host.
    """

    name: ClassVar[str] = "dycoke"
    needs: ClassVar[frozenset[Need]] = frozenset({"grid"})
    temporal: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2411.15024"

    frame_keep_ratio: float = Field(
        0.3, gt=0, le=1, description="share of tokens to keep of each frame that is not the first"
    )

    cache_layer: Layer | None = Field(
        None, description="decoder layer from which on answers read the cache in part; none for all"
    )
    cache_keep_ratio: KeepRatio = 0.3

    def cache_pruning(self) -> CachePruning | None:
        return None if self.cache_layer is None else CachePruning(self.cache_layer, self._read)

    def _read(self, scores: Tensor, state: StepState) -> Tensor:
        # 0.2 * 50 may be 9.999999999999998 in floating point.
        count = max(1, int(scores.shape[0] * self.cache_keep_ratio + 1e-9))
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen = chosen.index_fill(0, top(scores, count), True)
        if state.read is not None and state.scores is not None:
            alike = torch.nn.functional.cosine_similarity(scores, state.scores, dim=0) >= ALIKE
            chosen = torch.where(alike, state.read, chosen)
        state.scores, state.read = scores, chosen
        return chosen

    def num_kept(self, grid: Grid) -> int | None:
        if self.keep_ratio is not None:
            return super().num_kept(grid)
        windows, places = _windows(grid[0]), grid[1] * grid[2]
        # 0.7 * 10 may be 6.999999999999999 in floating point: not a reason to keep 6.
        each = max(1, int(self.frame_keep_ratio * places + 1e-9))
        return windows * places + (grid[0] - windows) * each

    def matching_flops(self, grid: Grid, width: int) -> int:
        return (prod(grid) - _windows(grid[0]) * grid[1] * grid[2]) * width

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        frames = tokens.frames.flatten(1, 2)
        windows, places = _windows(frames.shape[0]), frames.shape[1]
        between = frames.shape[0] - windows
        # What whole first frames leave, or one token each, or as many as there are.
        changed = max(count - windows * places, min(between, max(0, count - windows)))
        first = torch.arange(windows, device=frames.device) * WINDOW
        j = torch.arange(between, device=frames.device)
        later = j // (WINDOW - 1) * WINDOW + j % (WINDOW - 1) + 1

        kept = torch.zeros(frames.shape[:2], dtype=torch.bool, device=frames.device)
        kept = kept.index_copy(0, first, _even(windows, places, count - changed, frames.device))
        kept = kept.index_copy(0, later, _least_similar(frames, between, changed))
        return FusionPlan.from_survivors(true_indices(kept.flatten(), count), tokens.num_tokens)


def _windows(frames: int) -> int:
    return -(-frames // WINDOW)


def _even(rows: int, places: int, count: int, device: torch.device) -> Bool[Tensor, "R P"]:
    """``count`` places, evenly spread over the rows and within each."""
    each, more = divmod(count, rows)
    none = torch.zeros(places, dtype=torch.bool, device=device)
    marks = none.index_fill(0, spread(each, places, device), True).repeat(rows, 1)
    longer = none.index_fill(0, spread(each + 1, places, device), True)
    return marks.index_copy(0, spread(more, rows, device), longer.expand(more, -1))


def _least_similar(frames: Tensor, between: int, count: int) -> Bool[Tensor, "L P"]:
    """``count`` places of the ``between`` frames that are not first, equally many of each."""
    windows, places = _windows(frames.shape[0]), frames.shape[1]
    similar = frames.new_zeros(windows, WINDOW - 1, places, dtype=torch.float32)
    # The third frame of a window looks past the second.
    for number, before in ((1, 0), (2, 0), (3, 2)):
        own = frames[number::WINDOW]
        similar[: len(own), number - 1] = rowwise(own, frames[before::WINDOW][: len(own)], 0.0)
    similar = similar.flatten(0, 1)[:between]
    each = max(1, count // max(1, between))
    ranks = torch.argsort(torch.argsort(similar, dim=-1, stable=True), dim=-1)
    chosen = torch.argsort((similar + 4 * (ranks >= each)).flatten(), stable=True)[:count]
    marks = torch.zeros(similar.numel(), dtype=torch.bool, device=frames.device)
    return marks.index_fill(0, chosen, True).view_as(similar)
