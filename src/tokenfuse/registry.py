"""Which strategies and adapters there are, and who brought them."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

import pluggy

from tokenfuse import adapters as builtin_adapters
from tokenfuse import hookspecs
from tokenfuse import strategies as builtin_strategies
from tokenfuse.adapters.base import Adapter
from tokenfuse.errors import PluginError, UnknownNameError, UnsupportedModelError, did_you_mean
from tokenfuse.hookspecs import PROJECT
from tokenfuse.strategies.base import Strategy

T = TypeVar("T")


class PluginWarning(UserWarning):
    """A plugin failed; everything else keeps working."""


@dataclass(frozen=True)
class Registered(Generic[T]):
    """A registered class and the distribution (or module) that brought it."""

    cls: type[T]
    distribution: str


class Registry:
    """Strategies and adapters of tokenfuse itself, of installed plugins, and of given modules.

    Plugins are installed distributions with an entry point in the group ``tokenfuse``. The
    environment variable ``TOKENFUSE_PLUGINS`` limits them: empty for none, or names with commas.
    """

    def __init__(self, modules: Iterable[ModuleType | object] = (), *, installed: bool = True) -> None:
        self.strategies: dict[str, Registered[Strategy]] = {}
        self.adapters: dict[str, Registered[Adapter]] = {}
        self._pm = pluggy.PluginManager(PROJECT)
        self._pm.add_hookspecs(hookspecs)
        self._origin: dict[Any, str] = {}
        self._add(builtin_strategies, PROJECT)
        self._add(builtin_adapters, PROJECT)
        for module in modules:
            self._add(module, getattr(module, "__name__", type(module).__name__))
        for point in _entry_points() if installed else ():
            origin = point.dist.name if point.dist else point.value
            try:
                self._add(point.load(), origin)
            except Exception as error:
                _warn(origin, f"cannot be loaded ({point.value})", error)
        self._refuse_unknown_hooks()
        self._call("tokenfuse_register_strategies", "strategies", Strategy)
        self._call("tokenfuse_register_adapters", "adapters", Adapter)

    def strategy(self, name: str) -> type[Strategy]:
        """The strategy class of that name. Raises UnknownNameError."""
        if name not in self.strategies:
            raise UnknownNameError(
                f'no strategy is called "{name}": {did_you_mean(name, self.strategies)}'
            )
        return self.strategies[name].cls

    def adapter(self, model: Any) -> Adapter:
        """The most specific adapter that matches ``model``. Raises UnsupportedModelError."""
        fitting = [r.cls for r in self.adapters.values() if r.cls.matches(model)]
        if not fitting:
            kind = getattr(getattr(model, "config", None), "model_type", None)
            raise UnsupportedModelError(
                f"no adapter matches {type(model).__name__} (model_type {kind!r}); expected a "
                f"transformers model for one of: {', '.join(sorted(self.adapters))}. "
                "An adapter of your own is one class: see docs/how-to/write-an-adapter.md"
            )
        # A subclass says more about the model than its base does.
        return max(fitting, key=lambda cls: len(cls.__mro__))(model)

    def observe(self, hook: str, **arguments: Any) -> None:
        """Call an observing hook of every plugin; one that raises is named in a warning."""
        for plugin, caller in self._callers(hook):
            try:
                caller(**arguments)
            except Exception as error:
                _warn(self._origin[plugin], f"raised in {hook}", error)

    def _add(self, plugin: Any, origin: str) -> None:
        self._origin[plugin] = origin
        self._pm.register(plugin)

    def _refuse_unknown_hooks(self) -> None:
        while True:
            try:
                self._pm.check_pending()
            except pluggy.PluginValidationError as error:
                _warn(self._origin[error.plugin], "is left out", error)
                self._pm.unregister(error.plugin)
            else:
                return

    def _callers(self, hook: str) -> Iterator[tuple[Any, Any]]:
        """Each plugin that implements ``hook``, with a caller for it alone: one failure stops no other."""
        plugins = self._pm.get_plugins()
        for impl in getattr(self._pm.hook, hook).get_hookimpls():
            others = plugins - {impl.plugin}
            yield impl.plugin, self._pm.subset_hook_caller(hook, others)

    def _call(self, hook: str, kind: str, base: type[Any]) -> None:
        table: dict[str, Registered[Any]] = getattr(self, kind)
        for plugin, caller in self._callers(hook):
            origin = self._origin[plugin]

            def register(cls: type[Any], origin: str = origin) -> None:
                name = getattr(cls, "name", None)
                if not (isinstance(cls, type) and issubclass(cls, base) and isinstance(name, str)):
                    raise PluginError(
                        f"{origin} registers {cls!r}; expected a subclass of "
                        f"{base.__module__}.{base.__name__} with a class attribute name: str"
                    )
                if name in table:
                    raise PluginError(
                        f'{kind} "{name}" is registered twice, by {table[name].distribution} and '
                        f"by {origin}: rename one, or leave one out with TOKENFUSE_PLUGINS"
                    )
                table[name] = Registered(cls, origin)

            try:
                caller(register=register)
            except PluginError:
                raise
            except Exception as error:
                _warn(origin, f"raised in {hook}", error)


def _entry_points() -> Iterator[importlib.metadata.EntryPoint]:
    allowed = os.environ.get("TOKENFUSE_PLUGINS")
    names = None if allowed is None else {name.strip() for name in allowed.split(",")}
    for point in importlib.metadata.entry_points(group=PROJECT):
        if names is None or point.name in names:
            yield point


def _warn(origin: str, what: str, error: Exception) -> None:
    warnings.warn(
        f"tokenfuse plugin {origin} {what}: {type(error).__name__}: {error}",
        PluginWarning,
        stacklevel=3,
    )


@functools.cache
def registry() -> Registry:
    """The registry of this process, made on first use."""
    return Registry()
