"""What the conformance kit for adapters asks of cuts before and inside the vision tower."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tokenfuse.adapters._spans import flat
from tokenfuse.compression import encode_prompt, prompt_adapter
from tokenfuse.plan import FusionPlan
from tokenfuse.prompt.inputs import PIXELS
from tokenfuse.registry import default_registry
from tokenfuse.strategies._base import Strategy
from tokenfuse.strategies._early import TowerStrategy
from tokenfuse.strategies._tower import TowerCut, TowerTokens
from tokenfuse.tokens import VisualTokens


class CutEarly(TowerStrategy):
    """Drops every other token, or frame, at the input of one vision block."""

    name: ClassVar[str] = "conformance_early"
    vision_block: int = 0
    frames: bool = False
    every: int = 2

    def tower_cuts(self, blocks: int) -> tuple[TowerCut, ...]:
        return (TowerCut(self.vision_block % blocks, self.choose, frames=self.frames),)

    def choose(self, tokens: TowerTokens) -> FusionPlan:
        """The plan of each item."""
        n = tokens.num_tokens
        index = torch.arange(0, n, self.every, device=tokens.states.device)
        return FusionPlan.from_survivors(index, n)


class Repeated(Strategy):
    """Behind the tower, the plans that were made inside it."""

    name: ClassVar[str] = "conformance_repeated"
    frames: bool = False

    def plan(self, tokens: VisualTokens) -> FusionPlan:
        t, h, w = tokens.grid
        n = tokens.num_tokens
        index = torch.arange(n, device=tokens.features.device)
        if not self.frames:
            return FusionPlan.from_survivors(index[::2], n)
        kept = (index // (h * w) % 2 == 0) if t > 1 else torch.ones_like(index, dtype=torch.bool)
        return FusionPlan.from_survivors(index[kept], n)


class TowerConformance:
    """Cuts inside the vision tower, as tests; see AdapterConformance, which holds what they ask."""

    attentions: ClassVar[Any]
    modalities: ClassVar[Any]
    registry: ClassVar[Any]
    frames_as_images: ClassVar[bool]
    model: Any
    inputs: Any
    compress: Any

    def early(self, attention: str, **options: Any) -> tuple[Any, CutEarly]:
        """The model, and a strategy that cuts in its tower; a skip where that is refused."""
        model = self.model(attention)
        kind = prompt_adapter(model, self.registry or default_registry()).cuts_tower
        if kind is None:
            pytest.skip("the tower of this model has to read everything")
        if self.frames_as_images:
            pytest.skip("the tower of this model reads frames as images, one by one")
        return model, CutEarly(frames=kind == "frames", **options)

    def test_what_goes_in_the_tower_leaves_the_prompt_as_elsewhere(
        self, attention: str, case: str
    ) -> None:
        """Ids, mask and positions are those of the same plans behind the tower."""
        for block in (0, -1):
            model, early = self.early(attention, vision_block=block)
            inputs = self.inputs(case)
            mine = self.compress(model, inputs, early)
            theirs = self.compress(model, inputs, Repeated(frames=early.frames))
            for name in ("input_ids", "attention_mask", "position_ids"):
                assert torch.equal(mine[name], theirs[name]), name
            for modality, plans in theirs.plans.items():
                for plan, own in zip(plans, mine.plans[modality], strict=True):
                    assert torch.equal(plan.target, own.target)

    def test_what_never_entered_the_tower_has_no_part_in_it(self, case: str) -> None:
        """Gradients reach the pixels of what is left, and of nothing else."""
        model, early = self.early(self.attentions[0])
        inputs = dict(self.inputs(case))
        adapter = prompt_adapter(model, self.registry or default_registry())
        for modality in self.modalities:
            if inputs.get(PIXELS[modality]) is not None:
                inputs[PIXELS[modality]] = inputs[PIXELS[modality]].clone().requires_grad_()
        encoded = encode_prompt(adapter, adapter.read(inputs), early)
        for part in encoded:
            pixels: Tensor = inputs[PIXELS[part.modality]]
            left = torch.cat([tokens.features for tokens in part.items]).square().sum()
            (gradient,) = torch.autograd.grad(left, pixels, retain_graph=True)
            if early.frames and part.modality == "image":
                continue
            dims = tuple(range(2 if early.frames else 1, pixels.ndim))
            reached = (gradient.abs().sum(dims) > 0).double().mean()
            assert part.cut is not None
            kept = sum(plan.num_kept for plan in part.cut)
            total = sum(plan.num_source for plan in part.cut)
            assert float(reached) == pytest.approx(kept / total)

    def test_cuts_in_the_tower_that_keep_all_change_nothing(self, attention: str) -> None:
        """Bit-identical features; and after an exception in the tower no hook is left."""
        model, early = self.early(attention, every=1)
        inputs = self.inputs("left")
        adapter = prompt_adapter(model, self.registry or default_registry())
        with torch.no_grad():
            whole = encode_prompt(adapter, adapter.read(inputs), Repeated())
            mine = encode_prompt(adapter, adapter.read(inputs), early)
        for one, two in zip(whole, mine, strict=True):
            assert torch.equal(flat(one.output.pooler_output), flat(two.output.pooler_output))

        class Stops(CutEarly):
            name: ClassVar[str] = "conformance_stops"

            def choose(self, tokens: TowerTokens) -> FusionPlan:
                raise KeyboardInterrupt

        if "video" in self.modalities or not early.frames:
            with pytest.raises(KeyboardInterrupt):
                self.compress(model, inputs, Stops(frames=early.frames))
        assert not any(module._forward_pre_hooks for module in model.modules())
