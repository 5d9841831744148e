"""What a form asks of a strategy, from the JSON Schema of its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from tokenfuse.config import KEY, MEANT_BY, get_strategy, presets
from tokenfuse.errors import ConfigError, UnknownNameError, did_you_mean
from tokenfuse.registry import default_registry

Kind = Literal["choice", "flag", "number", "text"]


@dataclass(frozen=True)
class Field:
    """One option of a strategy as a form shows it.

    ``kind``: one of ``choices``; yes or no; a number, a ``whole`` one or any; or text that is read
    as YAML. ``default``: the strategy's own, None where the option may be left blank.
    """

    name: str
    kind: Kind
    default: Any
    about: str
    choices: tuple[Any, ...] = ()
    whole: bool = False

    @property
    def shown(self) -> Any:
        """The default as the form shows it."""
        return _as_text(self.default) if self.kind == "text" else self.default


def offered() -> list[str]:
    """The strategies and presets that a form can make, sorted.

    Not those that are nothing without other strategies: visitors may not write names of
    strategies, which may be names of files as well.
    """
    names = {*default_registry().strategies, *presets()} - set(MEANT_BY.values())
    return sorted(names)


def fields(strategy: str) -> list[Field]:
    """The form of a strategy or preset. Raises UnknownNameError for a name not ``offered``."""
    if strategy not in offered():
        raise UnknownNameError(f"no form is for {strategy!r}: {did_you_mean(strategy, offered())}")
    found = get_strategy(strategy)
    schema = type(found).model_json_schema()
    values = found.describe()
    return [
        _field(name, entry, values.get(name))
        for name, entry in schema.get("properties", {}).items()
        if name not in MEANT_BY
    ]


def configured(strategy: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping that a filled form means: the strategy, and what differs from its defaults.

    ``values``: by the names of ``fields``, as ``Field.shown`` has them.

    Raises ConfigError for text that is no YAML.
    """
    changes = {}
    for field in fields(strategy):
        value = values.get(field.name, field.shown)
        if field.kind == "text":
            value = _read(field, value)
        elif field.whole and isinstance(value, float) and value.is_integer():
            value = int(value)
        if value != field.default:
            changes[field.name] = value
    return {KEY: strategy, **changes}


def _field(name: str, entry: Mapping[str, Any], default: Any) -> Field:
    about = str(entry.get("description", ""))
    types = [part for part in entry.get("anyOf", [entry]) if part.get("type") != "null"]
    only = types[0] if len(types) == 1 else {}
    kind = only.get("type")
    # A list that the form cannot show otherwise is written as in a YAML file.
    if "enum" in only:
        return Field(name, "choice", default, about, choices=tuple(only["enum"]))
    if kind == "boolean":
        return Field(name, "flag", default, about)
    if kind in ("number", "integer"):
        return Field(name, "number", default, about, whole=kind == "integer")
    return Field(name, "text", default, about)


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        value = list(value)
    written: str = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return written.removesuffix("\n").removesuffix("\n...")


def _read(field: Field, text: Any) -> Any:
    if str(text or "").strip() == field.shown:
        return field.default
    try:
        return yaml.safe_load(str(text or ""))
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ConfigError(
            f"{field.name}: {text!r} is no YAML: {said}; expected a value as in a configuration "
            f"file, such as {field.shown or '0.5'}"
        ) from error
