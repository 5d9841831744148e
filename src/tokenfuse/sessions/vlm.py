"""``attach``: a model's own ``generate`` and ``forward``, with compression, inside a block."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenfuse.compression import (
    CompressedInputs,
    compress_with,
    prompt_adapter,
    refuse_unmet_needs,
)
from tokenfuse.errors import AttachError, PromptError
from tokenfuse.prompt.cache import as_argument, cache_of, filled_length
from tokenfuse.prompt.turn import Turn, brings_items, refuse_a_gap, show_more, without_visuals
from tokenfuse.registry import Registry
from tokenfuse.report import Report
from tokenfuse.sessions.arguments import as_the_caller_means
from tokenfuse.sessions.proportional import proportional_attention
from tokenfuse.strategies._base import Strategy

WRAPPED = ("generate", "forward")
MARK = "_tokenfuse_session"
TURN = "_tokenfuse_turn"
"""Name under which a cache carries what it holds, so that a copy of the cache carries it too."""


ONE_BY_ONE = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
"""Options of generate for one answer per row of a cache."""


class Prompt(NamedTuple):
    """A prompt that a model has read: what ``Session.ask`` goes on from.

    ``input_ids`` and ``attention_mask`` ``(B, L)`` are the caller's own; ``cache`` holds the
    shorter prompt, as ``model`` has read it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    cache: Any
    model: Any


def refuse_attached(model: Any) -> None:
    """Raise AttachError if a session holds ``model`` already."""
    if MARK in vars(model):
        raise AttachError(
            f"this {type(model).__name__} is already attached; expected one session per model at a "
            "time: leave the outer with-block first"
        )


class Session:
    """An attached model. ``report`` is the last prompt's Report, or None before the first."""

    def __init__(
        self,
        model: Any,
        strategy: Strategy,
        registry: Registry,
        frames_as_images: bool = False,
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.adapter = prompt_adapter(model, registry)
        refuse_unmet_needs(self.adapter, strategy)
        self.report: Report | None = None
        self._registry = registry
        self._frames_as_images = frames_as_images
        self._own: dict[str, Any] = {}
        self._wrapped: dict[str, Any] = {}
        self._delta: Tensor | None = None

    def __enter__(self) -> Session:
        attributes = vars(self.model)
        refuse_attached(self.model)
        self._delta = self.adapter.position_delta()
        self._own = {name: attributes[name] for name in WRAPPED if name in attributes}
        for name, instead in (("generate", self._generate), ("forward", self._forward)):
            self._wrapped[name] = _wrap(getattr(self.model, name), instead)
            setattr(self.model, name, self._wrapped[name])
        setattr(self.model, MARK, self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        delattr(self.model, MARK)
        for name in WRAPPED:
            self._unwrap(name)
        self.adapter.set_position_delta(self._delta)

    def _unwrap(self, name: str) -> None:
        if name in self._own:
            setattr(self.model, name, self._own[name])
        else:
            vars(self.model).pop(name, None)

    def encode(self, inputs: Mapping[str, Any]) -> Prompt:
        """Let the model read a prompt once, compressed, so that ``ask`` can go on from it.

        ``inputs`` are the processor's, up to where the questions begin.

        Raises AttachError outside the block, and what ``compress`` raises.
        """
        self._require_attached("encode")
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
        return Prompt(ids, mask, cache_of(output), self.model)

    def ask(
        self,
        prompt: Prompt,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Go on from an encoded prompt with a question, and leave the prompt as it is.

        ``input_ids (k * B, n)``: what follows each prompt, or ``k`` questions about each, padded on
        the left. ``options`` are those of ``generate``, and so is the result: the prompt, the
        question, the answer.

        Raises AttachError outside the block, PromptError where rows do not fit.
        """
        self._require_attached("ask")
        if prompt.model is not self.model:
            raise PromptError("the prompt was encoded by another model; expected one of this model")
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
                f"input_ids have {len(input_ids)} row(s), the encoded prompt has "
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

    def _require_attached(self, what: str) -> None:
        if vars(self.model).get(MARK) is not self:
            raise AttachError(
                f"{what} is called outside its with-block, where the model is as it was; expected "
                f"with tokenfuse.attach(...) as session: session.{what}(...)"
            )

    def _forward(self, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        turn = _turn_of(cache_of(inputs))
        if turn is not None:
            inputs, turn = self._step(inputs, turn)
        elif self._bring_a_prompt(inputs):
            short = self._compress(inputs)
            if short.plans:
                turn = Turn.of(inputs["input_ids"], short)
            inputs = short
        with proportional_attention(self.model, None if turn is None else turn.shares):
            output = original(**inputs)
        values = output if isinstance(output, tuple) else output.values()
        for cache in (value for value in values if filled_length(value)):
            _remember(cache, turn)
        return output

    @torch.no_grad()
    def _generate(self, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        # generate calls forward once per token, with inputs that are short already.
        self._unwrap("forward")
        try:
            return self._short_generate(original, inputs)
        finally:
            # Another thread may have left the block meanwhile, as readers of a stream do.
            if vars(self.model).get(MARK) is self:
                self.model.forward = self._wrapped["forward"]

    def _short_generate(self, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        if inputs.get("input_ids") is None and inputs.get("inputs") is not None:
            inputs["input_ids"] = inputs.pop("inputs")
        cache = cache_of(inputs)
        turn = _turn_of(cache)
        held = filled_length(cache) + (turn.removed if turn else 0)
        prompt = inputs.get("input_ids")
        if turn is not None and (prompt is None or not turn.begins(prompt, held)):
            raise PromptError(
                f"input_ids do not begin with the {held} tokens that the cache stands for; "
                "expected the earlier ids, the answer, then the new turn, padded alike"
            )
        short: dict[str, Any]
        if held and prompt is not None and self._shows_more(inputs, prompt[:, held:]):
            turn = turn or Turn.of_text(self.adapter, inputs, held)
            short, turn = show_more(
                self.adapter,
                inputs,
                turn,
                held,
                self.strategy,
                self._registry,
                self._frames_as_images,
            )
            self.report = short.report
        elif turn is not None:
            short = self._continue(inputs, turn)
        elif self._bring_a_prompt(inputs):
            short = compressed = self._compress(inputs)
            if not compressed.plans:
                return original(**inputs)
            turn = Turn.of(inputs["input_ids"], compressed)
        elif held and inputs.get("position_ids") is None and self._has_a_delta(prompt, held):
            # The model may have read another prompt since, and keeps that one's delta.
            turn = Turn.of_text(self.adapter, inputs, held)
            short = self._continue(inputs, turn)
        else:
            return original(**inputs)
        prompt = inputs["input_ids"]
        self._refuse_gaps_without_a_cache(inputs, short["position_ids"])
        arguments = as_the_caller_means(
            short, prompt, short["input_ids"], self.model.generation_config
        )
        with proportional_attention(self.model, turn.shares):
            output = original(**arguments)
        sequences = output if isinstance(output, Tensor) else output.sequences
        times = len(sequences) // len(prompt)
        answer = sequences[:, short["input_ids"].shape[1] :]
        whole = torch.cat([prompt.repeat_interleave(times, 0).to(answer.device), answer], -1)
        filled = None if isinstance(output, Tensor) else cache_of(output)
        cache = cache if filled is None else filled
        # A cache that holds text only, as before, is anybody's.
        if cache is not None and (turn.plans or _turn_of(cache) is not None):
            _remember(cache, replace(turn.repeat(times), seen=whole))
        if isinstance(output, Tensor):
            return whole
        output.sequences = whole
        return output

    def _refuse_gaps_without_a_cache(self, inputs: Mapping[str, Any], positions: Tensor) -> None:
        configs = (inputs.get("generation_config"), self.model.generation_config)
        said = [inputs.get("use_cache"), *(getattr(c, "use_cache", None) for c in configs)]
        cached = next((value for value in said if value is not None), True)
        # generate drops a mask that hides nothing; without a cache 1-D positions are all that is
        # left to tell prompts apart.
        if not cached and positions.ndim == 2 and bool((positions.diff() > 1).any()):
            raise PromptError(
                "use_cache is False, and without a cache transformers takes gaps in 1-D "
                "position_ids for the beginnings of other prompts; expected use_cache=True, or a "
                "strategy with positions: contiguous"
            )

    def _bring_a_prompt(self, inputs: Mapping[str, Any]) -> bool:
        """Whether there is something to compress or report, not only tokens that follow a cache."""
        if self.adapter.has_visuals(inputs):
            return True
        brought = (inputs.get("input_ids") is not None) or bool(inputs.get("mm_encoder_outputs"))
        return brought and not filled_length(cache_of(inputs))

    def _shows_more(self, inputs: Mapping[str, Any], new: Tensor) -> bool:
        """Whether images or videos come after the tokens that a cache stands for."""
        return self.adapter.has_visuals(inputs) and brings_items(self.adapter, new)

    def _has_a_delta(self, ids: Tensor | None, held: int) -> bool:
        """Whether a cache holds text only, of a model that counts by a delta of its own."""
        if ids is None or ids.shape[1] <= held or self.adapter.position_delta() is None:
            return False
        return not brings_items(self.adapter, ids[:, :held])

    def _compress(self, inputs: Mapping[str, Any]) -> CompressedInputs:
        short = compress_with(
            self.adapter,
            inputs,
            self.strategy,
            self._registry,
            frames_as_images=self._frames_as_images,
        )
        self.report = short.report
        return short

    def _continue(self, inputs: Mapping[str, Any], turn: Turn) -> dict[str, Any]:
        """Arguments of ``generate`` for a later turn: the short prompt, then what came after it."""
        ids = inputs["input_ids"]
        new, given = ids[:, turn.length :], inputs.get("attention_mask")
        if given is None:
            begun = torch.ones_like(ids[:, : turn.length])
            given = torch.cat([begun, self.adapter.infer_mask(new)], -1)
        mask, positions = turn.extend(new, given, ids.shape[1])
        refuse_a_gap(self.adapter, mask[:, turn.short.shape[1] :])
        return without_visuals(self.adapter, inputs, new) | {
            "input_ids": torch.cat([turn.short, new], -1),
            "attention_mask": mask,
            "position_ids": positions,
        }

    def _step(self, inputs: Mapping[str, Any], turn: Turn) -> tuple[dict[str, Any], Turn]:
        """Arguments of ``forward`` for new tokens after a compressed prompt in the cache."""
        ids, past = inputs.get("input_ids"), filled_length(cache_of(inputs))
        held = turn.removed + past
        if ids is None or len(ids) != len(turn.seen) or not turn.holds(held):
            raise PromptError(
                f"the new input_ids do not go on from the {held} tokens that the cache stands "
                "for; expected the ids that follow, one row per row of the cache"
            )
        total = held + ids.shape[1]
        mask, positions = turn.extend(ids, inputs.get("attention_mask"), total)
        refuse_a_gap(self.adapter, mask[:, turn.short.shape[1] :])
        step = {"attention_mask": mask, "position_ids": positions[..., past:]}
        seen = torch.cat([turn.seen[:, :held], ids], -1)
        return without_visuals(self.adapter, inputs, ids) | step, replace(turn, seen=seen)


def _wrap(original: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """``original`` with its own signature, which transformers reads, calling ``instead``."""
    signature = inspect.signature(original)
    extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        named = signature.bind(*args, **kwargs).arguments
        more = named.pop(extra, {})
        return instead(original, named | more)

    return wrapped


def _remember(cache: Any, turn: Turn | None) -> None:
    if turn is not None:
        setattr(cache, TURN, turn)


def _turn_of(cache: Any) -> Turn | None:
    """What a session put into ``cache``, or None where it holds nothing of a session's."""
    if hasattr(cache, TURN) and not filled_length(cache):
        delattr(cache, TURN)
    turn: Turn | None = getattr(cache, TURN, None)
    return turn
