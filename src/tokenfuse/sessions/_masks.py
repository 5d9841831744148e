"""Attention masks of decoder layers whose caches hold fewer entries than the model thinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tokenfuse.prompt.layers import Kept


@dataclass(frozen=True, eq=False)
class Entries:
    """What the cache of a layer holds with the queries of a call.

    ``keys (B, K)``: the column of the prompt that each entry stands for, ``counts (B, K)``: which
    entries count. The last of them are those of the ``queries (B, Q)``, columns of the call, which
    has ``width`` of them, ``past`` others before. ``whole``: whether all count.
    """

    keys: Int[Tensor, "B K"]
    counts: Bool[Tensor, "B K"]
    queries: Int[Tensor, "B Q"]
    past: int
    width: int
    whole: bool

    @classmethod
    def of(
        cls,
        before: Kept | None,
        past: int,
        width: int,
        rows: int,
        columns: Int[Tensor, "B Q"] | None,
        valid: Bool[Tensor, "B Q"] | None,
        even: bool,
        device: torch.device,
    ) -> Entries:
        """``before``: what the cache has held of ``past`` columns, None for all of them.

        ``columns``, ``valid``: what is left of the call's, None for all. ``even``: whether all of
        them count.
        """
        if columns is None:
            columns = torch.arange(width, device=device).expand(rows, -1)
        new = torch.ones_like(columns, dtype=torch.bool) if valid is None else valid
        if before is None:
            older = torch.arange(past, device=device).expand(rows, -1)
            counts = torch.ones_like(older, dtype=torch.bool)
        else:
            older, counts = before.until(past)
        return cls(
            torch.cat([older, past + columns], -1),
            torch.cat([counts, new], -1),
            columns,
            past,
            width,
            even and (before is None or before.whole),
        )

    def repeat(self, times: int) -> Entries:
        """The same for rows that are repeated ``times`` times each."""
        if times == 1:
            return self
        keys, counts, queries = (
            x.repeat_interleave(times, 0) for x in (self.keys, self.counts, self.queries)
        )
        return Entries(keys, counts, queries, self.past, self.width, self.whole)


def cut_mask(
    mask: Any,
    entries: Entries,
    total: int,
    *,
    kind: str,
    dtype: torch.dtype,
    unread: Bool[Tensor, "B W"] | None = None,
) -> Any:
    """The mask that the model has made for all columns, for what a layer reads.

    ``mask``: None, ``(B, W)`` as flash attention takes it, or ``(B, 1, L, W)``, of bools or added
    to the logits. ``total``: how many entries the attention sees, beyond those of ``entries`` empty
    ones. ``kind``, ``dtype``: the model's attention and dtype. ``unread``: columns that are not to
    be read, though they are there.
    """
    flash, number = "flash" in kind, entries.queries.shape[1]
    held = entries.keys.shape[1] - number
    if mask is None and entries.whole and unread is None and (held == 0 or number == 1 or flash):
        return None
    missing = total - entries.keys.shape[1]
    keys = nn.functional.pad(entries.keys, (0, missing))
    counts = nn.functional.pad(entries.counts, (0, missing))
    if unread is not None:
        counts = counts & ~unread.gather(-1, keys)
    if mask is None and flash:
        return counts.long()
    if mask is not None and mask.ndim == 2:
        return torch.where(counts, mask.gather(-1, keys), 0)
    valid = entries.counts[:, held:]
    if mask is None:
        queries = entries.past + entries.queries
        seen = (keys[:, None, None] <= queries[:, None, :, None]) & counts[:, None, None]
        seen = _own(seen, valid, held)
        if kind != "eager":
            return seen
        bias = torch.zeros_like(seen, dtype=dtype)
        return bias.masked_fill(~seen, torch.finfo(dtype).min)
    mask = mask.expand(len(keys), -1, entries.width, -1)
    rows = entries.queries[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    part = mask.gather(2, rows)
    part = part.gather(3, keys[:, None, None].expand(-1, part.shape[1], part.shape[2], -1))
    if part.dtype == torch.bool:
        return _own(part & counts[:, None, None], valid, held)
    part = part.masked_fill(~counts[:, None, None], torch.finfo(part.dtype).min)
    own = _own(torch.zeros_like(part, dtype=torch.bool), valid, held)
    return part.masked_fill(own, 0)


def _own(seen: Tensor, valid: Tensor, held: int) -> Tensor:
    """``seen (B, 1, Q, K)``, where padding sees itself: a row without a key would be NaN.

    ``valid (B, Q)``: which queries are no padding. ``held``: the entry of the first query.
    """
    place = held + torch.arange(valid.shape[1], device=valid.device)
    own = torch.arange(seen.shape[-1], device=valid.device) == place[:, None]
    return seen | (own & ~valid[:, :, None])[:, None]
