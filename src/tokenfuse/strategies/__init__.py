"""Compression methods, one file each, and what a strategy is made of."""

from __future__ import annotations

from tokenfuse.strategies._base import Attention, Budgeted, Compressed, Strategy, Wants

__all__ = ["Attention", "Budgeted", "Compressed", "Strategy", "Wants"]
