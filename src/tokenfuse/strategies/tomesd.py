"""Token Merging for Stable Diffusion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tokenfuse.ops.select import budget, spread, top_per_row, true_indices
from tokenfuse.ops.similarity import nearest_per_row
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Budgeted, Need
from tokenfuse.strategies._fields import KeepRatio, Seed
from tokenfuse.tokens import Grid, VisualTokens


class _Round(NamedTuple):
    """Merge ``removed`` tokens of ``grid`` in all, with one destination per cell of a frame."""

    grid: Grid
    cell: tuple[int, int]
    removed: int

    @property
    def cells(self) -> Grid:
        """``(T, rows, columns)`` of whole cells."""
        t, h, w = self.grid
        return t, h // self.cell[0], w // self.cell[1]

    @property
    def sources(self) -> int:
        """Tokens of a frame that are no destination."""
        return self.grid[1] * self.grid[2] - self.cells[1] * self.cells[2]


class ToMeSD(Budgeted):
    """Fuse tokens of each frame into one random token per cell, the most similar one.

    Source: Token Merging for Fast Stable Diffusion, arXiv 2303.17604. Each whole cell of
    ``sy × sx`` places has one destination, at random or its first place. Of the other tokens of a
    frame those with the greatest cosine to a destination of that frame merge into it, and a
    survivor is the plain mean of all that it stands for. ``FusionPlan.expand`` is the published
    unmerge. The draw is the same for every frame and depends on ``seed`` and the grid alone.

    All frames lose the same number of tokens, give or take one, so that exactly ⌈keep_ratio · N⌉
    are left. Published is the ratio that goes, 0.5, and it ends where only destinations are left
    (a quarter). Ours goes on: the grid of destinations is merged again in the same way, until the
    budget is met. A frame smaller than a cell is one cell, where the published code finds no
    destination. Once every frame is too small for a cell of two, whatever is left of all of them
    is laid in one row and merged along it. Ties go to the lowest index. A zero vector is like
    nothing: it merges last, into the frame's first destination.

    Never synchronises with the host.
    """

    name: ClassVar[str] = "tomesd"
    working_copies: ClassVar[float] = 3.1
    needs: ClassVar[frozenset[Need]] = frozenset({"grid"})
    paper: ClassVar[str] = "arXiv 2303.17604"

    keep_ratio: KeepRatio = 0.5
    sx: int = Field(2, ge=1, description="columns of a cell, which holds one destination")
    sy: int = Field(2, ge=1, description="rows of a cell")
    destination: Literal["random", "first"] = Field(
        "random", description="random: any place of the cell; first: its top left one"
    )
    seed: Seed = 0

    @model_validator(mode="after")
    def _has_sources(self) -> ToMeSD:
        if self.sx * self.sy == 1:
            raise ValueError("a cell of sx: 1 by sy: 1 has nothing to merge; make one of them 2")
        return self

    def matching_flops(self, grid: Grid, width: int) -> int:
        n = grid[0] * grid[1] * grid[2]
        rounds = self._rounds(grid, budget(self.keep_ratio, n))
        return sum(r.grid[0] * r.sources * r.cells[1] * r.cells[2] * width for r in rounds)

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        features = tokens.frames.flatten(0, 2).to(torch.float32)
        n, device = len(features), features.device
        lots = torch.Generator().manual_seed(self.seed)
        # Of each place of the round's grid, the token there; of each token, the place it is in.
        token = place = torch.arange(n, device=device)
        x = features
        for step in self._rounds(tokens.grid, count):
            cells = self._destinations(step, lots).to(device, non_blocking=True)
            goal = _goals(step, x, cells)
            place = goal[place]
            if step.sources * step.grid[0] > step.removed:
                break
            # The next grid is that of the cells.
            t, _, _ = step.grid
            frame = torch.arange(t, device=device)[:, None] * (len(goal) // t)
            kept = (frame + cells).flatten()
            slot = torch.zeros_like(goal).scatter(0, kept, torch.arange(len(kept), device=device))
            token, place = token[kept], slot[place]
            total = x.new_zeros(len(kept), x.shape[1]).index_add_(0, place, features)
            sizes = x.new_zeros(len(kept)).index_add_(0, place, torch.ones_like(features[:, 0]))
            x = total / sizes[:, None]
        roots = token[place]
        own = torch.arange(n, device=device)
        return FusionPlan.from_roots(true_indices(roots == own, count), roots)

    def _rounds(self, grid: Grid, count: int) -> Iterator[_Round]:
        """The rounds that leave ``count`` tokens of ``grid``; all but the last leave the cells."""
        t, h, w = grid
        while t * h * w > count:
            sy, sx = min(self.sy, h), min(self.sx, w)
            if sy * sx == 1:
                t, h, w = 1, 1, t * h * w
                sx = min(self.sy * self.sx, w)
            step = _Round((t, h, w), (sy, sx), 0)
            step = step._replace(removed=min(t * step.sources, t * h * w - count))
            yield step
            t, h, w = step.cells

    def _destinations(self, step: _Round, lots: torch.Generator) -> Tensor:
        """The destination of each cell, as a place of the frame."""
        (_, rows, columns), (sy, sx) = step.cells, step.cell
        lot = torch.zeros(rows, columns, dtype=torch.long)
        if self.destination == "random":
            lot = torch.randint(sy * sx, (rows, columns), generator=lots)
        row = torch.arange(rows)[:, None] * sy + lot // sx
        return (row * step.grid[2] + torch.arange(columns) * sx + lot % sx).flatten()


def _goals(step: _Round, x: Tensor, cells: Tensor) -> Tensor:
    """Where each token goes in a round: to a destination of its frame, or nowhere, ``(n,)``."""
    t, h, w = step.grid
    frames = x.view(t, h * w, -1)
    keys = cells.sort().values
    is_source = torch.ones(h * w, dtype=torch.bool, device=x.device).index_fill(0, keys, False)
    sources = true_indices(is_source, step.sources)
    best, match = nearest_per_row(frames[:, sources], frames[:, keys])
    # All frames lose as many, and evenly spaced ones one more.
    each, more = divmod(step.removed, t)
    counts = torch.full((t,), each, device=x.device)
    counts = counts.index_fill(0, spread(more, t, x.device), each + 1)
    goal = torch.where(top_per_row(best, counts), keys[match], sources)
    whole = (
        torch.arange(h * w, device=x.device).expand(t, -1).scatter(1, sources.expand(t, -1), goal)
    )
    return (whole + torch.arange(t, device=x.device)[:, None] * (h * w)).flatten()
