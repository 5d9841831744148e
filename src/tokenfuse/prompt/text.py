"""The text of prompts, for strategies that ask what the prompt asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jaxtyping import Bool, Int
from torch import Tensor

from tokenfuse.errors import PromptError
from tokenfuse.tokens import Modality

Place = tuple[int, int]
"""A row of the batch, and a column of its prompt."""


def prompt_texts(
    embed: Callable[[Tensor], Tensor],
    ids: Int[Tensor, "B L"],
    text: Bool[Tensor, "B L"],
    items: Iterable[tuple[Place, Place]],
    rows: Iterable[int],
) -> dict[int, Tensor]:
    """The embedded text ``(n, D)`` of the prompts in some ``rows`` of a batch.

    ``text`` marks what may be text. ``items``: where each image and video begins and ends; what
    stands between, such as the timestamps of frames, is no text. One host synchronisation per row.
    """
    text = text.clone()
    for (row, first), (_, last) in items:
        text[row, first : last + 1] = False
    return {row: embed(ids[row, text[row]]).detach() for row in rows}


class MismatchError(PromptError):
    """A prompt has not as many placeholders of a modality as there are features."""


def mismatch(modality: Modality, placeholders: int, features: int) -> MismatchError:
    """The error where a modality's placeholders are not as many as its features."""
    return MismatchError(
        f"the prompt shows {placeholders} {modality} placeholder(s), the {modality} features are "
        f"{features}: pass input_ids, attention_mask and pixels of one processor call, not "
        "truncated"
    )
