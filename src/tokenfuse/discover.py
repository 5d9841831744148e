"""Find the classes that the modules of a package define, so that no list has to be kept."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


def subclasses_in(package: str, base: type[T]) -> Iterator[type[T]]:
    """Concrete public subclasses of ``base``, each from the file that defines it, by file name."""
    root = importlib.import_module(package)
    for found in sorted(pkgutil.iter_modules(root.__path__), key=lambda m: m.name):
        module = importlib.import_module(f"{package}.{found.name}")
        for name, cls in vars(module).items():
            if (
                inspect.isclass(cls)
                and issubclass(cls, base)
                and cls.__module__ == module.__name__
                and not inspect.isabstract(cls)
                and not name.startswith("_")
            ):
                yield cls
