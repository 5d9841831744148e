"""``attach``: a model's own ``generate`` and ``forward``, with compression, inside a block."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tokenfuse.adapters.base import MODALITIES, PIXELS
from tokenfuse.adapters.vision import VisionAdapter
from tokenfuse.callers import as_the_caller_means
from tokenfuse.config import StrategyLike, load_strategy
from tokenfuse.engine import (
    CompressedInputs,
    compress_with,
    filled_length,
    prompt_adapter,
    refuse_unmet_needs,
)
from tokenfuse.errors import AttachError, PromptError
from tokenfuse.registry import Registry, registry
from tokenfuse.report import Report
from tokenfuse.strategies.base import Strategy

WRAPPED = ("generate", "forward")
MARK = "_tokenfuse_session"
TURN = "_tokenfuse_turn"
"""Name under which a cache carries what it holds, so that a copy of the cache carries it too."""


def attach(
    model: Any, strategy: StrategyLike, /, *, among: Registry | None = None, **options: Any
) -> Session:
    """Compress every prompt that ``model`` gets, or merge tokens in it, inside a ``with`` block.

    ``options`` are set over those of ``strategy``: ``attach(model, "ttf", threshold=0.8)``. A
    vision transformer gets a VisionSession; what follows is about vision-language models.

    ``generate`` returns what it always returns: the caller's own prompt, then the answer. Calling
    the model returns logits of the shorter prompt. Inside the block a later turn on the same cache
    works when its ids begin with the earlier ones. Leaving the block, also by an exception,
    restores the model.

    Raises ConfigError, UnsupportedModelError, and AttachError if the model is attached already.
    """
    # It is built on this module.
    from tokenfuse.vision_session import VisionSession

    found = among or registry()
    chosen = load_strategy(strategy, options, among=found)
    adapter = found.adapter(model)
    if isinstance(adapter, VisionAdapter):
        return VisionSession(adapter, chosen, found)
    return Session(model, chosen, found)


@dataclass(frozen=True, eq=False)
class _Turn:
    """What a cache holds: the short prompt ``(B, L')`` in place of the caller's ``(B, L)``.

    ``seen``: the caller's prompt and all that followed it into the cache.
    """

    length: int
    seen: Tensor
    short: Tensor
    mask: Tensor
    positions: Tensor

    @classmethod
    def of(cls, prompt: Tensor, short: Mapping[str, Any]) -> _Turn:
        names = ("input_ids", "attention_mask", "position_ids")
        return cls(prompt.shape[1], prompt, *(short[name] for name in names))

    @property
    def removed(self) -> int:
        return self.length - self.short.shape[1]

    def holds(self, held: int) -> bool:
        """Whether a cache that stands for ``held`` of the caller's tokens still is this turn's."""
        return self.length <= held <= self.seen.shape[1]

    def begins(self, ids: Tensor, held: int) -> bool:
        """Whether ``ids`` begin with those ``held`` tokens, and go on."""
        fits = self.holds(held) and len(ids) == len(self.seen) and held < ids.shape[1]
        return fits and torch.equal(ids[:, :held].to(self.seen.device), self.seen[:, :held])

    def repeat(self, times: int) -> _Turn:
        """The turn of a batch whose rows were repeated, as for several answers to one prompt."""
        rows = {
            name: getattr(self, name).repeat_interleave(times, 0)
            for name in ("seen", "short", "mask")
        }
        return replace(self, **rows, positions=self.positions.repeat_interleave(times, -2))

    def extend(self, new: Tensor, given: Tensor | None, total: int) -> tuple[Tensor, Tensor]:
        """Mask and positions when the ``new`` tokens end the caller's ``total`` tokens.

        ``given`` is the caller's mask for all of these. Positions go on from the prompt's highest,
        which is that of its last text; padding has 0.
        """
        if given is None:
            given = torch.ones_like(self.mask[:, :1]).expand(-1, total)
        if given.shape != (len(new), total):
            raise PromptError(
                f"attention_mask has shape {tuple(given.shape)}; expected {(len(new), total)}: one "
                "column per token of the conversation so far, the cached ones included"
            )
        later = given[:, self.length :].to(self.mask.dtype)
        last = self.positions.amax(-1, keepdim=True)
        after = last + later.cumsum(-1).to(self.positions.dtype)
        return torch.cat([self.mask, later], -1), torch.cat([self.positions, after], -1)


def refuse_attached(model: Any) -> None:
    """Raise AttachError if a session holds ``model`` already."""
    if MARK in vars(model):
        raise AttachError(
            f"this {type(model).__name__} is already attached; expected one session per model at a "
            "time: leave the outer with-block first"
        )


class Session:
    """An attached model. ``report`` is the last prompt's Report, or None before the first."""

    def __init__(self, model: Any, strategy: Strategy, found: Registry) -> None:
        self.model = model
        self.strategy = strategy
        self.adapter = prompt_adapter(model, found)
        refuse_unmet_needs(self.adapter, strategy)
        self.report: Report | None = None
        self._found = found
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

    def _forward(self, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        turn = _turn_of(inputs.get("past_key_values"))
        if turn is not None:
            inputs, turn = self._step(inputs, turn)
        elif self._bring_a_prompt(inputs):
            short = self._compress(inputs)
            if short.plans:
                turn = _Turn.of(inputs["input_ids"], short)
            inputs = short
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
            self.model.forward = self._wrapped["forward"]

    def _short_generate(self, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        if inputs.get("input_ids") is None and inputs.get("inputs") is not None:
            inputs["input_ids"] = inputs.pop("inputs")
        cache = inputs.get("past_key_values")
        turn = _turn_of(cache)
        if turn is not None:
            short = self._continue(inputs, turn)
            prompt = inputs["input_ids"]
        elif self._bring_a_prompt(inputs):
            compressed = self._compress(inputs)
            if not compressed.plans:
                return original(**inputs)
            prompt, short = inputs["input_ids"], compressed
            turn = _Turn.of(prompt, short)
        else:
            return original(**inputs)
        arguments = as_the_caller_means(
            short, prompt, short["input_ids"], self.model.generation_config
        )
        output = original(**arguments)
        sequences = output if isinstance(output, Tensor) else output.sequences
        times = len(sequences) // len(prompt)
        answer = sequences[:, short["input_ids"].shape[1] :]
        whole = torch.cat([prompt.repeat_interleave(times, 0).to(answer.device), answer], -1)
        cache = cache if isinstance(output, Tensor) else output.get("past_key_values", cache)
        if cache is not None:
            _remember(cache, replace(turn.repeat(times), seen=whole))
        if isinstance(output, Tensor):
            return whole
        output.sequences = whole
        return output

    def _bring_a_prompt(self, inputs: Mapping[str, Any]) -> bool:
        """Whether there is something to compress or report, not only tokens that follow a cache."""
        if self.adapter.has_visuals(inputs):
            return True
        brought = (inputs.get("input_ids") is not None) or bool(inputs.get("mm_encoder_outputs"))
        return brought and not filled_length(inputs.get("past_key_values"))

    def _compress(self, inputs: Mapping[str, Any]) -> CompressedInputs:
        short = compress_with(self.adapter, inputs, self.strategy, None, self._found)
        self.report = short.report
        return short

    def _continue(self, inputs: Mapping[str, Any], turn: _Turn) -> dict[str, Any]:
        """Arguments of ``generate`` for a later turn: the short prompt, then what came after it."""
        ids = inputs.get("input_ids")
        held = turn.removed + filled_length(inputs["past_key_values"])
        if ids is None or not turn.begins(ids, held):
            raise PromptError(
                f"input_ids do not begin with the {held} tokens that past_key_values stand for; "
                "expected the earlier ids, the answer, then the new turn, padded alike"
            )
        new = ids[:, turn.length :]
        mask, positions = turn.extend(new, inputs.get("attention_mask"), ids.shape[1])
        return self._without_visuals(inputs, new) | {
            "input_ids": torch.cat([turn.short, new], -1),
            "attention_mask": mask,
            "position_ids": positions,
        }

    def _step(self, inputs: Mapping[str, Any], turn: _Turn) -> tuple[dict[str, Any], _Turn]:
        """Arguments of ``forward`` for new tokens after a compressed prompt in the cache."""
        ids, past = inputs.get("input_ids"), filled_length(inputs["past_key_values"])
        held = turn.removed + past
        if ids is None or len(ids) != len(turn.seen) or not turn.holds(held):
            raise PromptError(
                f"the new input_ids do not go on from the {held} tokens that past_key_values stand "
                "for; expected the ids that follow, one row per row of the cache"
            )
        total = held + ids.shape[1]
        mask, positions = turn.extend(ids, inputs.get("attention_mask"), total)
        step = {"attention_mask": mask, "position_ids": positions[..., past:]}
        seen = torch.cat([turn.seen[:, :held], ids], -1)
        return self._without_visuals(inputs, ids) | step, replace(turn, seen=seen)

    def _without_visuals(self, inputs: Mapping[str, Any], new: Tensor) -> dict[str, Any]:
        """The inputs of a later turn, without the pixels that the cache holds already."""
        for modality in MODALITIES:
            token = self.adapter.placeholder_id(modality)
            if token is not None and bool((new == token).any()):
                raise PromptError(
                    f"a later turn brings a new {modality}; expected text only on a compressed "
                    "cache: start with a new cache and the whole conversation"
                )
        for name in ("position_ids", "inputs_embeds", "mm_encoder_outputs"):
            if inputs.get(name) is not None:
                raise PromptError(
                    f"a later turn on a compressed cache brings {name}, which counts by the "
                    "uncompressed prompt; expected none: leave it out"
                )
        seen = {"token_type_ids", "mm_token_type_ids"}
        for modality in MODALITIES:
            if inputs.get(PIXELS[modality]) is not None:
                seen |= set(self.adapter.encoder_inputs(inputs, modality))
        return {name: value for name, value in inputs.items() if name not in seen}


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


def _remember(cache: Any, turn: _Turn | None) -> None:
    if turn is not None:
        setattr(cache, TURN, turn)


def _turn_of(cache: Any) -> _Turn | None:
    """What a session put into ``cache``, or None where it holds nothing of a session's."""
    if hasattr(cache, TURN) and not filled_length(cache):
        delattr(cache, TURN)
    turn: _Turn | None = getattr(cache, TURN, None)
    return turn
