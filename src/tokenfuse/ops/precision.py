"""Precision: what strategies compute in, and whether values are finite."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def outside_autocast(device: torch.device) -> AbstractContextManager[object]:
    """What runs inside is as it is outside ``torch.autocast``, which would round its products.

    ``torch.autocast`` changes what a strategy keeps, and lets fp16 overflow where fp32 does not.
    """
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def all_finite(x: Float[Tensor, "*n"]) -> Bool[Tensor, ""]:
    """Whether no value is NaN or infinite, on the device of ``x``.

    In one read: ``isfinite`` makes several tensors of the size of ``x``, which takes ten times as
    long as finding the least and the greatest value, one of which shows what is not finite.
    """
    if not x.numel():
        return torch.ones((), dtype=torch.bool, device=x.device)
    least, most = x.detach().aminmax()
    return least.isfinite() & most.isfinite()
