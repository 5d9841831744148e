"""Density-peaks clustering (DPC-KNN), which several methods use to choose and fill centres.

A point is a good centre if its neighbourhood is dense and every denser point is far away. With
``d²`` the squared distance divided by the width: the density of a point is the exponential of minus
the mean ``d²`` to its nearest neighbours, itself among them; its score is the density times the
distance to the nearest denser point, or the greatest distance of all where no point is denser.

Published code adds random noise to the densities, so that equal ones differ. Here the lower index
counts as the denser of two equals, and every run gives the same result. Scores are compared as
logarithms: with the features of a language model ``exp`` of minus a squared distance is 0 for all
points, and what would choose is the noise.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenfuse.ops import CHUNK
from tokenfuse.ops.select import top_per_row
from tokenfuse.ops.similarity import to_steps

LARGE = 1e16
"""Features are clamped to this, so that fp32 holds their squares."""

WORST = torch.finfo(torch.float32).min
"""Score of a valid point at distance 0 of a denser one, above the -inf of one that is not valid."""


def density_peaks(
    points: Float[Tensor, "F n D"],
    valid: Bool[Tensor, "F n"],
    neighbours: int,
    most: Int[Tensor, " F"] | None = None,
) -> Float[Tensor, "F n"]:
    """How good a centre each point would be among the valid ones of its row, fp32, a logarithm.

    ``neighbours``: how many tell the density; ``most``: more than that in no row. A row with fewer
    valid points has as many neighbours as points. Points that are not valid get -inf. Never
    synchronises with the host; looks at CHUNK distances at a time.
    """
    among = _among(valid, neighbours, most)
    parts = zip(_parts(points, valid), among.split(_batch(points)), strict=True)
    return torch.cat([_scores(_Squared(x), part, neighbours, near) for (x, part), near in parts])


def _among(valid: Tensor, neighbours: int, most: Tensor | None) -> Tensor:
    """How many neighbours tell the density of the points of each row."""
    among = valid.sum(-1).clamp_max(neighbours)
    return among if most is None else torch.minimum(among, most)


def density_clusters(
    points: Float[Tensor, "F n D"],
    valid: Bool[Tensor, "F n"],
    counts: Int[Tensor, " F"],
    neighbours: int,
    most: Int[Tensor, " F"] | None = None,
) -> tuple[Bool[Tensor, "F n"], Int[Tensor, "F n"]]:
    """The ``counts`` best centres of each row, and the index of the nearest one to each point.

    As ``density_peaks`` and ``nearest_centre``, whose distances are computed once where they fit
    into CHUNK. A centre is its own. Never synchronises with the host.
    """
    own = torch.arange(points.shape[1], device=points.device)
    among = _among(valid, neighbours, most)
    size = _batch(points)
    found = []
    parts = zip(_parts(points, valid), among.split(size), counts.split(size), strict=True)
    for (x, part), near, number in parts:
        squared = _Squared(x)
        centres = top_per_row(_scores(squared, part, neighbours, near), number)
        nearest = [
            squared.of(rows).masked_fill(~centres[:, None, :], torch.inf).argmin(-1)
            for rows in squared.rows
        ]
        found.append((centres, torch.where(centres, own, torch.cat(nearest, 1))))
    best, index = zip(*found, strict=True)
    return torch.cat(best), torch.cat(index)


def nearest_centre(
    points: Float[Tensor, "F n D"], centres: Bool[Tensor, "F n"]
) -> Int[Tensor, "F n"]:
    """Index of the centre of its row that each point is nearest to; a centre is its own.

    The lowest index wins on ties; the first point where a row has no centre. Never synchronises
    with the host; looks at CHUNK distances at a time.
    """
    own = torch.arange(points.shape[1], device=points.device)
    found = [
        torch.cat([_nearest(x[:, rows], x, here) for rows in _rows(x)], 1)
        for x, here in _parts(points, centres)
    ]
    return torch.where(centres, own, torch.cat(found))


def _parts(points: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of the batch at a time, in fp32, around the mean of what the mask marks in each.

    What the points of a row have in common would only make the rounding of distances coarser.
    """
    size = _batch(points)
    for x, part in zip(points.split(size), mask.split(size), strict=True):
        wide = x.to(torch.float32).clamp(-LARGE, LARGE)
        sound = torch.where(part[..., None], wide, 0)
        yield wide - sound.sum(1, keepdim=True) / part.sum(-1).clamp_min(1)[:, None, None], part


def _batch(points: Tensor) -> int:
    return max(1, CHUNK // points.shape[1] ** 2)


def _rows(x: Tensor) -> Iterator[slice]:
    """Points whose distances to all others are held at a time."""
    n = x.shape[1]
    size = max(1, CHUNK // (x.shape[0] * n))
    for i in range(0, n, size):
        yield slice(i, min(i + size, n))


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of each point of ``x`` and each of ``y``, ``(F, n, m)``.

    Rounded to steps of its own rounding error, 2⁻¹⁷ of how far the two points are from 0, so that
    equal points are at distance 0 and ties are ties whatever order the products are summed in.
    """
    both = x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None, :]
    exponent = torch.frexp(both).exponent.clamp_min(-100)
    difference = torch.ldexp(both.baddbmm_(x, y.mT, alpha=-2), -exponent)
    rounded = to_steps(difference).clamp_min_(0).mul_(1 / x.shape[-1])
    return torch.ldexp(rounded, exponent)


class _Squared:
    """Squared distances of points, held where they fit at once, else computed when asked for."""

    def __init__(self, x: Tensor) -> None:
        self._x, self.rows = x, list(_rows(x))
        self._held = _squared(x, x) if len(self.rows) == 1 else None

    def of(self, rows: slice) -> Tensor:
        """Those of some of the points, ``(F, r, n)``."""
        return _squared(self._x[:, rows], self._x) if self._held is None else self._held


def _scores(held: _Squared, valid: Tensor, neighbours: int, among: Tensor) -> Tensor:
    n = valid.shape[1]
    index = torch.arange(n, device=valid.device)

    def distances() -> Iterator[tuple[slice, Tensor]]:
        for part in held.rows:
            yield part, held.of(part)

    density, furthest = [], []
    among = among.clamp_min(1)[:, None]
    rank = torch.arange(min(neighbours, n), device=valid.device)
    for part, squared in distances():
        near = squared.masked_fill(~valid[:, None, :], torch.inf)
        near = near.topk(len(rank), largest=False).values.sort(-1).values
        near = near.masked_fill(near.isinf() | (rank >= among[..., None]), 0)
        density.append(-near.sum(-1) / among)
        pairs = valid[:, part, None] & valid[:, None, :]
        furthest.append(squared.masked_fill(~pairs, 0).amax((-2, -1)))
    log_density = torch.cat(density, 1)
    most = torch.stack(furthest).amax(0)[:, None]

    scores = []
    for part, squared in distances():
        own, other = log_density[:, part, None], log_density[:, None, :]
        earlier = index < index[part, None]
        denser = valid[:, None, :] & ((other > own) | ((other == own) & earlier))
        gap = squared.masked_fill(~denser, torch.inf).amin(-1)
        gap = torch.where(gap.isinf(), most, gap)
        score = 0.5 * gap.log() + log_density[:, part]
        scores.append(torch.where(gap > 0, score, WORST))
    return torch.cat(scores, 1).masked_fill(~valid, -torch.inf)


def _nearest(x: Tensor, y: Tensor, centres: Tensor) -> Tensor:
    squared = _squared(x, y).masked_fill(~centres[:, None, :], torch.inf)
    return squared.argmin(-1)
