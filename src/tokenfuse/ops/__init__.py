"""Pure tensor functions for authors of strategies."""

from __future__ import annotations

CHUNK = 2**24
"""Similarities, distances or attention weights that are held at a time: 64 MiB of them in fp32."""
