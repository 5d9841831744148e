"""A failure at any step of the road leaves the model as it was."""

from __future__ import annotations

import pytest
import torch

import models
import tokenfuse
from tokenfuse import compression
from tokenfuse.adapters.qwen3_vl import Qwen3VL
from tokenfuse.sessions import vlm
from tokenfuse.strategies.ttf import TTF

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = {
    "read": (Qwen3VL, "read"),
    "encode": (compression, "encode_prompt"),
    "the tower's output": (Qwen3VL, "spans"),
    "plan": (TTF, "plan"),
    "fuse": (TTF, "fuse"),
    "positions": (Qwen3VL, "positions"),
    "order": (Qwen3VL, "column_order"),
    "shorten": (compression, "shorten_prompt"),
    "shares": (compression, "_shares"),
    "report": (compression, "_report"),
    "delta": (Qwen3VL, "set_position_delta"),
    "arguments": (vlm, "for_shorter_prompt"),
}


@pytest.mark.parametrize("call", ["generate", "forward"])
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_leaves_the_model_as_it_was(step, call, monkeypatch):
    model, inputs = models.build(), models.one_video()
    held = {name: id(value) for name, value in vars(model).items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    plain = model.generate(**inputs, max_new_tokens=2)
    delta = model.model.rope_deltas

    class InjectedError(RuntimeError):
        pass

    def fail(*_, **__):
        raise InjectedError(step)

    session = tokenfuse.attach(model, "ttf", keep_ratio=0.4)
    before = model.generate(**inputs, max_new_tokens=2)
    with monkeypatch.context() as patch:
        patch.setattr(*STEPS[step], fail)
        if (step, call) == ("arguments", "forward"):
            model(**inputs)
        else:
            with pytest.raises(InjectedError, match=step), torch.no_grad():
                getattr(model, call)(**inputs)
    assert torch.equal(model.generate(**inputs, max_new_tokens=2), before)
    session.detach()
    assert {name: id(value) for name, value in vars(model).items()} == held
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(model.model.rope_deltas, delta)
    assert torch.equal(model.generate(**inputs, max_new_tokens=2), plain)
