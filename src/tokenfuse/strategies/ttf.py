"""Temporal Token Fusion."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from tokenfuse.errors import ConfigError
from tokenfuse.ops.select import true_indices
from tokenfuse.ops.similarity import cosine, frame_means, on_host, turned, unit
from tokenfuse.ops.window import moved_alike, window_match
from tokenfuse.plan import DROPPED, FusionPlan, Reduce
from tokenfuse.strategies._base import Budgeted
from tokenfuse.tokens import Grid, VisualTokens

REANCHOR_ROUNDS = 4
"""Times that frames which the anchors so far do not explain may be given anchors of their own."""


class TTF(Budgeted):
    """Fuse tokens that repeat what a local window of an anchor frame already says.

    Source: Temporal Token Fusion, arXiv 2605.07355. The defaults are the published method: the
    outline is that of its abstract; the anchor, the order and the fusion by identity are those of
    its section 3.1 as two independent implementations read it.

    The anchor frame is the one whose mean vector has the greatest cosine with the mean of all
    frames' means (the earliest on ties). Each token of another frame is compared with the
    ``window × window`` neighbourhood of its place in the anchor frame. Where the greatest cosine
    exceeds ``threshold``, the token leaves and belongs to its best match (the first in row-major
    order on ties), which stays as it is. A zero vector matches nothing. ``threshold >= 1`` keeps
    everything. The anchor frame stands first in the prompt, then the others in time; all keep
    their positions. An item of one frame, such as an image, stays as it is, whatever the options
    say.

    What follows is ours. ``order="time"`` leaves the anchor frame where it is. ``reduce="mean"``
    makes each survivor the mean of all that belongs to it.

    ``segments="auto"``: a frame whose tokens have an average similarity below ``reanchor`` is lost
    (a negative one counts as 0). Each run of consecutive lost frames gets an anchor of its own: its
    first frame with ``anchor="first"``, else the one nearest to the run's mean. Then all is matched
    again, up to REANCHOR_ROUNDS times. Each anchor stands right before the first frame that belongs
    to it.

    ``reference="previous"`` compares each frame with the one before instead, and a fused token
    belongs to whatever its match belongs to. The first frame is the anchor, and with
    ``segments="auto"`` each lost frame is another.

    ``guard="motion"`` accepts a match at another place only where most of the 3 × 3 places
    around it found theirs by the same shift, as they do where a whole region moves. Elsewhere the
    token is compared with its own place: what has left a place, or come to one, is not explained by
    a look-alike beside it. Where tokens repeat nothing exactly, neighbours seldom agree on a shift,
    so that a camera that moves is hardly compressed.

    ``keep_ratio`` replaces the threshold by the value that leaves exactly ⌈keep_ratio · N⌉
    survivors: first the anchors, then the ``min_tokens_per_frame`` least similar of each frame,
    then the least similar of all (lowest index on ties). Anchors of scene changes are added in
    order as long as the budget holds them. A budget below one frame keeps the anchor tokens that
    absorbed most (lowest index on ties) and fuses every other, with all it absorbed, into its most
    similar surviving one: nothing is left of any other frame.

    Where tokens went before, as behind a strategy that acts in the vision tower, a place without a
    token matches nothing, and means are those of what is there. A token whose window of the anchor
    frame is empty is like nothing: it stays, or is dropped where the budget does not hold it.

    A higher threshold never removes more: neither anchors nor matches depend on it. Cosines are
    rounded to multiples of 2⁻¹⁷, so that a tie is a tie on every device.

    Keep-ratio mode never synchronises with the host; threshold mode does once, and once more per
    round of re-anchoring.
    """

    name: ClassVar[str] = "ttf"
    temporal: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2605.07355"

    threshold: float = Field(0.7, ge=-1, description="cosine above which a token is fused")
    window: int = Field(3, ge=1, description="side of the search window in tokens, odd")
    anchor: Literal["auto", "first"] | Annotated[int, Field(ge=0, strict=True)] = Field(
        "auto",
        description="anchor frame: auto for the one nearest to the mean of all, the first, or an "
        "index",
    )
    reference: Literal["anchor", "previous"] = Field(
        "anchor", description="frame that each frame is matched against"
    )
    reduce: Reduce = Field(
        "keep",
        description="keep: a survivor stays as it was; mean: it is the mean of all it absorbed",
    )
    order: Literal["anchor_first", "time"] = Field(
        "anchor_first",
        description="anchor_first: anchors before what they absorbed from; time: as they were",
    )
    segments: Literal["auto", "single"] = Field(
        "single", description="single: one anchor; auto: new anchors after scene changes"
    )
    reanchor: float = Field(
        0.5,
        ge=0,
        le=1,
        description="average similarity of a frame to its anchor below which it needs a new one",
    )
    guard: Literal["none", "motion"] = Field(
        "none",
        description="motion: a match elsewhere counts only where places around moved alike",
    )
    min_tokens_per_frame: int = Field(
        0, ge=0, description="least similar tokens of each frame that always stay"
    )

    @field_validator("window")
    @classmethod
    def _odd(cls, window: int) -> int:
        if window % 2 == 0:
            raise ValueError(
                f"a window has a middle, so it must be odd: {window - 1} or {window + 1}"
            )
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
        if self.keep_ratio is None and self.threshold >= 1:
            return prod(grid)
        return super().num_kept(grid)

    def hint(self, grid: Grid) -> str | None:
        count, places = self.num_kept(grid), grid[1] * grid[2]
        if (
            self.keep_ratio is None
            or count is None
            or 2 * count >= 3 * places
            or self._passes(grid)
        ):
            return None
        return (
            f"keep_ratio {self.keep_ratio:g} leaves {count} tokens, and one anchor frame has "
            f"{places}, which ttf keeps first: next to nothing of the other frames stays; expected "
            f"more than {1.5 / grid[0]:.2g}, or another strategy for so small a budget"
        )

    def matching_flops(self, grid: Grid, width: int) -> int:
        t, h, w = grid
        return (t - 1) * h * w * self.window**2 * width

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        return _Matches(self, tokens).plan_by_budget(count)

    def choose_freely(self, tokens: VisualTokens) -> FusionPlan:
        return _Matches(self, tokens).plan_by_threshold()


class _Matches:
    """Anchors and best matches of one item, refined round by round.

    ``anchor_of (T,)``: the anchor frame of each frame. ``similarity (T, P)`` fp32 and
    ``match (T, P)``: the best match of each of the ``P = H * W`` places, as a source index.
    """

    def __init__(self, config: TTF, tokens: VisualTokens) -> None:
        self.config = config
        self.there: Tensor | None = None
        self._mean: Tensor | None = None
        self.frames = self._dense(tokens)
        self.places = tokens.grid[1] * tokens.grid[2]
        self.index = torch.arange(tokens.grid[0], device=tokens.features.device)
        self.chained = config.reference == "previous"
        anchor = self._first_anchor()
        self.anchor_of = anchor.expand_as(self.index)
        # The first frame of a chain stands with itself; it is an anchor.
        self._match((self.index - 1).clamp_min(0) if self.chained else anchor)

    def _dense(self, tokens: VisualTokens) -> Tensor:
        """The features as ``(T, H, W, D)``; zeros where there is no token, which match nothing."""
        t, h, w = tokens.grid
        if tokens.num_tokens == t * h * w:
            return tokens.frames
        steps = tokens.coords.new_tensor([h * w, w, 1])
        self.at = (tokens.coords * steps).sum(-1)
        self.there = torch.zeros(t * h * w, dtype=torch.bool, device=self.at.device)
        self.there = self.there.index_fill(0, self.at, True)
        rows = tokens.features.new_zeros(t * h * w, tokens.features.shape[-1])
        return rows.index_copy(0, self.at, tokens.features).view(t, h, w, -1)

    def plan_by_threshold(self) -> FusionPlan:
        rounds = REANCHOR_ROUNDS if self.config.segments == "auto" else 0
        while True:
            kept = self._kept_by_threshold()
            segment = self._new_segments()
            # The one host synchronisation: how many survive, and whether a scene has no anchor.
            count, segments = torch.stack([kept.sum(), segment.amax()]).tolist()
            if not segments or not rounds:
                break
            self._reanchor(segment)
            rounds -= 1
        if count == len(kept if self.there is None else self.at):
            return FusionPlan.identity(count, kept.device)
        return self._plan(true_indices(kept, count), self._roots(kept))

    def plan_by_budget(self, count: int) -> FusionPlan:
        if count < self.places and (self.there is None or count < self._in_anchor()):
            return self._part_of_one_frame(count)
        most = count // self.places
        for _ in range(REANCHOR_ROUNDS if self.config.segments == "auto" and most > 1 else 0):
            segment = self._new_segments(most)
            # Elsewhere a needless round, which changes nothing, is cheaper than reading a flag.
            if on_host(segment) and not bool(segment.any()):
                break
            self._reanchor(segment)
        # Anchors first, then the floor, then the least similar.
        key = torch.where(self._floor(), self.similarity - 8, self.similarity)
        key = torch.where(self._is_anchor[:, None], -16.0, key).flatten()
        if self.there is not None:
            key = key.masked_fill(~self.there, torch.inf)
        survivors = torch.argsort(key, stable=True)[:count].sort().values
        kept = torch.zeros_like(key, dtype=torch.bool).index_fill(0, survivors, True)
        return self._plan(survivors, self._roots(kept))

    def _plan(self, survivors: Tensor, roots: Tensor) -> FusionPlan:
        if self.there is not None:
            # Of the tokens that are there; those whose match is not are like nothing.
            number = torch.full_like(roots, DROPPED)
            number = number.index_copy(0, self.at, torch.arange(len(self.at), device=roots.device))
            kept = torch.zeros_like(self.there).index_fill(0, survivors, True)
            roots = torch.where(kept[roots], number[roots], DROPPED)[self.at]
            survivors = number[survivors]
        return replace(FusionPlan.from_roots(survivors, roots), frame_order=self._frame_order())

    def _in_anchor(self) -> int:
        """How many tokens of the first anchor frame are there. One host synchronisation."""
        assert self.there is not None
        return int(self.there.view(-1, self.places)[self.anchor_of[0]].sum())

    def _frame_order(self) -> Tensor | None:
        """The order of frames in which each anchor stands before all that it explains, ``(T,)``.

        None where it does so in time.
        """
        config = self.config
        alone = config.anchor == 0 and config.segments == "single"
        if config.order == "time" or self.chained or config.anchor == "first" or alone:
            return None
        first = self.index.scatter_reduce(0, self.anchor_of, self.index, "amin")
        return torch.where(self._is_anchor, 2 * first - 1, 2 * self.index).argsort()

    @property
    def _is_anchor(self) -> Tensor:
        return self.anchor_of == self.index

    @property
    def _means(self) -> Tensor:
        """The mean vector of each frame, ``(T, D)`` fp32, computed once."""
        if self._mean is None:
            self._mean = frame_means(self.frames.flatten(1, 2))
            if self.there is not None:
                # What is not there is zero.
                count = self.there.view(-1, self.places).sum(-1, keepdim=True)
                self._mean = self._mean * (self.places / count.clamp_min(1))
        return self._mean

    def _distance(self, group: Tensor) -> Tensor:
        """How far each frame's mean is from the mean of its group's means, by ``turned``, ``(T,)``.

        ``group (T,)``: a number in 0..T for each frame.
        """
        member = group[None] == torch.arange(len(group) + 1, device=group.device)[:, None]
        sound = self._means.masked_fill(unit(self._means)[1][:, None], 0)
        centre = member.to(sound.dtype) @ sound
        away = turned(self._means, centre[group])
        if self.there is None:
            return away
        # A frame of which nothing is there explains nothing.
        return away.masked_fill(~self.there.view(-1, self.places).any(-1), torch.inf)

    def _first_anchor(self) -> Tensor:
        """The anchor of all frames to begin with, ``(1,)``."""
        anchor, frames = self.config.anchor, self.index.shape[0]
        if anchor == "first" or self.chained:
            return self.index[:1]
        if anchor == "auto":
            return self._distance(torch.zeros_like(self.index)).argmin(-1, keepdim=True)
        if anchor >= frames:
            raise ConfigError(
                f"anchor: {anchor} is not a frame of a video of {frames} temporal patches; "
                f'expected 0..{frames - 1}, "auto" or "first"'
            )
        return self.index[anchor : anchor + 1]

    def _match(self, reference: Tensor) -> None:
        """Compare the frames with ``reference``, one frame for all or one for each."""
        similarity, place, own = window_match(self.frames, reference, self.config.window)
        if self.config.guard == "motion":
            here = torch.arange(self.places, device=place.device).view_as(place[0])
            # What repeats its own place as well as any other has not moved.
            place = torch.where(own == similarity, here, place)
            alike = moved_alike(place)
            similarity = torch.where(alike, similarity, own)
            place = torch.where(alike, place, here)
        self.similarity = similarity.flatten(1)
        self.match = place.flatten(1) + reference[:, None] * self.places

    def _new_segments(self, most: int | None = None) -> Tensor:
        """The new segment that each frame belongs to: 1, 2, … in order, or 0 for none, ``(T,)``.

        There are no more than make ``most`` anchors in all.
        """
        explained = self.similarity.clamp_min(0).mean(-1)
        if self.there is not None:
            there = self.there.view_as(self.similarity)
            total = self.similarity.clamp_min(0).masked_fill(~there, 0).sum(-1)
            count = there.sum(-1)
            explained = torch.where(count > 0, total / count.clamp_min(1), 1.0)
        lost = (explained < self.config.reanchor) & ~self._is_anchor
        begins = lost
        if not self.chained:
            begins = lost & ~torch.cat([lost.new_zeros(1), lost[:-1]])
        segment = torch.where(lost, begins.cumsum(0), 0)
        if most is None:
            return segment
        return torch.where(segment + self._is_anchor.sum() <= most, segment, 0)

    def _reanchor(self, segment: Tensor) -> None:
        """Give each new segment an anchor of its own, and match again."""
        if self.chained:
            begins = self._is_anchor | (segment > 0)
            self.anchor_of = torch.where(begins, self.index, 0).cummax(0).values
            return
        same = segment[:, None] == segment[None, :]
        # The first of equals is the anchor: the first frame, if the distance is none for all.
        distance = self._distance(segment) if self.config.anchor != "first" else segment * 0.0
        anchor = torch.where(same, distance, torch.inf).argmin(-1)
        self.anchor_of = torch.where(segment > 0, anchor, self.anchor_of)
        self._match(self.anchor_of)

    def _floor(self) -> Tensor:
        """The ``min_tokens_per_frame`` least similar places of each frame, ``(T, P)`` bool."""
        least = min(self.config.min_tokens_per_frame, self.places)
        mask = torch.zeros_like(self.match, dtype=torch.bool)
        if least == 0:
            return mask
        likeness = self.similarity
        if self.there is not None:
            likeness = likeness.masked_fill(~self.there.view_as(likeness), torch.inf)
        order = torch.argsort(likeness, dim=-1, stable=True)[:, :least]
        return mask.scatter(1, order, True)

    def _kept_by_threshold(self) -> Tensor:
        kept = self.similarity <= self.config.threshold
        kept = (kept | self._is_anchor[:, None] | self._floor()).flatten()
        return kept if self.there is None else kept & self.there

    def _roots(self, kept: Tensor) -> Tensor:
        """The survivor that each source token belongs to, ``(N,)`` source indices."""
        own = torch.arange(kept.shape[0], device=kept.device)
        roots = torch.where(kept, own, self.match.flatten())
        if self.there is not None:
            roots = torch.where(self.there, roots, own)
        if self.chained:
            # Each step doubles the length of chain that is resolved.
            for _ in range((self.index.shape[0] - 1).bit_length()):
                roots = roots[roots]
        return roots

    def _part_of_one_frame(self, count: int) -> FusionPlan:
        """Keep ``count`` tokens of the only anchor frame, fewer than it has."""
        first = self.anchor_of[0] * self.places
        anchors = self._is_anchor[:, None].expand_as(self.match)
        place = self._roots(anchors.flatten()) - first
        ones = torch.ones_like(place)
        if self.there is not None:
            # Places of other frames that hold nothing are their own roots.
            inside = (place >= 0) & (place < self.places)
            ones, place = torch.where(inside & self.there, ones, 0), place.clamp(0, self.places - 1)
        absorbed = torch.zeros_like(self.match[0]).index_add(0, place, ones)
        if self.there is not None:
            here = self.there.view(-1, self.places).index_select(0, self.anchor_of[:1])[0]
            absorbed = absorbed.masked_fill(~here, -1)
        chosen = torch.argsort(absorbed, descending=True, stable=True)[:count].sort().values
        frame = self.frames.index_select(0, self.anchor_of[:1]).flatten(1, 2)
        heir = chosen[cosine(frame, frame[:, chosen])[0].argmax(-1)]
        heir = heir.scatter(0, chosen, chosen)
        roots = heir[place] + first
        if self.there is not None:
            own = torch.arange(len(roots), device=roots.device)
            # What matched a place of the anchor frame that holds nothing is like nothing.
            roots = torch.where(here[place] & inside, roots, own)
        return self._plan(chosen + first, roots)
