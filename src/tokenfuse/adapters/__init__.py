"""Built-in adapters: every ``Adapter`` that a file of this folder defines."""

from __future__ import annotations

from collections.abc import Callable

from tokenfuse.adapters.base import Adapter
from tokenfuse.discover import subclasses_in
from tokenfuse.hookspecs import hookimpl


@hookimpl
def tokenfuse_register_adapters(register: Callable[[type[Adapter]], None]) -> None:
    """Register every ``Adapter`` of this folder."""
    for cls in subclasses_in(__name__, Adapter):
        register(cls)
