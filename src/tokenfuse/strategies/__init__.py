"""Built-in strategies: every ``Strategy`` that a file of this folder defines."""

from __future__ import annotations

from collections.abc import Callable

from tokenfuse.discover import subclasses_in
from tokenfuse.hookspecs import hookimpl
from tokenfuse.strategies.base import Strategy


@hookimpl
def tokenfuse_register_strategies(register: Callable[[type[Strategy]], None]) -> None:
    """Register every ``Strategy`` of this folder."""
    for cls in subclasses_in(__name__, Strategy):
        register(cls)
