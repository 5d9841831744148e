"""``generate``'s arguments for a shorter prompt.

Length limits shrink with it. Streamers, and the caller's processors, criteria and prefix functions,
are shown the caller's own prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

LENGTHS = ("max_length", "min_length")
COUNTS_PROMPT = (*LENGTHS, "prompt_length_to_skip", "begin_index", "regulation_start")
"""Attributes of transformers' own processors and criteria that count the prompt's tokens."""


def setting(name: str, arguments: Mapping[str, Any], defaults: Any) -> Any:
    """What ``generate`` takes an option for, looking where it looks; None where nobody says it.

    ``defaults`` is the model's generation_config.
    """
    given = getattr(arguments.get("generation_config"), name, None)
    found = (arguments.get(name), given, getattr(defaults, name, None))
    return next((value for value in found if value is not None), None)


def for_shorter_prompt(
    arguments: Mapping[str, Any], prompt: Tensor, short: Tensor, defaults: Any
) -> dict[str, Any]:
    """Arguments of ``generate`` for the ``short (B, L')`` prompt in place of the ``prompt (B, L)``.

    Lengths that count the prompt shrink with it. A streamer, and every processor, criterion and
    prefix function of the caller's own, sees their prompt. Nothing that they passed is changed.
    ``defaults`` is the model's generation_config.
    """
    moved = dict(arguments)
    removed = prompt.shape[1] - short.shape[1]
    config = moved.get("generation_config")
    if config is not None:
        config = moved["generation_config"] = copy.copy(config)

    def callers_ids(ids: Tensor) -> Tensor:
        rows = prompt.to(ids.device).repeat_interleave(len(ids) // len(prompt), 0)
        return torch.cat([rows, ids[:, short.shape[1] :]], -1)

    for name in LENGTHS:
        length = setting(name, moved, defaults)
        if not length:
            continue
        if moved.get(name) is None and config is not None:
            setattr(config, name, max(0, length - removed))
        else:
            moved[name] = max(0, length - removed)
    for name in ("logits_processor", "stopping_criteria"):
        if moved.get(name):
            # The list keeps its class: transformers calls and merges it.
            views = [_view(one, callers_ids, removed) for one in moved[name]]
            moved[name] = type(moved[name])(views)
    allowed = moved.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        # Beams of one prompt share its number; sampled sequences are numbered one by one.
        beams = setting("num_beams", moved, defaults) or 1
        same = 1 if beams > 1 else setting("num_return_sequences", moved, defaults) or 1

        def prefix(number: int, ids: Tensor) -> Any:
            mine = prompt[number // same].to(ids.device)
            return allowed(number, torch.cat([mine, ids[short.shape[1] :]]))

        moved["prefix_allowed_tokens_fn"] = prefix
    if moved.get("streamer") is not None:
        moved["streamer"] = _PromptStreamer(moved["streamer"], callers_ids)
    return moved


def uncompiled(arguments: dict[str, Any]) -> None:
    """Let ``generate`` run without compiling its steps. ``arguments``: from ``for_shorter_prompt``.

    Beside a generation_config a keyword makes transformers warn.
    """
    config = arguments.get("generation_config")
    if config is None or "disable_compile" in arguments:
        arguments.setdefault("disable_compile", True)
    else:
        config.disable_compile = True


def _view(one: Any, callers_ids: Callable[[Tensor], Tensor], removed: int) -> Any:
    if not type(one).__module__.startswith("transformers."):
        return _View(one, callers_ids)
    # Objects of transformers' own classes replace its defaults by their type, so they keep it.
    counted = [name for name in COUNTS_PROMPT if getattr(one, name, None)]
    if counted:
        one = copy.copy(one)
    for name in counted:
        setattr(one, name, max(0, getattr(one, name) - removed))
    return one


class _View:
    """A processor or criterion that is shown the caller's prompt before the new tokens."""

    def __init__(self, inner: Any, callers_ids: Callable[[Tensor], Tensor]) -> None:
        self._inner = inner
        self._callers_ids = callers_ids

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        return self._inner(self._callers_ids(input_ids), scores)

    def __getattr__(self, name: str) -> Any:
        # A copy in the making has no _inner yet.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)


class _PromptStreamer:
    """Gives the caller's streamer their prompt, then every token as it comes."""

    def __init__(self, streamer: Any, callers_ids: Callable[[Tensor], Tensor]) -> None:
        self._streamer = streamer
        self._callers_ids = callers_ids
        self._started = False

    def put(self, value: Tensor) -> None:
        self._streamer.put(value if self._started else self._callers_ids(value))
        self._started = True

    def end(self) -> None:
        self._streamer.end()
