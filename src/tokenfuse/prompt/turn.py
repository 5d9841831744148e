"""Later turns of a conversation on a cache that holds a shorter prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from tokenfuse.adapters._base import (
    MODALITIES,
    PER_TOKEN,
    PIXELS,
    Adapter,
    Encoded,
    refuse_lost_end,
)
from tokenfuse.compression import (
    CompressedInputs,
    check_prompt,
    fuse_all,
    needs_of,
    plan_items,
    report_on,
)
from tokenfuse.costs import Stopwatch, attends
from tokenfuse.errors import PromptError, UnsupportedModelError
from tokenfuse.plan import FusionPlan
from tokenfuse.prompt.cache import NAMES
from tokenfuse.prompt.realign import count_positions, next_position_delta, shorten
from tokenfuse.prompt.shares import Shares
from tokenfuse.registry import Registry
from tokenfuse.strategies._base import Strategy
from tokenfuse.tokens import Modality


@dataclass(frozen=True, eq=False)
class Turn:
    """What a cache holds: the short prompt ``(B, L')`` in place of the caller's ``(B, L)``.

    ``seen``: the caller's prompt and all that followed it into the cache. ``columns (B, L')``: the
    caller's column of each token of the short prompt. ``plans``: of all its items. ``since``: the
    columns at which later turns that showed something began. ``shares``: which tokens each stands
    for, where attention is proportional.
    """

    length: int
    seen: Tensor
    short: Tensor
    mask: Tensor
    positions: Tensor
    columns: Tensor
    plans: Mapping[Modality, list[FusionPlan]]
    since: tuple[int, ...] = ()
    shares: Shares | None = None

    @classmethod
    def of(cls, prompt: Tensor, short: CompressedInputs, since: tuple[int, ...] = ()) -> Turn:
        """The turn of a compressed prompt."""
        return cls(
            length=prompt.shape[1],
            seen=prompt,
            short=short["input_ids"],
            mask=short["attention_mask"],
            positions=short["position_ids"],
            columns=short.columns,
            plans=short.plans,
            since=since,
            shares=short.shares,
        )

    @classmethod
    def of_text(cls, adapter: Adapter, inputs: Mapping[str, Any], held: int) -> Turn:
        """The turn of a cache that holds the first ``held`` tokens of a prompt, all text.

        Raises PromptError where one of them stands for an image or a video.
        """
        ids, mask = inputs["input_ids"][:, :held], _mask(inputs)[:, :held]
        begun = {"input_ids": ids, "attention_mask": mask}
        if ids.shape[1] < held or brings_items(adapter, ids):
            raise PromptError(
                "the cache holds a prompt already, and the inputs bring images or videos; "
                "expected an empty cache, one that a generate of this session filled, or one of "
                "text only: start with a new cache and the whole conversation"
            )
        positions = adapter.positions(begun)
        positions = positions.expand(*positions.shape[:-2], len(ids), -1)
        columns = torch.arange(held, device=ids.device).expand(len(ids), -1)
        return cls(held, ids, ids, mask, positions, columns, {})

    @property
    def removed(self) -> int:
        return self.length - self.short.shape[1]

    def holds(self, held: int) -> bool:
        """Whether a cache that stands for ``held`` of the caller's tokens still is this turn's."""
        return self.length <= held <= self.seen.shape[1]

    def begins(self, ids: Tensor, held: int) -> bool:
        """Whether ``ids`` begin with those ``held`` tokens, and go on."""
        fits = self.holds(held) and len(ids) == len(self.seen) and held < ids.shape[1]
        return fits and torch.equal(ids[:, :held].to(self.seen.device), self.seen[:, :held])

    def repeat(self, times: int) -> Turn:
        """The turn of a batch whose rows were repeated, as for several answers to one prompt."""
        if times == 1:
            return self
        rows = {
            name: getattr(self, name).repeat_interleave(times, 0)
            for name in ("seen", "short", "mask", "columns")
        }
        # Plans are counted prompt by prompt, which no longer are the caller's.
        positions = self.positions.repeat_interleave(times, -2)
        shares = None if self.shares is None else self.shares.repeat(times)
        return replace(self, **rows, positions=positions, plans={}, shares=shares)

    def extend(self, new: Tensor, given: Tensor | None, total: int) -> tuple[Tensor, Tensor]:
        """Mask and positions when the ``new`` tokens end the caller's ``total`` tokens.

        ``given`` is the caller's mask for all of these. Positions go on from the last token of the
        prompt, or from the highest of its rows after a visual token.
        """
        if given is None:
            given = torch.ones_like(self.mask[:, :1]).expand(-1, total)
        if given.shape != (len(new), total):
            raise PromptError(
                f"attention_mask has shape {tuple(given.shape)}; expected {(len(new), total)}: one "
                "column per token of the conversation so far, the cached ones included"
            )
        later = given[:, self.length :].to(self.mask.dtype)
        end = self.mask.long().cumsum(-1).argmax(-1, keepdim=True)
        last = self.positions.gather(-1, end.expand(*self.positions.shape[:-1], 1))
        if last.ndim == 3:
            last = torch.cat([last[:-3], last[-3:].amax(0, keepdim=True).expand(3, -1, -1)])
        after = last + later.cumsum(-1).to(self.positions.dtype)
        return torch.cat([self.mask, later], -1), torch.cat([self.positions, after], -1)


def show_more(
    adapter: Adapter,
    inputs: Mapping[str, Any],
    turn: Turn,
    held: int,
    strategy: Strategy,
    registry: Registry,
    frames_as_images: bool,
) -> tuple[CompressedInputs, Turn]:
    """Arguments of ``generate`` for a later turn that brings new images or videos, and that turn.

    ``inputs`` are the processor's for the whole conversation, of which the cache stands for the
    first ``held`` tokens. What it holds keeps its plans and its columns; the rest is compressed,
    and padded on the left where prompts lose unequally many tokens. All items are encoded again,
    since a processor's pixels cannot be parted in the same way for all models.

    Raises PromptError where the inputs are not those of the whole conversation.
    """
    whole = {name: value for name, value in inputs.items() if name not in NAMES}
    check_prompt(adapter, whole)
    _refuse_old_masks(whole)
    refuse_positions(whole)
    ids, mask = whole["input_ids"], _mask(whole)
    whole["attention_mask"] = mask
    watch = Stopwatch(adapter.model.device)
    with torch.no_grad():
        since = (*turn.since, held)
        encoded = adapter.encode(whole, needs_of(strategy), frames_as_images, since)
        watch.lap()
        plans: dict[Modality, list[FusionPlan]] = {}
        new: dict[Modality, list[int]] = {}
        for part in encoded:
            later = _later(adapter, whole, part, turn, held)
            shown = [i for i, is_new in enumerate(later) if is_new]
            old = iter(turn.plans.get(part.modality, []))
            fresh = iter(plan_items(part, strategy, registry, shown))
            plans[part.modality] = [next(fresh if is_new else old) for is_new in later]
            new[part.modality] = shown
        fused = fuse_all(adapter, encoded, plans, strategy, new)
        watch.lap()
    keep = adapter.kept_columns(whole, encoded, plans)
    refuse_lost_end(mask, keep)
    positions = adapter.positions(whole)
    tail = shorten(mask[:, held:], keep[:, held:], "left")
    refuse_a_gap(adapter, tail.valid)
    begun, reached = turn.extend(ids[:, turn.length : held], mask[:, :held], held)
    valid = torch.cat([begun.bool(), tail.valid], -1)
    if strategy.positions == "keep":
        after = tail.take(positions.expand(*positions.shape[:-2], len(ids), -1)[..., held:], 0)
    else:
        end = begun.long().cumsum(-1).argmax(-1, keepdim=True)
        last = reached.gather(-1, end.expand(*reached.shape[:-1], 1))
        after = last + tail.valid.long().cumsum(-1)
    realigned = torch.cat([reached, after.to(reached.dtype)], -1)
    if realigned.ndim == 3 and realigned.shape[0] == 4:
        realigned[0] = count_positions(valid)
    between = torch.arange(turn.length, held, device=ids.device).expand(len(ids), -1)
    columns = torch.cat([turn.columns, between, held + tail.columns], -1)
    prompt: dict[str, Any] = {
        "input_ids": ids.gather(-1, columns).masked_fill(~valid, adapter.pad_id() or 0),
        "attention_mask": valid.to(mask.dtype),
        "position_ids": realigned,
    }
    for name in PER_TOKEN:
        if whole.get(name) is not None:
            prompt[name] = whole[name].gather(-1, columns).masked_fill(~valid, 0)
    delta = adapter.position_delta() if strategy.positions == "keep" else None
    removed = (mask.sum(-1) - valid.sum(-1))[:, None]
    after = next_position_delta(realigned, valid) if delta is None else delta + removed
    adapter.set_position_delta(after)
    watch.lap()
    read = {name for part in encoded for name in adapter.encoder_inputs(whole, part.modality)}
    rest = {name: value for name, value in inputs.items() if name not in read}
    short = CompressedInputs({**rest, **prompt, "mm_encoder_outputs": fused})
    short.plans, short.columns = plans, columns
    if strategy.attention == "proportional" or turn.shares is not None:
        once = shares = Shares.once(ids.shape[1], columns, valid)
        if strategy.attention == "proportional":
            owners, seen_from = adapter.owners(whole, encoded, plans), adapter.seen_from(whole)
            shares = Shares.of(owners, seen_from, columns, valid)
        # What the cache holds was read by its own shares, whatever this session's strategy says.
        short.shares = shares.after(turn.shares or once, turn.length)
    lengths = mask.sum(-1).tolist(), valid.sum(-1).tolist()
    short.report = report_on(adapter, strategy, encoded, plans, *lengths, watch.read())
    registry.observe("tokenfuse_compressed", report=short.report)
    return short, Turn.of(ids, short, since)


def _later(
    adapter: Adapter, whole: Mapping[str, Any], part: Encoded, turn: Turn, held: int
) -> list[bool]:
    """Which items of a conversation are not in the cache.

    Raises PromptError where those that are, are others than the cache holds.
    """
    try:
        places = adapter.places(whole, part.modality, part.spans)
    except PromptError as error:
        raise PromptError(
            f"{error}. A turn that brings new images or videos takes the processor's output for "
            "the whole conversation, earlier pixels included"
        ) from None
    later = [column >= held for _, column in places]
    known = turn.plans.get(part.modality, [])
    if later.count(False) != len(known):
        raise PromptError(
            f"a later turn shows {later.count(False)} {part.modality} item(s) that the cache "
            f"should hold, which holds {len(known)} of this conversation; expected the pixels of "
            "the whole conversation, and one answer per prompt: start with a new cache"
        )
    return later


def _refuse_old_masks(inputs: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError where transformers masks images after a cached prompt wrongly."""
    if inputs.get("token_type_ids") is None:
        return
    installed = version("transformers")
    if tuple(map(int, installed.split(".")[:2])) < (5, 23):
        raise UnsupportedModelError(
            "a later turn shows something new to a model with token_type_ids, which transformers "
            f"{installed} masks by the wrong columns, compressed or not; expected 5.23 or newer, "
            "or a new cache with the whole conversation"
        )


def refuse_a_gap(adapter: Adapter, valid: Tensor) -> None:
    """Raise PromptError where padding between turns would be read. One host sync for a hybrid."""
    if not all(attends(adapter.model.config.get_text_config())) and not bool(valid.all()):
        raise PromptError(
            "the prompts of a batch are unequally long in a later turn, and layers of "
            f"{type(adapter.model).__name__} that are no attention would read the padding between; "
            "expected one prompt at a time, or a new cache"
        )


def brings_items(adapter: Adapter, ids: Tensor) -> bool:
    """Whether some of the ids stand for images or videos. A host sync for each kind of id."""
    found = (adapter.placeholder_id(modality) for modality in MODALITIES)
    return any(bool(ids.eq(token).any()) for token in set(found) if token is not None)


def refuse_positions(inputs: Mapping[str, Any]) -> None:
    """Raise PromptError where a later turn counts by the uncompressed prompt."""
    for name in ("position_ids", "inputs_embeds", "mm_encoder_outputs"):
        if inputs.get(name) is not None:
            raise PromptError(
                f"a later turn on a compressed cache brings {name}, which counts by the "
                "uncompressed prompt; expected none: leave it out"
            )


def without_visuals(
    adapter: Adapter, inputs: Mapping[str, Any], new: Tensor | None = None
) -> dict[str, Any]:
    """The inputs of a later turn, without the pixels that the cache holds already.

    ``new``: the new ids, if these may not bring images or videos.
    """
    if new is not None and brings_items(adapter, new):
        raise PromptError(
            "a later call of the model brings a new image or video; expected text only on a "
            "compressed cache: bring it by generate, with the inputs of the whole conversation"
        )
    refuse_positions(inputs)
    seen = {"token_type_ids", "mm_token_type_ids"}
    for modality in MODALITIES:
        if inputs.get(PIXELS[modality]) is not None:
            seen |= set(adapter.encoder_inputs(inputs, modality))
    return {name: value for name, value in inputs.items() if name not in seen}


def _mask(inputs: Mapping[str, Any]) -> Tensor:
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    return torch.ones_like(ids) if mask is None else mask
