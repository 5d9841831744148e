"""tokenfuse: fewer visual tokens for video-language models, without training or patched models."""

from __future__ import annotations

from tokenfuse.adapters.base import Adapter
from tokenfuse.adapters.base import ModelAdapter as _ModelAdapter
from tokenfuse.config import load_strategy, strategy
from tokenfuse.engine import CompressedInputs, compress
from tokenfuse.errors import TokenFuseError
from tokenfuse.hookspecs import hookimpl
from tokenfuse.plan import FusionPlan
from tokenfuse.registry import Registered
from tokenfuse.registry import registry as _registry
from tokenfuse.report import Report
from tokenfuse.session import Session, attach
from tokenfuse.strategies.base import Compressed, Strategy
from tokenfuse.tokens import VisualTokens

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Compressed",
    "CompressedInputs",
    "FusionPlan",
    "Registered",
    "Report",
    "Session",
    "Strategy",
    "TokenFuseError",
    "VisualTokens",
    "adapters",
    "attach",
    "compress",
    "hookimpl",
    "load_strategy",
    "strategies",
    "strategy",
]


def strategies() -> dict[str, Registered[Strategy]]:
    """Every registered strategy by name, with the distribution that brought it."""
    return dict(_registry().strategies)


def adapters() -> dict[str, Registered[_ModelAdapter]]:
    """Every registered adapter by name, with the distribution that brought it."""
    return dict(_registry().adapters)
