"""Which strategies and adapters there are, and who brought them."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_args

import pluggy

from tokenfuse import builtin, hooks
from tokenfuse.adapters._base import ModelAdapter
from tokenfuse.errors import PluginError, UnknownNameError, UnsupportedModelError, did_you_mean
from tokenfuse.hooks import PROJECT
from tokenfuse.strategies._base import Need, Stage, Strategy

T = TypeVar("T")


class PluginWarning(UserWarning):
    """A plugin failed; everything else keeps working."""


@dataclass(frozen=True)
class Registered(Generic[T]):
    """A registered class and the distribution (or module) that brought it."""

    cls: type[T]
    distribution: str


@dataclass(frozen=True)
class _Plugin:
    """A module or object with hooks, its distribution, and a manager of its own."""

    module: object
    origin: str
    # One manager each: a plugin that fails disturbs no other, and none has to be hashable.
    manager: pluggy.PluginManager


class Registry:
    """Strategies and adapters of tokenfuse itself, of installed plugins, and of given modules.

    Plugins are installed distributions with an entry point in the group ``tokenfuse``. The
    environment variable ``TOKENFUSE_PLUGINS`` limits them: empty for none, or names with commas.

    A plugin that cannot be loaded or used is named in a PluginWarning, and the rest keeps working.
    Raises PluginError for a name that is registered twice.
    """

    def __init__(self, modules: Iterable[object] = (), *, installed: bool = True) -> None:
        self.strategies: dict[str, Registered[Strategy]] = {}
        self.adapters: dict[str, Registered[ModelAdapter]] = {}
        self._plugins: list[_Plugin] = []
        self._add(builtin, PROJECT)
        for module in modules:
            self._add(module, getattr(module, "__name__", type(module).__name__))
        for point in _entry_points() if installed else ():
            origin = getattr(point.dist, "name", None) or point.value
            try:
                module = point.load()
            # A plugin that calls sys.exit must not end the program of its user.
            except (Exception, SystemExit) as error:
                _warn(origin, f"cannot be loaded ({point.value})", error)
            else:
                self._add(module, origin)
        self._fill(self.strategies, Strategy, "tokenfuse_register_strategies")
        self._fill(self.adapters, ModelAdapter, "tokenfuse_register_adapters")

    def strategy(self, name: str) -> type[Strategy]:
        """The strategy class of that name. Raises UnknownNameError."""
        if name not in self.strategies:
            raise UnknownNameError(
                f'no strategy is called "{name}": {did_you_mean(name, self.strategies)}'
            )
        return self.strategies[name].cls

    def adapter(self, model: Any) -> ModelAdapter:
        """The most derived adapter that matches ``model``. Raises UnsupportedModelError.

        Between classes of which neither derives from the other, the first registered wins, and
        built-ins are registered first; a fallback goes after all others.
        """
        fitting = [entry.cls for entry in self.adapters.values() if _matches(entry, model)]
        fitting.sort(key=lambda cls: cls.fallback)
        for cls in fitting:
            if not any(other is not cls and issubclass(other, cls) for other in fitting):
                return cls(model)
        for name, inner in _modules_of(model):
            if any(_matches(entry, inner) for entry in self.adapters.values()):
                raise UnsupportedModelError(
                    f"{type(model).__name__} is no model that tokenfuse knows, but holds a "
                    f"{type(inner).__name__}, which it does; expected model.{name}: pass that one"
                )
        kind = getattr(getattr(model, "config", None), "model_type", None)
        raise UnsupportedModelError(
            f"no model family matches {type(model).__name__} (model_type {kind!r}); expected a "
            f"transformers model for one of: {', '.join(sorted(self.adapters))}. "
            "A family of your own is one class: see docs/how-to/write-an-adapter.md"
        )

    def observe(self, hook: str, /, **arguments: Any) -> None:
        """Call an observing hook of every plugin; one that raises is named in a warning."""
        for plugin in self._plugins:
            _call(plugin, hook, arguments)

    def _add(self, module: object, origin: str) -> None:
        if any(module is plugin.module for plugin in self._plugins):
            return
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(hooks)
        try:
            manager.register(module)
            manager.check_pending()
            if not manager.get_hookcallers(module):
                raise PluginError(
                    f"{module!r} implements no hook; expected a function such as "
                    "tokenfuse_register_strategies, marked by @tokenfuse.hookimpl"
                )
        except (Exception, SystemExit) as error:
            _warn(origin, "is left out", error)
        else:
            self._plugins.append(_Plugin(module, origin, manager))

    def _fill(self, table: dict[str, Registered[Any]], base: type[Any], hook: str) -> None:
        for plugin in self._plugins:
            given: list[type[Any]] = []
            _call(plugin, hook, {"register": functools.partial(_accept, given, base)})
            for cls in given:
                if cls.name in table:
                    first = table[cls.name].distribution
                    raise PluginError(
                        f'{base.__name__.lower()} "{cls.name}" is registered twice, by {first} and '
                        f"by {plugin.origin}: rename one, or leave one out with TOKENFUSE_PLUGINS"
                    )
                table[cls.name] = Registered(cls, plugin.origin)


def _accept(given: list[type[Any]], base: type[Any], cls: Any) -> None:
    """What hooks get as ``register``: note a class, or raise PluginError if it cannot be used."""
    if (
        not isinstance(cls, type)
        or not issubclass(cls, base)
        or inspect.isabstract(cls)
        or not isinstance(getattr(cls, "name", None), str)
    ):
        raise PluginError(
            f"{cls!r} is registered; expected a concrete subclass of tokenfuse."
            f"{base.__name__.removeprefix('Model')} with a class attribute name: str"
        )
    if issubclass(cls, Strategy):
        _check_declared(cls)
    given.append(cls)


def _check_declared(cls: type[Strategy]) -> None:
    """Raise PluginError unless a strategy says of itself what commands and models ask for."""
    stages, needs = get_args(Stage), get_args(Need)
    declared: object = cls.needs
    if cls.stage not in stages:
        raise PluginError(
            f"strategy {cls.name} has stage {cls.stage!r}; expected {' or '.join(stages)}"
        )
    if not isinstance(declared, frozenset) or not declared <= set(needs):
        raise PluginError(
            f"strategy {cls.name} has needs {declared!r}; expected a frozenset of "
            f"{', '.join(needs)}"
        )


def _call(plugin: _Plugin, hook: str, arguments: dict[str, Any]) -> None:
    try:
        getattr(plugin.manager.hook, hook)(**arguments)
    except (Exception, SystemExit) as error:
        _warn(plugin.origin, f"raised in {hook}", error)


def _matches(entry: Registered[ModelAdapter], model: Any) -> bool:
    try:
        return bool(entry.cls.matches(model))
    except (Exception, SystemExit) as error:
        _warn(entry.distribution, f"raised in {entry.cls.__name__}.matches", error)
        return False


def _modules_of(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules inside a model, nearest first, without itself."""
    named = getattr(model, "named_modules", None)
    modules = list(named()) if callable(named) else []
    yield from sorted(modules[1:], key=lambda found: found[0].count("."))


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    allowed = os.environ.get("TOKENFUSE_PLUGINS")
    if allowed is None:
        return installed_plugins()
    names = {name.strip() for name in allowed.split(",")} - {""}
    found = installed_plugins() if names else []
    installed = {point.name for point in found}
    for name in sorted(names - installed):
        warnings.warn(
            f'TOKENFUSE_PLUGINS names "{name}", which is not installed: '
            f"{did_you_mean(name, installed)}",
            PluginWarning,
            stacklevel=2,
        )
    return [point for point in found if point.name in names]


def installed_plugins() -> list[importlib.metadata.EntryPoint]:
    """The entry points of all installed distributions in the group ``tokenfuse``.

    A distribution whose entry points cannot be read is named in a PluginWarning.
    """
    found: dict[str | None, list[importlib.metadata.EntryPoint]] = {}
    # One by one, so that a malformed file of one distribution does not hide all the others.
    for distribution in importlib.metadata.distributions():
        # Of one that is found twice the first counts, as in imports.
        name: str | None = distribution.name
        if name not in found or name is None:
            own = found.setdefault(name, [])
            try:
                own += distribution.entry_points.select(group=PROJECT)
            except Exception as error:
                _warn(str(name), "has entry points that cannot be read", error)
    return [point for own in found.values() for point in own]


def _warn(origin: str, what: str, error: BaseException) -> None:
    warnings.warn(
        f"tokenfuse plugin {origin} {what}: {type(error).__name__}: {error}",
        PluginWarning,
        stacklevel=2,
    )


@functools.cache
def default_registry() -> Registry:
    """The registry of this process, made on first use."""
    return Registry()
