"""EarlyTom."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokenfuse.errors import ConfigError
from tokenfuse.ops.select import budget
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Attention, Need, Needs, Stage, Strategy
from tokenfuse.strategies._fields import VisionBlock, as_tuple, one_or_more
from tokenfuse.strategies._layers import WeighedPlan
from tokenfuse.strategies._tower import TowerCut, TowerTokens
from tokenfuse.tokens import Modality, VisualTokens

PUBLISHED = 27
"""Blocks of the tower for which the published numbers are."""
MOMENTUM = 0.9
"""The weight of a frame's own likeness in the running one."""

Blocks = Annotated[
    tuple[Annotated[int, Field(ge=1, lt=PUBLISHED)], ...],
    Field(
        min_length=1,
        description="vision blocks, counted from 0, at whose input frames merge, of a tower of "
        f"{PUBLISHED}; in proportion in others",
    ),
    one_or_more({"type": "integer", "minimum": 1, "exclusiveMaximum": PUBLISHED}),
]


class EarlyTom(Strategy):
    """Merge alike frames of a video inside the vision tower.

    Source: EarlyTom, arXiv 2605.30010, whose numbers are for SigLIP. At the input of each of three
    ``blocks`` frames form groups: a frame joins as long as its likeness to the group's first one,
    the mean cosine over places, smoothed from frame to frame, reaches ``threshold``, and the group
    has no more than ``most_frames``. In groups of three or more the first and the last frame stay;
    of those between, two neighbours merge if they are as alike as the first and the last are, and
    as the second of them and the next, or more. The mean weighs each by how alike it and its
    successor are, and by the frames it stands for. Later blocks read fewer frames.

    With ``keep_ratio`` tokens go before the LLM, too: ⌈keep_ratio · N⌉ of all ``N`` at most are
    left, the same number in every frame. By their attention in vision ``block``, groups are formed
    once more: frames of groups of one or two, and the first and last of longer ones, keep the
    tokens with most; others the one with most in each of equal windows, so that what stays is
    spread over a still scene.

    Free of the faults of the published code: no frame vanishes unmerged, the last pair of a group
    is a mean and no copy, sizes are carried, any grid will do. Differently from there, groups for
    ``keep_ratio`` are formed of the features before the LLM, and saliency is that of one block.

    Of an image nothing goes. Synchronises with the host once for each video and block.
    """

    name: ClassVar[str] = "earlytom"
    stage: ClassVar[Stage] = "tower"
    needs: ClassVar[frozenset[Need]] = frozenset({"grid"})
    temporal: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2605.30010"

    blocks: Blocks = (9, 22, 24)
    threshold: float = Field(
        0.8, ge=-1, le=1, description="likeness to a group's first frame that lets one join"
    )
    most_frames: int = Field(6, ge=1, description="frames of a group, at most")
    keep_ratio: float | None = Field(
        None, gt=0, le=1, description="share of tokens that is left before the LLM, at most"
    )
    block: VisionBlock = -1

    @field_validator("blocks", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return as_tuple(value)

    @field_validator("blocks")
    @classmethod
    def _rising(cls, blocks: tuple[int, ...]) -> tuple[int, ...]:
        if list(blocks) != sorted(set(blocks)):
            raise ValueError(f"{list(blocks)} do not rise; expected {sorted(set(blocks))}")
        return blocks

    def needed(self) -> Needs:
        return Needs(None if self.keep_ratio is None else Attention(self.block))

    def for_modality(self, modality: Modality) -> Strategy | None:
        return None if self.keep_ratio is None else self

    def tower_cuts(self, blocks: int) -> tuple[TowerCut, ...]:
        at = {max(1, round(block * blocks / PUBLISHED)) for block in self.blocks}
        # The last ones of so many blocks may be rounded up to none.
        at = {min(block, blocks - 1) for block in at}
        return tuple(TowerCut(block, self._merge, frames=True) for block in sorted(at))

    @torch.no_grad()
    def _merge(self, tokens: TowerTokens) -> FusionPlan | None:
        likeness = self._likeness(tokens.states)
        firsts, weights = [], []
        for start, stop in self._groups(likeness):
            roots, own = merges(likeness, start, stop)
            firsts += roots
            weights += own
        if len(set(firsts)) == len(firsts):
            return None
        device = tokens.states.device
        root_of = torch.tensor(firsts, device=device)
        survivors = torch.tensor(sorted(set(firsts)), device=device)
        plan = FusionPlan.from_roots(survivors, root_of)
        weight = torch.tensor(weights, device=device) * tokens.sizes
        return WeighedPlan(plan.survivors, plan.target, weight)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens) -> FusionPlan:
        if self.keep_ratio is None:
            raise ConfigError(
                "earlytom merges frames inside a vision tower; expected compress or attach on a "
                "model, or a keep_ratio: bare tokens have no tower"
            )
        t, h, w = tokens.grid
        n, places = tokens.num_tokens, h * w
        # Of a video that the tower has read, whole frames are left.
        frames = n // places
        count = budget(self.keep_ratio, t * places)
        if t == 1 or count >= n:
            return FusionPlan.identity(n, tokens.features.device)
        likeness = self._likeness(tokens.features.view(frames, places, -1))
        still = [
            stop - start > 2 and start < i < stop - 1
            for start, stop in self._groups(likeness)
            for i in range(start, stop)
        ]
        device = tokens.features.device
        each, more = divmod(count, frames)
        quotas = torch.full((frames, 1), each, device=device)
        quotas[:more] += 1
        scores = tokens.needed("saliency").float().view(frames, places)
        keep = torch.where(
            torch.tensor(still, device=device)[:, None],
            spread_best(scores, quotas),
            ranks(scores) < quotas,
        )
        return FusionPlan.from_survivors(keep.flatten().nonzero().flatten(), n)

    def _likeness(self, states: Float[Tensor, "T P D"]) -> list[list[float]]:
        """The mean cosine of frame ``i`` and frame ``i + k``, at ``[k][i]``. One host sync."""
        frames, most = states.shape[0], max(2, min(self.most_frames, states.shape[0]))
        found = states.new_zeros(most, frames, dtype=torch.float32)
        for k in range(1, most):
            pairs = cosine_similarity(states[k:].float(), states[:-k].float(), dim=-1)
            found[k, : frames - k] = pairs.mean(-1)
        rows: list[list[float]] = found.tolist()
        return rows

    def _groups(self, likeness: list[list[float]]) -> list[tuple[int, int]]:
        """The first frame of each group, and the one behind its last."""
        frames, start, running = len(likeness[0]), 0, 1.0
        found = []
        for i in range(1, frames):
            if i - start < self.most_frames:
                running = MOMENTUM * likeness[i - start][start] + (1 - MOMENTUM) * running
                if running >= self.threshold:
                    continue
            found.append((start, i))
            start, running = i, 1.0
        return [*found, (start, frames)]


def merges(likeness: list[list[float]], start: int, stop: int) -> tuple[list[int], list[float]]:
    """For each frame of a group the one that it becomes a part of, and the weight that it has."""
    roots, weights = list(range(start, stop)), [1.0] * (stop - start)
    if stop - start < 3:
        return roots, weights
    next_, ends = likeness[1], likeness[stop - 1 - start][start]
    i = start + 1
    while i + 1 < stop - 1:
        if next_[i] >= ends and next_[i] >= next_[i + 1]:
            roots[i + 1 - start] = i
            for j in (i, i + 1):
                weights[j - start] = max(next_[j], torch.finfo(torch.float32).eps)
            i += 1
        i += 1
    return roots, weights


def ranks(scores: Float[Tensor, "T P"]) -> Int[Tensor, "T P"]:
    """The place of each score in its row, the greatest first, the lowest index on ties."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def spread_best(scores: Float[Tensor, "T P"], quotas: Int[Tensor, "T 1"]) -> Tensor:
    """The greatest score in each of a row's ``quotas`` equal windows of places, as a mask."""
    places = scores.shape[1]
    window = torch.arange(places, device=scores.device) * quotas // places
    # By window, and inside it by score.
    order = (window * places + ranks(scores)).argsort(dim=-1)
    sorted_windows = window.gather(1, order)
    first = torch.ones_like(sorted_windows, dtype=torch.bool)
    first[:, 1:] = sorted_windows.diff(dim=-1) != 0
    return torch.zeros_like(first).scatter(1, order, first) & (quotas > 0)
