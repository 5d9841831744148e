"""A session of a vision-language model: every prompt that it gets is compressed."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from threading import Lock, get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenfuse.adapters._base import Adapter
from tokenfuse.compression import (
    CompressedInputs,
    acts_inside,
    check_frames_as_images,
    compress_prompt,
    prompt_adapter,
    refuse_a_gap,
    refuse_unmet_needs,
    told_by_layer,
    untouched,
)
from tokenfuse.config import Configuration
from tokenfuse.errors import PromptError, UnsupportedModelError
from tokenfuse.prompt.cache import as_argument, cache_of, filled_length
from tokenfuse.prompt.inputs import MODALITIES, PIXELS, shown
from tokenfuse.prompt.text import MismatchError
from tokenfuse.prompt.turn import Turn
from tokenfuse.registry import Registry
from tokenfuse.report import Report
from tokenfuse.sessions._attached import Attached, place, refuse_compiled
from tokenfuse.sessions._decoder import refuse_unfit_cuts
from tokenfuse.sessions.arguments import for_shorter_prompt, setting, uncompiled
from tokenfuse.sessions.llm_stage import LayerStage, layer_stage
from tokenfuse.sessions.proportional import attention_modules, proportional_attention

WRAPPED = ("generate", "forward")
PROMPTS = ("input_ids", "inputs_embeds", "mm_encoder_outputs", *PIXELS.values())
"""What brings a prompt, as opposed to tokens that follow one."""
TURN = "_tokenfuse_turn"
"""Name under which a cache carries what it holds, so that a copy of the cache carries it too."""
REPORTS = 100
"""How many reports a session remembers."""
ONE_BY_ONE = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
"""Options of generate for one answer per row of a cache."""

_generating: dict[int, list[Any]] = {}
"""The models whose ``generate`` is running in each thread: they call ``forward`` themselves."""


class Prefilled(NamedTuple):
    """A prompt that a model has read: what ``Session.ask`` goes on from.

    ``input_ids`` and ``attention_mask`` ``(B, L)`` are the caller's own; ``cache`` holds the
    shorter prompt, as ``model`` has read it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    cache: Any
    model: Any


class Session(Attached):
    """An attached vision-language model.

    ``report``: the Report of the last prompt, None before the first; ``reports``: of the last
    hundred. ``columns (B, L')``: the caller's columns that the last call's logits, attentions and
    hidden states stand for; None before the first. With several threads the last is whichever
    ended its compression last.
    """

    _names = WRAPPED

    def __init__(
        self,
        model: Any,
        configuration: Configuration,
        registry: Registry,
        frames_as_images: bool = False,
    ) -> None:
        check_frames_as_images(frames_as_images)
        self.adapter: Adapter = prompt_adapter(model, registry)
        self.reports: deque[Report] = deque(maxlen=REPORTS)
        self.columns: Tensor | None = None
        self._noting = Lock()
        self._observe = registry.observe
        self._frames_as_images = frames_as_images
        self._own: dict[str, Any] = {}
        refuse_unmet_needs(self.adapter, configuration, frames_as_images)
        refuse_unfit_cuts(model, configuration.strategy, configuration.attention)
        if configuration.attention == "proportional":
            refuse_compiled(model, attention_modules(model), "attention: proportional")
        super().__init__(model, configuration)

    @property
    def report(self) -> Report | None:
        return self.reports[-1] if self.reports else None

    @property
    def _family(self) -> str:
        return self.adapter.name

    def _originals(self) -> Mapping[str, Any]:
        return self._own

    def _place(self, undo: ExitStack) -> None:
        held = vars(self.model)
        self._own = {name: held[name] for name in WRAPPED if name in held}
        undo.callback(self.adapter.set_position_delta, self.adapter.position_delta())
        self._placement = placement = object()
        for name, instead in (("generate", self._generate), ("forward", self._forward)):
            wrapped = self._wrap(getattr(self.model, name), instead, placement)
            place(self.model, name, wrapped, undo)

    def _wrap(
        self, original: Callable[..., Any], instead: Callable[..., Any], placement: object
    ) -> Callable[..., Any]:
        """``original`` with its own signature, which transformers reads, calling ``instead``.

        ``placement``: what the wrapper belongs to; a later one of the session has its own.
        """
        signature = inspect.signature(original)
        extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
        inner = instead == self._forward

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            # A wrapper of somebody else's may call this one when its time is over.
            over = not self.attached or self._placement is not placement
            if over or (inner and self._generates_here):
                return original(*args, **kwargs)
            named = signature.bind(*args, **kwargs).arguments
            more = named.pop(extra, {})
            return instead(original, named | more)

        return wrapped

    @property
    def _generates_here(self) -> bool:
        """Whether ``generate`` runs in this thread, which calls ``forward`` with short inputs.

        That of another session too, if the model changes hands meanwhile.
        """
        return any(model is self.model for model in _generating.get(get_ident(), ()))

    def prefill(self, inputs: Mapping[str, Any]) -> Prefilled:
        """Let the model read a prompt once, compressed, so that ``ask`` can go on from it.

        ``inputs`` are the processor's, up to where the questions begin.

        Raises AttachError if the session is detached, and what ``compress`` raises.
        """
        self.require_attached("prefill")
        ids = inputs.get("input_ids")
        if ids is None:
            raise PromptError("inputs hold no input_ids; expected the processor's output")
        default = self.model.generation_config.cache_implementation
        if default not in (None, "dynamic"):
            raise PromptError(
                f"the model's generation_config asks for a {default} cache, which cannot grow with "
                "questions; expected cache_implementation None: unset it"
            )
        # By generate: some models count positions otherwise in a plain call than there.
        output = self.model.generate(
            **inputs, **ONE_BY_ONE, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
        )
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        return Prefilled(ids, mask, cache_of(output), self.model)

    def ask(
        self,
        prompt: Prefilled,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Go on from a prefilled prompt with a question, and leave the prompt as it is.

        ``input_ids (k * B, n)``: what follows each prompt, or ``k`` questions about each, padded on
        the left. ``options`` are those of ``generate``, and so is the result: the prompt, the
        question, the answer.

        Raises AttachError if the session is detached, PromptError where rows do not fit.
        """
        self.require_attached("ask")
        if prompt.model is not self.model:
            raise PromptError(
                "the prompt was read by another model; expected one that this model read"
            )
        if input_ids.ndim != 2 or not input_ids.shape[1]:
            raise PromptError(
                f"input_ids have shape {tuple(input_ids.shape)}; expected a question of one token "
                "or more for each row, (k * B, n)"
            )
        for name in ("num_beams", "num_return_sequences"):
            if (options.get(name) or 1) > 1:
                raise PromptError(
                    f"{name} is {options[name]}, and transformers takes no cache of fewer rows; "
                    "expected 1: ask the same question in several rows"
                )
        times, rest = divmod(len(input_ids), len(prompt.input_ids))
        if rest or not times:
            raise PromptError(
                f"input_ids have {len(input_ids)} row(s), the prefilled prompt has "
                f"{len(prompt.input_ids)}; expected one or several questions for each prompt"
            )
        if attention_mask is None:
            attention_mask = self.adapter.infer_mask(input_ids)
        cache, turn = copy.deepcopy(prompt.cache), _turn_of(prompt.cache)
        if times > 1:
            # Unlike batch_repeat_interleave, linear attention has it too.
            rows = torch.arange(len(prompt.input_ids), device=prompt.input_ids.device)
            cache.reorder_cache(rows.repeat_interleave(times))
            _remember(cache, None if turn is None else turn.repeat(times))
        before = (x.repeat_interleave(times, 0) for x in (prompt.input_ids, prompt.attention_mask))
        ids, mask = (
            torch.cat([old, new.to(old)], -1)
            for old, new in zip(before, (input_ids, attention_mask), strict=True)
        )
        return self.model.generate(
            input_ids=ids, attention_mask=mask, **as_argument(cache), **{**ONE_BY_ONE, **options}
        )

    def _forward(self, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        cache = cache_of(inputs)
        turn = _turn_of(cache)
        arguments: Mapping[str, Any] = inputs
        if turn is not None:
            arguments, turn = self._step(inputs, turn)
        elif shown(inputs) or not filled_length(cache):
            arguments, turn = self._first_turn(inputs)
        with (
            proportional_attention(self.model, None if turn is None else turn.shares),
            layer_stage(self.model, self.strategy, turn) as stage,
        ):
            output = original(**arguments)
        turn = self._cut(stage, turn, arguments)
        values = output if isinstance(output, tuple) else output.values()
        for filled in (value for value in values if filled_length(value)):
            _remember(filled, turn)
        return output

    @torch.no_grad()
    def _generate(self, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        if inputs.get("input_ids") is None and inputs.get("inputs") is not None:
            inputs["input_ids"] = inputs.pop("inputs")
        arguments, turn = self._turn(inputs)
        running = _generating.setdefault(get_ident(), [])
        running.append(self.model)
        try:
            if turn is None:
                return original(**arguments)
            return self._answer(original, inputs, arguments, turn)
        finally:
            running.pop()
            if not running:
                del _generating[get_ident()]

    def _turn(self, inputs: dict[str, Any]) -> tuple[Mapping[str, Any], Turn | None]:
        """What ``generate`` is to read, and the turn that it then has read.

        No turn where the inputs are read as they are.
        """
        ids, cache = inputs.get("input_ids"), cache_of(inputs)
        turn = _turn_of(cache)
        held = filled_length(cache) + (0 if turn is None else turn.removed)
        if turn is not None and (ids is None or not turn.begins(ids, held)):
            raise PromptError(
                f"input_ids do not begin with the {held} tokens that the cache stands for; "
                "expected the earlier ids, the answer, then the new turn, padded alike"
            )
        if not held:
            return self._first_turn(inputs)
        if ids is None:
            return inputs, None
        # Without pixels a turn of text looks at its ids itself.
        looks = turn is None or bool(shown(inputs))
        shows_more = looks and self._shows(ids[:, held:])
        if turn is None:
            turn = self._turn_of_text(inputs, ids, held, shows_more)
            if turn is None:
                return inputs, None
        if shows_more:
            return self._later_turn(inputs, turn, held)
        return self._text_turn(inputs, turn)

    def _first_turn(self, inputs: Mapping[str, Any]) -> tuple[Mapping[str, Any], Turn | None]:
        """A prompt that no cache has read yet, or whatever else a call brings instead of one."""
        if all(inputs.get(name) is None for name in PROMPTS):
            return inputs, None
        embeds = inputs.get("inputs_embeds")
        if embeds is not None and all(inputs.get(name) is None for name in PIXELS.values()):
            lengths = [embeds.shape[1]] * len(embeds)
            why = "the prompt came as inputs_embeds, which do not say what is visual"
            self._note(untouched(self.adapter, self.configuration, lengths, inputs, why), None)
            return inputs, None
        short = compress_prompt(
            self.adapter,
            self.adapter.read(inputs),
            self.configuration,
            frames_as_images=self._frames_as_images,
            observe=self._tell,
        )
        self._note(short.report, short.columns)
        return (inputs if short.turn is None else short), short.turn

    def _later_turn(
        self, inputs: dict[str, Any], turn: Turn, held: int
    ) -> tuple[Mapping[str, Any], Turn | None]:
        """A turn that shows something new. The inputs are those of the whole conversation."""
        _refuse_old_masks(inputs)
        _refuse_positions(inputs)
        given = inputs.get("attention_mask")
        reached = turn.extend(
            inputs["input_ids"][:, turn.length : held], None if given is None else given[:, :held]
        )
        try:
            short = compress_prompt(
                self.adapter,
                self.adapter.read(inputs, continues=True),
                self.configuration,
                after=reached,
                frames_as_images=self._frames_as_images,
                observe=self._tell,
            )
        except MismatchError as error:
            raise PromptError(
                f"{error}. A turn that brings new images or videos takes the processor's output "
                "for the whole conversation, earlier pixels included"
            ) from None
        self._note(short.report, short.columns)
        return short, short.turn

    def _text_turn(
        self, inputs: dict[str, Any], turn: Turn
    ) -> tuple[Mapping[str, Any], Turn | None]:
        """A turn of text: the short prompt, then all that has come after it."""
        ids = inputs["input_ids"]
        new, given = ids[:, turn.length :], inputs.get("attention_mask")
        if given is None:
            begun = torch.ones_like(ids[:, : turn.length])
            given = torch.cat([begun, self.adapter.infer_mask(new)], -1)
        whole = turn.extend(new, given)
        refuse_a_gap(self.adapter, whole.mask[:, turn.ids.shape[1] :])
        self.columns = whole.columns
        arguments = self._without_visuals(inputs, new) | {
            "input_ids": whole.ids,
            "attention_mask": whole.mask,
            "position_ids": whole.positions,
        }
        return arguments, turn

    def _turn_of_text(
        self, inputs: dict[str, Any], ids: Tensor, held: int, shows_more: bool
    ) -> Turn | None:
        """The turn of a cache that no session has filled, where one is needed to go on from it."""
        visuals = bool(shown(inputs))
        if shows_more and not visuals:
            raise PromptError(
                "placeholders of images or videos stand after the "
                f"{held} tokens that the cache holds, and no pixels are given: the cache was made "
                "from a compressed one and has lost what tokenfuse noted on it, or the pixels are "
                "missing; expected the cache that generate returned, or the whole conversation's "
                "pixels"
            )
        if visuals and (not shows_more or ids.shape[1] < held or self._shows(ids[:, :held])):
            raise PromptError(
                "the cache holds a prompt already, and the inputs bring images or videos; "
                "expected an empty cache, one that a generate of this session filled, or one of "
                "text only: start with a new cache and the whole conversation"
            )
        # The model may have read another prompt since, and keeps that one's delta.
        counts = inputs.get("position_ids") is None and self.adapter.position_delta() is not None
        if not shows_more and not (counts and held < ids.shape[1]):
            return None
        if self._shows(ids[:, :held]):
            return None
        begun = {"input_ids": ids[:, :held]}
        if inputs.get("attention_mask") is not None:
            begun["attention_mask"] = inputs["attention_mask"][:, :held]
        prompt = self.adapter.read(begun)
        return Turn.of_text(prompt, self.adapter.positions(prompt).ids)

    def _step(self, inputs: dict[str, Any], turn: Turn) -> tuple[Mapping[str, Any], Turn]:
        """Arguments of ``forward`` for new tokens after a compressed prompt in the cache."""
        ids, past = inputs.get("input_ids"), filled_length(cache_of(inputs))
        held = turn.removed + past
        if ids is None or len(ids) != len(turn.seen) or not turn.may_stand_for(held):
            raise PromptError(
                f"the new input_ids do not go on from the {held} tokens that the cache stands "
                "for; expected the ids that follow, one row per row of the cache"
            )
        later = torch.cat([turn.seen[:, turn.length : held], ids], -1)
        whole = turn.extend(later, inputs.get("attention_mask"))
        refuse_a_gap(self.adapter, whole.mask[:, turn.ids.shape[1] :])
        self.columns = whole.columns[:, past:]
        step = {"attention_mask": whole.mask, "position_ids": whole.positions[..., past:]}
        seen = torch.cat([turn.seen[:, :held], ids], -1)
        return self._without_visuals(inputs, ids) | step, replace(turn, seen=seen)

    def _answer(
        self,
        original: Callable[..., Any],
        inputs: Mapping[str, Any],
        short: Mapping[str, Any],
        turn: Turn,
    ) -> Any:
        """The answer to a shorter prompt, as if the caller's own had been read."""
        prompt = inputs["input_ids"]
        self._refuse_gaps_without_a_cache(inputs, short)
        self._refuse_beams(inputs)
        arguments = for_shorter_prompt(
            short, prompt, short["input_ids"], self.model.generation_config
        )
        if turn.visuals is not None or turn.layers is not None:
            # A static cache would have the steps compiled, without the hooks of the layers.
            uncompiled(arguments)
        with (
            proportional_attention(self.model, turn.shares),
            layer_stage(self.model, self.strategy, turn) as stage,
        ):
            output = original(**arguments)
        turn = self._cut(stage, turn, short) or turn
        sequences = output if isinstance(output, Tensor) else output.sequences
        times = len(sequences) // len(prompt)
        answer = sequences[:, short["input_ids"].shape[1] :]
        whole = torch.cat([prompt.repeat_interleave(times, 0).to(answer.device), answer], -1)
        given = cache_of(inputs)
        filled = None if isinstance(output, Tensor) else cache_of(output)
        cache = given if filled is None else filled
        # A cache filled by text alone was not shortened. It needs no record of ours, and may be
        # continued without a session.
        if cache is not None and (turn.items or _turn_of(cache) is not None):
            _remember(cache, replace(turn.repeat(times), seen=whole))
        if isinstance(output, Tensor):
            return whole
        output.sequences = whole
        return output

    def _cut(
        self, stage: LayerStage | None, turn: Turn | None, arguments: Mapping[str, Any]
    ) -> Turn | None:
        """The turn with what has become of it inside the LLM, which its report is told."""
        if stage is None or turn is None:
            return turn
        counts = stage.counts
        if counts is not None and isinstance(arguments, CompressedInputs):
            before = arguments.report
            report = told_by_layer(self.adapter, before, *counts, arguments)
            with self._noting:
                for i, noted in enumerate(self.reports):
                    if noted is before:
                        self.reports[i] = report
            self._observe("tokenfuse_compressed", report=report)
        return stage.after(turn)

    def _tell(self, hook: str, /, **arguments: Any) -> None:
        """Tell observers, but not of a report before the LLM has had its part in it."""
        if hook != "tokenfuse_compressed" or not acts_inside(self.strategy):
            self._observe(hook, **arguments)

    def _note(self, report: Report, columns: Tensor | None) -> None:
        with self._noting:
            self.reports.append(report)
            self.columns = columns

    def _shows(self, ids: Tensor) -> bool:
        """Whether some of the ids stand for images or videos. A host sync for each kind of id."""
        kinds = {self.adapter.placeholder_id(modality) for modality in MODALITIES}
        return any(bool(ids.eq(token).any()) for token in kinds if token is not None)

    def _without_visuals(self, inputs: Mapping[str, Any], new: Tensor) -> dict[str, Any]:
        """The inputs of a turn of text, without the pixels that the cache has seen already."""
        if self._shows(new):
            raise PromptError(
                "a later call of the model brings a new image or video; expected text only on a "
                "compressed cache: bring it by generate, with the inputs of the whole conversation"
            )
        _refuse_positions(inputs)
        seen = {"token_type_ids", "mm_token_type_ids"}
        for modality in MODALITIES:
            if inputs.get(PIXELS[modality]) is not None:
                seen |= set(self.adapter.encoder_inputs(inputs, modality))
        return {name: value for name, value in inputs.items() if name not in seen}

    def _refuse_beams(self, inputs: Mapping[str, Any]) -> None:
        """Raise PromptError where beams would change places under what each step has chosen."""
        if self.strategy.cache_pruning() is None:
            return
        beams = setting("num_beams", inputs, self.model.generation_config) or 1
        if beams > 1:
            raise PromptError(
                f"num_beams is {beams}, and strategy {self.strategy.name} remembers for each "
                "answer what its steps read; expected num_beams 1"
            )

    def _refuse_gaps_without_a_cache(
        self, inputs: Mapping[str, Any], short: Mapping[str, Any]
    ) -> None:
        cached = setting("use_cache", inputs, self.model.generation_config) is not False
        # generate drops a mask that hides nothing; without a cache 1-D positions are all that is
        # left to tell prompts apart.
        positions, steps = short["position_ids"], short["position_ids"].diff()
        back = (steps < 0) & (short["attention_mask"][:, 1:] != 0)
        if not cached and positions.ndim == 2 and bool(((steps > 1) | back).any()):
            raise PromptError(
                "use_cache is False, and without a cache transformers takes gaps in 1-D "
                "position_ids for the beginnings of other prompts; expected use_cache=True, or "
                "positions: contiguous"
            )


def _refuse_positions(inputs: Mapping[str, Any]) -> None:
    """Raise PromptError where a later turn counts by the uncompressed prompt."""
    for name in ("position_ids", "inputs_embeds", "mm_encoder_outputs"):
        if inputs.get(name) is not None:
            raise PromptError(
                f"a later turn on a compressed cache brings {name}, which counts by the "
                "uncompressed prompt; expected none: leave it out"
            )


def _refuse_old_masks(inputs: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError where transformers masks images after a cached prompt wrongly."""
    if inputs.get("token_type_ids") is None:
        return
    installed = version("transformers")
    if tuple(map(int, installed.split(".")[:2])) < (5, 23):
        raise UnsupportedModelError(
            "a later turn shows something new to a model with token_type_ids, which transformers "
            f"{installed} masks by the wrong columns, compressed or not; expected 5.23 or newer, "
            "or a new cache with the whole conversation"
        )


def _remember(cache: Any, turn: Turn | None) -> None:
    if turn is not None:
        setattr(cache, TURN, turn)


def _turn_of(cache: Any) -> Turn | None:
    """What a session put into ``cache``, or None where it holds nothing of a session's."""
    if hasattr(cache, TURN) and not filled_length(cache):
        delattr(cache, TURN)
    turn: Turn | None = getattr(cache, TURN, None)
    return turn
