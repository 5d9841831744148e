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
    among = valid.sum(-1).clamp_max(neighbours)
    if most is not None:
        among = torch.minimum(among, most)
    parts = zip(_parts(points, valid), among.split(_batch(points)), strict=True)
    return torch.cat([_scores(*part, neighbours, near) for part, near in parts])


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


def _scores(x: Tensor, valid: Tensor, neighbours: int, among: Tensor) -> Tensor:
    rows = list(_rows(x))
    n = x.shape[1]
    # Twice the products, where they do not fit at once, instead of all the memory.
    held = [_squared(x, x)] if len(rows) == 1 else None
    index = torch.arange(n, device=x.device)

    def distances() -> Iterator[tuple[slice, Tensor]]:
        for i, part in enumerate(rows):
            yield part, _squared(x[:, part], x) if held is None else held[i]

    density, furthest = [], []
    among = among.clamp_min(1)[:, None]
    rank = torch.arange(min(neighbours, n), device=x.device)
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
