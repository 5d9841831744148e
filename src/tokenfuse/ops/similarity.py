"""Cosines: of tokens with each other, row by row, and the nearest of many. Pure tensor maths."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenfuse.ops import CHUNK

NO_MATCH = -2.0
"""Similarity of a token that matches nothing, below every cosine."""

STEP = 2.0**-17
"""Cosines are rounded to multiples of this, some ten times what fp32 gets wrong.

A power of two, so that dividing or multiplying by it is exact.
"""


def on_host(x: Tensor) -> bool:
    """Whether ``x`` is on the CPU, where reading a value waits for no device."""
    return x.device.type == "cpu"


def to_steps(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """``x`` rounded to multiples of STEP.

    A tie is then a tie, whatever order the products behind it were summed in. As cosines, vectors
    are equal whose directions differ by less than some 0.004, √(2 · STEP): ``turned`` tells more.
    """
    return (x / STEP).round_().mul_(STEP)


def unit(x: Float[Tensor, "*n D"]) -> tuple[Float[Tensor, "*n D"], Bool[Tensor, "*n"]]:
    """The vectors at length 1, fp32, and which are blank.

    Blank ones are zero, or so small or large that fp32 cannot hold their square; they become zero.
    """
    wide = x.to(torch.float32)
    norm = torch.linalg.vector_norm(wide, dim=-1)
    blank = is_sound(norm).logical_not()
    # In place: features of a long video are held once more, not twice.
    return (wide / norm[..., None]).masked_fill_(blank[..., None], 0.0), blank


def is_sound(norm: Float[Tensor, "*n"]) -> Bool[Tensor, "*n"]:
    """Whether fp32 holds the squares of vectors of this length, and they are not zero."""
    return (norm > 1e-17) & (norm < 1e18)


def cosine(
    queries: Float[Tensor, "F n D"], near: Float[Tensor, "R m D"], blank: float = NO_MATCH
) -> Float[Tensor, "F n m"]:
    """Cosine of each query with each of the ``m`` tokens of its frame (``R`` is 1 or ``F``).

    fp32, rounded to multiples of STEP. Where either vector is blank, as ``unit`` has it, the cosine
    is ``blank``.
    """
    q, r = queries.to(torch.float32), near.to(torch.float32)
    q_norm, r_norm = torch.linalg.vector_norm(q, dim=-1), torch.linalg.vector_norm(r, dim=-1)
    if r.shape[0] == 1:
        dots = (q.flatten(0, 1) @ r[0].T).view(q.shape[0], q.shape[1], r.shape[1])
    else:
        dots = q @ r.mT
    similar = to_steps(dots.div_(q_norm[:, :, None]).div_(r_norm[:, None, :]))
    exists = is_sound(q_norm)[:, :, None] & is_sound(r_norm)[:, None, :]
    return torch.where(exists, similar, blank)


def in_parts(x: Float[Tensor, "n *m"]) -> Iterator[Tensor]:
    """``x`` in parts along its first axis: what is computed of one in fp32 is bounded.

    On a CPU it stays in cache.
    """
    held = CHUNK // 64 if on_host(x) else CHUNK
    return iter(x.split(max(1, held // max(1, prod(x.shape[1:])))))


def frame_means(frames: Float[Tensor, "T n D"]) -> Float[Tensor, "T D"]:
    """The mean vector of each frame, fp32. The frames are not copied as a whole."""
    if not on_host(frames):
        return frames.mean(1, dtype=torch.float32)
    sums = [
        torch.stack([part.to(torch.float32).sum(0) for part in in_parts(frame)]).sum(0)
        for frame in frames
    ]
    return torch.stack(sums).div_(frames.shape[1])


def rowwise(
    x: Float[Tensor, "n *m D"], y: Float[Tensor, "n *m D"], blank: float = NO_MATCH
) -> Float[Tensor, "n *m"]:
    """``cosine`` of each row of ``x`` with the same row of ``y``. Neither is copied."""
    pairs = zip(in_parts(x), in_parts(y), strict=True)
    return torch.cat([_rowwise(a.to(torch.float32), b.to(torch.float32), blank) for a, b in pairs])


def _rowwise(x: Tensor, y: Tensor, blank: float) -> Tensor:
    x_norm, y_norm = (torch.linalg.vector_norm(each, dim=-1) for each in (x, y))
    similar = to_steps((x * y).sum(-1).div_(x_norm).div_(y_norm))
    return torch.where(is_sound(x_norm) & is_sound(y_norm), similar, blank)


def turned(x: Float[Tensor, "n D"], y: Float[Tensor, "#n D"]) -> Float[Tensor, " n"]:
    """How far the direction of each row of ``x`` is from that of the same row of ``y``, fp32.

    The length of the difference of the unit vectors, √(2 − 2 cos): 0 where they point the same way,
    2 where they are opposite, 3 where either is blank. In multiples of 2⁻¹⁸, some ten times what
    fp32 gets wrong. It tells vectors apart that are far too alike for the rounding of ``cosine``,
    such as the means of a still video's frames.
    """
    (u, lost), (v, blank) = unit(x), unit(y)
    length = (u - v).square().sum(-1).sqrt()
    return (length.masked_fill(lost | blank, 3) * 2.0**18).round() * 2.0**-18


def nearest(
    queries: Float[Tensor, "n D"], keys: Float[Tensor, "m D"]
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """The greatest cosine of each query with any key, fp32, and which; the lowest index on ties.

    A zero vector matches nothing: similarity NO_MATCH and key 0.
    """
    found = []
    for part in queries.split(max(1, CHUNK // keys.shape[0])):
        similar = cosine(part[None], keys[None])[0]
        # max returns the first of equals.
        found.append(similar.max(-1))
    best, index = zip(*found, strict=True)
    return torch.cat(best), torch.cat(index)


def nearest_per_row(
    queries: Float[Tensor, "B n D"], keys: Float[Tensor, "B m D"]
) -> tuple[Float[Tensor, "B n"], Int[Tensor, "B n"]]:
    """``nearest`` for each of ``B`` batch rows, whose queries meet the keys of their row only.

    A zero vector matches nothing: similarity NO_MATCH and key 0.
    """
    (query, lost), (key, blank) = unit(queries), unit(keys)
    # In units of STEP: rounding makes a tie a tie whatever order the products are summed in.
    query, worst = query.div_(STEP), NO_MATCH / STEP
    bias = torch.where(blank, worst, 0.0)[:, None, :]
    # On a CPU what is compared stays in cache.
    held = CHUNK // 64 if on_host(keys) else CHUNK
    found = []
    for part in query.split(max(1, held // blank.numel()), dim=1):
        # max returns the first of equals.
        found.append(torch.baddbmm(bias, part, key.mT).round_().max(-1))
    best, index = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    best = torch.where(lost, NO_MATCH, best * STEP)
    return best, torch.where(lost, 0, index)


ROWS = 512
"""Rows of a block: large enough for a fast product, small enough to waste little."""


class Cosines:
    """Cosine of each token with every other, fp32; 0 where one of them is blank.

    ``hold``: compute all at once, for no more than CHUNK; otherwise each row when asked for.
    """

    def __init__(self, features: Float[Tensor, "N D"], hold: bool) -> None:
        self.units, self.blank = unit(features)
        self.num_tokens, self.width = features.shape
        self._all = self._compute() if hold else None

    def row(self, index: Int[Tensor, " 1"]) -> Float[Tensor, " N"]:
        """The cosines of one token with all, itself included."""
        if self._all is not None:
            return self._all.index_select(0, index)[0]
        return self.units @ self.units.index_select(0, index)[0]

    def nearest(self) -> Float[Tensor, " N"]:
        """The greatest cosine of each token with another; -inf for an only token."""
        if self._all is not None:
            diagonal = self._all.diagonal()
            own = diagonal.clone()
            diagonal.fill_(-torch.inf)
            best = self._all.amax(1)
            diagonal.copy_(own)
            return best
        best = torch.full_like(self.units[:, 0], -torch.inf)
        for start, block in self._blocks():
            block.diagonal().fill_(-torch.inf)
            rows, columns = best[start : start + block.shape[0]], best[start:]
            torch.maximum(columns, block.amax(0), out=columns)
            torch.maximum(rows, block.amax(1), out=rows)
        return best

    def _compute(self) -> Tensor:
        everything = self.units.new_empty((self.num_tokens, self.num_tokens))
        for start, block in self._blocks():
            stop = start + block.shape[0]
            everything[start:stop, start:] = block
            everything[start:, start:stop] = block.T
        return everything

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Rows from ``start``, and columns from ``start`` on: every pair once."""
        step = max(1, min(ROWS, CHUNK // self.num_tokens))
        for start in range(0, self.num_tokens, step):
            yield start, self.units[start : start + step] @ self.units[start:].T
