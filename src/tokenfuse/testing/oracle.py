"""The reference that every adapter is held against: the full-length run of the unmodified model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokenfuse.adapters.base import PER_TOKEN
from tokenfuse.proportional import before_attention, proportional_attention


class MaskedRun:
    """The full-length run of a model in which no token sees those that were dropped.

    ``inputs`` are the processor's, ``hidden (B, L)`` marks the dropped tokens. Positions are the
    model's own, by the method that ``generate`` asks. ``never`` are ids that no answer holds,
    ``text_type`` is the token type of an answer. ``sizes (B, L)`` are what proportional attention
    weighs the tokens by. A hook on each attention of the decoder hides
    the dropped keys, whatever mask the model makes, so that bidirectional blocks and sliding
    windows stay as they are. Every answer reads the whole conversation anew, without a cache.
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        hidden: Tensor,
        *,
        never: Sequence[int] = (),
        text_type: int = 0,
        sizes: Tensor | None = None,
    ) -> None:
        self.model, self.inputs, self.hidden = model, dict(inputs), hidden
        self.sizes = sizes
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
        self.hidden = torch.cat([self.hidden, torch.zeros_like(ids, dtype=torch.bool)], -1)
        if self.sizes is not None:
            self.sizes = torch.cat([self.sizes, torch.ones_like(ids)], -1)

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
        with hide(self.model, self.hidden | ~self.real, self.sizes):
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

    def answer(self, steps: int) -> tuple[Tensor, Tensor]:
        """Greedy tokens ``(B, steps)`` and the logits that chose them ``(B, steps, V)``."""
        tokens, logits = [], []
        for _ in range(steps):
            logits.append(self.logits()[:, -1])
            scores = logits[-1].clone()
            scores[:, self.never] = -torch.inf
            tokens.append(scores.argmax(-1, keepdim=True))
            self.append(tokens[-1])
        return torch.cat(tokens, -1), torch.stack(logits, 1)


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
            own = positions[..., row : row + 1, :][..., seen]
            if own.ndim == 3 and len(own) == 4:
                own[0] = torch.arange(own.shape[-1])
            embeds = given["inputs_embeds"][row : row + 1, seen]
            sizes = None if self.sizes is None else self.sizes[row : row + 1, seen]
            with proportional_attention(self.model, sizes):
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
            rows.append(whole.index_copy(0, seen.nonzero().flatten(), logits))
        return torch.stack(rows)

    def _decoder_inputs(self) -> dict[str, Any]:
        caught: dict[str, Any] = {}

        def catch(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            caught.update(kwargs)

        handle = self.model.get_decoder().register_forward_pre_hook(catch, with_kwargs=True)
        try:
            type(self.model).forward(self.model, **self.inputs, position_ids=self.positions())
        finally:
            handle.remove()
        return caught


@contextmanager
def hide(model: Any, hidden: Tensor, sizes: Tensor | None = None) -> Iterator[None]:
    """No token of the decoder sees the ``hidden (B, L)`` ones inside the block, but itself.

    It sees the others as often as ``sizes (B, L)`` says.
    """
    length = hidden.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
    # A row without a visible key would be NaN.
    blocked = hidden[:, None, None] & ~torch.eye(length, dtype=torch.bool, device=hidden.device)

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = causal.expand(len(hidden), 1, -1, -1)
        if mask.dtype == torch.bool:
            mask = mask & ~blocked
            if sizes is None:
                return args, kwargs | {"attention_mask": mask}
            mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, -1e9)
        weight = 0.0 if sizes is None else sizes[:, None, None].log().to(mask)
        lowest = torch.finfo(mask.dtype).min
        return args, kwargs | {"attention_mask": (mask + weight).masked_fill(blocked, lowest)}

    with before_attention(model, hook):
        yield
