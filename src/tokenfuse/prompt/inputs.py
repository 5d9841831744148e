"""A prompt, read once from the inputs that a caller passes to a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from tokenfuse.errors import PromptError
from tokenfuse.plan import DROPPED
from tokenfuse.prompt.cache import cache_of, filled_length
from tokenfuse.prompt.realign import Mask
from tokenfuse.prompt.text import Place, mismatch
from tokenfuse.tokens import Modality

MODALITIES: tuple[Modality, ...] = ("image", "video")
PIXELS: dict[Modality, str] = {"image": "pixel_values", "video": "pixel_values_videos"}
PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "labels")
"""Model inputs with one column per prompt token, beside input_ids and attention_mask."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A batch of ``B`` prompts of ``L`` columns, as the caller passed it.

    ``inputs``: everything that the caller passed, by name. ``shows``: the modalities of which they
    bring pixels. ``ids (B, L)``. ``mask (B, L)``: the caller's attention mask, of any dtype; ones
    where there is none. ``per_token``: the other inputs with one column per token. ``here``: for
    each modality, which tokens stand for one of its features, ``(B, L)``. ``pad_id``: what padding
    is filled with. ``cache``: the one among the inputs, or None.
    """

    inputs: Mapping[str, Any]
    shows: tuple[Modality, ...]
    ids: Int[Tensor, "B L"]
    mask: Mask
    per_token: Mapping[str, Int[Tensor, "B L"]]
    here: Mapping[Modality, Bool[Tensor, "B L"]]
    pad_id: int
    cache: Any = None

    @classmethod
    def read(
        cls,
        inputs: Mapping[str, Any],
        placeholders: Callable[[Mapping[str, Any], Modality], Bool[Tensor, "B L"]],
        pad_id: int | None,
        *,
        continues: bool = False,
    ) -> Prompt:
        """Read the inputs, and refuse those that cannot be shortened without a change of meaning.

        ``placeholders`` tells from the inputs which tokens stand for a feature of a modality, shown
        or not. ``continues``: the inputs are those of a conversation whose beginning a cache holds.

        Raises PromptError.
        """
        ids = getattr(inputs, "get", lambda _: None)("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise PromptError(
                "inputs hold no input_ids of shape (B, L); expected the processor's output with "
                'return_tensors="pt", not inputs_embeds'
            )
        if inputs.get("mm_encoder_outputs"):
            raise PromptError(
                "inputs hold mm_encoder_outputs, features that are encoded or compressed already; "
                "expected pixels: pass the processor's output, or detach the session first"
            )
        shows = shown(inputs)
        cache = cache_of(inputs)
        cached = filled_length(cache) > 0 and not continues
        if cached and shows:
            raise PromptError(
                "the cache holds a prompt already, and the inputs bring images or videos; "
                "expected an empty cache, or under attach one that its generate filled: start with "
                "a new cache and the whole conversation"
            )
        if shows:
            _refuse_unreadable(inputs, ids, pad_id)
        mask = inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            # A prompt of text alone comes back as it is, whatever its mask.
            mask = torch.ones_like(ids)
        here = {m: placeholders(inputs, m) & (mask != 0) for m in MODALITIES}
        per_token = {name: x for name in PER_TOKEN if (x := inputs.get(name)) is not None}
        pad = 0 if pad_id is None else pad_id
        prompt = cls(inputs, shows, ids, mask, per_token, here, pad, cache)
        if not cached:
            prompt._refuse_unshown()
        return prompt

    def places(
        self, modality: Modality, sizes: Sequence[int], since: int = 0
    ) -> list[tuple[Place, Place]]:
        """Where each item of a modality begins and ends, by how many features each has.

        ``sizes``: features of each item that is shown from column ``since`` on, in prompt order.
        One host synchronisation.

        Raises PromptError where the sizes are not those of the prompt's placeholders.
        """
        found = self._from(modality, since).nonzero()
        starts = [*accumulate(sizes, initial=0)]
        if len(found) != starts[-1]:
            raise mismatch(modality, len(found), starts[-1])
        ends = [end - 1 for end in starts[1:]]
        if not ends:
            return []
        both = torch.cat([found[starts[:-1]], found[ends]], -1).tolist()
        return [((row, first), (end, last)) for row, first, end, last in both]

    def kept(
        self, features: Mapping[Modality, Bool[Tensor, " n"]], since: int = 0
    ) -> Bool[Tensor, "B L"]:
        """Which tokens stay: all text, and the visual tokens whose feature is marked.

        ``features``: a mark for each feature of a modality that is shown from column ``since`` on,
        as many as ``places`` has counted, in prompt order. What stands before that column stays.
        """
        keep = torch.ones_like(self.ids, dtype=torch.bool)
        for modality, marks in features.items():
            keep = keep.masked_scatter(self._from(modality, since), marks.to(keep.device))
        return keep

    def owners(
        self, features: Mapping[Modality, Int[Tensor, " n"]], since: int = 0
    ) -> Int[Tensor, "B L"]:
        """The column of the token that each token was fused into; its own, or -1 where dropped.

        ``features``: for each feature of a modality that is shown from column ``since`` on, the
        index of the feature that it was fused into, or -1.
        """
        own = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
        owners = own
        for modality, target in features.items():
            here, target = self._from(modality, since), target.to(own)
            # The column of each feature, found without a mask's host synchronisation.
            slot = here.flatten().cumsum(0).view_as(self.ids) - 1
            slot = torch.where(here, slot, len(target)).flatten()
            columns = own.new_empty(len(target) + 1).scatter(0, slot, own.flatten())[:-1]
            owner = torch.where(target == DROPPED, DROPPED, columns[target.clamp_min(0)])
            owners = owners.masked_scatter(here, owner)
        return owners

    def in_place(
        self, modality: Modality, features: Shaped[Tensor, "n ..."], since: int, onto: Tensor
    ) -> Shaped[Tensor, "B L ..."]:
        """``onto (B, L, ...)`` with a value for each feature of a modality in its token's place.

        ``features``: as many as ``places`` has counted from column ``since`` on, in prompt order.
        """
        here = self._from(modality, since)
        here = here.view(*here.shape, *[1] * (onto.ndim - 2)).expand_as(onto)
        return onto.masked_scatter(here, features.to(onto))

    def _refuse_unshown(self) -> None:
        """Raise PromptError where placeholders have no pixels, and would be read as words.

        One host synchronisation for each modality that is not shown.
        """
        for modality in MODALITIES:
            if modality not in self.shows and (count := int(self.here[modality].sum())):
                raise mismatch(modality, count, 0)

    def _from(self, modality: Modality, since: int) -> Bool[Tensor, "B L"]:
        here = self.here[modality]
        return here & (torch.arange(here.shape[1], device=here.device) >= since) if since else here


def shown(inputs: Mapping[str, Any]) -> tuple[Modality, ...]:
    """The modalities of which the inputs bring pixels."""
    return tuple(m for m in MODALITIES if inputs.get(PIXELS[m]) is not None)


def _refuse_unreadable(inputs: Mapping[str, Any], ids: Tensor, pad_id: int | None) -> None:
    """Raise PromptError where inputs with pixels hold what cannot be shortened."""
    for name in ("inputs_embeds", "cu_seq_lens_q", "cu_seq_lens_k"):
        if inputs.get(name) is not None:
            raise PromptError(
                f"inputs hold {name}, which cannot be shortened; expected the processor's output, "
                "one prompt per row"
            )
    if isinstance(inputs.get("logits_to_keep"), Tensor):
        raise PromptError(
            "logits_to_keep is a tensor of columns, which move; expected a number of last columns"
        )
    mask = inputs.get("attention_mask")
    if mask is None and pad_id is not None and bool((ids == pad_id).any()):
        raise PromptError(
            "input_ids hold the padding token, and attention_mask is missing; expected (B, L): "
            "pass the processor's attention_mask"
        )
    for name in ("attention_mask", *PER_TOKEN):
        value = inputs.get(name)
        if value is not None and getattr(value, "shape", None) != ids.shape:
            raise PromptError(
                f"{name} has shape {tuple(getattr(value, 'shape', ()))}; expected (B, L) as "
                f"input_ids, {tuple(ids.shape)}"
            )
    _refuse_positions(inputs.get("position_ids"), mask, ids)
    known = {"input_ids", "attention_mask", "position_ids", *PER_TOKEN, *PIXELS.values()}
    for name, value in inputs.items():
        if name not in known and isinstance(value, Tensor) and value.shape[:2] == ids.shape:
            raise PromptError(
                f"{name} has one column per prompt token, and tokenfuse does not know how to "
                f"shorten it; expected the processor's output: leave {name} out"
            )


def _refuse_positions(positions: Tensor | None, mask: Tensor | None, ids: Tensor) -> None:
    if positions is None:
        return
    if positions.shape[-1] != ids.shape[1] or positions.ndim not in (2, 3):
        raise PromptError(
            f"position_ids have shape {tuple(positions.shape)}; expected (B, L), (3, B, L) or "
            f"(4, B, L) with L = {ids.shape[1]}, or none: the model computes them"
        )
    text = positions[0] if positions.ndim == 3 and positions.shape[0] == 4 else positions
    if mask is None and text.ndim == 2 and bool((text.diff() <= 0).any()):
        raise PromptError(
            "position_ids start anew within a row, as of several prompts packed into one; expected "
            "one prompt per row: pad instead of packing"
        )
