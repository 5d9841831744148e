"""Which key of a shorter prompt stands for which tokens of the whole one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tokenfuse.plan import DROPPED


@dataclass(frozen=True, eq=False)
class Shares:
    """Which keys of a shorter prompt stand for the ``N`` tokens of the whole one.

    ``key (B, N)``: the column of the shorter prompt that each was fused into, or -1.
    ``first_query (B, N)``: the first of its columns that would have seen it. ``num_keys``: how many
    columns it has, M.
    """

    key: Int[Tensor, "B N"]
    first_query: Int[Tensor, "B N"]
    num_keys: int

    @classmethod
    def of(
        cls,
        owner: Int[Tensor, "B N"],
        seen_from: Int[Tensor, "B N"],
        columns: Int[Tensor, "B M"],
        valid: Bool[Tensor, "B M"],
        order: Int[Tensor, "B N"] | None = None,
    ) -> Shares:
        """Shares by columns of the whole prompt.

        ``owner``: the column of the token that each was fused into, or -1. ``seen_from``: the first
        column that sees each. ``columns``, ``valid``: those that are left, padding marked false.
        ``order``: the column that stands in each place of the whole prompt, if not its own.
        """
        if order is not None:
            # Who comes after whom is said by places, so that all is counted in places.
            place = order.argsort(-1)
            owner = torch.where(owner == DROPPED, DROPPED, place.gather(-1, owner.clamp_min(0)))
            owner, seen_from = (
                owner.gather(-1, order),
                place.gather(-1, seen_from).gather(-1, order),
            )
            columns = place.gather(-1, columns)
        # Padding stands in the column of some token that is gone, whose place it must not take.
        whole, left = owner.shape[1], columns.shape[1]
        slots = torch.arange(left, device=columns.device).expand_as(columns)
        places = columns.new_full((len(columns), whole + 1), left)
        places = places.scatter(1, torch.where(valid, columns, whole), slots)[:, :whole]
        # The place of a token that is gone is that of the next one that is left.
        after = places.flip(-1).cummin(-1).values.flip(-1)
        key = nn.functional.pad(places.masked_fill(places == left, DROPPED), (0, 1), value=DROPPED)
        key = key.gather(-1, torch.where(owner == DROPPED, whole, owner))
        first = torch.where(places < left, places, after).gather(-1, seen_from)
        return cls(key, first, left)

    def extend(self, valid: Bool[Tensor, "B K"]) -> Shares:
        """The shares of this prompt followed by ``K`` tokens of text, each of which counts once.

        ``valid``: which of them are no padding.
        """
        count = valid.shape[1]
        slot = torch.arange(self.num_keys, self.num_keys + count, device=valid.device)
        slot = slot.expand_as(valid)
        return Shares(
            torch.cat([self.key, torch.where(valid, slot, DROPPED)], -1),
            torch.cat([self.first_query, slot], -1),
            self.num_keys + count,
        )

    def continuing(self, earlier: Shares) -> Shares:
        """These shares for a prompt of which a cache holds the beginning, read by ``earlier``.

        The tokens of the beginning keep the shares by which they were read.
        """
        tokens = earlier.key.shape[1]
        key = torch.cat([earlier.key, self.key[:, tokens:]], -1)
        first = torch.cat([earlier.first_query, self.first_query[:, tokens:]], -1)
        return replace(self, key=key, first_query=first)

    def repeat(self, times: int) -> Shares:
        """The shares of a batch whose rows are repeated ``times`` times each."""
        key, first = (x.repeat_interleave(times, 0) for x in (self.key, self.first_query))
        return replace(self, key=key, first_query=first)

    def counts(self, first: int, queries: int) -> Int[Tensor, "B Q M"]:
        """How many tokens each key stands for, as each of ``queries`` columns from ``first`` sees.

        At least 1.
        """
        # Each token counts from one query on: mark that one, then sum along the queries.
        row = (self.first_query - first).clamp(0, queries)
        column = torch.where(self.key == DROPPED, self.num_keys, self.key)
        width = self.num_keys + 1
        marks = row.new_zeros(len(row), (queries + 1) * width, dtype=torch.int32)
        marks.scatter_add_(1, row * width + column, torch.ones_like(row, dtype=torch.int32))
        seen = marks.view(len(row), queries + 1, width)[:, :queries, : self.num_keys]
        return seen.cumsum(1, dtype=torch.int32).clamp_min_(1)
