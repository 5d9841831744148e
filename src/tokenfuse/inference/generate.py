"""Greedy answers to prompts, and the time to their first token."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from tokenfuse.sessions.llm_stage import LayerCounts, layer_stage
from tokenfuse.sessions.proportional import proportional_attention
from tokenfuse.strategies._base import Strategy


class Answered(NamedTuple):
    """Greedy answers ``ids (B, A)`` without their prompts, and the first token's ``logits (B, V)``.

    The logits are fp32. ``A`` is the length of the longest answer, ``V`` the size of the
    vocabulary. ``layers``: what each decoder layer has read, where tokens have gone inside the LLM.
    """

    ids: Int[Tensor, "B A"]
    logits: Float[Tensor, "B V"]
    layers: LayerCounts | None


def answers(
    model: Any, processor: Any, inputs: Mapping[str, Any], *, max_new_tokens: int
) -> list[str]:
    """The greedy answer to each of ``B`` prompts, as text.

    ``inputs`` are a processor's, padded on the left, or a prompt that ``compress`` has shortened.
    """
    return decode(processor, generate(model, inputs, max_new_tokens=max_new_tokens).ids)


def generate(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int,
    strategy: Strategy | None = None,
    **options: Any,
) -> Answered:
    """Greedy answers. ``inputs`` as for ``answers``; ``strategy``: the one that has shortened them.

    It is only needed where it acts inside the LLM, too. ``options`` are those of the model's
    ``generate``.
    """
    turn = getattr(inputs, "turn", None)
    with (
        proportional_attention(model, None if turn is None else turn.shares),
        layer_stage(model, strategy, turn) as stage,
    ):
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    ids = output.sequences[:, inputs["input_ids"].shape[1] :]
    return Answered(ids, output.logits[0].float(), None if stage is None else stage.counts)


def decode(processor: Any, ids: Int[Tensor, "B A"]) -> list[str]:
    """Answers as text, without special tokens and the white space around."""
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


def first_token_ms(model: Any, inputs: Mapping[str, Any]) -> float:
    """Milliseconds until ``generate`` has its first token, vision and compression included."""
    began = time.perf_counter()
    # Reading the token waits for a GPU to have it.
    model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1].item()
    return (time.perf_counter() - began) * 1e3
