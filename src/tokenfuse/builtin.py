"""The built-in plugin: every strategy and adapter that a file of their folders defines."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import TypeVar

from tokenfuse.adapters._base import ModelAdapter
from tokenfuse.hooks import hookimpl
from tokenfuse.strategies._base import Strategy

T = TypeVar("T")


@hookimpl
def tokenfuse_register_strategies(register: Callable[[type[Strategy]], None]) -> None:
    """Register every strategy of ``tokenfuse.strategies``."""
    for cls in _classes_in("tokenfuse.strategies", Strategy):
        register(cls)


@hookimpl
def tokenfuse_register_adapters(register: Callable[[type[ModelAdapter]], None]) -> None:
    """Register every adapter of ``tokenfuse.adapters``."""
    for cls in _classes_in("tokenfuse.adapters", ModelAdapter):
        register(cls)


def _classes_in(package: str, base: type[T]) -> Iterator[type[T]]:
    """Concrete public subclasses of ``base``, each from the file that defines it, by file name."""
    root = importlib.import_module(package)
    names = sorted(module.name for module in pkgutil.iter_modules(root.__path__))
    # Behind an underscore are bases and helpers.
    for leaf in (name for name in names if not name.startswith("_")):
        module = importlib.import_module(f"{package}.{leaf}")
        for name, cls in vars(module).items():
            if (
                inspect.isclass(cls)
                and issubclass(cls, base)
                and cls.__module__ == module.__name__
                and not inspect.isabstract(cls)
                and not name.startswith("_")
            ):
                yield cls
