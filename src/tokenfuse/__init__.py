"""tokenfuse: fewer visual tokens for video-language models, without training or patched models."""

from __future__ import annotations

from tokenfuse.adapters._base import Adapter
from tokenfuse.adapters._base import ModelAdapter as _ModelAdapter
from tokenfuse.compression import CompressedInputs, compress
from tokenfuse.config import get_strategy
from tokenfuse.errors import TokenFuseError
from tokenfuse.hooks import hookimpl
from tokenfuse.plan import FusionPlan
from tokenfuse.registry import Registered
from tokenfuse.registry import default_registry as _registry
from tokenfuse.report import Report
from tokenfuse.sessions._attached import is_attached
from tokenfuse.sessions.attach import attach
from tokenfuse.sessions.vlm import Session
from tokenfuse.strategies._base import Compressed, Strategy
from tokenfuse.strategies._inside import LayerStrategy
from tokenfuse.strategies._layers import LayerCut, LayerTokens
from tokenfuse.strategies._tower import PixelTokens, TowerCut, TowerTokens
from tokenfuse.tokens import VisualTokens

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Compressed",
    "CompressedInputs",
    "FusionPlan",
    "LayerCut",
    "LayerStrategy",
    "LayerTokens",
    "PixelTokens",
    "Registered",
    "Report",
    "Session",
    "Strategy",
    "TokenFuseError",
    "TowerCut",
    "TowerTokens",
    "VisualTokens",
    "attach",
    "compress",
    "get_strategy",
    "hookimpl",
    "is_attached",
    "list_adapters",
    "list_strategies",
]


def list_strategies() -> dict[str, Registered[Strategy]]:
    """Every registered strategy by name, with the distribution that brought it."""
    return dict(_registry().strategies)


def list_adapters() -> dict[str, Registered[_ModelAdapter]]:
    """Every registered adapter by name, with the distribution that brought it."""
    return dict(_registry().adapters)
