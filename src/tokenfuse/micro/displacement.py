"""How far a clip moves, measured from its pixels by block matching.

The first frame of every temporal patch is compared with the first frame of the one before it, so
that a steady motion is one shift whatever its speed. Every block of 16 × 16 pixels (a visual token)
looks for its like among all places up to 24 pixels away: first at half the resolution, then one
pixel around the best place found. Likeness is the correlation of brightness plus saturation, less
their means; neither gain nor offset of the light changes it. A block *moves* where

- it has texture, and its like is good (a correlation of 0.8 or more);
- the like is twice as near (half of 1 - correlation) as what stood at the block's own place;
- and twice as near as what stands now at the place of the like: a look-alike that is still there
  has not moved;
- and some block of the pair before or after moves as it does, within two pixels: what moves goes
  on, and chance likenesses at a cut or where a thing appears do not.

All others count as 0. So do appearance, change and cuts, which have no place that they came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from tokenfuse.micro.motion import TOKEN
from tokenfuse.micro.tasks import FRAMES_PER_PATCH, SIZE, Float

REACH = 24
TEXTURE = 2.0  # least standard deviation of a block, in grey values
ALIKE = 0.98  # a block this much like its old self is not looked for elsewhere
GOOD = 0.8
AGREES = 2
NEARER = 0.001  # likeness that a pixel of shift costs: along an edge the nearest like is meant

Index = npt.NDArray[np.intp]
Group = Literal["low", "medium", "high"]
_CELLS = SIZE // TOKEN
_HALF = 2  # pixels of a pixel in the first search


@dataclass(frozen=True)
class Displacement:
    """In tokens per temporal patch; of blocks in all pairs of neighbouring temporal patches.

    ``median`` and ``moving``: median and mean over the blocks that move, 0 where none does.
    ``everywhere``: mean over all blocks. ``share``: of the blocks that move. The median separates
    motions best: the mean of a fast pan is mixed with that of a slow object, and that over all
    blocks depends on the object's size as much as on its speed.
    """

    median: float
    moving: float
    everywhere: float
    share: float


STILL = Displacement(0.0, 0.0, 0.0, 0.0)


def group(displacement: float) -> Group:
    """Below ½ token per temporal patch, up to 1, or above."""
    return "low" if displacement < 0.5 else "medium" if displacement <= 1 else "high"


def measure(video: npt.NDArray[np.floating] | npt.NDArray[np.uint8]) -> Displacement:
    """The displacement in a video ``(F, 96, 96, 3)``, better without its sensor noise."""
    first = np.asarray(video[::FRAMES_PER_PATCH], np.float32)
    # Objects differ from a background in saturation even where they are as bright.
    level = first.mean(-1) + first.max(-1) - first.min(-1)
    before, now = level[:-1], level[1:]
    blocks = _centred(_blocks(now, TOKEN))
    stays = _likeness(blocks, _centred(_blocks(before, TOKEN)))
    pair, row, col = np.nonzero((_norm(blocks) >= TEXTURE * TOKEN) & (stays < ALIKE))
    if not len(pair):
        return STILL
    at = (pair, row, col)
    down, right = _search(_halved(before), _halved(now), *at)
    best, down, right = _refine(before, blocks[at], *at, down * _HALF, right * _HALF)
    place = (pair, row * TOKEN + down, col * TOKEN + right)
    source = _likeness(*(_centred(_windows(x, TOKEN)[place]) for x in (before, now)))
    far = 1 - best
    moves = np.flatnonzero((best >= GOOD) & (2 * far <= 1 - stays[at]) & (2 * far <= 1 - source))
    pair, down, right = pair[moves], down[moves], right[moves]
    agree = np.abs(pair[:, None] - pair) == 1
    for shift in (down, right):
        agree &= np.abs(shift[:, None] - shift) <= AGREES
    shifts = np.hypot(down, right)[agree.any(1)] / TOKEN
    if not len(shifts):
        return STILL
    return Displacement(
        median=float(np.median(shifts)),
        moving=float(shifts.mean()),
        everywhere=float(shifts.sum()) / stays.size,
        share=len(shifts) / stays.size,
    )


def _search(before: Float, now: Float, pair: Index, row: Index, col: Index) -> tuple[Index, Index]:
    """Shifts down and right from blocks of ``now`` to their like in ``before``, in its pixels.

    Both are pictures ``(n, h, w)`` of half the resolution.
    """
    block, reach = TOKEN // _HALF, REACH // _HALF
    wide, shifts = block + 2 * reach, 2 * reach + 1
    blocks = _centred(_blocks(now, block)[pair, row, col])
    level = before - before.mean((1, 2), keepdims=True)
    padded = np.pad(level, ((0, 0), (reach, reach), (reach, reach)))
    top, left = row * block, col * block
    # The spectrum of a window as wide as block and reach: no shift in reach wraps around.
    spectrum = np.fft.rfft2(_windows(padded, wide)[pair, top, left])
    spectrum *= np.conj(np.fft.rfft2(blocks, s=(wide, wide)))
    products = np.fft.irfft2(spectrum, s=(wide, wide))[:, :shifts, :shifts]
    spread = _windows(_spread(padded, block), shifts)[pair, top, left]
    least = TEXTURE * block
    step = np.arange(-reach, reach + 1)
    values = products / (
        np.maximum(_norm(blocks), least)[:, None, None] * np.maximum(spread, least)
    )
    values -= NEARER * _HALF * np.hypot(step[:, None], step)
    last = before.shape[1] - block
    for axis, corner in ((1, top), (2, left)):
        place = np.expand_dims(corner[:, None] + step, 3 - axis)
        values = np.where((place >= 0) & (place <= last), values, -2)
    found = values.reshape(len(pair), -1).argmax(1)
    return found // shifts - reach, found % shifts - reach


def _refine(
    before: Float, blocks: Float, pair: Index, row: Index, col: Index, down: Index, right: Index
) -> tuple[Float, Index, Index]:
    """The greatest likeness within a pixel of the shifts, and the shift that has it."""
    last = SIZE - TOKEN
    tops = np.clip((row * TOKEN + down)[:, None] + np.arange(-1, 2), 0, last)
    lefts = np.clip((col * TOKEN + right)[:, None] + np.arange(-1, 2), 0, last)
    near = _windows(before, TOKEN)[pair[:, None, None], tops[:, :, None], lefts[:, None, :]]
    values = _likeness(_centred(near), blocks[:, None, None]).reshape(len(pair), -1)
    found = values.argmax(1)
    each = np.arange(len(pair))
    down, right = tops[each, found // 3] - row * TOKEN, lefts[each, found % 3] - col * TOKEN
    return values[each, found], down, right


def _halved(pictures: Float) -> Float:
    n, high, wide = pictures.shape
    cells = pictures.reshape(n, high // _HALF, _HALF, wide // _HALF, _HALF)
    half: Float = cells.mean((2, 4))
    return half


def _spread(pictures: Float, width: int) -> Float:
    """Root of the summed squares about the mean in every window of ``width`` pixels squared."""

    def sums(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        for axis in (1, 2):
            total = np.insert(x.cumsum(axis), 0, 0, axis)
            x = np.take(total, range(width, total.shape[axis]), axis) - np.take(
                total, range(total.shape[axis] - width), axis
            )
        return x

    precise = pictures.astype(np.float64)
    square = sums(precise**2) - sums(precise) ** 2 / width**2
    return np.sqrt(np.maximum(square, 0)).astype(np.float32)


def _blocks(pictures: Float, width: int) -> Float:
    """``(n, 6 * width, 6 * width)`` to ``(n, 6, 6, width, width)``."""
    cells = pictures.reshape(-1, _CELLS, width, _CELLS, width)
    return cells.transpose(0, 1, 3, 2, 4)


def _windows(pictures: Float, width: int) -> Float:
    windows: Float = sliding_window_view(pictures, (width, width), axis=(1, 2))
    return windows


def _centred(blocks: Float) -> Float:
    centred: Float = blocks - blocks.mean((-2, -1), keepdims=True)
    return centred


def _norm(centred: Float) -> Float:
    norm: Float = np.sqrt((centred**2).sum((-2, -1)))
    return norm


def _likeness(one: Float, two: Float) -> Float:
    """Correlation of blocks less their means; blocks without texture are like nothing."""
    scale = np.maximum(_norm(one), TEXTURE * TOKEN) * np.maximum(_norm(two), TEXTURE * TOKEN)
    like: Float = (one * two).sum((-2, -1)) / scale
    return like
