"""How much attention each token gets, from queries and keys, without the whole map.

Queries and keys are ``(n, heads, d)``, rotated already, of which each frame is a run of
``lengths[i]``; ``group`` consecutive patches become one visual token. Results are fp32, one value
per visual token, means over heads that sum to 1 over each frame.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    group: int = 1,
) -> Float[Tensor, " N"]:
    """The attention that each token gets from the queries of its frame, on average."""
    found = []
    for q, k in _frames(queries, keys, lengths):
        total = q.new_zeros(k.shape[1])
        for part in q.split(max(1, CHUNK // (k.shape[0] * k.shape[1])), dim=1):
            total += (part @ k.mT * scale).softmax(-1).sum((0, 1))
        found.append(total / (q.shape[0] * q.shape[1]))
    received: Tensor = torch.cat(found).unflatten(0, (-1, group)).sum(-1)
    return received


def mean_query_attention(
    queries: Float[Tensor, "n heads d"],
    keys: Float[Tensor, "n heads d"],
    lengths: Sequence[int],
    scale: float,
    group: int = 1,
) -> Float[Tensor, " N"]:
    """The attention that the mean query of a frame pays to the mean key of each token."""
    found = []
    for q, k in _frames(queries, keys, lengths):
        tokens = k.unflatten(1, (-1, group)).mean(2)
        logits = q.mean(1, keepdim=True) @ tokens.mT * scale
        found.append(logits.softmax(-1).mean((0, 1)))
    return torch.cat(found)


def _frames(queries: Tensor, keys: Tensor, lengths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Each frame's queries and keys, ``(heads, n, d)`` fp32."""
    pairs = zip(queries.split(list(lengths)), keys.split(list(lengths)), strict=True)
    return [(q.transpose(0, 1).float(), k.transpose(0, 1).float()) for q, k in pairs]
