"""Strategies from names, mappings and YAML files, and the JSON Schema of all of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tokenfuse.errors import ConfigError, UnknownNameError, did_you_mean
from tokenfuse.registry import Registry, registry
from tokenfuse.strategies.base import Strategy

KEY = "strategy"
CHAIN = "compose"
"""The key that needs no strategy beside it, and the strategy that it means."""

StrategyLike = str | Path | Mapping[str, Any] | Strategy
"""A strategy's name, a preset's, a YAML file, a mapping with the key ``strategy``, a Strategy."""

# Other projects' names for the share of tokens that stays, and for the share that goes.
_KEPT = {"retention_ratio", "retention_rate", "retain_ratio", "keep_rate"}
_REMOVED = {
    "pruning_rate",
    "pruning_ratio",
    "video_pruning_rate",
    "compression_ratio",
    "drop_ratio",
    "drop_rate",
    "reduction",
}


def strategy(name: str, /, **options: Any) -> Strategy:
    """The strategy registered as ``name`` with the given options.

    Raises UnknownNameError for an unknown name, ConfigError for an unknown or invalid option.
    """
    return load_strategy({KEY: name, **options})


def load_strategy(
    source: StrategyLike,
    overrides: Mapping[str, Any] | None = None,
    *,
    among: Registry | None = None,
) -> Strategy:
    """A strategy from any of the forms of StrategyLike, with ``overrides`` on top.

    Raises ConfigError (UnknownNameError for a name) that says which key in which file and line is
    wrong, what was expected, and the nearest valid name.
    """
    found = among or registry()
    changes = dict(overrides or {})
    where: dict[str, str] = {}
    if isinstance(source, Strategy):
        if changes.get(KEY, source.name) == source.name:
            # Its own class, registered or not.
            changes.pop(KEY, None)
            if not changes:
                return source
            return _validate(type(source), dict(source) | changes, where, found)
        # Not model_dump, which describes the steps of a chain instead of keeping them.
        values: dict[str, Any] = dict(source)
    elif isinstance(source, Mapping):
        values = dict(source)
    elif isinstance(source, str | Path):
        path = _file(source, found)
        if path is None:
            values = {KEY: str(source)}
        else:
            values, where = _read(path)
    else:
        raise ConfigError(
            f"{source!r} is of type {type(source).__name__}; expected a strategy's name, a "
            "preset's, a YAML file, a mapping or a Strategy"
        )
    # A file is not to blame for what is set over it.
    where = {key: place for key, place in where.items() if key not in changes}
    return _build(values | changes, where, found)


def presets() -> dict[str, Path]:
    """The YAML files that tokenfuse ships, by name."""
    here = Path(__file__).parent
    for folder in (here / "configs", here.parents[1] / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def json_schema(among: Registry | None = None) -> dict[str, Any]:
    """JSON Schema of a configuration: one alternative per strategy, told apart by its name."""
    definitions: dict[str, Any] = {}
    for name, entry in sorted((among or registry()).strategies.items()):
        # Models inside an option stay with their strategy: another may have one of the same name.
        schema = entry.cls.model_json_schema(ref_template=f"#/$defs/{name}/$defs/{{model}}")
        schema["description"] = schema.get("description", name).partition("\n\n")[0]
        schema["properties"] = {KEY: {"const": name}, **schema.get("properties", {})}
        own = schema.get("required", [])
        schema["required"] = own if name == CHAIN else [KEY, *own]
        definitions[name] = schema
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tokenfuse configuration",
        "type": "object",
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in definitions],
        "discriminator": {"propertyName": KEY},
        "$defs": definitions,
    }


def _file(source: str | Path, among: Registry) -> Path | None:
    """The file that ``source`` names, or None where it is a registered name."""
    shipped = presets()
    if isinstance(source, str) and source in among.strategies:
        return None
    if isinstance(source, str) and source in shipped:
        return shipped[source]
    path = Path(source)
    if path.is_file():
        return path
    names = {*among.strategies, *shipped}
    if isinstance(source, str) and not path.suffix and path.parent == Path():
        raise UnknownNameError(
            f'no strategy or preset is called "{source}": {did_you_mean(source, names)}'
        )
    raise ConfigError(
        f"configuration {path} is not a file; expected a YAML file, or the name of a strategy or "
        f"preset: {did_you_mean(path.stem, names)}"
    )


_KINDS = {
    type(None): "nothing",
    yaml.SequenceNode: "a list",
    yaml.ScalarNode: "a single value",
}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a YAML file, and the place of each key for messages; of the whole under ""."""
    where = {"": f"{path}: "}
    try:
        # Bytes: YAML says itself how they are encoded.
        loader = yaml.SafeLoader(path.read_bytes())
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                f"{path} holds {_KINDS[type(node)]}; expected a mapping such as {KEY}: ttf"
            )
        for key, _ in node.value:
            place = f"{path}, line {key.start_mark.line + 1}: "
            if str(key.value) in where:
                raise ConfigError(f"{place}key {key.value} stands twice; remove one")
            where[str(key.value)] = place
        values: dict[str, Any] = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    return values, where


def _build(values: dict[str, Any], where: Mapping[str, str], among: Registry) -> Strategy:
    """The strategy that ``values`` describe; ``where`` holds the place of each key in a file."""
    if KEY not in values and CHAIN in values:
        values = {KEY: CHAIN, **values}
    if KEY not in values:
        given = f"got the keys {', '.join(map(str, values))}" if values else "got no key"
        name = values.get("name", "ttf")
        raise ConfigError(
            f"{where.get('', '')}a configuration names its strategy; {given}; expected a line such "
            f"as {KEY}: {name}"
        )
    name = values[KEY]
    if not isinstance(name, str):
        raise ConfigError(f"{where.get(KEY, '')}{KEY}: {name!r} is not a name; expected text")
    try:
        cls = among.strategy(name)
    except UnknownNameError as error:
        raise UnknownNameError(f"{where.get(KEY, '')}{error}") from None
    return _validate(cls, {key: value for key, value in values.items() if key != KEY}, where, among)


def _validate(
    cls: type[Strategy], options: Mapping[str, Any], where: Mapping[str, str], among: Registry
) -> Strategy:
    try:
        # A chain loads its steps by what is registered here.
        context = {"load": functools.partial(load_strategy, among=among)}
        return cls.model_validate(options, context=context)
    except ValidationError as error:
        # An option that takes several types has one problem for each.
        problems: dict[str, list[str]] = {}
        for problem in error.errors():
            subject, message = _explain(problem, cls, where)
            problems.setdefault(subject, []).append(message)
        raise ConfigError("; ".join(s + " or ".join(m) for s, m in problems.items())) from None


def _explain(problem: Any, cls: type[Strategy], where: Mapping[str, str]) -> tuple[str, str]:
    """What is wrong, and what was expected instead."""
    given = problem["input"]
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    if not problem["loc"]:
        return f"{where.get('', '')}{cls.name}: ", message
    key, *inner = map(str, problem["loc"])
    if problem["type"] == "missing" and not inner:
        meaning = cls.model_fields[key].description
        return f"{where.get('', '')}{cls.name}: ", f"{key} is missing; expected {meaning or 'it'}"
    place = where.get(key, "")
    if problem["type"] == "extra_forbidden" and not inner:
        if key in _KEPT | _REMOVED and "keep_ratio" in cls.model_fields:
            return f"{place}unknown key {key}: ", _as_keep_ratio(key, given)
        return f"{place}unknown key {key} of {cls.name}: ", did_you_mean(key, cls.model_fields)
    return f"{place}{key}: {given!r} is wrong: ", message


def _as_keep_ratio(key: str, given: Any) -> str:
    if isinstance(given, int | float):
        ratio = given if key in _KEPT else 1 - given
        if 0 < ratio <= 1:
            return f"use keep_ratio: {ratio:.6g}"
    return "use keep_ratio, the share of tokens that stay, in (0, 1]"
