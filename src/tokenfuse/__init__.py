"""tokenfuse: fewer visual tokens for video-language models, without training or patched models.

What needs torch is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenfuse.errors import TokenFuseError

if TYPE_CHECKING:
    from tokenfuse.adapters._base import Adapter, ModelAdapter
    from tokenfuse.compression import CompressedInputs, compress
    from tokenfuse.config import get_strategy
    from tokenfuse.hooks import hookimpl
    from tokenfuse.plan import FusionPlan
    from tokenfuse.registry import Registered
    from tokenfuse.report import Report
    from tokenfuse.sessions._attached import is_attached
    from tokenfuse.sessions.attach import attach
    from tokenfuse.sessions.vlm import Session
    from tokenfuse.strategies._base import Compressed, Strategy
    from tokenfuse.strategies._early import TowerStrategy
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
    "TowerStrategy",
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

_HOMES = {
    "Adapter": "adapters._base",
    "Compressed": "strategies._base",
    "CompressedInputs": "compression",
    "FusionPlan": "plan",
    "LayerCut": "strategies._layers",
    "LayerStrategy": "strategies._inside",
    "LayerTokens": "strategies._layers",
    "PixelTokens": "strategies._tower",
    "Registered": "registry",
    "Report": "report",
    "Session": "sessions.vlm",
    "Strategy": "strategies._base",
    "TowerCut": "strategies._tower",
    "TowerStrategy": "strategies._early",
    "TowerTokens": "strategies._tower",
    "VisualTokens": "tokens",
    "attach": "sessions.attach",
    "compress": "compression",
    "get_strategy": "config",
    "hookimpl": "hooks",
    "is_attached": "sessions._attached",
}
"""The modules that names come from, once they are asked for."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def list_strategies() -> dict[str, Registered[Strategy]]:
    """Every registered strategy by name, with the distribution that brought it."""
    from tokenfuse.registry import default_registry

    return dict(default_registry().strategies)


def list_adapters() -> dict[str, Registered[ModelAdapter]]:
    """Every registered adapter by name, with the distribution that brought it."""
    from tokenfuse.registry import default_registry

    return dict(default_registry().adapters)
