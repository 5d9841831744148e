"""Queries, keys and attention of a decoder layer's own attention, for a few of its rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenfuse.adapters._sized import with_kernel
from tokenfuse.errors import UnsupportedModelError
from tokenfuse.prompt.cache import CACHES, cache_of

NAME = "tokenfuse_rows"
"""What transformers calls the attention that only tells what it was given."""
AT_A_TIME = 1024
"""Rows whose queries and keys are computed at once where all are asked for."""


class Rows(NamedTuple):
    """Some rows of an attention, after the rotary embedding.

    ``queries (H, R, d)``, ``keys (G, R, d)``; ``scale``, ``softcap``: as for ``row_attention``.
    """

    queries: Tensor
    keys: Tensor
    scale: float
    softcap: float | None


class _Given(Exception):
    """Carries what an attention gave to its kernel out of it."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows


def _tell(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any
) -> Any:
    if options.get("s_aux") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has attention sinks, which tokenfuse does not score by; "
            "expected a strategy that reads no attention, such as uniform with a layer"
        )
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    raise _Given(Rows(query[0], key[0], scale, options.get("softcap")))


@functools.cache
def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _tell)


@dataclass
class HeardKeys:
    """A cache for one call of an attention: hands all on to the real one, and notes the keys."""

    cache: Any
    keys: Tensor | None = None

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """As the real one; without one, what is given."""
        if self.cache is not None:
            key, value = self.cache.update(key, value, *args, **kwargs)
        self.keys = key
        return key, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def hearing(kwargs: Mapping[str, Any], name: str) -> tuple[HeardKeys, dict[str, Any]]:
    """What to call an attention with so that its keys are heard. ``name``: that of the cache."""
    heard = HeardKeys(cache_of(kwargs))
    return heard, {**{k: v for k, v in kwargs.items() if k not in CACHES}, name: heard}


def given_rows(module: Any, call: Mapping[str, Any], row: int, places: Tensor | slice) -> Rows:
    """Queries and keys of some places of one row.

    ``call``: what the attention ``module`` is called with, by name. What it computes for these
    places alone is what it computes for them among all. The module stays as it is.

    Raises UnsupportedModelError where the attention is of a kind that tells neither.
    """
    _register()
    hidden: Tensor = call["hidden_states"]
    rows, width = hidden.shape[:2]
    some = {k: v for k, v in call.items() if k not in CACHES and k != "attention_mask"}
    for name, value in some.items():
        some[name] = chosen_places(name, value, (rows, width), row, places)
    twin = with_kernel(module, NAME)
    try:
        type(module).forward(twin, **some, attention_mask=None)
    except _Given as given:
        return given.rows
    raise UnsupportedModelError(
        f"{type(module).__name__} computes its attention in a way of its own, so that it cannot be "
        "scored; expected a strategy that reads no attention, such as uniform with a layer"
    )


def all_rows(module: Any, call: Mapping[str, Any], row: int, places: Tensor) -> Rows:
    """As ``given_rows`` for many places, some at a time."""
    parts = [given_rows(module, call, row, part) for part in places.split(AT_A_TIME)]
    return parts[0]._replace(
        queries=torch.cat([part.queries for part in parts], 1),
        keys=torch.cat([part.keys for part in parts], 1),
    )


def chosen_places(
    name: str, value: Any, shape: tuple[int, int], row: int, places: Tensor | slice
) -> Any:
    """An argument of a decoder layer for some places of one row; all else as it is."""

    def pick(x: Tensor, batch: int, columns: int) -> Tensor:
        """One row, some columns. ``batch``, ``columns``: the axes, from the last."""
        if x.ndim >= -batch:
            x = x.narrow(batch, row if x.shape[batch] > 1 else 0, 1)
        if isinstance(places, slice):
            start, stop, _ = places.indices(x.shape[columns])
            return x.narrow(columns, start, stop - start)
        return x.index_select(columns, places)

    return along(name, value, shape, pick)


def along(
    name: str, value: Any, shape: tuple[int, int], pick: Callable[[Tensor, int, int], Tensor]
) -> Any:
    """An argument of a decoder layer with ``pick(tensor, batch axis, column axis)`` applied.

    ``shape``: rows and columns of the hidden states. Arguments without columns stay as they are.
    """
    rows, width = shape
    if isinstance(value, tuple | list) and value and all(isinstance(x, Tensor) for x in value):
        # Cosines and sines, (..., L, d).
        parts = [pick(x, -3, -2) if x.ndim >= 2 and x.shape[-2] == width else x for x in value]
        return type(value)(parts)
    if not isinstance(value, Tensor) or name == "attention_mask":
        return value
    if "position" in name:
        return pick(value, -2, -1) if value.ndim and value.shape[-1] == width else value
    if value.ndim >= 2 and value.shape[1] == width and value.shape[0] in (1, rows):
        return pick(value, -value.ndim, 1 - value.ndim)
    return value


def visible_rows(mask: Tensor | None, row: int, places: Tensor, past: int, keys: int) -> Tensor:
    """Which of ``keys`` entries the queries in some places of one row see, ``(R, keys)``.

    ``mask``: as the attention gets it. ``past``: how many entries stand before the first query.
    """
    entries = torch.arange(keys, device=places.device)
    if mask is not None and mask.ndim == 4:
        own = mask[min(row, len(mask) - 1), 0, places]
        return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
    causal = entries <= past + places[:, None]
    return causal if mask is None else causal & mask[min(row, len(mask) - 1)].bool()


class _Reached(Exception):
    """Carries what a layer calls its attention with out of it."""

    def __init__(self, call: dict[str, Any]) -> None:
        super().__init__()
        self.call = call


class _Stop(nn.Module):
    """Stands for an attention, and goes no further."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Reached({**kwargs, "hidden_states": args[0]} if args else kwargs)


def arguments_of(
    layer: Any,
    name: str,
    hidden: Tensor,
    kwargs: dict[str, Any],
    row: int,
    columns: Tensor,
    shape: tuple[int, int],
) -> dict[str, Any]:
    """What a layer would call its attention with, for some columns of one row. It stays as it is.

    ``name``: that of the attention in the layer.
    """
    some = {
        key: chosen_places(key, value, shape, row, columns)
        for key, value in kwargs.items()
        if key not in (*CACHES, "attention_mask", "hidden_states")
    }
    twin = object.__new__(type(layer))
    vars(twin).update(vars(layer))
    vars(twin)["_modules"] = {**layer._modules, name: _Stop()}
    try:
        type(layer).forward(twin, hidden[row : row + 1, columns], attention_mask=None, **some)
    except _Reached as reached:
        return reached.call
    raise UnsupportedModelError(
        f"a {type(layer).__name__} does not call its attention, so that it cannot be scored; "
        "expected a strategy that reads none, such as uniform with a layer"
    )
