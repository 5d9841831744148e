"""Strategies from names, mappings and YAML files, and the JSON Schema of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tokenfuse.errors import ConfigError, did_you_mean
from tokenfuse.registry import Registry, registry
from tokenfuse.strategies.base import Strategy

KEY = "strategy"

StrategyLike = str | Path | Mapping[str, Any] | Strategy
"""A registered name, a preset's name, a YAML file, a mapping with the key ``strategy``, or a strategy."""

# Other projects' names for the share of tokens, and what each means as a keep ratio.
_OTHER_RATIOS = {
    "retention_ratio": lambda x: x,
    "retain_ratio": lambda x: x,
    "pruning_rate": lambda x: 1 - x,
    "pruning_ratio": lambda x: 1 - x,
    "compression_ratio": lambda x: 1 - x,
    "reduction": lambda x: 1 - x,
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
    lines: dict[str, str] = {}
    if isinstance(source, Strategy):
        if not overrides:
            return source
        values: dict[str, Any] = {KEY: source.name, **source.model_dump()}
    elif isinstance(source, Mapping):
        values = dict(source)
    else:
        path = _file(source, among or registry())
        values, lines = ({KEY: str(source)}, {}) if path is None else _read(path)
    values |= overrides or {}
    return _build(values, lines, among or registry())


def presets() -> dict[str, Path]:
    """The YAML files that tokenfuse ships, by name."""
    here = Path(__file__).parent
    for folder in (here / "configs", here.parents[1] / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def json_schema(among: Registry | None = None) -> dict[str, Any]:
    """JSON Schema of a configuration: one alternative per registered strategy, told apart by its name."""
    alternatives = []
    definitions: dict[str, Any] = {}
    for name, entry in sorted((among or registry()).strategies.items()):
        schema = entry.cls.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= schema.pop("$defs", {})
        schema["properties"] = {KEY: {"const": name}, **schema.get("properties", {})}
        schema["required"] = [KEY, *schema.get("required", [])]
        definitions[entry.cls.__name__] = schema
        alternatives.append({"$ref": f"#/$defs/{entry.cls.__name__}"})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tokenfuse configuration",
        "type": "object",
        "oneOf": alternatives,
        "discriminator": {"propertyName": KEY},
        "$defs": definitions,
    }


def _file(source: str | Path, among: Registry) -> Path | None:
    """The file that ``source`` names, or None where it is a registered name (or a misspelt one)."""
    if isinstance(source, str) and source in among.strategies:
        return None
    if isinstance(source, str) and source in presets():
        return presets()[source]
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.parent != Path():
        if not path.is_file():
            raise ConfigError(
                f"configuration {path} is not a file; expected a YAML file, a strategy "
                f"({', '.join(sorted(among.strategies))}) or a preset ({', '.join(presets())})"
            )
        return path
    return None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a YAML file, and where each key stands."""
    text = path.read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{path} holds {type(values).__name__}; expected a mapping such as strategy: ttf"
        )
    lines: dict[str, str] = {}
    for key, _ in node.value:
        where = f"{path}, line {key.start_mark.line + 1}: "
        if key.value in lines:
            raise ConfigError(f"{where}key {key.value} stands twice; remove one")
        lines[key.value] = where
    return values, lines


def _build(values: dict[str, Any], lines: Mapping[str, str], among: Registry) -> Strategy:
    if KEY not in values:
        raise ConfigError(
            f"a configuration names its strategy; got the keys {', '.join(map(str, values))}; "
            "expected a line such as strategy: ttf"
        )
    name = values.pop(KEY)
    if not isinstance(name, str):
        raise ConfigError(f"{lines.get(KEY, '')}strategy: {name!r} is not a name; expected text")
    try:
        cls = among.strategy(name)
    except ConfigError as error:
        raise type(error)(f"{lines.get(KEY, '')}{error}") from None
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems = [_explain(e, cls, lines) for e in error.errors()]
        raise ConfigError("; ".join(problems)) from None


def _explain(error: Any, cls: type[Strategy], lines: Mapping[str, str]) -> str:
    key = str(error["loc"][0]) if error["loc"] else ""
    where = lines.get(key, "")
    given = error["input"]
    if error["type"] == "extra_forbidden":
        meant = _OTHER_RATIOS.get(key)
        if meant and "keep_ratio" in cls.model_fields and isinstance(given, int | float):
            return f"{where}unknown key {key}: use keep_ratio: {round(meant(given), 6):g}"
        return f"{where}unknown key {key} of {cls.name}: {did_you_mean(key, cls.model_fields)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}{key}: {given!r} is wrong: {message}" if key else f"{cls.name}: {message}"
