"""Strategies from names, mappings and YAML files, and the JSON Schema of all of them."""

from __future__ import annotations

import re
import reprlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import ValidationError

from tokenfuse.errors import ConfigError, UnknownNameError, did_you_mean
from tokenfuse.prompt.realign import Policy
from tokenfuse.registry import PluginWarning, Registry, default_registry
from tokenfuse.strategies._base import Strategy

KEY = "strategy"
MEANT_BY = {"compose": "compose", "video": "by_modality", "image": "by_modality"}
"""Keys that need no strategy beside them, and the strategy that each means."""

AttentionMode = Literal["plain", "proportional"]


@dataclass(frozen=True)
class Configuration:
    """A strategy, and how the prompt that it shortens is read.

    ``positions``: with ``"keep"`` survivors and all that follows have the positions of the
    uncompressed prompt; ``"contiguous"`` renumbers without gaps, for comparison. ``attention``:
    with ``"proportional"`` the language model's attention weighs a survivor by the tokens that
    were fused into it, inside ``attach``; with ``"plain"`` every survivor counts once.
    """

    strategy: Strategy
    positions: Policy = "keep"
    attention: AttentionMode = "plain"

    def describe(self) -> dict[str, Any]:
        """The mapping that makes this configuration again, ``{"strategy": name, ...}``."""
        named = self.strategy.describe()
        read = {name: getattr(self, name) for name in PROMPT_OPTIONS}
        return {KEY: named.pop(KEY), **read, **named}


PROMPT_OPTIONS: dict[str, tuple[str, ...]] = {
    "positions": get_args(Policy),
    "attention": get_args(AttentionMode),
}
"""Options of a configuration that say how the whole prompt is read, and their values."""

_MEANINGS = {
    "positions": "keep: survivors and all that follows keep the positions of the uncompressed "
    "prompt; contiguous: renumber without gaps, for comparison",
    "attention": "proportional: inside attach, the language model's attention weighs a survivor by "
    "the tokens that were fused into it; plain: every survivor counts once",
}

StrategyLike = str | Path | Mapping[str, Any] | Strategy | Configuration
"""A strategy's name, a preset's, a YAML file, a Strategy, a Configuration, or a mapping with the
key ``strategy`` or with one of MEANT_BY."""

DEEPEST = 16
"""How deep strategies may stand in each other, files included."""
MOST_PARTS = 256
"""Strategies of one configuration."""
LARGEST = 2**20
"""Bytes of a YAML file."""

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


def get_strategy(
    source: StrategyLike, /, *, registry: Registry | None = None, **options: Any
) -> Strategy:
    """A strategy from any of the forms of StrategyLike, with ``options`` set over its own.

    Raises ConfigError (UnknownNameError for a name) that says which key in which file and line is
    wrong, what was expected, and the nearest valid name.
    """
    found = get_configuration(source, registry=registry, **options)
    for name in PROMPT_OPTIONS:
        if getattr(found, name) != getattr(Configuration, name):
            raise ConfigError(
                f"{name}: {getattr(found, name)} is about the whole prompt, which a strategy does "
                f"not see; expected {found.strategy.name} without it: give {name} to compress or "
                "attach"
            )
    return found.strategy


def get_configuration(
    source: StrategyLike, /, *, registry: Registry | None = None, **options: Any
) -> Configuration:
    """A configuration from any of the forms of StrategyLike, with ``options`` set over its own.

    ``options`` are those of the strategy, and ``positions`` and ``attention``.

    Raises ConfigError as ``get_strategy`` does.
    """
    known, own = default_registry() if registry is None else registry, source
    if not isinstance(known, Registry):
        raise ConfigError(
            f"registry is {shown(registry)}; expected a tokenfuse.registry.Registry, or none"
        )
    if isinstance(source, Configuration):
        source = source.strategy
    if isinstance(source, Strategy):
        _refuse_prompt_options_of(type(source))
    values, where = _values(source, dict(options), known, _Where())
    read = {name: values.pop(name) for name in PROMPT_OPTIONS if name in values}
    for name, value in read.items():
        if value not in PROMPT_OPTIONS[name]:
            raise ConfigError(
                f"{where.of(name)}{name}: {shown(value)} is wrong: it should be "
                f"{' or '.join(map(repr, PROMPT_OPTIONS[name]))}"
            )
    strategy = _strategy(source, values, where, known)
    if isinstance(own, Configuration):
        return replace(own, strategy=strategy, **read)
    return Configuration(strategy, **read)


def _values(
    source: StrategyLike, changes: dict[str, Any], registry: Registry, where: _Where
) -> tuple[dict[str, Any], _Where]:
    """What ``source`` says, with ``changes`` over it, and where each value stands.

    ``where``: where ``source`` itself stands.
    """
    if isinstance(source, Strategy):
        # Not model_dump, which describes the steps of a chain instead of keeping them.
        values: dict[str, Any] = {KEY: source.name, **dict(source)} | changes
        # Its own class need not be registered.
        return (values, where) if values[KEY] == source.name else _based(values, where, registry)
    if isinstance(source, Mapping):
        where = where.inside(source)
        values = dict(source)
    elif isinstance(source, str | Path):
        path = _file(source, registry, where)
        if path is None:
            values = {KEY: str(source)}
        else:
            values, where = _read(path, where)
    else:
        raise ConfigError(
            f"{where.of()}{shown(source)} is of type {type(source).__name__}; expected a "
            "strategy's name, a preset's, a YAML file, a mapping or a Strategy"
        )
    # A file is not to blame for what is set over it.
    return _based(values | changes, where.without(changes), registry)


def _based(
    values: dict[str, Any], where: _Where, registry: Registry
) -> tuple[dict[str, Any], _Where]:
    """The same values over those of the preset or file that they name as their strategy."""
    name = values.get(KEY)
    if not isinstance(name, str) or name in registry.strategies:
        return values, where
    path = _file(name, registry, where.at(KEY))
    if path is None:
        return values, where
    base, there = _read(path, where.at(KEY))
    base, there = _based(base, there, registry)
    own = {key: value for key, value in values.items() if key != KEY}
    return base | own, there.under(where, own)


def _part(part: Any, where: _Where, registry: Registry) -> Strategy:
    """A strategy that is part of another configuration."""
    where.read.parts += 1
    if where.read.parts > MOST_PARTS:
        raise ConfigError(
            f"{where.of()}the configuration has more than {MOST_PARTS} parts; expected fewer: "
            "files that name the same file twice double them each time"
        )
    if isinstance(part, Configuration):
        raise ConfigError(
            f"{where.of()}{shown(part)} is a whole configuration; expected a Strategy"
        )
    if isinstance(part, Strategy):
        _refuse_prompt_options_of(type(part))
    values, where = _values(part, {}, registry, where)
    for name in PROMPT_OPTIONS:
        if name in values:
            raise ConfigError(
                f"{where.of(name)}{values.get(KEY)} sets {name}; set it at the top of the "
                "configuration instead"
            )
    return _strategy(part, values, where, registry)


def _strategy(source: Any, values: dict[str, Any], where: _Where, registry: Registry) -> Strategy:
    """The strategy that ``values`` describe; ``source`` itself where they change nothing."""
    if isinstance(source, Strategy) and values.get(KEY) == source.name:
        # Its own class, registered or not.
        options = {key: value for key, value in values.items() if key != KEY}
        if options == dict(source):
            return source
        return _validate(type(source), options, where, registry)
    return _build(values, where, registry)


def presets() -> dict[str, Path]:
    """The YAML files that tokenfuse ships, by name."""
    here = Path(__file__).parent
    for folder in (here / "configs", here.parents[1] / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def json_schema(registry: Registry | None = None) -> dict[str, Any]:
    """JSON Schema of a configuration: one alternative per strategy, told apart by its name."""
    definitions: dict[str, Any] = {}
    for name, entry in sorted((registry or default_registry()).strategies.items()):
        # Models inside an option stay with their strategy: another may have one of the same name.
        try:
            schema = entry.cls.model_json_schema(ref_template=f"#/$defs/{name}/$defs/{{model}}")
        except Exception as error:
            warnings.warn(
                f"strategy {name} of {entry.distribution} is left out of the schema, for an option "
                f"has none: {error}; expected options that YAML can hold, or an annotation "
                "pydantic.WithJsonSchema",
                PluginWarning,
                stacklevel=2,
            )
            continue
        schema["description"] = schema.get("description", name).partition("\n\n")[0]
        read = {option: _schema_of(option) for option in PROMPT_OPTIONS}
        schema["properties"] = {KEY: {"const": name}, **read, **schema.get("properties", {})}
        if name not in MEANT_BY.values():
            schema["required"] = [KEY, *schema.get("required", [])]
        definitions[name] = schema
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tokenfuse configuration",
        "type": "object",
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in definitions],
        "discriminator": {"propertyName": KEY},
        "$defs": definitions,
    }


def _schema_of(option: str) -> dict[str, Any]:
    """JSON Schema of an option of the whole configuration."""
    return {
        "default": getattr(Configuration, option),
        "description": _MEANINGS[option],
        "enum": list(PROMPT_OPTIONS[option]),
        "title": option.capitalize(),
        "type": "string",
    }


@dataclass(frozen=True)
class _Where:
    """Where in files the values of a configuration stand, for messages.

    ``lines``: the place of each value, by the keys that lead to it, and of the whole at ``()``.
    ``other``: the place to name for a value whose own place is not known, such as one that Python
    code gave. ``part_of``: which part of the configuration this is. ``open``: the files and
    mappings that are being read, outermost first. ``read``: what has been read of files so far, and
    how many parts there were, for the whole configuration.
    """

    lines: Mapping[tuple[str | int, ...], str] = field(default_factory=dict)
    other: str = ""
    part_of: str = ""
    open: tuple[Any, ...] = ()
    read: _Read = field(default_factory=lambda: _Read())

    def of(self, *keys: str | int) -> str:
        """The place of a value as the beginning of a message."""
        return self.lines.get(keys, self.other) + self.part_of

    def without(self, keys: Iterable[str]) -> _Where:
        """The same where the values of these keys stand elsewhere."""
        gone = {(key,) for key in keys}
        kept = {path: line for path, line in self.lines.items() if path[:1] not in gone}
        return replace(self, lines=kept)

    def inside(self, source: Mapping[str, Any] | Path) -> _Where:
        """The same while ``source`` is read. Raises ConfigError where it is being read already."""
        if any(
            source is other or (isinstance(source, Path) and source == other) for other in self.open
        ):
            raise ConfigError(f"{self.of()}it leads back to itself; remove the part that does")
        if len(self.open) >= DEEPEST:
            raise ConfigError(
                f"{self.of()}strategies stand in each other more than {DEEPEST} deep; expected "
                "fewer: name the inner ones directly"
            )
        return replace(self, open=(*self.open, source))

    def at(self, *keys: str | int) -> _Where:
        """The place of one value, for what is read because of it."""
        return _Where({}, self.lines.get(keys, self.other), self.part_of, self.open, self.read)

    def under(self, over: _Where, keys: Iterable[str]) -> _Where:
        """The same where ``over`` says where the values of these keys stand."""
        own = set(keys)
        theirs = {path: line for path, line in over.lines.items() if path[:1] and path[0] in own}
        return replace(self, lines={**self.without(own).lines, **theirs})

    def part(self, *keys: str | int) -> _Where:
        """The same for the configuration that stands under ``keys``."""
        n = len(keys)
        inside = {path[n:]: line for path, line in self.lines.items() if path[:n] == keys}
        line = inside.setdefault((), self.lines.get(keys[:1], self.other))
        names = (f"step {key + 1}: " if isinstance(key, int) else f"{key}: " for key in keys)
        return _Where(inside, line, self.part_of + "".join(names), self.open, self.read)


@dataclass
class _Read:
    """What one call has read: files, each once, and the number of parts."""

    files: dict[Path, tuple[dict[str, Any], dict[tuple[str | int, ...], str]]] = field(
        default_factory=dict
    )
    parts: int = 0


def _file(source: str | Path, registry: Registry, where: _Where) -> Path | None:
    """The file that ``source`` names, or None where it is a registered name."""
    shipped = presets()
    if isinstance(source, str) and source in registry.strategies:
        return None
    if isinstance(source, str) and source in shipped:
        return shipped[source]
    path = Path(source)
    try:
        if path.is_file():
            return path
    except (OSError, ValueError):
        raise ConfigError(
            f"{where.of()}{str(source)[:40]!r}… is no name and no path; expected a strategy, a "
            "preset or a YAML file: read a text with yaml.safe_load, and pass the mapping"
        ) from None
    names = {*registry.strategies, *shipped}
    if isinstance(source, str) and not path.suffix and path.parent == Path():
        raise UnknownNameError(
            f'{where.of()}no strategy or preset is called "{_brief(source)}": '
            f"{did_you_mean(_brief(source), names)}"
        )
    raise ConfigError(
        f"{where.of()}configuration {_brief(path)} is not a file; expected a YAML file, or the "
        f"name of a strategy or preset: {did_you_mean(_brief(path.stem), names)}"
    )


_KINDS = {
    type(None): "nothing",
    yaml.SequenceNode: "a list",
    yaml.ScalarNode: "a single value",
}


def _read(path: Path, where: _Where) -> tuple[dict[str, Any], _Where]:
    """The mapping in a YAML file, and where its values stand; ``where``: where it is named."""
    resolved = path.resolve()
    before, where = where.of(), where.inside(resolved)
    if resolved not in where.read.files:
        node, values = load_yaml(path, before)
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                f"{before}{path} holds {_KINDS[type(node)]}; expected a mapping such as {KEY}: ttf"
            )
        where.read.files[resolved] = values, lines_of(node, f"{before}{path}")
    values, lines = where.read.files[resolved]
    places = {(): f"{before}{path}: "} | lines
    # The mapping itself is changed by nobody, but what it is merged into is.
    return dict(values), _Where(places, before, open=where.open, read=where.read)


class _Loader(yaml.SafeLoader):
    """Says in which line a value stands that is not what it looks like, such as a 41st day."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, TypeError, AttributeError) as error:
            raise yaml.constructor.ConstructorError(
                None, None, str(error)[:80], node.start_mark
            ) from None


def load_yaml(path: Path, before: str = "") -> tuple[yaml.Node | None, Any]:
    """What a YAML file holds, as nodes and as values. ``before``: the beginning of messages.

    Raises ConfigError with the file and the line; what stands in the line is not quoted, for a
    configuration may name any file.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(
                f"{before}{path} has {path.stat().st_size} bytes; expected a configuration of no "
                f"more than {LARGEST}"
            )
        # Bytes: YAML says itself how they are encoded.
        loader = _Loader(path.read_bytes())
        try:
            node = loader.get_single_node()
            return node, None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        said = "; ".join(str(part) for part in (error.context, error.problem) if part)
        raise ConfigError(f"{before}{path}{line} is not valid YAML: {said}") from None
    except yaml.YAMLError as error:
        said = getattr(error, "reason", None) or type(error).__name__
        raise ConfigError(f"{before}{path} is not valid YAML: {said}") from None
    except RecursionError:
        raise ConfigError(
            f"{before}{path} is nested too deeply; expected a configuration of a few levels"
        ) from None
    except OSError as error:
        raise ConfigError(f"{before}{path} cannot be read: {error.strerror}") from error


# YAML 1.1 takes 9e-1 for text; 1.2, JSON and editors take it for a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_value(text: str) -> Any:
    """A value as YAML has it, such as that of an option. Raises ConfigError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"{shown(text)} is no value; expected one as in YAML") from None


class _Brief(reprlib.Repr):
    """Short, however large what is shown: aliases in YAML make trees of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 2, 3, 3, 3
        self.maxstring = self.maxother = self.maxlong = 60


def shown(value: Any) -> str:
    """A value of a configuration in a message, shortened."""
    return _Brief().repr(value)[:200]


def _brief(text: object) -> str:
    """A name in a message, shortened."""
    whole = str(text)
    return whole if len(whole) <= 60 else f"{whole[:57]}..."


def lines_of(node: yaml.Node, file: str) -> dict[tuple[str | int, ...], str]:
    """The place of each key and list item in a YAML document, by the keys that lead to it.

    Raises ConfigError where a key stands twice.
    """
    lines: dict[tuple[str | int, ...], str] = {}
    seen: set[int] = set()

    def note(node: yaml.Node, *path: str | int) -> None:
        # What an alias repeats, perhaps without end, stands where it is first.
        if id(node) in seen:
            return
        seen.add(id(node))
        inside: list[tuple[str | int, yaml.Node, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            inside = [(str(key.value), key, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            inside = [(i, item, item) for i, item in enumerate(node.value)]
        for key, start, value in inside:
            place = f"{file}, line {start.start_mark.line + 1}: "
            if (*path, key) in lines:
                raise ConfigError(f"{place}key {key} stands twice; remove one")
            lines[*path, key] = place
            note(value, *path, key)

    note(node)
    return lines


def _build(values: dict[str, Any], where: _Where, registry: Registry) -> Strategy:
    """The strategy that ``values`` describe."""
    if KEY not in values:
        meant = next((MEANT_BY[key] for key in values if key in MEANT_BY), None)
        values = {KEY: meant, **values} if meant else values
    if KEY not in values:
        given = f"got the keys {', '.join(map(_brief, values))}" if values else "got no key"
        name = values.get("name", "ttf")
        raise ConfigError(
            f"{where.of()}a configuration names its strategy; {given}; expected a line such as "
            f"{KEY}: {name}"
        )
    name = values[KEY]
    if not isinstance(name, str):
        raise ConfigError(f"{where.of(KEY)}{KEY}: {shown(name)} is not a name; expected text")
    try:
        cls = registry.strategy(name)
    except UnknownNameError as error:
        raise UnknownNameError(f"{where.of(KEY)}{error}") from None
    return _validate(
        cls, {key: value for key, value in values.items() if key != KEY}, where, registry
    )


def _refuse_prompt_options_of(cls: type[Strategy]) -> None:
    for name in PROMPT_OPTIONS.keys() & cls.model_fields.keys():
        raise ConfigError(
            f"strategy {cls.name} has an option called {name}, which in every configuration says "
            "how the whole prompt is read; expected another name: rename the option"
        )


class _Located(ValueError):
    """What is wrong with a part of a configuration; the message says where that is."""


def _validate(
    cls: type[Strategy], options: Mapping[str, Any], where: _Where, registry: Registry
) -> Strategy:
    _refuse_prompt_options_of(cls)

    def load(part: Any, *keys: str | int) -> Strategy:
        try:
            return _part(part, where.part(*keys), registry)
        except ConfigError as error:
            raise _Located(str(error)) from None

    try:
        # What is made of strategies loads them by what is registered here.
        return cls.model_validate(options, context={"load": load})
    except ValidationError as error:
        # An option that takes several types has one problem for each.
        problems: dict[str, list[str]] = {}
        for problem in error.errors():
            subject, message = _explain(problem, cls, where)
            problems.setdefault(subject, []).append(message)
        raise ConfigError("; ".join(s + " or ".join(m) for s, m in problems.items())) from None


def _explain(problem: Any, cls: type[Strategy], where: _Where) -> tuple[str, str]:
    """What is wrong, and what was expected instead."""
    given = problem["input"]
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    if isinstance(problem.get("ctx", {}).get("error"), _Located):
        return message, ""
    if not problem["loc"]:
        return f"{where.of()}{cls.name}: ", message
    key, *inner = map(str, problem["loc"])
    if problem["type"] == "missing" and not inner:
        meaning = cls.model_fields[key].description
        return f"{where.of()}{cls.name}: ", f"{key} is missing; expected {meaning or 'it'}"
    place = where.of(key)
    if problem["type"] == "extra_forbidden" and not inner:
        key = _brief(key)
        if key in _KEPT | _REMOVED and "keep_ratio" in cls.model_fields:
            return f"{place}unknown key {key}: ", _as_keep_ratio(key, given)
        return f"{place}unknown key {key} of {cls.name}: ", did_you_mean(key, cls.model_fields)
    hint = per_cent_hint(given) if key == "keep_ratio" else ""
    return f"{place}{key}: {shown(given)} is wrong: ", message + hint


def per_cent_hint(given: Any) -> str:
    """What follows a message about a share of tokens that looks like per cent: 33 or ``"33%"``."""
    number = re.fullmatch(r"(\d+(?:\.\d*)?) ?%?", str(given).strip())
    if number is None or not 1 < float(number[1]) <= 100:
        return ""
    return f"; for {float(number[1]):g} per cent write {float(number[1]) / 100:g}"


def _as_keep_ratio(key: str, given: Any) -> str:
    if isinstance(given, int | float):
        ratio = given if key in _KEPT else 1 - given
        if 0 < ratio <= 1:
            return f"use keep_ratio: {ratio:.6g}"
    return "use keep_ratio, the share of tokens that stay, in (0, 1]"
