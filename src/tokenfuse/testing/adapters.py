"""The conformance kit for adapters: what it takes to hand a model a shorter prompt."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

import tokenfuse
from tokenfuse.adapters._base import Adapter, Encoded
from tokenfuse.adapters._spans import Span, flat
from tokenfuse.compression import CompressedInputs, prompt_adapter
from tokenfuse.costs import attends
from tokenfuse.errors import AttachError, PromptError, UnsupportedModelError
from tokenfuse.plan import DROPPED, FusionPlan, Reduce
from tokenfuse.prompt.cache import as_argument, cache_of
from tokenfuse.prompt.inputs import MODALITIES, PER_TOKEN, PIXELS
from tokenfuse.registry import Registry, default_registry
from tokenfuse.sessions.proportional import before_attention
from tokenfuse.strategies._base import Attention, Needs, Strategy
from tokenfuse.testing._inside import InsideConformance
from tokenfuse.testing._tower import TowerConformance
from tokenfuse.testing.oracle import DeletedRun, MaskedRun
from tokenfuse.tokens import Modality, VisualTokens

Part = tuple[Literal["text", "image", "video"], int]
"""A part of a prompt, and a seed: equal seeds mean equal content, wherever the part stands."""


class Drop(Strategy):
    """Drops tokens at random, and the whole of every second frame if ``frames`` says so.

    The draw depends on the grid alone, so that an item loses the same tokens in a batch and alone.
    """

    name: ClassVar[str] = "conformance_drop"
    reduction: float = 0.5
    frames: bool = False

    def plan(self, tokens: VisualTokens) -> FusionPlan:
        t, h, w = tokens.grid
        n = tokens.num_tokens
        rng = torch.Generator().manual_seed(t * 1009 + h * 101 + w)
        noise = torch.rand(n, generator=rng)
        if self.frames and t > 1:
            noise += (torch.arange(n) // (h * w) % 2 == 0) * 2.0
            n = -(-t // 2) * h * w
        kept = max(1, round(n * (1 - self.reduction)))
        survivors = noise.topk(kept).indices.sort().values
        return FusionPlan.from_survivors(survivors.to(tokens.features.device), tokens.num_tokens)


class Halves(Strategy):
    """Fuses each token of the second half of an item into the one as far into the first half."""

    name: ClassVar[str] = "conformance_halves"
    reduce: Reduce = "mean"

    def fuse(self, plan: FusionPlan, x: Tensor) -> Tensor:
        return plan.fuse(x, self.reduce)

    def plan(self, tokens: VisualTokens) -> FusionPlan:
        n = tokens.num_tokens
        kept = -(-n // 2)
        index = torch.arange(n, device=tokens.features.device)
        return FusionPlan.from_roots(index[:kept], index % kept)


class Spread(Halves):
    """Fuses every other token into an earlier one, far enough that others stand between them."""

    name: ClassVar[str] = "conformance_spread"

    def plan(self, tokens: VisualTokens) -> FusionPlan:
        index = torch.arange(tokens.num_tokens, device=tokens.features.device)
        roots = torch.where(index % 2 == 0, index, index // 4 * 2)
        # Of some nothing is left at all.
        return FusionPlan.from_roots(index[::2], roots.masked_fill(index % 6 == 5, DROPPED))


class Turned(Spread):
    """Fuses like ``Spread``, and lets the last frame of a video stand first."""

    name: ClassVar[str] = "conformance_turned"

    def plan(self, tokens: VisualTokens) -> FusionPlan:
        return _turned(super().plan(tokens), tokens)


class Moved(Strategy):
    """Keeps every token, and lets the last frame of a video stand first."""

    name: ClassVar[str] = "conformance_moved"

    def plan(self, tokens: VisualTokens) -> FusionPlan:
        plan = FusionPlan.identity(tokens.num_tokens, tokens.features.device)
        return _turned(plan, tokens)


def _turned(plan: FusionPlan, tokens: VisualTokens) -> FusionPlan:
    frames = torch.arange(tokens.grid[0], device=tokens.features.device)
    return plan if len(frames) == 1 else replace(plan, frame_order=frames.roll(1))


DROPS = {
    "33 %": Drop(reduction=0.33),
    "67 %": Drop(reduction=0.67),
    "99 %": Drop(reduction=0.99),
    "whole frames": Drop(reduction=0.1, frames=True),
}
ONE_DROP = "67 %"
"""What prompts lose under every attention but the first."""
NOTHING = Drop(reduction=0.0)
HALF = Drop(reduction=0.5)
MOVED = Moved()
STEPS = 5
ALL = slice(None)


class AdapterConformance(InsideConformance, TowerConformance):
    """Everything that an adapter promises, as tests. A subclass gives a model and its prompts.

    ::

        class TestMine(AdapterConformance):
            adapter = "mine"
            model = staticmethod(functools.cache(build_a_tiny_random_model))
            prompt = staticmethod(processor_inputs)

    ``model(attention)`` is the model in eval mode with attention ``"sdpa"`` or ``"eager"``, and
    without an end token. ``prompt(rows, side)`` are the processor's inputs for a batch of prompts,
    padded on ``side``, ``attention_mask`` included. A row is a list of parts, each a kind
    (``"text"``, ``"image"``, ``"video"``) and a seed. Equal seeds mean equal content, other seeds
    other content and, where the model allows it, another size; a text has two tokens or more.
    """

    adapter: ClassVar[str | None] = None
    """The name of the adapter that should be found for the model."""
    registry: ClassVar[Registry | None] = None
    """Where the adapter is registered, if not as an installed plugin."""
    modalities: ClassVar[Sequence[Modality]] = ("image", "video")
    """What prompts may show."""
    attentions: ClassVar[Sequence[str]] = ("sdpa", "eager")
    """The attentions that the model has. Most tests run the first, some run all."""
    drops: ClassVar[Sequence[str]] = tuple(DROPS)
    """The names in ``DROPS`` of what prompts lose."""
    full: ClassVar[bool] = False
    """Whether every attention meets all of ``drops``, instead of the first alone."""
    mixed: ClassVar[bool] = True
    """Whether the model itself takes an image and a video in one prompt."""
    several: ClassVar[bool] = True
    """Whether the model itself takes several images, or videos, in one prompt."""
    beams: ClassVar[bool] = True
    """Whether the model itself can search with beams when it is shown something."""
    frames_as_images: ClassVar[bool] = False
    causal: ClassVar[bool] = True
    """Whether text sees only what comes before it."""
    text_type: ClassVar[int] = 0
    """The token type of an answer, where the model has token types."""
    tolerance: ClassVar[float] = 1e-4
    """Largest difference of logits that is rounding."""

    half: ClassVar[Strategy] = HALF
    nothing: ClassVar[Strategy] = NOTHING

    _shorter: ClassVar[dict[tuple[str, str, Strategy], CompressedInputs]]
    _hidden: ClassVar[dict[tuple[str, str, Strategy], tuple[Tensor, Tensor]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # pytest makes an instance for each test.
        cls._shorter, cls._hidden = {}, {}

    @staticmethod
    def model(attention: str) -> Any:
        """The model with that attention, in eval mode."""
        raise NotImplementedError("the test class has no model(attention)")

    @staticmethod
    def prompt(rows: Sequence[Sequence[Part]], side: str = "left") -> dict[str, Any]:
        """The processor's inputs for a batch of prompts."""
        raise NotImplementedError("the test class has no prompt(rows, side)")

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Give the tests their attention, prompt and dropped share; pytest calls this."""
        cases = self.cases()
        values: dict[str, Sequence[Any]] = {
            "attention": self.attentions,
            "case": list(cases),
            "answered": [name for name in cases if name != "right"],
            "alone": [name for name in cases if name not in ("left", "right")],
            "dropped": self.drops,
            "side": ["left", "right"],
            "encoded": ["new alone", "all again"],
        }
        if {"attention", "dropped"} <= set(metafunc.fixturenames):
            attentions, drops = values.pop("attention"), values.pop("dropped")
            pairs = [
                (attention, dropped)
                for attention in attentions
                for dropped in drops
                if self.full or attention == attentions[0] or dropped == ONE_DROP
            ]
            metafunc.parametrize(("attention", "dropped"), pairs)
        for name in values:
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values[name])

    def cases(self) -> dict[str, list[list[Part]]]:
        """The prompts by name: one item, several, both orders, and a batch padded on each side."""
        first, last = self.modalities[0], self.modalities[-1]
        found: dict[str, list[list[Part]]] = {}
        for kind in self.modalities:
            found[kind] = [[("text", 1), (kind, 1), ("text", 2)]]
            if self.several:
                found[f"two {kind}s"] = [
                    [("text", 1), (kind, 1), ("text", 2), (kind, 2), ("text", 3)]
                ]
        if self.mixed and len(self.modalities) > 1:
            for one, two in ((first, last), (last, first)):
                found[f"{one}, {two}"] = [
                    [("text", 4), (one, 3), ("text", 5), (two, 4), ("text", 6)]
                ]
        longer: list[Part] = [("text", 8), (first, 6), ("text", 9), ("text", 10)]
        if self.several and (self.mixed or first == last):
            longer += [(last, 7), ("text", 11)]
        other = last if self.mixed else first
        batch: list[list[Part]] = [[("text", 7), (first, 5), ("text", 6)], longer]
        batch.append([("text", 12), (other, 8), ("text", 13), ("text", 14), ("text", 15)])
        return found | {"left": batch, "right": batch}

    def grids(self, case: str) -> list[tuple[int, int, int]] | None:
        """The grids ``(T, H, W)`` that the items of a prompt have, images first; None if unsaid.

        With 1-D rope nothing else tells a grid from one with rows and columns exchanged.
        """
        return None

    def inputs(self, case: str) -> dict[str, Any]:
        """The prompt of that name."""
        return self.prompt(self.cases()[case], "right" if case == "right" else "left")

    def compress(
        self, model: Any, inputs: Mapping[str, Any], strategy: Strategy = HALF, **options: Any
    ) -> CompressedInputs:
        """``tokenfuse.compress`` as this model needs it."""
        return tokenfuse.compress(
            model,
            inputs,
            strategy,
            frames_as_images=self.frames_as_images,
            registry=self.registry,
            **options,
        )

    def shorter(self, attention: str, case: str, strategy: Strategy = HALF) -> CompressedInputs:
        """``compress`` for a prompt by name, made once.

        The model's rope delta, which the call sets, is by now perhaps that of another prompt.
        """
        key = attention, case, strategy
        if key not in self._shorter:
            found = self.compress(self.model(attention), self.inputs(case), strategy)
            self._shorter[key] = found
        return self._shorter[key]

    def masked(
        self,
        attention: str,
        case: str,
        strategy: Strategy = HALF,
        proportional: bool = False,
    ) -> MaskedRun:
        """``oracle`` for a prompt by name; what it hides is found once."""
        model, inputs, key = self.model(attention), self.inputs(case), (attention, case, strategy)
        if key not in self._hidden:
            self._hidden[key] = self.hide(model, inputs, self.shorter(*key).plans)
        hidden, owner = self._hidden[key]
        order = self.order(model, inputs, strategy)
        return self.run(model, inputs, hidden, owner if proportional else None, order)

    def attach(self, model: Any, strategy: Strategy = HALF, **options: Any) -> Any:
        """``tokenfuse.attach`` as this model needs it."""
        return tokenfuse.attach(
            model,
            strategy,
            frames_as_images=self.frames_as_images,
            registry=self.registry,
            **options,
        )

    def placeholders(self, model: Any, inputs: Mapping[str, Any], modality: Modality) -> Tensor:
        """Which tokens stand for a feature of a modality, by the model's config alone."""
        config, ids = model.config, inputs["input_ids"]
        tokens = [getattr(config, f"{m}_token_id", None) for m in MODALITIES]
        types = inputs.get("mm_token_type_ids")
        if types is not None:
            # Where one id stands for both, the types tell them apart.
            visual = torch.isin(ids, ids.new_tensor([t for t in tokens if t is not None]))
            return visual.logical_and(types == 1 + MODALITIES.index(modality))
        token = tokens[MODALITIES.index(modality)]
        return torch.isin(ids, ids.new_tensor([] if token is None else [token]))

    def oracle(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        plans: Mapping[Any, Any],
        proportional: bool = False,
        order: Tensor | None = None,
    ) -> MaskedRun:
        """The full-length run in which what the plans drop is hidden.

        ``proportional``: what is left is weighed by the tokens it stands for. ``order (B, L)``: the
        column that stands in each place, if not its own.
        """
        hidden, owner = self.hide(model, inputs, plans)
        return self.run(model, inputs, hidden, owner if proportional else None, order)

    def order(
        self, model: Any, inputs: Mapping[str, Any], strategy: Strategy = MOVED
    ) -> Tensor | None:
        """The column that stands in each place, ``(B, L)``, where the strategy moves frames."""
        if not isinstance(strategy, Moved | Turned):
            return None
        return self.compress(model, inputs, MOVED).columns

    def hide(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        plans: Mapping[Any, Any],
    ) -> tuple[Tensor, Tensor]:
        """Which tokens the plans drop, and the column of what each is fused into, ``(B, L)``."""
        ids = inputs["input_ids"]
        hidden = torch.zeros_like(ids, dtype=torch.bool)
        owner = torch.arange(ids.shape[1]).expand_as(ids)
        adapter = self.adapter_of(model)
        with torch.no_grad():
            encoded = adapter.encode(adapter.read(inputs))
        for part in encoded:
            here = self.placeholders(model, inputs, part.modality)
            if self.frames_as_images:
                # A video's frames follow each other, and hold nothing but tokens.
                spans = [Span((1, 1, plan.num_source)) for plan in plans[part.modality]]
                part = replace(part, spans=spans)
            hidden = hidden.masked_scatter(here, ~part.keep_mask(plans[part.modality]))
            column = owner[here]
            spans = column.split([span.size for span in part.spans])
            for span, columns, plan in zip(part.spans, spans, plans[part.modality], strict=True):
                own = columns[span.tokens()]
                target = own[plan.survivors][plan.target.clamp_min(0)]
                columns[span.tokens()] = target.masked_fill(plan.target == DROPPED, DROPPED)
            owner = owner.masked_scatter(here, column)
        return hidden, owner

    def run(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        hidden: Tensor,
        owner: Tensor | None = None,
        order: Tensor | None = None,
    ) -> MaskedRun:
        """The full-length run in which ``hidden (B, L)`` is hidden, and its ``owner`` seen.

        ``order (B, L)``: the column that stands in each place, if not its own.
        """
        kind = MaskedRun if _masked(model) else DeletedRun
        return kind(
            model,
            inputs,
            hidden,
            never=self.never(model),
            text_type=self.text_type,
            owner=owner,
            order=order,
        )

    @staticmethod
    def never(model: Any) -> list[int]:
        """Ids that an answer must not hold: a random model may say that it sees an image."""
        names = [f"{modality}_token_id" for modality in MODALITIES]
        found = [getattr(model.config, name, None) for name in names]
        return [token for token in found if token is not None]

    def adapter_of(self, model: Any) -> Adapter:
        """The adapter that is found for the model."""
        return prompt_adapter(model, self.registry or default_registry())

    def encode(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        needs: Mapping[Modality, Needs] | None = None,
    ) -> list[Encoded]:
        """The items of the inputs, as the adapter has them."""
        adapter = self.adapter_of(model)
        return adapter.encode(adapter.read(inputs), needs, self.frames_as_images)

    def close(self, mine: Tensor, theirs: Tensor) -> None:
        """Assert that two tensors are equal up to rounding."""
        torch.testing.assert_close(mine, theirs, atol=self.tolerance, rtol=0)

    def generate(self, model: Any, inputs: Mapping[str, Any], **options: Any) -> Any:
        """Greedy answers, with the logits that chose them."""
        return model.generate(**inputs, **{**self.options(model), **options})

    def options(self, model: Any) -> dict[str, Any]:
        """The options of ``generate`` for a greedy answer and the logits that chose it."""
        return {
            "max_new_tokens": STEPS,
            "suppress_tokens": self.never(model),
            "return_dict_in_generate": True,
            "output_logits": True,
        }

    def agree(self, out: Any, begins: Tensor, oracle: MaskedRun, rows: slice = ALL) -> None:
        """Assert that what ``generate`` returned is ``begins (B, L)`` and the oracle's answer.

        ``rows``: those of ``out`` that the oracle is for. Each token has to be the oracle's best.
        Only where the best leads by no more than rounding, as between two tokens of a random model
        it sometimes does, the other may be chosen; the oracle then goes on from there.
        """
        sequences = out.sequences[rows]
        logits = torch.stack(out.logits, 1)[rows]
        assert torch.equal(sequences[:, : begins.shape[1]], begins)
        tokens = sequences[:, begins.shape[1] :]
        assert tokens.shape == logits.shape[:2]
        expected = oracle.follow(tokens)
        self.close(logits, expected)
        # Each of the two logits may be off.
        assert float(oracle.lag(tokens, expected).max()) <= 2 * self.tolerance

    # What is found

    def test_the_adapter_is_found(self) -> None:
        """The registry chooses this adapter for the model, and it matches nothing else."""
        found = self.adapter_of(self.model(self.attentions[0]))
        assert self.adapter in (None, found.name)
        assert not type(found).matches(torch.nn.Linear(1, 1))
        assert not type(found).matches(self.model(self.attentions[0]).base_model)

    def test_items_are_those_of_the_prompt(self, case: str) -> None:
        """Features and grids are of the prompt's items, and not all alike."""
        report = self.shorter(self.attentions[0], case).report
        shown = sum(kind != "text" for row in self.cases()[case] for kind, _ in row)
        assert len(report.items) >= shown
        for item in report.items:
            assert item.tokens_before == item.grid[0] * item.grid[1] * item.grid[2]
        assert report.tokens_after < report.tokens_before
        expected = self.grids(case)
        assert expected in (None, [item.grid for item in report.items])

    def test_places_are_those_of_the_rope(self, case: str) -> None:
        """Rows and columns of the grid are the rows and columns that M-RoPE gives the tokens."""
        model, inputs = self.model(self.attentions[0]), self.inputs(case)
        adapter = self.adapter_of(model)
        prompt = adapter.read(inputs)
        positions = adapter.positions(prompt).ids
        if positions.ndim == 2:
            pytest.skip("1-D rope knows no rows and columns")
        with torch.no_grad():
            encoded = adapter.encode(prompt, frames_as_images=self.frames_as_images)
        for part in encoded:
            here = self.placeholders(model, inputs, part.modality)
            rope = positions[-2:].expand(2, *here.shape)[:, here]
            rope = rope.split([span.size for span in part.spans], -1)
            for span, tokens, own in zip(part.spans, part.items, rope, strict=True):
                t, h, w = span.grid
                frames = own[:, span.tokens()].view(2, t, h * w)
                places = tokens.coords[:, 1:].T.reshape(2, t, h * w)
                assert torch.equal(frames - frames[..., :1], places)

    # The prompt

    def test_every_placeholder_has_a_feature(self, case: str, dropped: str) -> None:
        """The shorter prompt shows as many placeholders as there are features, and all text."""
        model, inputs = self.model(self.attentions[0]), self.inputs(case)
        short = self.shorter(self.attentions[0], case, DROPS[dropped])
        text = {"long": inputs["attention_mask"].bool(), "short": short["attention_mask"].bool()}
        for modality in MODALITIES:
            here = self.placeholders(model, short, modality) & text["short"]
            output = short["mm_encoder_outputs"].get(modality)
            features = 0
            if output is not None:
                features = sum(x.numel() // x.shape[-1] for x in output.pooler_output)
            assert int(here.sum()) == features, f"{modality} placeholders and features"
            text["short"] &= ~here
            text["long"] &= ~self.placeholders(model, inputs, modality)
        for row in range(len(inputs["input_ids"])):
            mine = short["input_ids"][row, text["short"][row]]
            assert torch.equal(mine, inputs["input_ids"][row, text["long"][row]])

    def test_positions_are_those_of_the_uncompressed_prompt(self, case: str) -> None:
        """A survivor is read where the model itself would read it."""
        oracle = self.masked(self.attentions[0], case)
        short = self.shorter(self.attentions[0], case)
        positions, mine = oracle.positions(), short["position_ids"]
        if mine.ndim == 3 and len(mine) == 4:
            positions, mine = positions[-3:], mine[1:]
            counted = short["attention_mask"].cumsum(-1) - 1
            real = short["attention_mask"].bool()
            assert torch.equal(short["position_ids"][0][real], counted[real])
        for row, seen in enumerate(oracle.seen):
            real = short["attention_mask"][row].bool()
            assert torch.equal(mine[..., row, :][..., real], positions[..., row, :][..., seen])

    def test_every_layer_of_features_is_fused(self, alone: str) -> None:
        """Pooled and DeepStack features alike are means of what the plan fuses."""
        model, inputs = self.model(self.attentions[0]), self.inputs(alone)
        short = self.compress(model, inputs, Halves())
        with torch.no_grad():
            encoded = self.encode(model, inputs)
        for part in encoded:
            fused = short["mm_encoder_outputs"][part.modality]
            assert type(fused) is type(part.output)
            layers = getattr(part.output, "deepstack_features", None) or []
            given = getattr(fused, "deepstack_features", None) or []
            assert len(layers) == len(given), "every DeepStack layer stays"
            whole = [part.output.pooler_output, *layers]
            for full, mine in zip(whole, [fused.pooler_output, *given], strict=True):
                rows = flat(full).split([span.size for span in part.spans])
                expected = [_halved(x, span) for x, span in zip(rows, part.spans, strict=True)]
                torch.testing.assert_close(flat(mine), torch.cat(expected), atol=1e-5, rtol=1e-5)

    def test_the_next_position_follows_the_uncompressed_prompt(self, case: str) -> None:
        """``rope_deltas`` say where the answer goes on, counted by the shorter prompt."""
        model, inputs = self.model(self.attentions[0]), self.inputs(case)
        if not hasattr(model.base_model, "rope_deltas"):
            pytest.skip("this model's positions are counts")
        model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
        before = inputs["attention_mask"].sum(-1) + model.base_model.rope_deltas[:, 0]
        short = self.compress(model, inputs)
        after = short["attention_mask"].sum(-1) + model.base_model.rope_deltas[:, 0]
        assert after.tolist() == before.tolist()

    # What the model makes of it

    def test_a_plan_that_keeps_all_changes_nothing(self, attention: str, case: str) -> None:
        """Logits and rope delta are bit-identical to those of the plain call."""
        model, inputs = self.model(attention), self.inputs(case)
        positions = MaskedRun(model, inputs, torch.zeros(len(inputs["input_ids"]), 1)).positions()
        with torch.no_grad():
            plain = model(**inputs, position_ids=positions).logits
            model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
            delta = getattr(model.base_model, "rope_deltas", None)
            same = model(**self.compress(model, inputs, NOTHING)).logits
        real = inputs["attention_mask"].bool()
        assert torch.equal(same[real], plain[real])
        if delta is not None:
            assert torch.equal(model.base_model.rope_deltas, delta)

    def test_logits_equal_the_masked_run(self, attention: str, case: str, dropped: str) -> None:
        """The oracle: what stays gives what the full-length run gives with the rest hidden."""
        model, inputs = self.model(attention), self.inputs(case)
        short = self.shorter(attention, case, DROPS[dropped])
        oracle = self.masked(attention, case, DROPS[dropped])
        with torch.no_grad():
            mine = model(**short).logits[short["attention_mask"].bool()]
        assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
        self.close(mine, oracle.logits()[oracle.seen])

    def test_generated_tokens_equal_the_masked_run(self, answered: str, dropped: str) -> None:
        """The oracle for answers: every token, and the logits that chose it."""
        model, inputs = self.model(self.attentions[0]), self.inputs(answered)
        short = self.compress(model, inputs, DROPS[dropped])
        out = self.generate(model, short)
        oracle = self.masked(self.attentions[0], answered, DROPS[dropped])
        self.agree(out, short["input_ids"], oracle)

    def test_seen_from_is_what_the_models_own_mask_says(self, case: str) -> None:
        """The first token that sees a visual one is told as the decoder's attention has it."""
        model, inputs = self.model(self.attentions[0]), self.inputs(case)
        adapter = self.adapter_of(model)
        masks: list[Tensor | None] = []

        def catch(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            masks.append(kwargs.get("attention_mask"))

        with torch.no_grad(), before_attention(model, catch):
            model(**inputs, use_cache=False)
        real = inputs["attention_mask"].bool()
        visible = real[:, :, None] & real[:, None]
        if masks[0] is None:
            visible = visible.tril()
        elif masks[0].dtype == torch.bool:
            visible &= masks[0][:, 0]
        else:
            visible &= masks[0][:, 0] > torch.finfo(masks[0].dtype).min / 2
        first = visible.to(torch.uint8).argmax(1)
        # Padding sees nothing.
        begin = real.to(torch.uint8).argmax(-1, keepdim=True)
        told = adapter.seen_from(adapter.read(inputs)).maximum(begin)
        for modality in self.modalities:
            here = self.placeholders(model, inputs, modality) & real
            assert torch.equal(told[here], first[here])

    def test_proportional_attention_equals_the_weighed_run(
        self, attention: str, answered: str
    ) -> None:
        """A survivor gets the attention of all it stands for, also while answering, and later."""
        oracle = self.masked(attention, answered, Spread(), proportional=True)
        self.answer_twice(
            attention, answered, Spread(reduce="keep"), oracle, attention="proportional"
        )

    def answer_twice(
        self, kind: str, answered: str, strategy: Strategy, oracle: MaskedRun, **options: Any
    ) -> None:
        """Hold an answer of an attached model, and one in a second turn, against the oracle.

        ``kind``: the model's attention. ``options``: those of ``attach``.
        """
        model, inputs = self.model(kind), self.inputs(answered)
        with self.attach(model, strategy, **options):
            first, ids = self.first_turn(model, inputs)
            later = {"input_ids": ids, **as_argument(cache_of(first))} | _mask(inputs, ids)
            second = self.generate(model, later)
        self.agree(first, inputs["input_ids"], oracle)
        oracle.append(self.question(len(ids)))
        self.agree(second, ids, oracle)

    # Frames in another order

    def test_frames_change_places_with_what_touches_them(self, case: str) -> None:
        """The last frame stands first, and markers and timestamps go with their frames."""
        model, inputs = self.model(self.attentions[0]), self.inputs(case)
        order = self.order(model, inputs)
        assert order is not None
        assert torch.equal(order.sort(-1).values[0], torch.arange(order.shape[1]))
        adapter = self.adapter_of(model)
        place = order.argsort(-1)
        with torch.no_grad():
            encoded = self.encode(model, inputs)
        moved = torch.zeros_like(order, dtype=torch.bool)
        for part in encoded:
            here = adapter.read(inputs).here[part.modality]
            for i, ((row, first), (_, last)) in enumerate(part.places):
                columns = (here[row, first : last + 1].nonzero().flatten() + first).tolist()
                frames = part.frame_columns(i, columns)
                if len(frames) == 1:
                    continue
                begins = place[row, [start for start, _ in frames]]
                turned = list(range(len(frames)))
                assert begins.argsort().tolist() == [turned[-1], *turned[:-1]]
                apart = frames[0][1] != frames[1][0]
                for start, end in frames:
                    inside = slice(start - apart, end + apart)
                    assert place[row, inside].diff().eq(1).all(), "a frame stays in one piece"
                moved[row, max(0, first - len(columns)) : last + len(columns)] = True
        own = torch.arange(order.shape[1]).expand_as(order)
        assert torch.equal(order[~moved], own[~moved]), "nothing else moves"

    def test_moved_frames_equal_the_masked_run(self, attention: str, answered: str) -> None:
        """Logits, answers and a second turn, where the last frame of every video stands first."""
        model, strategy = self.model(attention), Turned(reduce="keep")
        self.skip_without_frames(attention, answered)
        short = self.shorter(attention, answered, strategy)
        oracle = self.masked(attention, answered, strategy)
        with torch.no_grad():
            mine = model(**short).logits
        logits, real = oracle.logits(), short["attention_mask"].bool()
        for row, columns in enumerate(short.columns):
            self.close(mine[row, real[row]], logits[row, columns[real[row]]])
        self.answer_twice(attention, answered, strategy, oracle)

    def test_moved_frames_are_weighed_by_what_they_stand_for(self, answered: str) -> None:
        """Proportional attention counts who would have seen whom in the new order."""
        kind, strategy = self.attentions[0], Turned(reduce="keep")
        self.skip_without_frames(kind, answered)
        oracle = self.masked(kind, answered, strategy, proportional=True)
        self.answer_twice(kind, answered, strategy, oracle, attention="proportional")

    def skip_without_frames(self, attention: str, case: str) -> None:
        """Skip the test of a prompt of images, of which nothing can change places."""
        plans = self.shorter(attention, case, Turned(reduce="keep")).plans.values()
        if all(plan.frame_order is None for own in plans for plan in own):
            pytest.skip("this prompt shows no video, and frames of images cannot change places")

    def test_moved_frames_of_later_turns_equal_the_masked_run(self) -> None:
        """A later turn moves the frames that it brings, and no others."""
        kind = self.modalities[-1]
        if kind != "video" or not (self.several or self.frames_as_images):
            pytest.skip("this model takes no videos, or one in a prompt")
        turns: list[list[list[Part]]] = [
            [[("text", 1), (kind, 1), ("text", 2)]],
            [[("text", 6), (kind, 4), ("text", 7)]],
        ]
        for attention in ("plain", "proportional"):
            self.converse(turns, Turned(reduce="keep"), attention=attention)

    def test_no_token_sees_the_future(self, attention: str, case: str) -> None:
        """What is said last changes nothing of what comes before it."""
        if not self.causal:
            pytest.skip("text of this model sees what comes after it")
        model, inputs = self.model(attention), self.inputs(case)
        logits = []
        for step in (0, 1):
            ids = inputs["input_ids"].clone()
            last = inputs["attention_mask"].cumsum(-1).argmax(-1)
            rows = torch.arange(len(ids))
            ids[rows, last] = ids[rows, last - step]
            short = self.compress(model, {**inputs, "input_ids": ids})
            with torch.no_grad():
                out = model(**short).logits
            end = short["attention_mask"].cumsum(-1).argmax(-1)
            before = short["attention_mask"].bool()
            before[rows, end] = False
            logits.append(out[before])
        self.close(*logits)

    def test_a_batch_gives_what_its_prompts_give_alone(self, side: str) -> None:
        """Rows of a padded batch do not meet, and padding is not seen."""
        model, rows = self.model(self.attentions[0]), self.cases()["left"]
        for strategy in (HALF, Halves()):
            together = self.compress(model, self.prompt(rows, side), strategy)
            with torch.no_grad():
                both = model(**together).logits
            for row, real in enumerate(together["attention_mask"].bool()):
                alone = self.compress(model, self.prompt([rows[row]], side), strategy)
                with torch.no_grad():
                    self.close(both[row, real], model(**alone).logits[0])

    def test_the_padding_side_is_kept_or_chosen(self, side: str) -> None:
        """Rows that lose unequally many tokens are padded again on the side they were padded."""
        model = self.model(self.attentions[0])
        other = "left" if side == "right" else "right"
        inputs = self.prompt(self.cases()["left"], side)
        for chosen, expected in ((None, side), (other, other)):
            mask = self.compress(model, inputs, padding_side=chosen)["attention_mask"]
            assert torch.equal(mask, mask.sort(-1, descending=expected == "right").values)

    # Generation

    def test_attach_gives_what_compress_gives(self, answered: str) -> None:
        """``generate`` inside the block returns the caller's own prompt, then the same answer."""
        model, inputs = self.model(self.attentions[0]), self.inputs(answered)
        short = self.shorter(self.attentions[0], answered)
        with self.attach(model) as session:
            out = self.generate(model, inputs)
        self.agree(out, inputs["input_ids"], self.masked(self.attentions[0], answered))
        assert session.report.items == short.report.items
        assert session.report.tokens_after < session.report.tokens_before

    def test_beams_of_one_prompt_see_its_own_items(self) -> None:
        """Beams over a batch are scored by what the oracle says of their own prompts."""
        if not self.beams:
            pytest.skip("this model cannot search with beams when it is shown something")
        model, inputs = self.model(self.attentions[0]), self.inputs("left")
        with self.attach(model):
            out = self.generate(
                model, inputs, num_beams=2, num_return_sequences=2, output_scores=True
            )
        for best in range(2):
            tokens = out.sequences[best::2, inputs["input_ids"].shape[1] :]
            assert tokens.shape[1] == STEPS
            logits = self.masked(self.attentions[0], "left").follow(tokens)
            scores = logits.log_softmax(-1).gather(-1, tokens[..., None])
            self.close(out.sequences_scores[best::2], scores[..., 0].mean(-1))

    def test_the_model_is_left_as_it_was(self) -> None:
        """After the block, and after an exception in it, nothing of tokenfuse is there."""
        model, inputs = self.model(self.attentions[0]), self.inputs("left")
        held = {name: id(value) for name, value in vars(model).items()}
        before = self.generate(model, inputs).sequences
        with pytest.raises(ValueError, match="no_such_option"), self.attach(model):
            model.generate(**inputs, no_such_option=1)
        assert {name: id(value) for name, value in vars(model).items()} == held
        assert torch.equal(self.generate(model, inputs).sequences, before)

    # Conversations

    def first_turn(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """What ``generate`` returns inside the block, and the ids of the next turn."""
        out = self.generate(model, inputs)
        new = self.question(len(inputs["input_ids"]))
        return out, torch.cat([out.sequences, new], -1)

    def question(self, rows: int, seed: int = 20) -> Tensor:
        """The ids of some text, without what begins a prompt."""
        plain = self.prompt([[("text", 1)]])["input_ids"]
        whole = self.prompt([[("text", 1), ("text", seed)]])["input_ids"]
        question: Tensor = whole[:, plain.shape[1] :].expand(rows, -1)
        return question

    def test_a_second_turn_equals_the_masked_run(self, answered: str) -> None:
        """A later question on the same cache is answered as if all were read anew."""
        model, inputs = self.model(self.attentions[0]), self.inputs(answered)
        oracle = self.masked(self.attentions[0], answered)
        with self.attach(model):
            first, ids = self.first_turn(model, inputs)
            later = {"input_ids": ids, **as_argument(cache_of(first))} | _mask(inputs, ids)
            out = self.generate(model, later)
        oracle.append(ids[:, inputs["input_ids"].shape[1] :])
        self.agree(out, ids, oracle)

    def test_the_second_turn_of_an_explicit_prompt_goes_on_where_it_should(self) -> None:
        """Without a session the model's own rope delta is all that says where to go on."""
        model, inputs = self.model(self.attentions[0]), self.inputs(self.modalities[-1])
        oracle = self.masked(self.attentions[0], self.modalities[-1])
        short = self.compress(model, inputs)
        length = short["input_ids"].shape[1]
        first, ids = self.first_turn(model, short)
        later = {"input_ids": ids, **as_argument(cache_of(first))}
        if not hasattr(model.base_model, "rope_deltas"):
            # A 1-D count cannot know that tokens are missing; the caller must say it.
            after = short["position_ids"][:, -1:] + torch.arange(
                1, ids.shape[1] - length + 1, device=ids.device
            )
            later["position_ids"] = torch.cat([short["position_ids"], after], -1)
        out = self.generate(model, later)
        oracle.append(ids[:, length:])
        self.agree(out, ids, oracle)

    def test_new_items_in_later_turns_equal_the_masked_run(self, side: str, encoded: str) -> None:
        """New images or videos in later turns are compressed, too; what the cache holds stays.

        One prompt over three turns, or two prompts that lose unequally many tokens over two. The
        vision tower reads the new items alone, or those of earlier turns again.
        """
        if not self.several and not self.frames_as_images:
            pytest.skip("this model takes one item in a prompt")
        kind = self.modalities[-1]
        turns: list[list[list[Part]]] = [
            [
                [("text", 1), (kind, 1), ("text", 2)],
                [("text", 3), ("text", 4), (kind, 3), ("text", 5)],
            ],
            [[("text", 6), (kind, 4), ("text", 7)], [("text", 8), (kind, 2), ("text", 9)]],
            [[("text", 16), (kind, 5), ("text", 17)]],
        ]
        chosen = [turn[:1] for turn in turns] if side == "left" else turns[:2]
        self.converse(chosen, again=encoded == "all again")

    def test_an_item_after_a_turn_of_text_equals_the_masked_run(self) -> None:
        """A cache that holds text only is gone on from, too."""
        kind = self.modalities[-1]
        self.converse([[[("text", 1), ("text", 2)]], [[("text", 6), (kind, 4), ("text", 7)]]])

    def test_later_turns_count_what_their_survivors_stand_for(self) -> None:
        """Proportional attention in turns of prompts that lose unequally many tokens."""
        kind = self.modalities[-1]
        turns: list[list[list[Part]]] = [
            [[("text", 1), (kind, 0), ("text", 2)], [("text", 3), (kind, 1), ("text", 4)]],
            [[("text", 6), (kind, 4), ("text", 7)], [("text", 8), (kind, 5), ("text", 9)]],
        ]
        self.converse(turns, Spread(reduce="keep"), attention="proportional")
        alone = [turn[:1] for turn in turns]
        self.converse(alone, Halves(reduce="keep"), attention="proportional")

    def converse(
        self,
        turns: Sequence[list[list[Part]]],
        strategy: Strategy = HALF,
        attention: Literal["plain", "proportional"] = "plain",
        again: bool = False,
    ) -> None:
        """Hold every answer of a conversation against the oracle; a turn is a part of every row.

        ``again``: the adapter cannot tell which pixels belong to which item.
        """
        model = self.model(self.attentions[0])
        shown: list[list[Part]] = [[] for _ in turns[0]]
        whole: dict[str, Any] = {}
        proportional = attention == "proportional"
        with self.attach(model, strategy, attention=attention) as session:
            if again:
                session.adapter.feature_counts = lambda *_: None
            for number, turn in enumerate(turns):
                rows = [a + b for a, b in zip(shown, turn, strict=True)]
                if number == 0:
                    whole = self.prompt(rows)
                    out = self.generate(model, whole)
                else:
                    whole = self.conversation(shown, turn, whole, out.sequences)
                    later = whole | as_argument(cache_of(out))
                    if len(rows) > 1 and not _masked(model):
                        # Other layers than attention would read padding between turns of a batch.
                        with pytest.raises(PromptError, match="padding between"):
                            self.generate(model, later)
                        return
                    try:
                        out = self.generate(model, later)
                    except UnsupportedModelError as error:
                        if "expected 5.23 or newer" not in str(error):
                            raise
                        pytest.skip(str(error))
                    assert session.report.tokens_after < session.report.tokens_before
                    assert session.report.encoded_again > 0 or not again
                    with torch.no_grad():
                        plans = self.plans_of_turns(model, turns[: number + 1], strategy)
                        order = self.order_of_turns(model, turns[: number + 1], whole, strategy)
                    oracle = self.oracle(model, whole, plans, proportional, order)
                    self.agree(out, whole["input_ids"], oracle)
                shown = rows

    def plans_of_turns(
        self, model: Any, turns: Sequence[list[list[Part]]], strategy: Strategy
    ) -> dict[Modality, list[FusionPlan]]:
        """The plans of all items of a conversation, row by row, each turn's by itself."""
        merged: dict[Modality, list[FusionPlan]] = {}
        for row in range(len(turns[0])):
            for turn in turns:
                inputs = self.prompt([turn[row]])
                for part in self.encode(model, inputs):
                    plans = [strategy.plan(tokens) for tokens in part.items]
                    merged.setdefault(part.modality, []).extend(plans)
        return merged

    def order_of_turns(
        self,
        model: Any,
        turns: Sequence[list[list[Part]]],
        whole: Mapping[str, Any],
        strategy: Strategy,
    ) -> Tensor | None:
        """What stands in each place of one row of two turns at most, each moved by itself."""
        order = torch.arange(whole["input_ids"].shape[1])[None]
        for number, turn in enumerate(turns):
            own = self.order(model, self.prompt(turn), strategy)
            if own is None:
                return None
            # A prompt of one turn ends like the turn, whose answer is text.
            begin = 0 if number == 0 else order.shape[1] - own.shape[1]
            order[:, begin : begin + own.shape[1]] = begin + own
        return order

    def conversation(
        self,
        shown: list[list[Part]],
        turn: list[list[Part]],
        earlier: Mapping[str, Any],
        answered: Tensor,
    ) -> dict[str, Any]:
        """A processor's inputs for a conversation that goes on with another turn.

        ``shown``: the parts of each row so far, of which ``earlier`` are the inputs and
        ``answered (B, S)`` the ids with the last answer. The new turn is padded on the left, within
        the row.
        """
        rows = [a + b for a, b in zip(shown, turn, strict=True)]
        before = [self.prompt([row])["input_ids"] for row in shown]
        alone = [self.prompt([row]) for row in rows]
        whole = self.prompt(rows)
        names = [n for n in ("input_ids", "attention_mask", *PER_TOKEN) if n in whole]
        tails = [
            x["input_ids"].shape[1] - old.shape[1] for x, old in zip(alone, before, strict=True)
        ]
        answer = answered[:, earlier["input_ids"].shape[1] :]
        for old, x in zip(before, alone, strict=True):
            if not torch.equal(x["input_ids"][:, : old.shape[1]], old):
                pytest.skip("a longer prompt of this factory does not begin like a shorter one")
        for name in names:
            fill = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
            said = fill.get(name, torch.full_like(answer, self.text_type))
            begun = earlier.get(name, torch.zeros_like(earlier["input_ids"]))
            padding = self.never_read(name, earlier)
            whole[name] = torch.stack(
                [
                    torch.cat(
                        [
                            begun[row],
                            said[row],
                            padding.expand(max(tails) - tails[row]),
                            x[name][0, x[name].shape[1] - tails[row] :],
                        ]
                    )
                    for row, x in enumerate(alone)
                ]
            )
        return whole

    @staticmethod
    def never_read(name: str, inputs: Mapping[str, Any]) -> Tensor:
        """What stands where the mask hides it: any id, and zero."""
        ids: Tensor = inputs["input_ids"]
        return ids[0, :1] if name == "input_ids" else ids.new_zeros(1)

    def test_one_encoded_prompt_answers_many_questions(self, answered: str) -> None:
        """``prefill`` once, ``ask`` many: each answer is that of the whole prompt."""
        model, inputs = self.model(self.attentions[0]), self.inputs(answered)
        rows, options = len(inputs["input_ids"]), self.options(model)

        def check(out: Any, question: Tensor, which: slice = ALL) -> None:
            oracle = self.masked(self.attentions[0], answered)
            oracle.append(question)
            self.agree(out, torch.cat([inputs["input_ids"], question], -1), oracle, which)

        with self.attach(model) as session:
            prompt = session.prefill(inputs)
            for seed in (21, 22, 21):
                question = self.question(rows, seed)
                check(session.ask(prompt, question, **options), question)
            both = session.ask(prompt, question.repeat_interleave(2, 0), **options)
            for which in (slice(0, None, 2), slice(1, None, 2)):
                check(both, question, which)
            padded = torch.cat([question[:, :1], question], -1)
            mask = torch.ones_like(padded)
            mask[:, 0] = 0
            if _masked(model):
                out = session.ask(prompt, padded, mask, **options)
                ids, length = out.sequences, inputs["input_ids"].shape[1]
                out.sequences = torch.cat([ids[:, :length], ids[:, length + 1 :]], -1)
                check(out, question)
            else:
                # Other layers than attention would read the padding.
                with pytest.raises(PromptError, match="padding between"):
                    session.ask(prompt, padded, mask, **options)
        with pytest.raises(AttachError, match="detached"):
            session.ask(prompt, question)

    # What cannot be done

    def test_a_truncated_prompt_is_refused(self) -> None:
        """Fewer placeholders than features: an error that says so, not a shifted picture."""
        model, inputs = self.model(self.attentions[0]), self.inputs(self.modalities[-1])
        end = self.first_place(model, inputs) + 1
        cut = {
            k: v[:, :end] if k in ("input_ids", "attention_mask", *PER_TOKEN) else v
            for k, v in inputs.items()
        }
        with pytest.raises(PromptError, match="placeholder"):
            self.compress(model, cut)

    def test_placeholders_without_pixels_are_refused(self) -> None:
        """They would be read as if they were words."""
        model, inputs = self.model(self.attentions[0]), self.inputs(self.modalities[0])
        bare = {k: v for k, v in inputs.items() if k not in PIXELS.values()}
        with pytest.raises(PromptError, match="placeholder"):
            self.compress(model, bare)

    def test_another_prompt_than_that_of_the_cache_is_refused(self) -> None:
        """A later turn whose ids do not begin with the earlier ones would answer nonsense."""
        model, inputs = self.model(self.attentions[0]), self.inputs(self.modalities[0])
        with self.attach(model):
            first, ids = self.first_turn(model, inputs)
            other = ids.clone()
            other[:, -self.question(1).shape[1] - 2] += 1
            later = {"input_ids": other[:, 1:], **as_argument(cache_of(first))}
            with pytest.raises(PromptError, match="do not begin with the"):
                self.generate(model, later)

    def first_place(self, model: Any, inputs: Mapping[str, Any]) -> int:
        """The first column with a placeholder."""
        return min(
            int(here.nonzero()[0, 1])
            for here in (self.placeholders(model, inputs, m) for m in MODALITIES)
            if bool(here.any())
        )

    def test_inputs_are_left_alone(self, case: str) -> None:
        """Neither compress nor generate changes what the caller passed."""
        model, inputs = self.model(self.attentions[0]), self.inputs(case)
        before = copy.deepcopy(inputs)
        self.compress(model, inputs)
        with self.attach(model):
            model.generate(**inputs, max_new_tokens=2)
        assert inputs.keys() == before.keys()
        for name, value in inputs.items():
            assert not isinstance(value, Tensor) or torch.equal(value, before[name])

    def test_saliency_is_a_share_of_each_frame(self, alone: str) -> None:
        """Where the adapter supplies saliency, every frame's sums to 1 and none is negative."""
        model, inputs = self.model(self.attentions[0]), self.inputs(alone)
        if "saliency" not in self.adapter_of(model).supplies:
            pytest.skip("this adapter supplies no saliency")
        needs: dict[Modality, Needs] = {m: Needs(Attention(-1)) for m in MODALITIES}
        with torch.no_grad():
            encoded = self.encode(model, inputs, needs)
        for part in encoded:
            for tokens in part.items:
                assert tokens.saliency is not None
                assert float(tokens.saliency.min()) >= 0
                sums = tokens.saliency.view(tokens.grid[0], -1).sum(-1)
                torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-4, rtol=0)

    def test_a_video_is_one_item_of_all_its_frames(self, case: str) -> None:
        """Frames that came as items of their own could not be compared with each other."""
        model, inputs = self.model(self.attentions[0]), self.inputs(case)
        shown = [[kind for kind, _ in row].count("video") for row in self.cases()[case]]
        as_images = inputs.get(PIXELS["video"]) is None
        if not any(shown) or (as_images and not self.frames_as_images):
            pytest.skip("this prompt shows no video, or shows it as images")
        if self.frames_as_images:
            # All images of a prompt are one video.
            shown = [min(1, videos) for videos in shown]
        report = self.compress(model, inputs).report
        frames = [item.grid[0] for item in report.items if item.modality == "video"]
        assert len(frames) == sum(shown), "items of the modality video, and videos of the prompt"
        assert max(frames) > 1, "frames of the longest video"


def _halved(features: Tensor, span: Span) -> Tensor:
    """What Halves leaves of a span's features, without a plan."""
    tokens = span.tokens(features.device)
    n, kept = len(tokens), -(-len(tokens) // 2)
    rows = features.clone()
    first, second = tokens[: n - kept], tokens[kept:]
    rows[first] = (features[first] + features[second]) / 2
    stay = torch.ones(span.size, dtype=torch.bool, device=features.device)
    stay[second] = False
    return rows[stay]


def _masked(model: Any) -> bool:
    """Whether a mask hides a token from every layer of the decoder."""
    return all(attends(model.config.get_text_config()))


def _mask(inputs: Mapping[str, Any], ids: Tensor) -> dict[str, Tensor]:
    """The mask of a conversation that began with ``inputs``."""
    mask = inputs["attention_mask"]
    more = mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])
    return {"attention_mask": torch.cat([mask, more], -1)}
