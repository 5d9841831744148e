"""Compression methods, one file each, and what a strategy is made of."""

from __future__ import annotations

from tokenfuse.strategies._base import (
    Attending,
    Attention,
    Budgeted,
    Compressed,
    Needs,
    Scored,
    Strategy,
)
from tokenfuse.strategies._fields import KeepRatio

__all__ = [
    "Attending",
    "Attention",
    "Budgeted",
    "Compressed",
    "KeepRatio",
    "Needs",
    "Scored",
    "Strategy",
]
