"""The hooks that plugins implement."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from tokenfuse.adapters._base import ModelAdapter
    from tokenfuse.plan import FusionPlan
    from tokenfuse.report import Report
    from tokenfuse.strategies._base import Strategy
    from tokenfuse.tokens import VisualTokens

PROJECT = "tokenfuse"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def tokenfuse_register_strategies(register: Callable[[type[Strategy]], None]) -> None:
    """Call ``register(cls)`` for each strategy class."""


@hookspec
def tokenfuse_register_adapters(register: Callable[[type[ModelAdapter]], None]) -> None:
    """Call ``register(cls)`` for each adapter class."""


@hookspec
def tokenfuse_planned(tokens: VisualTokens, plan: FusionPlan, strategy: Strategy) -> None:
    """Observe each plan, item by item."""


@hookspec
def tokenfuse_compressed(report: Report) -> None:
    """Observe the report of each compressed prompt."""
