"""Best match of every token in a local window of another frame."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import product
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenfuse.errors import ConfigError
from tokenfuse.ops import CHUNK
from tokenfuse.ops._shifts import by_shifts, compiled
from tokenfuse.ops.similarity import NO_MATCH, cosine, on_host

Kernel = Literal["auto", "tiles", "shifts", "compiled", "triton"]
_chosen = ["auto"]
"""The kernel of this process; a list, so that a block can bring back the one before."""
NEIGHBOURS = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
"""Where the 8 places around one stand in a grid that is padded by one."""


@contextmanager
def using_kernel(name: Kernel | str) -> Iterator[None]:
    """Let ``window_match`` use one kernel inside the block, in all threads of the process.

    ``"tiles"``: products of tiles of the grid, on every device. ``"shifts"``: one shift of the
    window after the other, clear and slow, what others are held against. ``"compiled"``: the same
    by ``torch.compile``, which takes half a minute once. ``"triton"``: one kernel for GPUs.
    ``"auto"``: tiles. All give the same, but for cosines in the middle between two steps.

    Raises ConfigError for an unknown name, and where Triton is not installed.
    """
    if name not in get_args(Kernel):
        raise ConfigError(f"kernel {name!r} is none of {', '.join(get_args(Kernel))}")
    if name == "triton" and find_spec("triton") is None:
        raise ConfigError("kernel triton needs Triton, which comes with torch for CUDA; use auto")
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.remove(name)


def window_match(
    frames: Float[Tensor, "T H W D"],
    reference: Int[Tensor, " R"],
    window: int,
) -> tuple[Float[Tensor, "T H W"], Int[Tensor, "T H W"], Float[Tensor, "T H W"]]:
    """The greatest cosine of each token in ``window × window`` places of another frame, and where.

    ``reference``: the index of one frame for all (``R = 1``) or of one for each (``R = T``).
    Returns the similarity, fp32, the row-major index ``0..H*W-1`` of the match in its reference
    frame, and the cosine with the token's own place there, fp32. On ties the first place in
    row-major order wins. A zero vector matches nothing: similarity NO_MATCH and its own place.

    By the kernel of ``using_kernel``; by default tiles of the grid are compared with their
    neighbourhood in one product each, so that the features are read once and the work grows with
    the window, not with the grid.
    """
    kernel = _chosen[-1]
    if kernel == "shifts":
        return by_shifts(frames, reference, window)
    if kernel == "compiled":
        return compiled()(frames, reference, window)
    if kernel == "triton":
        from tokenfuse.ops._triton import by_triton

        return by_triton(frames, reference, window)
    count, height, width, _ = frames.shape
    reach = window // 2
    # Few large products suit a GPU; on a CPU a small tile stays in cache and wastes less.
    high, wide = (2, 8) if on_host(frames) else (16, 16)
    # So many frames at a time that what is copied of a tile and its surroundings is bounded.
    step = max(1, CHUNK // ((high + 2 * reach) * (wide + 2 * reach) * frames.shape[-1]))
    similarity = frames.new_empty((count, height, width), dtype=torch.float32)
    own = torch.empty_like(similarity)
    index = torch.empty((count, height, width), dtype=torch.long, device=frames.device)
    for start, top, left in product(
        range(0, count, step), range(0, height, high), range(0, width, wide)
    ):
        part = slice(start, start + step)
        rows = slice(top, min(top + high, height))
        cols = slice(left, min(left + wide, width))
        near_rows = slice(max(0, top - reach), min(height, rows.stop + reach))
        near_cols = slice(max(0, left - reach), min(width, cols.stop + reach))
        # Widening a slice copies it, after which flattening is free.
        queries = frames[part, rows, cols].to(torch.float32)
        of = reference if reference.shape[0] == 1 else reference[part]
        near = frames[:, near_rows, near_cols].index_select(0, of).to(torch.float32)
        similar = cosine(queries.flatten(1, 2), near.flatten(1, 2))
        best, place, here = _best(similar, rows, cols, near_rows, near_cols, reach, width)
        similarity[part, rows, cols] = best.view(queries.shape[:3])
        own[part, rows, cols] = here.view(queries.shape[:3])
        index[part, rows, cols] = place.view(queries.shape[:3])
    return similarity, index, own


def moved_alike(index: Int[Tensor, "T H W"]) -> Bool[Tensor, "T H W"]:
    """Whether most of the up to 8 places around each one are matched by the same shift.

    ``index``: the matches of ``window_match``.
    """
    _, height, width = index.shape
    place = torch.arange(height * width, device=index.device).view(height, width)
    # Rows and columns of the shift, one beyond the grid marked as no shift at all.
    shift = torch.stack([index // width - place // width, index % width - place % width])
    around = torch.nn.functional.pad(shift, (1, 1, 1, 1), value=height + width)
    same = torch.zeros_like(index)
    there = torch.zeros_like(place)
    for down, right in NEIGHBOURS:
        beside = around[:, :, down : down + height, right : right + width]
        same += (beside == shift).all(0)
        there += beside[0, 0] < height + width
    return 2 * same > there


def _best(
    similar: Tensor,
    rows: slice,
    cols: slice,
    near_rows: slice,
    near_cols: slice,
    reach: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best candidate per query, ties to the first in row-major order.

    Its cosine and place, and the cosine of the query's own place.
    """
    i, j = _places(rows, cols, similar.device)
    y, x = _places(near_rows, near_cols, similar.device)
    di = (y[None, :] - i[:, None]).abs()
    dj = (x[None, :] - j[:, None]).abs()
    similar = similar.masked_fill((di > reach) | (dj > reach), -torch.inf)
    # max returns the first of equals.
    best, first = similar.max(-1)
    here = (i - near_rows.start) * (near_cols.stop - near_cols.start) + j - near_cols.start
    own = similar.gather(-1, here.expand(similar.shape[0], -1)[..., None])[..., 0]
    place = torch.where(best == NO_MATCH, here, first)
    return best, (y * width + x)[place], own


def _places(rows: slice, cols: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    i = torch.arange(rows.start, rows.stop, device=device)
    j = torch.arange(cols.start, cols.stop, device=device)
    grid = torch.meshgrid(i, j, indexing="ij")
    return grid[0].flatten(), grid[1].flatten()
