"""The conformance kit for strategies that act at decoder layers."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Strategy
from tokenfuse.strategies._layers import LayerCut, LayerTokens

WIDTH, HEADS, GROUPS, HEAD = 16, 4, 2, 8


def layer_tokens_of(
    visual: int,
    layer: int = 2,
    *,
    text: tuple[int, int] = (3, 4),
    kind: str = "random",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    source: int | None = None,
) -> LayerTokens:
    """One prompt at a decoder layer, with all that a cut may read.

    ``visual`` tokens stand between ``text`` ones, as many before and after, in frames of four.
    ``kind``: what they are: ``random``, ``alike``, ``zeros``. Equal arguments make equal tokens.
    """
    rng = torch.Generator().manual_seed(seed)
    n = sum(text) + visual

    def noise(*shape: int) -> Tensor:
        # The 8 bits of bf16 hold the values, so that another dtype is the same tokens.
        return torch.randn(*shape, generator=rng).bfloat16().half().to(dtype)

    here = torch.arange(text[0], text[0] + visual)
    states = noise(n, WIDTH)
    if kind == "alike":
        states[here] = states[here[:1]].expand(visual, -1)
    if kind == "zeros":
        states[here] = 0
    index, rows = torch.arange(visual), torch.arange(n - text[1], n)
    attention = torch.randn(HEADS, text[1], n, generator=rng).softmax(-1)
    angles = torch.arange(n)[:, None] * 0.3 ** torch.arange(HEAD // 2)
    first = visual if source is None else source
    return LayerTokens(
        states=states,
        visual=here,
        coords=torch.stack([index // 4, index % 4 // 2, index % 2], -1),
        item=torch.zeros_like(index),
        sizes=torch.ones_like(index),
        grids=((-(-visual // 4), 2, 2),),
        original=first,
        source=first,
        layer=layer,
        num_layers=32,
        counts=(first,) * layer,
        attention=attention,
        rows=rows,
        received=torch.rand(n, generator=rng),
        keys=noise(n, GROUPS, HEAD),
        rope=(torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)),
        norm=torch.nn.functional.normalize,
    )


class LayerStrategyConformance:
    """What every cut inside the LLM promises, as tests. A subclass gives a strategy::

    class TestMine(LayerStrategyConformance):
        def make(self, **options):
            return Mine(**options)
    """

    ratio: ClassVar[dict[str, Any] | None] = None
    """Options with which the strategy keeps everything, None where it has none."""

    def make(self, **options: Any) -> Strategy:
        """The strategy with some options."""
        raise NotImplementedError("the test class has no make(**options)")

    def asked(self, cut: LayerCut, tokens: LayerTokens) -> LayerTokens:
        """The tokens with what a cut asks for, and nothing else."""
        return replace(
            tokens,
            attention=tokens.attention if cut.queries in ("last", "chosen") else None,
            rows=tokens.rows if cut.queries in ("last", "chosen") else None,
            received=tokens.received if cut.queries == "all" else None,
            rope=tokens.rope if cut.queries == "chosen" else None,
            keys=tokens.keys if cut.keys else None,
        )

    def test_cuts_rise_from_layer_to_layer(self) -> None:
        """Each layer once, none of them the first, and read the same way whenever asked."""
        strategy = self.make()
        layers = [cut.layer for cut in strategy.cuts()]
        assert layers
        assert layers == sorted(set(layers))
        assert layers[0] >= 1
        assert layers == [cut.layer for cut in strategy.cuts()]

    # Classes share the kit, each with tests of its own.
    @settings(max_examples=25, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        st.sampled_from([1, 2, 5, 16, 31]),
        st.sampled_from(["random", "alike", "zeros"]),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        st.integers(0, 9),
    )
    def test_every_plan_is_valid_and_the_same_again(
        self, visual: int, kind: str, dtype: torch.dtype, seed: int
    ) -> None:
        """Some token stays, what is fused is finite, and nothing that was given has changed."""
        for cut in self.make().cuts():
            tokens = layer_tokens_of(visual, cut.layer, kind=kind, seed=seed, dtype=dtype)
            own = self.asked(cut, tokens)
            before = {f.name: getattr(own, f.name) for f in fields(own)}
            copies = {k: v.clone() for k, v in before.items() if isinstance(v, Tensor)}
            plan = cut.plan(own)
            plan.check(visual)
            again = cut.plan(own)
            assert torch.equal(plan.survivors, again.survivors)
            assert torch.equal(plan.target, again.target)
            fuse = cut.fuse or FusionPlan.select
            fused = fuse(plan, own.features)
            assert fused.shape == (plan.num_kept, WIDTH)
            assert fused.dtype == dtype
            assert bool(fused.isfinite().all())
            assert all(torch.equal(before[name], copies[name]) for name in copies)

    def test_what_nothing_joined_stays_as_it_is(self) -> None:
        """Bit for bit, so that a cut that keeps everything changes nothing."""
        for cut in self.make().cuts():
            tokens = self.asked(cut, layer_tokens_of(24, cut.layer))
            plan = cut.plan(tokens)
            fused = (cut.fuse or FusionPlan.select)(plan, tokens.features)
            alone = plan.sizes == 1
            assert torch.equal(fused[alone], plan.select(tokens.features)[alone])

    def test_keeping_everything_is_the_identity(self) -> None:
        """Whatever the tokens show, with the options that say so."""
        if self.ratio is None:
            return
        for cut in self.make(**self.ratio).cuts():
            for visual in (1, 7, 24):
                tokens = self.asked(cut, layer_tokens_of(visual, cut.layer))
                assert cut.plan(tokens).is_identity

    def test_named_rows_are_text(self) -> None:
        """Rows whose attention is asked for are no visual tokens, and there is one at least."""
        for cut in self.make().cuts():
            if cut.choose is None:
                continue
            tokens = layer_tokens_of(12, 0)
            rows = cut.choose(tokens)
            assert len(rows)
            assert not bool(torch.isin(rows, tokens.visual).any())
            assert bool((rows < len(tokens.states)).all())
