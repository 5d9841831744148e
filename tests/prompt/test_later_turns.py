"""Later turns of families that tell placeholders or positions otherwise than Qwen3-VL."""

from __future__ import annotations

import pytest
import torch

import tokenfuse
from families import FAMILIES
from models import Forced
from tokenfuse.errors import PromptError
from tokenfuse.prompt.cache import as_argument, cache_of
from tokenfuse.testing import AdapterConformance

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = {"strategy": "uniform", "keep_ratio": 1.0}


def answer(model, inputs, cache=None, **options):
    never = AdapterConformance.never(model)
    return model.generate(
        **inputs,
        **as_argument(cache),
        suppress_tokens=never,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


@pytest.mark.parametrize("name", ["glm4v", "qwen3_vl"])
@pytest.mark.parametrize("without", [(), ("mm_token_type_ids",)])
def test_the_first_prompts_token_types_may_stay_among_the_inputs(name, without):
    """As in a loop that replaces the ids and keeps the rest."""
    family = FAMILIES[name]
    model = family.build("sdpa")
    inputs = family.prompt([[("text", 1), ("video", 1), ("text", 2)]])
    question = family.prompt([[("text", 3)]])["input_ids"][:, 1:]
    with tokenfuse.attach(model, "uniform"):
        first = answer(model, inputs)
        ids = torch.cat([first.sequences, question], -1)
        rest = {k: v for k, v in inputs.items() if k not in ("attention_mask", *without)}
        kept = answer(model, rest | {"input_ids": ids}, cache_of(first))
        first = answer(model, inputs)
        forced = [Forced(kept.sequences)]
        bare = answer(model, {"input_ids": ids}, cache_of(first), logits_processor=forced)
    torch.testing.assert_close(
        torch.stack(kept.logits, 1), torch.stack(bare.logits, 1), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_a_turn_after_a_visual_token_goes_on_as_transformers_does(name):
    """A prompt that ends within its image: the rows of its last position differ."""
    family = FAMILIES[name]
    model = family.build("sdpa")
    inputs = family.prompt([[("text", 1), ("image", 1), ("text", 2)]])
    end = int((inputs["input_ids"] == model.config.image_token_id).nonzero()[-1, 1]) + 1
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    inputs = {k: v[:, :end] if k in per_token else v for k, v in inputs.items()}
    question = family.prompt([[("text", 3)]])["input_ids"][:, 1:]

    def two_turns(*forced):
        first = answer(model, inputs, logits_processor=list(forced))
        ids = torch.cat([first.sequences, question], -1)
        later = {"input_ids": ids}
        return answer(model, later, cache_of(first), logits_processor=list(forced))

    plain = two_turns()
    with tokenfuse.attach(model, ALL):
        mine = two_turns(Forced(plain.sequences))
    torch.testing.assert_close(
        torch.stack(mine.logits), torch.stack(plain.logits), atol=1e-4, rtol=0
    )


def test_gaps_in_positions_without_a_cache_are_refused():
    """transformers would take what follows a gap for another prompt."""
    family = FAMILIES["llava"]
    model = family.build("sdpa")
    inputs = family.prompt([[("text", 1), ("image", 3), ("text", 2)]])
    with tokenfuse.attach(model, "uniform", keep_ratio=0.5):
        with pytest.raises(PromptError, match="use_cache is False"):
            model.generate(**inputs, use_cache=False, max_new_tokens=2)
        cached = answer(model, inputs)
    contiguous = {"keep_ratio": 0.5, "positions": "contiguous"}
    with tokenfuse.attach(model, "uniform", **contiguous):
        model.generate(**inputs, use_cache=False, max_new_tokens=2)
    assert cached.sequences.shape[1] == inputs["input_ids"].shape[1] + 4
