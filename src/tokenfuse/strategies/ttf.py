"""Temporal Token Fusion."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from tokenfuse.kernels.window import window_match
from tokenfuse.plan import FusionPlan, Reduce
from tokenfuse.strategies.base import Strategy
from tokenfuse.strategies.select import budget, first_argmax, true_indices
from tokenfuse.tokens import Grid, VisualTokens

REANCHOR_ROUNDS = 4
"""Times that frames which the anchors so far do not explain may be given anchors of their own."""


class TTF(Strategy):
    """Fuse tokens that repeat what a local window of an anchor frame already says.

    Source: Temporal Token Fusion, arXiv 2605.07355. Its abstract fixes the automatic anchor, the
    local window, the cosine threshold, fusion before the LLM and the kept coordinates. The medoid
    anchor, re-anchoring after scene changes, tie-breaking and the keep-ratio mode are ours.

    Each token of a non-anchor frame is compared with the ``window × window`` neighbourhood of its
    place in the anchor frame. Where the greatest cosine exceeds ``threshold``, the token leaves and
    belongs to its best match. A zero vector matches nothing. ``threshold >= 1`` keeps everything.

    ``segments="auto"``: frames of which less than ``reanchor`` matched form runs, and each run gets
    an anchor of its own, up to REANCHOR_ROUNDS times. ``"single"`` is the published form.

    ``reference="previous"`` compares each frame with the one before instead, and a fused token
    belongs to whatever its match belongs to; the anchor is then the first frame.

    ``keep_ratio`` replaces the threshold by the value that leaves exactly ⌈keep_ratio · N⌉ survivors:
    first the anchors, then the ``min_tokens_per_frame`` least similar of each frame, then the least
    similar of all (lowest index on ties). Anchors of scene changes are added as long as the budget
    holds them (``threshold`` still says what counts as matched). A budget below one frame keeps the
    anchor tokens that absorbed most and fuses every other, with all it absorbed, into its most
    similar surviving one. This mode never synchronises with the host; threshold mode does once, and
    once more per round of re-anchoring.
    """

    name: ClassVar[str] = "ttf"

    threshold: float = Field(0.7, ge=-1, description="cosine above which a token is fused")
    window: int = Field(3, ge=1, description="side of the search window in tokens, odd")
    anchor: Literal["auto", "first"] | int = Field(
        "auto", description="anchor frame: the medoid, the first, or an index"
    )
    reference: Literal["anchor", "previous"] = Field(
        "anchor", description="frame that each frame is matched against"
    )
    reduce: Reduce = Field(
        "mean", description="mean: a survivor is the mean of all it absorbed; keep: it stays as it was"
    )
    segments: Literal["auto", "single"] = Field(
        "auto", description="auto: new anchors after scene changes; single: one anchor"
    )
    reanchor: float = Field(
        0.1, ge=0, le=1, description="matched share of a frame below which it needs a new anchor"
    )
    keep_ratio: float | None = Field(
        None, gt=0, le=1, description="share of tokens to keep, instead of the threshold"
    )
    min_tokens_per_frame: int = Field(
        0, ge=0, description="least similar tokens of each frame that always stay"
    )

    @field_validator("window")
    @classmethod
    def _odd(cls, window: int) -> int:
        if window % 2 == 0:
            raise ValueError(f"a window has a middle, so it must be odd: {window - 1} or {window + 1}")
        return window

    @model_validator(mode="after")
    def _consistent(self) -> TTF:
        if self.reference == "previous" and isinstance(self.anchor, int):
            raise ValueError(
                f"reference: previous starts at the first frame, so anchor: {self.anchor} has no "
                "meaning; use anchor: first"
            )
        return self

    def fuse(self, plan: FusionPlan, x: Tensor) -> Tensor:
        return plan.fuse(x, self.reduce)

    def num_kept(self, grid: Grid) -> int | None:
        n = grid[0] * grid[1] * grid[2]
        if self.keep_ratio is not None:
            return budget(self.keep_ratio, n)
        return n if self.threshold >= 1 else None

    def matching_flops(self, grid: Grid, width: int) -> int:
        t, h, w = grid
        return (t - 1) * h * w * self.window**2 * width

    @torch.no_grad()
    def plan(self, tokens: VisualTokens) -> FusionPlan:
        n, grid = tokens.num_tokens, tokens.grid
        if self.num_kept(grid) == n or (grid[0] == 1 and self.keep_ratio is None):
            return FusionPlan.identity(n, tokens.features.device)
        matches = _Matches(self, tokens)
        if self.keep_ratio is not None:
            return matches.plan_by_budget(budget(self.keep_ratio, n))
        return matches.plan_by_threshold()


class _Matches:
    """Anchors and best matches of one item, refined round by round.

    ``anchor_of (T,)``: the anchor frame of each frame. ``similarity (T, P)`` fp32 and
    ``match (T, P)``: the best match of each of the ``P = H * W`` places, as a source index.
    """

    def __init__(self, config: TTF, tokens: VisualTokens) -> None:
        self.config = config
        self.frames = tokens.frames
        self.grid = tokens.grid
        self.places = tokens.grid[1] * tokens.grid[2]
        self.index = torch.arange(tokens.grid[0], device=tokens.features.device)
        self.closeness = self._closeness() if self._chained or config.anchor == "auto" else None
        self.anchor_of = self._first_anchor().expand(tokens.grid[0])
        self._match(shared=True)

    @property
    def _chained(self) -> bool:
        return self.config.reference == "previous"

    def plan_by_threshold(self) -> FusionPlan:
        rounds = REANCHOR_ROUNDS if self.config.segments == "auto" else 0
        while True:
            kept = self._kept_by_threshold()
            lost = self._lost()
            # The one host synchronisation: how many survive, and whether a scene has no anchor.
            count, open_frames = torch.stack([kept.sum(), lost.sum()]).tolist()
            if not open_frames or not rounds:
                break
            self._reanchor(lost)
            rounds -= 1
        survivors = true_indices(kept, count)
        return FusionPlan.from_roots(survivors, self._roots(kept))

    def plan_by_budget(self, count: int) -> FusionPlan:
        if self.config.segments == "auto" and (room := count // self.places - 1) > 0:
            for _ in range(1 if self._chained else REANCHOR_ROUNDS):
                lost = self._lost()
                # Reading a flag costs nothing on a CPU; on a GPU a needless round is cheaper.
                if lost.device.type == "cpu" and not bool(lost.any()):
                    break
                self._reanchor(lost, room)
        if count < self.places:
            return self._part_of_one_frame(count)
        anchors, floor = self._is_anchor[:, None], self._floor()
        # Anchors first, then the floor, then the least similar.
        key = torch.where(floor, self.similarity - 8, self.similarity)
        key = torch.where(anchors, -16.0, key).flatten()
        order = torch.argsort(key, stable=True)[:count]
        kept = torch.zeros_like(key, dtype=torch.bool).index_fill(0, order, True)
        return FusionPlan.from_roots(order.sort().values, self._roots(kept))

    @property
    def _is_anchor(self) -> Tensor:
        return self.anchor_of == self.index

    def _closeness(self) -> Tensor:
        """Cosine of every two frames' mean vectors, ``(T, T)``, symmetric to the bit."""
        means = self.frames.flatten(1, 2).mean(1, dtype=torch.float32)
        means = torch.nn.functional.normalize(means, dim=-1)
        product = means @ means.T
        return product + product.T

    def _first_anchor(self) -> Tensor:
        anchor, last = self.config.anchor, self.grid[0] - 1
        if isinstance(anchor, int):
            if not -last - 1 <= anchor <= last:
                from tokenfuse.errors import ConfigError

                raise ConfigError(
                    f"anchor: {anchor} is not a frame of a video of {last + 1} temporal patches; "
                    f'expected 0..{last}, "auto" or "first"'
                )
            return self.index[anchor]
        if anchor == "first" or self._chained or self.closeness is None:
            return self.index[0]
        return first_argmax(self.closeness.sum(-1))

    def _match(self, *, shared: bool = False) -> None:
        if self._chained:
            # The first frame's own match is never used: it is an anchor.
            reference = torch.cat([self.index[:1], self.index[:-1]])
        else:
            reference = self.anchor_of
        if shared and not self._chained:
            frames = self.frames.index_select(0, reference[:1])
        else:
            frames = self.frames.index_select(0, reference)
        similarity, place = window_match(self.frames, frames, self.config.window)
        self.similarity = similarity.flatten(1)
        self.match = place.flatten(1) + reference[:, None] * self.places

    def _lost(self) -> Tensor:
        """Frames that their anchor does not explain, ``(T,)`` bool."""
        matched = (self.similarity > self.config.threshold).sum(-1)
        return (matched < self.config.reanchor * self.places) & ~self._is_anchor

    def _reanchor(self, lost: Tensor, room: int | None = None) -> None:
        """Give each run of lost frames an anchor of its own; at most ``room`` anchors beyond the first."""
        if self._chained:
            begins, members = lost, torch.ones_like(lost)
        else:
            begins = lost & ~torch.cat([lost.new_zeros(1), lost[:-1]])
            # A run also ends where frames come to stand with another anchor.
            moved = torch.cat([lost.new_zeros(1), self.anchor_of[1:] != self.anchor_of[:-1]])
            begins, members = begins | (lost & moved), lost
        run = begins.cumsum(0)
        if room is not None:
            spent = self._is_anchor.sum() - 1
            members = members & (run + spent <= room)
            run = torch.minimum(run, (room - spent).clamp_min(0)) if self._chained else run
            members = members | self._chained
        same = (run[:, None] == run[None, :]) & members[:, None] & members[None, :]
        score = self._run_score(same)
        anchor = first_argmax(torch.where(same, score[None, :], -torch.inf))
        self.anchor_of = torch.where(members, anchor, self.anchor_of)
        if not self._chained:
            self._match()

    def _run_score(self, same: Tensor) -> Tensor:
        """What the anchor of a run has most of: closeness to the run, or earliness."""
        if self._chained or self.config.anchor == "first":
            return -self.index.float()
        if self.closeness is None:
            self.closeness = self._closeness()
        return torch.where(same, self.closeness, 0.0).sum(-1)

    def _floor(self) -> Tensor:
        """The ``min_tokens_per_frame`` least similar places of each frame, ``(T, P)`` bool."""
        least = min(self.config.min_tokens_per_frame, self.places)
        mask = torch.zeros_like(self.match, dtype=torch.bool)
        if least == 0:
            return mask
        order = torch.argsort(self.similarity, dim=-1, stable=True)[:, :least]
        return mask.scatter(1, order, True)

    def _kept_by_threshold(self) -> Tensor:
        kept = self.similarity <= self.config.threshold
        return (kept | self._is_anchor[:, None] | self._floor()).flatten()

    def _roots(self, kept: Tensor) -> Tensor:
        """The survivor that each source token belongs to, ``(N,)`` source indices."""
        own = torch.arange(kept.shape[0], device=kept.device)
        roots = torch.where(kept, own, self.match.flatten())
        if self._chained:
            # Each step doubles the length of chain that is resolved.
            for _ in range((self.grid[0] - 1).bit_length()):
                roots = roots[roots]
        return roots

    def _part_of_one_frame(self, count: int) -> FusionPlan:
        """Keep ``count`` tokens of the only anchor frame, fewer than it has."""
        anchors = self._is_anchor[:, None].expand_as(self.match).flatten()
        roots = self._roots(anchors)
        first = self.anchor_of[0] * self.places
        local = roots - first
        absorbed = torch.zeros(self.places, dtype=torch.long, device=local.device)
        absorbed = absorbed.index_add(0, local, torch.ones_like(local))
        chosen = torch.argsort(-absorbed, stable=True)[:count].sort().values
        frame = self.frames.flatten(1, 2).index_select(0, self.anchor_of[:1])[0].float()
        frame = torch.nn.functional.normalize(frame, dim=-1)
        heir = chosen[first_argmax(frame @ frame[chosen].T)]
        heir = heir.scatter(0, chosen, chosen)
        return FusionPlan.from_roots(chosen + first, heir[local] + first)
