"""The reference that every adapter is held against: the full-length run of the unmodified model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokenfuse.prompt.inputs import PER_TOKEN
from tokenfuse.sessions.proportional import before_attention


class MaskedRun:
    """The full-length run of a model in which no token sees those that were dropped.

    ``inputs`` are the processor's, ``hidden (B, L)`` marks the dropped tokens. Positions are the
    model's own, by the method that ``generate`` asks. ``never`` are ids that no answer holds,
    ``text_type`` is the token type of an answer. ``owner (B, L)``, for proportional attention: the
    column of the token that each was fused into, or -1. ``order (B, L)``, for frames that have
    changed places: the column that stands in each place; the decoder then reads what the model has
    made for it in that order. ``later``: more tokens ``(B, L)`` that are hidden from a decoder
    layer on, by its number. A hook on each attention of the decoder hides the dropped keys,
    whatever mask the model makes, so that bidirectional blocks and sliding windows stay as they
    are. Every answer reads the whole conversation anew, without a cache.
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        hidden: Tensor,
        *,
        never: Sequence[int] = (),
        text_type: int = 0,
        owner: Tensor | None = None,
        order: Tensor | None = None,
        later: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.model, self.inputs, self.hidden = model, dict(inputs), hidden
        self.later = dict(later or {})
        self.owner, self.order = owner, order
        self.never, self.text_type = list(never), text_type

    @property
    def real(self) -> Tensor:
        """Which tokens are no padding."""
        mask: Tensor = self.inputs["attention_mask"].bool()
        return mask

    @property
    def seen(self) -> Tensor:
        """Which tokens are left."""
        return self.real & ~self.hidden

    def append(self, ids: Tensor, mask: Tensor | None = None) -> None:
        """Let text follow every prompt."""
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
        for name in ("input_ids", "attention_mask", *PER_TOKEN):
            if self.inputs.get(name) is not None:
                old = self.inputs[name]
                new = more.get(name, torch.full_like(ids, self.text_type)).to(old.dtype)
                self.inputs[name] = torch.cat([old, new], -1)
        none = torch.zeros_like(ids, dtype=torch.bool)
        self.hidden = torch.cat([self.hidden, none], -1)
        self.later = {layer: torch.cat([x, none], -1) for layer, x in self.later.items()}
        own = torch.arange(self.hidden.shape[1]).expand_as(self.hidden)[:, -ids.shape[1] :]
        if self.owner is not None:
            self.owner = torch.cat([self.owner, own], -1)
        if self.order is not None:
            self.order = torch.cat([self.order, own], -1)

    def positions(self) -> Tensor:
        """The model's own positions for the whole conversation."""
        base, model = self.model.base_model, self.model
        delta = getattr(base, "rope_deltas", None)
        positions: Tensor = model._prepare_position_ids_for_generation(
            self.inputs["input_ids"], dict(self.inputs)
        )
        if hasattr(base, "rope_deltas"):
            base.rope_deltas = delta
        return positions.expand(*positions.shape[:-2], len(self.hidden), -1)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits ``(B, L, V)``; those of hidden tokens and of padding mean nothing."""
        if self.order is not None:
            return self._in_order(self.order)
        with hide(self.model, self.hidden | ~self.real, self.owner, self.later):
            # The class's own forward, also while the model is attached.
            output = type(self.model).forward(
                self.model,
                **self.inputs,
                position_ids=self.positions(),
                use_cache=False,
                return_dict=True,
            )
        logits: Tensor = output.logits
        return logits

    def _in_order(self, order: Tensor) -> Tensor:
        """The logits, in the caller's order, of the decoder that reads another one."""
        given, mask = self._decoder_inputs(), self.inputs["attention_mask"].gather(-1, order)
        positions = self.positions()
        positions = positions.gather(-1, order.expand_as(positions))
        if positions.ndim == 3 and len(positions) == 4:
            positions[0] = (mask.cumsum(-1) - 1).clamp_min(0)
        wide = order[..., None].expand_as(given["inputs_embeds"])
        read = {"inputs_embeds": given["inputs_embeds"].gather(1, wide)}
        if (visual := given.get("visual_pos_masks")) is not None:
            read["visual_pos_masks"] = visual.gather(-1, order)
            read["deepstack_visual_embeds"] = [
                torch.zeros_like(wide, dtype=layer.dtype)
                .masked_scatter(visual[..., None], layer)
                .gather(1, wide)[read["visual_pos_masks"]]
                for layer in given["deepstack_visual_embeds"]
            ]
        owner = self._placed_owner(order)
        later = {layer: x.gather(-1, order) for layer, x in self.later.items()}
        with hide(self.model, (self.hidden | ~self.real).gather(-1, order), owner, later):
            states = self.model.get_decoder()(
                **read,
                position_ids=positions,
                attention_mask=mask,
                use_cache=False,
                return_dict=True,
            )
        logits: Tensor = self.model.lm_head(states.last_hidden_state)
        return torch.zeros_like(logits).scatter(1, order[..., None].expand_as(logits), logits)

    def _placed_owner(self, order: Tensor) -> Tensor | None:
        """The place of the token that the one in each place was fused into, or -1."""
        if self.owner is None:
            return None
        place = order.argsort(-1).gather(-1, self.owner.clamp_min(0))
        return place.masked_fill(self.owner < 0, -1).gather(-1, order)

    def _decoder_inputs(self) -> dict[str, Any]:
        """What the model's own forward passes to its decoder."""
        caught: dict[str, Any] = {}

        def catch(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            caught.update(kwargs)

        handle = self.model.get_decoder().register_forward_pre_hook(catch, with_kwargs=True)
        try:
            type(self.model).forward(self.model, **self.inputs, position_ids=self.positions())
        finally:
            handle.remove()
        return caught

    def follow(self, tokens: Tensor) -> Tensor:
        """Append an answer ``(B, S)``, and give the logits ``(B, S, V)`` that choose its tokens.

        One run reads the whole conversation: no token of an answer sees what comes after it.
        """
        self.append(tokens)
        return self.logits()[:, -tokens.shape[1] - 1 : -1]

    def lag(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """How far below the best logit that of each token is, ``(B, S)``; 0 for greedy answers.

        ``tokens (B, S)`` were chosen by ``logits (B, S, V)``, but for the ids of ``never``.
        """
        allowed = logits.clone()
        allowed[..., self.never] = -torch.inf
        return allowed.max(-1).values - allowed.gather(-1, tokens[..., None])[..., 0]


class DeletedRun(MaskedRun):
    """The run of the decoder alone on what the full-length run would give it, dropped tokens cut.

    For models with layers that no mask reaches, such as linear attention: what these layers would
    have read of a dropped token cannot be hidden, so the token must not be there. One prompt at a
    time, without padding.
    """

    @torch.no_grad()
    def logits(self) -> Tensor:
        given, positions = self._decoder_inputs(), self.positions()
        rows = []
        for row, seen in enumerate(self.seen):
            columns = torch.arange(len(seen)) if self.order is None else self.order[row]
            columns = columns[seen[columns]]
            own = positions[..., row : row + 1, :][..., columns]
            if own.ndim == 3 and len(own) == 4:
                own[0] = torch.arange(own.shape[-1])
            embeds = given["inputs_embeds"][row : row + 1, columns]
            with weigh(self.model, self._weight(row)):
                states = self.model.get_decoder()(
                    inputs_embeds=embeds,
                    position_ids=own,
                    # Without a mask, gaps in 1-D positions would mean several packed prompts.
                    attention_mask=torch.ones_like(embeds[..., 0], dtype=torch.long),
                    use_cache=False,
                    return_dict=True,
                )
            logits = self.model.lm_head(states.last_hidden_state)[0]
            whole = logits.new_zeros(len(seen), logits.shape[-1])
            rows.append(whole.index_copy(0, columns, logits))
        return torch.stack(rows)

    def _weight(self, row: int) -> Tensor | None:
        """What the tokens left of one row weigh to each other, ``(1, 1, M, M)``."""
        if self.owner is None:
            return None
        seen, owner = self.seen[row], self.owner
        if self.order is not None and (placed := self._placed_owner(self.order)) is not None:
            seen, owner = seen[self.order[row]], placed
        every = torch.ones(len(seen), len(seen), dtype=torch.bool).tril()
        return log_counts(every, owner[row : row + 1])[:, :, seen][..., seen]


def log_counts(visible: Tensor, owner: Tensor) -> Tensor:
    """Log of how many tokens each stands for to each, ``(B, 1, L, L)``; 0 where it is none.

    ``visible (..., L, L)``: which tokens each would see, had none been fused. ``owner (B, L)``.
    """
    owned = owner[:, None, :, None] == torch.arange(owner.shape[1])
    return (visible.float() @ owned.float()).clamp_min(1).log()


@contextmanager
def hide(
    model: Any,
    hidden: Tensor,
    owner: Tensor | None = None,
    later: Mapping[int, Tensor] | None = None,
) -> Iterator[None]:
    """No token of the decoder sees the ``hidden (B, L)`` ones inside the block, but itself.

    Instead it sees the ``owner (B, L)`` of each that it would have seen once more. Nor does it see
    those of ``later`` from their layer on.
    """
    length = hidden.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=hidden.device)

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        gone = hidden
        for layer, more in (later or {}).items():
            gone = gone | more if module.layer_idx >= layer else gone
        # A row without a visible key would be NaN.
        blocked = gone[:, None, None] & ~itself
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = causal.expand(len(hidden), 1, -1, -1)
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        if owner is None and mask.dtype == torch.bool:
            return args, kwargs | {"attention_mask": mask & ~blocked}
        bias = _floats(mask, model.dtype)
        if owner is not None:
            bias = bias + log_counts(visible, owner).to(bias)
        lowest = torch.finfo(bias.dtype).min
        return args, kwargs | {"attention_mask": bias.masked_fill(blocked, lowest)}

    with before_attention(model, hook):
        yield


@contextmanager
def weigh(model: Any, weight: Tensor | None) -> Iterator[None]:
    """Add ``weight (1, 1, M, M)`` to the logits of a causal decoder's attentions in the block."""
    if weight is None:
        yield
        return
    causal = torch.ones(weight.shape[-2:], dtype=torch.bool).tril()

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        bias = _floats(causal if mask is None else mask, model.dtype)
        return args, kwargs | {"attention_mask": bias + weight.to(bias)}

    with before_attention(model, hook):
        yield


def _floats(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -1e9)
