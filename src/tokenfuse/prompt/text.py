"""The text of each item's prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tokenfuse.errors import PromptError
from tokenfuse.tokens import Modality


def prompt_texts(
    embed: Callable[[Tensor], Tensor],
    ids: Tensor,
    text: Tensor,
    placeholders: Mapping[Modality, Tensor],
    sizes: Mapping[Modality, Sequence[int]],
) -> dict[Modality, list[Tensor]]:
    """The embeddings ``(n, D)`` of the text of each item's prompt, by modality, in prompt order.

    ``ids (B, L)``; ``text (B, L)`` marks what may be text; ``placeholders`` marks each modality's
    features, ``sizes`` says how many each item has. What stands between the first and the last
    feature of an item, such as the timestamps of its frames, is no text.

    Raises PromptError where placeholders and items do not agree. Two host synchronisations per
    modality.
    """
    text, rows = text.clone(), {}
    for modality, here in placeholders.items():
        count = torch.tensor([0, *sizes[modality]], device=ids.device).cumsum(0)
        places = here.nonzero()
        if len(places) != sum(sizes[modality]):
            raise mismatch(modality, len(places), sum(sizes[modality]))
        spans = torch.cat([places[count[:-1]], places[count[1:] - 1]], -1).tolist()
        for row, first, _, last in spans:
            text[row, first : last + 1] = False
        rows[modality] = [span[0] for span in spans]
    used = {row for where in rows.values() for row in where}
    embedded = {row: embed(ids[row, text[row]]).detach() for row in sorted(used)}
    return {modality: [embedded[row] for row in where] for modality, where in rows.items()}


def mismatch(modality: Modality, placeholders: int, features: int) -> PromptError:
    """The error where a modality's placeholders are not as many as its features."""
    return PromptError(
        f"the prompt shows {placeholders} {modality} placeholder(s), the {modality} features are "
        f"{features}: pass input_ids, attention_mask and pixels of one processor call, not "
        "truncated"
    )
