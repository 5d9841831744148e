"""Attention of some rows of a decoder, without the whole map.

Queries ``(heads, R, d)`` and keys ``(groups, n, d)`` are those after the rotary embedding. Head
``h`` reads the keys of group ``h // (heads / groups)``. Logits and softmax are fp32, whatever the
dtype: rounded to that of the model, many weights would be equal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenfuse.ops import CHUNK

FEWEST = 256
"""Keys that are copied to fp32 at a time, at least."""


def row_attention(
    queries: Float[Tensor, "heads R d"],
    keys: Float[Tensor, "groups n d"],
    scale: float,
    visible: Bool[Tensor, "R n"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "heads R n"]:
    """The attention of each of some rows.

    ``visible``: which keys each row sees, None for all. ``softcap``: ``c`` where logits are
    ``c · tanh(logit / c)``. Memory is a few times that of the result.
    """
    groups, n, width = keys.shape
    q = queries.float().unflatten(0, (groups, -1)).flatten(1, 2)
    # Some keys at a time: a copy of all in fp32 would be larger than what it is for.
    size = n if keys.dtype == q.dtype else max(FEWEST, q.shape[1] * n // width)
    parts = keys.split(size, dim=1)
    logits = torch.cat([q @ part.float().mT for part in parts], -1).mul_(scale)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    logits = logits.view(*queries.shape[:2], n)
    if visible is not None:
        logits = logits.masked_fill_(~visible, -torch.inf)
    return logits.softmax(-1)


def received_attention(
    queries: Float[Tensor, "heads L d"],
    keys: Float[Tensor, "groups n d"],
    scale: float,
    visible: Callable[[slice], Bool[Tensor, "R n"]],
    softcap: float | None = None,
) -> Float[Tensor, " n"]:
    """The attention that each key gets, mean over heads and all queries, fp32.

    ``visible`` tells which keys the queries of a slice see. CHUNK weights are held at a time.
    """
    heads, length, _ = queries.shape
    total = torch.zeros(keys.shape[1], device=keys.device)
    size = max(1, CHUNK // (heads * keys.shape[1]))
    for start in range(0, length, size):
        part = slice(start, min(start + size, length))
        rows = row_attention(queries[:, part], keys, scale, visible(part), softcap)
        total += rows.sum((0, 1))
    return total / (heads * length)
