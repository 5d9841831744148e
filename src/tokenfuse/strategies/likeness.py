"""Cosines in which a zero vector is at right angles to everything."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tokenfuse.kernels.window import NO_MATCH, cosine


def likeness(
    frames: Float[Tensor, "F n D"], others: Float[Tensor, "R m D"]
) -> Float[Tensor, "F n m"]:
    """``cosine``, fp32 and rounded as there, but 0 where a vector is zero."""
    similar = cosine(frames, others)
    return torch.where(similar == NO_MATCH, 0, similar)


def pairwise_likeness(x: Float[Tensor, "n D"], y: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
    """``likeness`` of each row of ``x`` with the same row of ``y``."""
    return likeness(x[:, None], y[:, None])[:, 0, 0]
