"""What the conformance kit for adapters asks of cuts inside the LLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

from tokenfuse.errors import UnsupportedModelError
from tokenfuse.ops.select import top
from tokenfuse.plan import FusionPlan
from tokenfuse.prompt.cache import as_argument, cache_of
from tokenfuse.prompt.turn import Turn
from tokenfuse.sessions._decoder import decoder_layers, refuse_unfit_cuts
from tokenfuse.sessions.vlm import TURN
from tokenfuse.strategies._base import Strategy
from tokenfuse.strategies._inside import LayerStrategy
from tokenfuse.strategies._layers import LayerCut, LayerTokens
from tokenfuse.strategies.compose import Compose
from tokenfuse.testing.oracle import MaskedRun


class CutInside(LayerStrategy):
    """Drops half of the visual tokens at each of its layers: those that text attends to least.

    ``own``: by the attention of the layer itself, instead of that before it. ``share``: how much
    stays each time.
    """

    name: ClassVar[str] = "conformance_inside"
    layers: tuple[int, ...]
    own: bool = False
    share: float = 0.5

    def cuts(self) -> tuple[LayerCut, ...]:
        return tuple(
            LayerCut(layer, self.choose, queries="last", own=self.own) for layer in self.layers
        )

    def choose(self, tokens: LayerTokens) -> FusionPlan:
        """The plan of each cut."""
        n = tokens.num_visual
        return FusionPlan.from_survivors(top(tokens.scores(), max(1, round(n * self.share))), n)


class Watched(CutInside):
    """Tells ``seen`` what it is shown."""

    name: ClassVar[str] = "conformance_watched"
    seen: Any = Field(None, exclude=True)

    def choose(self, tokens: LayerTokens) -> FusionPlan:
        """The plan of each cut, which is told of."""
        self.seen(tokens)
        return super().choose(tokens)


def gone_inside(turn: Turn, real: Tensor) -> dict[int, Tensor]:
    """The caller's columns ``(B, L)`` that a turn's caches do not hold, by the layer from which on.

    ``real``: which columns are no padding.
    """
    gone = {}
    for kept in () if turn.layers is None else turn.layers.kept:
        entries = turn.columns.gather(1, kept.columns)
        # Padding may have the column of another entry.
        held = torch.zeros_like(real, dtype=torch.long).scatter_add(1, entries, kept.valid.long())
        gone[kept.layer] = real & (held == 0)
    return gone


class InsideConformance:
    """Cuts inside the LLM, as tests; see AdapterConformance, which holds what they ask for."""

    attentions: ClassVar[Any]
    full: ClassVar[bool]
    modalities: ClassVar[Any]
    several: ClassVar[bool]
    frames_as_images: ClassVar[bool]
    beams: ClassVar[bool]
    half: ClassVar[Strategy]
    nothing: ClassVar[Strategy]
    tolerance: ClassVar[float]
    model: Any
    inputs: Any
    attach: Any
    run: Any
    masked: Any
    first_turn: Any
    generate: Any
    agree: Any
    question: Any
    close: Any
    prompt: Any
    conversation: Any
    options: Any

    def cut(self, attention: str, *layers: int, **options: Any) -> tuple[Any, CutInside]:
        """The model, and a strategy that cuts in it; a skip where that is refused.

        ``layers``: counted from the end where negative. None: at the second and the last.
        """
        model = self.model(attention)
        number = len(decoder_layers(model))
        chosen = sorted({layer % number for layer in layers or (1, -1)} - {0})
        strategy = CutInside(layers=tuple(chosen), **options)
        try:
            refuse_unfit_cuts(model, strategy)
        except UnsupportedModelError as error:
            pytest.skip(str(error).partition("; expected")[0])
        return model, strategy

    def read(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Any, MaskedRun]:
        """What an attached model makes of a prompt, and the full-length run that it has to equal.

        What was cut is told by what its caches hold.
        """
        with torch.no_grad():
            output = model(**inputs, use_cache=True)
        return output, self.expected(inputs, cache_of(output), model)

    def expected(
        self, inputs: Mapping[str, Any], cache: Any, model: Any, before: Tensor | None = None
    ) -> MaskedRun:
        """The full-length run that hides from each layer what its cache does not hold.

        ``before (B, L)``: what went before the LLM.
        """
        turn: Turn = getattr(cache, TURN)
        real = inputs["attention_mask"].bool()
        gone = gone_inside(turn, real)
        assert gone, "nothing was cut"
        hidden = torch.zeros_like(real) if before is None else before
        for count, (layer, columns) in enumerate(gone.items(), start=1):
            assert bool((columns.sum(-1) > 0).any())
            # Every cache from there on is shorter, every earlier one whole.
            lengths = [cache.get_seq_length(at) for at in (layer - 1, layer)]
            assert lengths[1] < lengths[0], count
        found: MaskedRun = self.run(model, inputs, hidden)
        found.later = gone
        return found

    def test_a_cut_inside_equals_the_masked_run(self, attention: str, case: str) -> None:
        """Logits of all tokens that are left, with a cut before each of the layers."""
        self.cut(attention)
        layers = range(1, len(decoder_layers(self.model(attention))))
        # Under every attention but the first, one of them.
        for layer in layers if self.full or attention == self.attentions[0] else layers[-1:]:
            model, strategy = self.cut(attention, layer)
            inputs = self.inputs(case)
            with self.attach(model, strategy):
                output, oracle = self.read(model, inputs)
            left = inputs["attention_mask"].bool() & ~oracle.later[layer]
            self.close(output.logits[left], oracle.logits()[left])

    def test_cuts_inside_are_answered_as_by_the_masked_run(
        self, attention: str, answered: str
    ) -> None:
        """Two cuts, the answer, and one in a second turn on the same cache."""
        model, strategy = self.cut(attention)
        inputs = self.inputs(answered)
        with self.attach(model, strategy):
            first, ids = self.first_turn(model, inputs)
            oracle = self.expected(inputs, cache_of(first), model)
            later = {"input_ids": ids, **as_argument(cache_of(first))}
            later["attention_mask"] = torch.cat(
                [inputs["attention_mask"], torch.ones_like(ids)[:, inputs["input_ids"].shape[1] :]],
                -1,
            )
            second = self.generate(model, later)
        self.agree(first, inputs["input_ids"], oracle)
        oracle.append(self.question(len(ids)))
        self.agree(second, ids, oracle)

    def test_cuts_by_a_layers_own_attention_equal_the_masked_run(self, answered: str) -> None:
        """The attention that the layer would have had, had nothing been cut."""
        model, strategy = self.cut(self.attentions[0], own=True)
        inputs = self.inputs(answered)
        with self.attach(model, strategy):
            out, _ = self.first_turn(model, inputs)
            oracle = self.expected(inputs, cache_of(out), model)
        self.agree(out, inputs["input_ids"], oracle)

    def test_a_cut_inside_after_one_before_equals_the_masked_run(self, answered: str) -> None:
        """A chain: what went before the LLM is hidden from all layers."""
        model, strategy = self.cut(self.attentions[0], -1)
        inputs, half = self.inputs(answered), self.half
        before = self.masked(self.attentions[0], answered, half).hidden
        with self.attach(model, Compose(compose=(half, strategy), keep_ratio=None)):
            out, _ = self.first_turn(model, inputs)
            oracle = self.expected(inputs, cache_of(out), model, before)
        self.agree(out, inputs["input_ids"], oracle)

    def test_beams_after_a_cut_inside_equal_the_masked_run(self) -> None:
        """Beams over a batch, whose rows change places in the cache."""
        model, strategy = self.cut(self.attentions[0])
        if not self.beams:
            pytest.skip("this model cannot search with beams when it is shown something")
        inputs = self.inputs("left")
        try:
            self.generate(model, inputs, num_beams=2)
        except ValueError as error:
            pytest.skip(f"this model itself cannot search with beams here: {error}")
        with self.attach(model, strategy):
            first, _ = self.first_turn(model, inputs)
            out = self.generate(
                model, inputs, num_beams=2, num_return_sequences=2, output_scores=True
            )
        for best in range(2):
            oracle = self.expected(inputs, cache_of(first), model)
            tokens = out.sequences[best::2, inputs["input_ids"].shape[1] :]
            logits = oracle.follow(tokens)
            scores = logits.log_softmax(-1).gather(-1, tokens[..., None])
            self.close(out.sequences_scores[best::2], scores[..., 0].mean(-1))

    def test_cuts_inside_that_keep_all_change_nothing(self, attention: str) -> None:
        """Bit-identical logits; and after the block, and an exception in it, no hook is left."""
        model, strategy = self.cut(attention, share=1.0)
        inputs = self.inputs("left")
        with torch.no_grad():
            before = model(**inputs).logits
            # Attached models count positions as generate does.
            with self.attach(model, self.nothing):
                expected = model(**inputs).logits
            with self.attach(model, strategy):
                assert torch.equal(model(**inputs).logits, expected)

            def stop(_: LayerTokens) -> None:
                raise KeyboardInterrupt

            watched = Watched(layers=strategy.layers, seen=stop)
            with pytest.raises(KeyboardInterrupt), self.attach(model, watched):
                model(**inputs)
            assert torch.equal(model(**inputs).logits, before)
        for layer in model.get_decoder().modules():
            assert not layer._forward_hooks
            assert not layer._forward_pre_hooks

    def test_what_a_cut_removed_is_never_read(self, answered: str) -> None:
        """Whatever stands in its place from that layer on, the answer is bit for bit the same."""
        model, strategy = self.cut(self.attentions[0], 1)
        inputs = self.inputs(answered)
        layer = decoder_layers(model)[1]
        with self.attach(model, strategy):
            first, _ = self.first_turn(model, inputs)
            turn: Turn = getattr(cache_of(first), TURN)
            gone = gone_inside(turn, inputs["attention_mask"].bool())[1]

            def spoil(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
                states = args[0] if args else kwargs["hidden_states"]
                if states.shape[:2] != gone.shape:
                    return None
                noise = torch.where(gone[..., None], 1000.0, states)
                return (
                    ((noise, *args[1:]), kwargs)
                    if args
                    else (args, {**kwargs, "hidden_states": noise})
                )

            handle = layer.register_forward_pre_hook(spoil, with_kwargs=True)
            try:
                second, _ = self.first_turn(model, inputs)
            finally:
                handle.remove()
        for mine, theirs in zip(first.logits, second.logits, strict=True):
            assert torch.equal(mine, theirs)

    def test_scores_inside_are_those_of_the_whole_map(self, case: str) -> None:
        """The attention that cuts are decided by is what the eager layer itself had."""
        if "eager" not in self.attentions:
            pytest.skip("the model has no eager attention")
        model, strategy = self.cut("eager", -1)
        inputs, (layer,) = self.inputs(case), strategy.layers
        seen: list[LayerTokens] = []
        with self.attach(model, Watched(layers=(layer,), seen=seen.append)), torch.no_grad():
            output = model(**inputs, output_attentions=True)
        whole = output.attentions[layer - 1]
        assert len(seen) == len(whole)
        for mine, theirs, mask in zip(seen, whole, inputs["attention_mask"].bool(), strict=True):
            last = int(mask.nonzero().max())
            assert mine.attention is not None
            torch.testing.assert_close(
                mine.attention[:, 0], theirs[:, last, mask].float(), atol=1e-5, rtol=0
            )

    def test_cuts_inside_in_later_turns_equal_the_masked_run(self) -> None:
        """What a later turn shows is cut too, and what was cut before stays so."""
        model, strategy = self.cut(self.attentions[0])
        if not self.several and not self.frames_as_images:
            pytest.skip("this model takes one item in a prompt")
        kind = self.modalities[-1]
        begun: list[Any] = [
            [("text", 1), (kind, 1), ("text", 2)],
            [("text", 3), ("text", 4), (kind, 3), ("text", 5)],
        ]
        turn: list[Any] = [
            [("text", 6), (kind, 4), ("text", 7)],
            [("text", 8), (kind, 2), ("text", 9)],
        ]
        for rows in (1, 2):
            inputs = self.prompt(begun[:rows])
            with self.attach(model, strategy):
                first = self.generate(model, inputs)
                whole = self.conversation(begun[:rows], turn[:rows], inputs, first.sequences)
                later = whole | as_argument(cache_of(first))
                try:
                    out = self.generate(model, later)
                except UnsupportedModelError as error:
                    if "expected 5.23 or newer" not in str(error):
                        raise
                    pytest.skip(str(error))
                oracle = self.expected(whole, cache_of(out), model)
            gone = oracle.later[strategy.layers[0]]
            assert bool(gone[:, inputs["input_ids"].shape[1] :].any(-1).all())
            self.agree(out, whole["input_ids"], oracle)

    def test_questions_about_a_prompt_cut_inside_equal_the_masked_run(self) -> None:
        """``prefill`` once and ``ask`` twice at once, padding in the questions."""
        model, strategy = self.cut(self.attentions[0])
        inputs = self.inputs("left")
        with self.attach(model, strategy) as session:
            prompt = session.prefill(inputs)
            question = self.question(len(inputs["input_ids"]), 22)
            padded = torch.cat([question[:, :1], question], -1)
            mask = torch.ones_like(padded)
            mask[:, 0] = 0
            twice = (x.repeat_interleave(2, 0) for x in (padded, mask))
            out = session.ask(prompt, *twice, **self.options(model))
        length = inputs["input_ids"].shape[1]
        out.sequences = torch.cat([out.sequences[:, :length], out.sequences[:, length + 1 :]], -1)
        for which in (slice(0, None, 2), slice(1, None, 2)):
            oracle = self.expected(inputs, prompt.cache, model)
            oracle.append(question)
            begins = torch.cat([inputs["input_ids"], question], -1)
            self.agree(out, begins, oracle, which)
