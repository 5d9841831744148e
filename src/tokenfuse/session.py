"""``attach``: a model's own ``generate`` and ``forward``, with compression, for the length of a block."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tokenfuse.config import StrategyLike, load_strategy
from tokenfuse.engine import CompressedInputs, compress_with
from tokenfuse.errors import AttachError, PromptError
from tokenfuse.registry import Registry, registry
from tokenfuse.report import Report

MARK = "_tokenfuse_session"
WRAPPED = ("generate", "forward")


def attach(model: Any, strategy: StrategyLike, *, among: Registry | None = None) -> Session:
    """Compress every prompt that ``model`` gets inside a ``with`` block.

    ``generate`` returns what it always returns: the caller's own prompt, then the answer. Calling
    the model returns logits of the shorter prompt. A later turn on the same cache works when its
    ids begin with the earlier prompt. Leaving the block, also by an exception, restores the model.

    Raises ConfigError, UnsupportedModelError, and AttachError if the model is attached already.
    """
    found = among or registry()
    return Session(model, load_strategy(strategy, among=found), found)


@dataclass(frozen=True, eq=False)
class _Turn:
    """What a cache holds: the caller's prompt ``(B, L)`` and the short one ``(B, L')`` in its place."""

    prompt: Tensor
    short: Tensor
    mask: Tensor
    positions: Tensor

    def repeat(self, times: int) -> _Turn:
        return _Turn(
            self.prompt.repeat_interleave(times, 0),
            self.short.repeat_interleave(times, 0),
            self.mask.repeat_interleave(times, 0),
            self.positions.repeat_interleave(times, -2),
        )


class Session:
    """An attached model. ``report`` is the last prompt's Report, or None before the first."""

    def __init__(self, model: Any, strategy: Any, found: Registry) -> None:
        self.model = model
        self.strategy = strategy
        self.adapter = found.adapter(model)
        self.report: Report | None = None
        self._found = found
        self._turns: WeakKeyDictionary[Any, _Turn] = WeakKeyDictionary()
        self._replaced: dict[str, Any] = {}
        self._delta: Tensor | None = None

    def __enter__(self) -> Session:
        if MARK in self.model.__dict__:
            raise AttachError(
                f"this {type(self.model).__name__} is already attached; expected one session per "
                "model at a time: leave the outer with-block first"
            )
        self._delta = self.adapter.position_delta()
        for name in WRAPPED:
            if name in self.model.__dict__:
                self._replaced[name] = self.model.__dict__[name]
            original = getattr(self.model, name)
            setattr(self.model, name, self._wrap(original, getattr(self, f"_{name}")))
        setattr(self.model, MARK, self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in (*WRAPPED, MARK):
            delattr(self.model, name)
        for name, value in self._replaced.items():
            setattr(self.model, name, value)
        self._replaced.clear()
        self._turns.clear()
        self.adapter.set_position_delta(self._delta)

    def _wrap(self, original: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
        names = [
            name
            for name, parameter in inspect.signature(original).parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]

        # transformers reads both methods' signatures; wraps keeps them.
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return instead(original, dict(zip(names, args, strict=False)) | kwargs)

        return wrapped

    def _forward(self, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        if not self.adapter.has_visuals(inputs):
            return original(**inputs)
        self._refuse_filled_cache(inputs)
        return original(**self._compress(inputs))

    @torch.no_grad()
    def _generate(self, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        if inputs.get("input_ids") is None and inputs.get("inputs") is not None:
            inputs["input_ids"] = inputs.pop("inputs")
        cache = inputs.get("past_key_values")
        if cache is not None and cache in self._turns:
            short, turn = self._continue(inputs, self._turns[cache])
        elif inputs.get("input_ids") is None:
            return original(**inputs)
        else:
            self._refuse_filled_cache(inputs)
            short = self._compress(inputs)
            if not short.plans:
                return original(**inputs)
            turn = _Turn(
                inputs["input_ids"],
                short["input_ids"],
                short["attention_mask"],
                short["position_ids"],
            )
        output = original(**self._move_lengths(short, turn))
        return self._with_callers_prompt(output, turn, cache)

    def _compress(self, inputs: Mapping[str, Any]) -> CompressedInputs:
        short = compress_with(self.adapter, inputs, self.strategy, None, self._found)
        self.report = short.report
        return short

    def _refuse_filled_cache(self, inputs: Mapping[str, Any]) -> None:
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0 and self.adapter.has_visuals(inputs):
            raise PromptError(
                f"past_key_values already holds {cache.get_seq_length()} positions that this "
                "session did not write, and the inputs bring images or videos; expected an empty "
                "cache or one that this session's generate returned: start with a new cache"
            )

    def _continue(self, inputs: dict[str, Any], turn: _Turn) -> tuple[dict[str, Any], _Turn]:
        """The next turn on a cache of this session: the short prompt, then the new text."""
        ids, known = inputs["input_ids"], turn.prompt.shape[1]
        if ids.shape[0] != turn.prompt.shape[0] or not torch.equal(ids[:, :known], turn.prompt):
            raise PromptError(
                f"input_ids of shape {tuple(ids.shape)} do not begin with the {known} tokens of the "
                "prompt that filled this cache; expected the earlier ids, the answer, then the new "
                "turn, padded alike"
            )
        new = ids[:, known:]
        for modality in ("image", "video"):
            token = getattr(self.model.config, f"{modality}_token_id", None)
            if token is not None and bool((new == token).any()):
                raise PromptError(
                    f"a later turn brings a new {modality}; expected text only on a compressed "
                    "cache: start with a new cache and the whole conversation"
                )
        given = inputs.get("attention_mask")
        mask = torch.ones_like(new) if given is None else given[:, known:].to(turn.mask.dtype)
        steps = mask.cumsum(-1).to(turn.positions.dtype)
        extended = _Turn(
            ids,
            torch.cat([turn.short, new], -1),
            torch.cat([turn.mask, mask], -1),
            torch.cat([turn.positions, turn.positions[..., -1:] + steps], -1),
        )
        seen = {"token_type_ids", "mm_token_type_ids"}
        for modality in ("image", "video"):
            seen |= set(self.adapter.encoder_inputs(inputs, modality))
        rest = {name: value for name, value in inputs.items() if name not in seen}
        prompt = {
            "input_ids": extended.short,
            "attention_mask": extended.mask,
            "position_ids": extended.positions,
        }
        return rest | prompt, extended

    def _move_lengths(self, short: Mapping[str, Any], turn: _Turn) -> dict[str, Any]:
        """Lengths that count the prompt, and a streamer that shows it, as the caller means them."""
        moved = dict(short)
        removed = turn.prompt.shape[1] - turn.short.shape[1]
        config = moved.get("generation_config")
        if config is not None:
            moved["generation_config"] = config = copy.copy(config)
        for name in ("max_length", "min_length"):
            if moved.get(name):
                moved[name] -= removed
            elif config is not None and getattr(config, name, None):
                setattr(config, name, getattr(config, name) - removed)
        if moved.get("streamer") is not None:
            moved["streamer"] = _PromptStreamer(moved["streamer"], turn.prompt)
        return moved

    def _with_callers_prompt(self, output: Any, turn: _Turn, cache: Any) -> Any:
        sequences = output if isinstance(output, Tensor) else output.sequences
        times = sequences.shape[0] // turn.prompt.shape[0]
        turn = turn.repeat(times)
        answer = sequences[:, turn.short.shape[1] :]
        sequences = torch.cat([turn.prompt.to(answer.device), answer], -1)
        filled = cache if isinstance(output, Tensor) else getattr(output, "past_key_values", cache)
        if filled is not None:
            self._turns[filled] = turn
        if isinstance(output, Tensor):
            return sequences
        output.sequences = sequences
        return output


class _PromptStreamer:
    """Gives the caller's streamer the caller's prompt, then every token as it comes."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self._streamer = streamer
        self._prompt: Tensor | None = prompt

    def put(self, value: Tensor) -> None:
        if self._prompt is not None:
            value, self._prompt = self._prompt.cpu(), None
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()
