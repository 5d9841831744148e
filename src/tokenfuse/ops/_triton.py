"""The local window in one kernel of Triton: norms, products and the running greatest cosine.

Each program holds some tokens of one frame and goes through the window's places in row-major order.
Tokens are read from memory once and from the cache after that; nothing as wide as they are is
written.
"""

# Triton reads the annotations of a kernel, so that they stay values here.

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenfuse.ops.similarity import NO_MATCH, STEP

BLOCK = 16
"""Tokens of a program."""
WIDE = 128
"""Channels that are looked at at a time."""


@triton.jit
def window_kernel(
    frames,
    reference,
    similarity,
    index,
    own,
    height,
    width,
    channels,
    shared: tl.constexpr,
    reach: tl.constexpr,
    no_match: tl.constexpr,
    step: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    """One program: ``block`` places of the frame ``program_id(1)``."""
    frame = tl.program_id(1)
    places = height * width
    place = tl.program_id(0) * block + tl.arange(0, block)
    here = place < places
    row, column = place // width, place % width
    source = frames + (frame.to(tl.int64) * places + place[:, None]) * channels
    of = tl.load(reference + (0 if shared else frame)).to(tl.int64)
    best = tl.full([block], float("-inf"), tl.float32)
    match = place
    itself = tl.full([block], float("-inf"), tl.float32)
    for shift in range((2 * reach + 1) * (2 * reach + 1)):
        down = shift // (2 * reach + 1) - reach
        right = shift % (2 * reach + 1) - reach
        inside = here & (row + down >= 0) & (row + down < height)
        inside = inside & (column + right >= 0) & (column + right < width)
        other = place + down * width + right
        near = frames + (of * places + other[:, None]) * channels
        dot = tl.zeros([block], tl.float32)
        mine = tl.zeros([block], tl.float32)
        theirs = tl.zeros([block], tl.float32)
        for start in range(0, channels, wide):
            at = start + tl.arange(0, wide)
            there = inside[:, None] & (at < channels)[None, :]
            x = tl.load(source + at[None, :], mask=there, other=0.0).to(tl.float32)
            y = tl.load(near + at[None, :], mask=there, other=0.0).to(tl.float32)
            dot += tl.sum(x * y, 1)
            mine += tl.sum(x * x, 1)
            theirs += tl.sum(y * y, 1)
        a, b = tl.sqrt(mine), tl.sqrt(theirs)
        sound = (a > 1e-17) & (a < 1e18) & (b > 1e-17) & (b < 1e18)
        cosine = dot / tl.where(sound, a, 1.0) / tl.where(sound, b, 1.0)
        # To the nearest step, halves to the even one: 1.5 * 2**23 leaves a float no fraction.
        cosine = ((cosine / step + 12582912.0) - 12582912.0) * step
        cosine = tl.where(sound, cosine, no_match)
        cosine = tl.where(inside, cosine, float("-inf"))
        better = cosine > best
        match = tl.where(better, other, match)
        best = tl.where(better, cosine, best)
        itself = tl.where((down == 0) & (right == 0), cosine, itself)
    match = tl.where(best == no_match, place, match)
    out = frame.to(tl.int64) * places + place
    tl.store(similarity + out, best, mask=here)
    tl.store(index + out, match.to(tl.int64), mask=here)
    tl.store(own + out, itself, mask=here)


def by_triton(frames: Tensor, reference: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """``window_match`` by the kernel."""
    count, height, width, channels = frames.shape
    frames = frames.contiguous()
    similarity = frames.new_empty((count, height, width), dtype=torch.float32)
    own = torch.empty_like(similarity)
    index = torch.empty((count, height, width), dtype=torch.long, device=frames.device)
    grid = (triton.cdiv(height * width, BLOCK), count)
    window_kernel[grid](
        frames,
        reference,
        similarity,
        index,
        own,
        height,
        width,
        channels,
        shared=reference.shape[0] == 1,
        reach=window // 2,
        no_match=NO_MATCH,
        step=STEP,
        block=BLOCK,
        wide=WIDE,
    )
    return similarity, index, own
