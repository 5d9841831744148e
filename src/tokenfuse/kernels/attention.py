"""How much attention each token gets, from queries and keys, without the whole map.

Queries and keys are ``(n, heads, d)``, rotated already, of which each frame is a run of
``lengths[i]``. A frame begins with ``prefix`` tokens that are no patches, such as a class token;
``group`` consecutive patches become one visual token. Results are fp32, one value per visual token,
means over heads that sum to 1 over each frame, or to 0 where a class token attends to nothing but
the prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 2**24
"""Attention weights that are held at a time."""


def attention_received(
    queries: Float[Tensor, "n heads d"],
    keys: Float[Tensor, "n heads d"],
    lengths: Sequence[int],
    scale: float,
    prefix: int = 0,
    group: int = 1,
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
        found.append(_shares(total[prefix:], group))
    return torch.cat(found)


def mean_query_attention(
    queries: Float[Tensor, "n heads d"],
    keys: Float[Tensor, "n heads d"],
    lengths: Sequence[int],
    scale: float,
    prefix: int = 0,
    group: int = 1,
) -> Float[Tensor, " N"]:
    """The attention that the mean query of a frame pays to the mean key of each token."""
    found = []
    for q, k in _frames(queries, keys, lengths):
        tokens = k[:, prefix:].unflatten(1, (-1, group)).mean(2)
        logits = q[:, prefix:].mean(1, keepdim=True) @ tokens.mT * scale
        found.append(_shares(logits.softmax(-1).sum((0, 1)), 1))
    return torch.cat(found)


def _frames(
    queries: Tensor, keys: Tensor, lengths: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each frame's queries and keys, ``(heads, n, d)`` fp32."""
    for q, k in zip(queries.split(list(lengths)), keys.split(list(lengths)), strict=True):
        yield q.transpose(0, 1).float(), k.transpose(0, 1).float()


def _shares(total: Tensor, group: int) -> Tensor:
    tokens: Tensor = total.unflatten(0, (-1, group)).sum(-1)
    return tokens / total.sum().clamp_min(torch.finfo(total.dtype).tiny)
