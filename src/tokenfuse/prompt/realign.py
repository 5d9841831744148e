"""Shorter prompts whose survivors stay where they were. Pure tensor functions.

The rules: text survives in order; a survivor keeps its rope position; the first generated token
gets the position that the uncompressed prompt gives it; a batch gives what each sample gives alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

PaddingSide = Literal["left", "right"]
Policy = Literal["keep", "contiguous"]
"""Whether survivors keep their positions, or are counted anew without gaps."""
Mask = Shaped[Tensor, "B L"]
"""Non-zero where there is a token, zero at padding; of any dtype, as transformers takes them."""


class Positions(NamedTuple):
    """Rope positions of the uncompressed prompt, ``(B, L)``, ``(3, B, L)`` or ``(4, B, L)``.

    ``delta (B, 1)``: what the model adds to a count of tokens for the position that comes next.
    None where positions are counts, or where they are the caller's own.
    """

    ids: Int[Tensor, "... B L"]
    delta: Int[Tensor, "B 1"] | None


@dataclass(frozen=True, eq=False)
class Realigned:
    """Where the columns of a shorter prompt come from.

    ``columns (B, L')``: the column of the uncompressed prompt. ``valid (B, L')``: whether it is
    filled, not padding.
    """

    columns: Int[Tensor, "B M"]
    valid: Bool[Tensor, "B M"]

    def take(self, x: Tensor, fill: int) -> Tensor:
        """The surviving columns of ``x (..., B, L)``, padding set to ``fill``: ``(..., B, L')``."""
        columns = self.columns.expand(*x.shape[:-1], -1)
        return torch.where(self.valid, x.gather(-1, columns), fill)


def padding_side(mask: Mask) -> PaddingSide:
    """The side on which ``mask`` is padded; left, for generation, where it is not. One sync."""
    return "right" if bool((mask[:, -1:] == 0).any()) and bool((mask[:, :1] != 0).any()) else "left"


def shorten(mask: Mask, keep: Bool[Tensor, "B L"], side: PaddingSide) -> Realigned:
    """Leave out the tokens that ``keep`` marks false, and pad rows again to a common length.

    One host synchronisation, for the new length.
    """
    kept = mask.bool()
    kept = kept & keep
    counts = kept.sum(-1)
    length = int(counts.max())
    # A stable sort brings each row's survivors together in order.
    if side == "left":
        order = torch.argsort(kept.to(torch.uint8), dim=-1, stable=True)
        columns = order[:, mask.shape[1] - length :]
        valid = torch.arange(length, device=mask.device) >= (length - counts)[:, None]
    else:
        order = torch.argsort(kept.logical_not().to(torch.uint8), dim=-1, stable=True)
        columns = order[:, :length]
        valid = torch.arange(length, device=mask.device) < counts[:, None]
    return Realigned(columns, valid)


def count_positions(mask: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """0, 1, 2, … over the valid tokens of each row; 0 at padding."""
    return (mask.long().cumsum(-1) - 1).masked_fill(~mask, 0)


def realign_positions(
    positions: Int[Tensor, "... B L"], new: Realigned, policy: Policy
) -> Int[Tensor, "... B M"]:
    """Rope positions of the shorter prompt from those of the uncompressed one.

    ``positions`` is ``(B, L)`` (1-D rope), ``(3, B, L)`` (M-RoPE) or ``(4, B, L)``, whose first row
    counts tokens for the causal mask and is counted anew. ``contiguous`` counts all rows anew.
    """
    counted = count_positions(new.valid)
    if policy == "contiguous":
        return counted.expand(*positions.shape[:-2], -1, -1).clone()
    taken = new.take(positions, 0)
    if positions.ndim == 3 and positions.shape[0] == 4:
        taken[0] = counted
    return taken


def next_position_delta(
    positions: Int[Tensor, "... B M"], valid: Bool[Tensor, "B M"]
) -> Int[Tensor, "B 1"]:
    """What turns the count of each row's tokens into the rope position that comes next.

    ``positions`` are those of the shorter prompt, rows as in ``realign_positions``; ``valid`` says
    what is no padding.
    """
    rope = positions[1:] if positions.ndim == 3 and positions.shape[0] == 4 else positions
    last = rope.masked_fill(~valid, -1).amax(-1)
    if last.ndim == 2:
        last = last.amax(0)
    return (last + 1 - valid.sum(-1))[:, None]
