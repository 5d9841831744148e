"""How much attention each visual token gets, from queries and keys, without the whole map.

Queries and keys are ``(n, heads, d)`` after the rotary embedding, frame after frame, ``lengths[i]``
rows each. A frame begins with ``prefix`` rows that are no patches, such as a class token. The other
rows are its patches, of which ``group`` make one visual token: consecutive ones if ``columns`` is
0, otherwise squares of a raster with so many columns. A patch that fills no square is in no token.

Results are fp32, one value per visual token, in the order of the patches or squares: the mean over
heads, scaled to a sum of 1 over each frame. The sum is 0 where a class token attends to nothing but
the prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isqrt

import torch
from jaxtyping import Float
from torch import Tensor

from tokenfuse.ops import CHUNK


def attention_received(
    queries: Float[Tensor, "n heads d"],
    keys: Float[Tensor, "n heads d"],
    lengths: Sequence[int],
    scale: float,
    prefix: int = 0,
    group: int = 1,
    columns: int = 0,
) -> Float[Tensor, " N"]:
    """The attention that each token gets from the class token, the first of the prefix.

    Where there is no prefix, from all queries of its frame, on average.
    """
    found = []
    for q, k in _frames(queries, keys, lengths):
        if prefix:
            q = q[:, :1]
        total = q.new_zeros(k.shape[1])
        for part in q.split(max(1, CHUNK // (k.shape[0] * k.shape[1])), dim=1):
            total += (part @ k.mT * scale).softmax(-1).sum((0, 1))
        found.append(_shares(_pooled(total[prefix:], group, columns).sum(-1)))
    return torch.cat(found)


def mean_query_attention(
    queries: Float[Tensor, "n heads d"],
    keys: Float[Tensor, "n heads d"],
    lengths: Sequence[int],
    scale: float,
    prefix: int = 0,
    group: int = 1,
    columns: int = 0,
) -> Float[Tensor, " N"]:
    """The attention that the mean query of a frame pays to the mean key of each token."""
    found = []
    for q, k in _frames(queries, keys, lengths):
        tokens = _pooled(k[:, prefix:].mT, group, columns).mean(-1)
        logits = q[:, prefix:].mean(1, keepdim=True) @ tokens * scale
        found.append(_shares(logits.softmax(-1).sum((0, 1))))
    return torch.cat(found)


def _frames(
    queries: Tensor, keys: Tensor, lengths: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each frame's queries and keys, ``(heads, n, d)`` fp32."""
    for q, k in zip(queries.split(list(lengths)), keys.split(list(lengths)), strict=True):
        yield q.transpose(0, 1).float(), k.transpose(0, 1).float()


def _pooled(x: Tensor, group: int, columns: int) -> Tensor:
    """The patches of a frame, ``(..., n)``, as those of each token, ``(..., N, group)``."""
    pooled: Tensor = x.unflatten(-1, (-1, columns or group))
    if columns:
        side = isqrt(group)
        pooled = pooled.unfold(-2, side, side).unfold(-2, side, side).flatten(-2).flatten(-3, -2)
    return pooled


def _shares(tokens: Tensor) -> Tensor:
    return tokens / tokens.sum().clamp_min(torch.finfo(tokens.dtype).tiny)
