"""Greedy answers to prompts, and the time to their first token."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from tokenfuse.sessions.proportional import proportional_attention


def answers(
    model: Any, processor: Any, inputs: Mapping[str, Any], *, max_new_tokens: int
) -> list[str]:
    """The greedy answer to each of ``B`` prompts, as text.

    ``inputs`` are a processor's, padded on the left, or a prompt that ``compress`` has shortened.
    """
    ids, _ = generate(model, inputs, max_new_tokens=max_new_tokens)
    return decode(processor, ids)


def generate(
    model: Any, inputs: Mapping[str, Any], *, max_new_tokens: int
) -> tuple[Int[Tensor, "B A"], Float[Tensor, "B V"]]:
    """Greedy answers without their prompts, and the first token's logits in fp32.

    ``A`` is the length of the longest answer, ``V`` the size of the vocabulary. ``inputs`` as for
    ``answers``.
    """
    turn = getattr(inputs, "turn", None)
    with proportional_attention(model, None if turn is None else turn.shares):
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return output.sequences[:, inputs["input_ids"].shape[1] :], output.logits[0].float()


def decode(processor: Any, ids: Int[Tensor, "B A"]) -> list[str]:
    """Answers as text, without special tokens and the white space around."""
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


def first_token_ms(model: Any, inputs: Mapping[str, Any]) -> float:
    """Milliseconds until ``generate`` has its first token, vision and compression included."""
    began = time.perf_counter()
    # Reading the token waits for a GPU to have it.
    model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1].item()
    return (time.perf_counter() - began) * 1e3
