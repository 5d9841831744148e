"""A model's KV cache, which transformers calls ``cache`` since 5.24, ``past_key_values`` before."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

CACHES = ("cache", "past_key_values")


def cache_of(values: Mapping[str, Any]) -> Any:
    """The cache among the inputs or the outputs of a model, or None."""
    # The keys, for an output that is asked for the old name warns, even where it has neither.
    held = values.keys()
    found = (values[name] for name in CACHES if name in held)
    return next((cache for cache in found if cache is not None), None)


def as_argument(cache: Any) -> dict[str, Any]:
    """``cache`` under the name that ``generate`` and the model take it by."""
    return {_name(): cache}


def filled_length(cache: Any) -> int:
    """How many positions a cache holds; 0 for none."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


@functools.cache
def _name() -> str:
    from transformers.generation import GenerateDecoderOnlyOutput

    return next(name for name in CACHES if name in GenerateDecoderOnlyOutput.__dataclass_fields__)
