"""What a cache holds after a shorter prompt, so that a later turn can go on from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tokenfuse.errors import PromptError
from tokenfuse.plan import FusionPlan
from tokenfuse.prompt.inputs import Prompt
from tokenfuse.prompt.layers import Layers, Visuals
from tokenfuse.prompt.realign import (
    PaddingSide,
    Policy,
    Positions,
    Realigned,
    count_positions,
    next_position_delta,
    padding_side,
    realign_positions,
    shorten,
)
from tokenfuse.prompt.shares import Shares
from tokenfuse.prompt.text import Place
from tokenfuse.report import ItemReport
from tokenfuse.tokens import Modality


class Item(NamedTuple):
    """An image or a video of a prompt, its plan, and what the report says of it.

    ``first`` and ``last``: where its first and its last token stand in the uncompressed batch.
    """

    modality: Modality
    first: Place
    last: Place
    plan: FusionPlan
    report: ItemReport


@dataclass(frozen=True, eq=False)
class Turn:
    """The short prompt ``(B, L')`` that a cache has read in place of the caller's ``(B, L)``.

    ``seen (B, S)``: the caller's ids that the cache stands for, prompt and answer. ``ids``,
    ``mask``: the short prompt. ``positions``: its rope positions. ``columns``: the caller's column
    of each of its tokens. ``length``: how many columns the caller's prompt has, L. ``items``: the
    images and videos in it. ``shares``: which tokens each column stands for, where attention is
    proportional. ``visuals``: what may be cut of it inside the LLM, until it has been read;
    ``layers``: what the caches of the layers hold of it, where that is not all.
    """

    seen: Int[Tensor, "B S"]
    ids: Int[Tensor, "B M"]
    mask: Shaped[Tensor, "B M"]
    positions: Int[Tensor, "... B M"]
    columns: Int[Tensor, "B M"]
    length: int
    items: tuple[Item, ...] = ()
    shares: Shares | None = None
    visuals: Visuals | None = None
    layers: Layers | None = None

    @classmethod
    def of_text(cls, prompt: Prompt, positions: Tensor) -> Turn:
        """The turn of a cache that has read a prompt of text alone, as it is."""
        length = prompt.ids.shape[1]
        columns = torch.arange(length, device=prompt.ids.device).expand_as(prompt.ids)
        return cls(prompt.ids, prompt.ids, prompt.mask, positions, columns, length)

    @property
    def removed(self) -> int:
        """How many columns fewer the short prompt has than the caller's."""
        return self.length - self.ids.shape[1]

    def may_stand_for(self, count: int) -> bool:
        """Whether a cache of this turn can stand for the first ``count`` of the caller's columns.

        It holds the whole short prompt at least, and no more than what the turn has seen.
        """
        return self.length <= count <= self.seen.shape[1]

    def begins(self, ids: Int[Tensor, "B L"], count: int) -> bool:
        """Whether ``ids`` begin with the ``count`` tokens that the cache stands for, and go on."""
        fits = self.may_stand_for(count) and len(ids) == len(self.seen) and count < ids.shape[1]
        return fits and torch.equal(ids[:, :count].to(self.seen.device), self.seen[:, :count])

    def repeat(self, times: int) -> Turn:
        """The turn of a batch whose rows are repeated, as for several answers to one prompt."""
        if times == 1:
            return self
        names = ("seen", "ids", "mask", "columns")
        rows = {name: getattr(self, name).repeat_interleave(times, 0) for name in names}
        items = [
            item._replace(
                first=(item.first[0] * times + i, item.first[1]),
                last=(item.last[0] * times + i, item.last[1]),
            )
            for item in self.items
            for i in range(times)
        ]
        return replace(
            self,
            **rows,
            positions=self.positions.repeat_interleave(times, -2),
            items=in_prompt_order(items),
            shares=None if self.shares is None else self.shares.repeat(times),
            layers=None if self.layers is None else self.layers.repeat(times),
        )

    def extend(self, new: Int[Tensor, "B K"], given: Tensor | None) -> Turn:
        """The turn after ``K`` tokens of text have followed the short prompt.

        ``given``: the caller's mask for the whole conversation, ``(B, L + K)``; None hides nothing.
        Positions go on from the last token of the prompt, or from the highest of its rope rows
        where that is a visual token.

        Raises PromptError where the mask has another shape.
        """
        if not new.shape[1]:
            return self
        total = self.length + new.shape[1]
        if given is None:
            given = torch.ones_like(self.mask[:, :1]).expand(-1, total)
        if given.shape != (len(new), total):
            raise PromptError(
                f"attention_mask has shape {tuple(given.shape)}; expected {(len(new), total)}: one "
                "column per token of the conversation so far, the cached ones included"
            )
        later = given[:, self.length :].to(self.mask.dtype)
        after = self.last_position + later.cumsum(-1).to(self.positions.dtype)
        own = torch.arange(self.length, total, device=new.device).expand(len(new), -1)
        return replace(
            self,
            ids=torch.cat([self.ids, new], -1),
            mask=torch.cat([self.mask, later], -1),
            positions=torch.cat([self.positions, after], -1),
            columns=torch.cat([self.columns, own], -1),
            length=total,
            shares=None if self.shares is None else self.shares.extend(later != 0),
        )

    @property
    def last_position(self) -> Int[Tensor, "... B 1"]:
        """The position that tokens after the short prompt count from."""
        # The last token of the short prompt may be of a frame that has changed places.
        end = self.columns.masked_fill(self.mask == 0, -1).argmax(-1, keepdim=True)
        last = self.positions.gather(-1, end.expand(*self.positions.shape[:-1], 1))
        if last.ndim == 3:
            last = torch.cat([last[:-3], last[-3:].amax(0, keepdim=True).expand(3, -1, -1)])
        return last

    @property
    def read_as(self) -> Shares:
        """The shares by which the short prompt was read: each column once, if not others."""
        if self.shares is not None:
            return self.shares
        own = torch.arange(self.length, device=self.ids.device).expand(len(self.ids), -1)
        return Shares.of(own, own, self.columns, self.mask != 0)


class Shortened(NamedTuple):
    """A shorter prompt, the earlier turns in it included, as a turn that nothing follows yet.

    ``removed (B,)``: how many tokens each row lost. ``delta (B, 1)``: what the model adds to a
    count of tokens for the position that comes next. ``per_token``: the other inputs with one
    column per token.
    """

    turn: Turn
    removed: Int[Tensor, " B"]
    delta: Int[Tensor, "B 1"]
    per_token: dict[str, Tensor]

    @property
    def valid(self) -> Tensor:
        """Which columns are no padding, ``(B, L')``."""
        return self.turn.mask != 0


def shorten_prompt(
    prompt: Prompt,
    keep: Tensor,
    positions: Positions,
    policy: Policy,
    *,
    side: PaddingSide | None = None,
    after: Turn | None = None,
    order: Int[Tensor, "B L"] | None = None,
) -> Shortened:
    """Leave out the tokens that ``keep (B, L)`` marks false, and pad the rows again.

    ``positions`` are those of the uncompressed prompt. ``policy``: ``"keep"`` them, or count anew,
    ``"contiguous"``. ``side``: where to pad, None as the prompt is padded. ``after``: the turn that
    a cache holds, of which the prompt is the continuation; its columns stay as they are. ``order``:
    the column that stands in each place, if not its own; all that a token has goes with it.

    Raises PromptError where the last token of a prompt is left out. Two host synchronisations, one
    more where ``side`` is None.
    """
    held = 0 if after is None else after.length
    _refuse_lost_end(prompt.mask, keep)
    mask, side = prompt.mask, side or padding_side(prompt.mask)
    if order is not None:
        mask, keep = mask.gather(-1, order), keep.gather(-1, order)
    tail = shorten(mask[:, held:], keep[:, held:], side)
    if order is not None:
        tail = Realigned(order.gather(-1, held + tail.columns) - held, tail.valid)
    columns, valid = held + tail.columns, tail.valid
    if after is None or policy == "keep":
        own = realign_positions(positions.ids[..., held:], tail, policy)
    else:
        own = after.last_position + tail.valid.long().cumsum(-1)
    if after is not None:
        columns = torch.cat([after.columns, columns], -1)
        valid = torch.cat([after.mask != 0, valid], -1)
        own = torch.cat([after.positions, own.to(after.positions.dtype)], -1)
        if own.ndim == 3 and own.shape[0] == 4:
            own[0] = count_positions(valid)
    removed = prompt.mask.bool().sum(-1) - valid.sum(-1)
    # The model's own delta knows of the highest position, which the plan may have removed.
    if positions.delta is not None and policy == "keep":
        delta = positions.delta + removed[:, None]
    else:
        delta = next_position_delta(own, valid)

    new = Realigned(columns, valid)
    turn = Turn(
        seen=prompt.ids,
        ids=new.take(prompt.ids, prompt.pad_id),
        mask=valid.to(prompt.mask.dtype),
        positions=own,
        columns=columns,
        length=prompt.ids.shape[1],
        layers=None if after is None else after.layers,
    )
    per_token = {
        name: new.take(value, -100 if name == "labels" else 0)
        for name, value in prompt.per_token.items()
    }
    return Shortened(turn, removed, delta, per_token)


def in_prompt_order(items: Sequence[Item]) -> tuple[Item, ...]:
    """Items by modality, then by their place in the batch."""
    return tuple(sorted(items, key=lambda item: (item.modality, item.first)))


def _refuse_lost_end(mask: Tensor, keep: Tensor) -> None:
    """Raise PromptError where a prompt's last token, ``(B, L)``, is not kept. One host sync."""
    last = mask.long().cumsum(-1).argmax(-1, keepdim=True)
    if not bool(keep.gather(-1, last).all()):
        raise PromptError(
            "a prompt ends with a visual token, and the plan removes it; expected text after the "
            "last image or video: let the processor end the prompt"
        )
