"""Built-in adapters: every adapter that a file of this folder defines."""

from __future__ import annotations

from collections.abc import Callable

from tokenfuse.adapters.base import ModelAdapter
from tokenfuse.discover import subclasses_in
from tokenfuse.hookspecs import hookimpl


@hookimpl
def tokenfuse_register_adapters(register: Callable[[type[ModelAdapter]], None]) -> None:
    """Register every adapter of this folder."""
    for cls in subclasses_in(__name__, ModelAdapter):
        # Bases of several adapters have no name.
        if hasattr(cls, "name"):
            register(cls)
