"""Model families, one file each, and what an adapter is made of."""

from __future__ import annotations

from tokenfuse.adapters._base import Adapter, ModelAdapter
from tokenfuse.adapters._packed import Packed
from tokenfuse.adapters._saliency import QueriesKeys, square_frames
from tokenfuse.adapters._spans import Span

__all__ = ["Adapter", "ModelAdapter", "Packed", "QueriesKeys", "Span", "square_frames"]
