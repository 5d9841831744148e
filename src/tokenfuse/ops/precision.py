"""Choosing tokens in the precision of what they are chosen by."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def outside_autocast(device: torch.device) -> AbstractContextManager[object]:
    """What runs inside is as it is outside ``torch.autocast``, which would round its products.

    ``torch.autocast`` changes what a strategy keeps, and lets fp16 overflow where fp32 does not.
    """
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
