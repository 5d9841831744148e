"""The page of all strategies, which ``make pages`` renews.

It is made from the built-in strategies themselves, without those of plugins, and goes to standard
output: their docstrings, their options as the JSON Schema has them, and the presets.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tokenfuse.bench.markdown import NONE, table
from tokenfuse.config import get_strategy, presets
from tokenfuse.errors import TokenFuseError
from tokenfuse.registry import Registry
from tokenfuse.strategies._base import Strategy
from tokenfuse.strategies._stages import stages

HEAD = """\
# Strategies

<!-- Made by: make pages -->

Every strategy that tokenfuse brings. Options are keys of a [configuration](../how-to/configure.md);
`tokenfuse strategies` lists those of installed plugins too, and `tokenfuse compare` puts them
[side by side](../how-to/compare-strategies.md).

A stage says where in the model tokens go: `vit`, inside a vision transformer, `tower`, [before or
inside the vision tower](../explanation/inside-the-tower.md) of a VLM, `pre_llm`, between the vision
tower and the LLM, or `llm`, [at decoder layers](../explanation/inside-the-llm.md); some act at one
or the other, or at several, as their options say. Needs are what a strategy must have beside
features: `grid`, every place of the grid, so that it must come first in a chain; `saliency`, a
score per token; `text`, the prompt's embeddings. A strategy that only compares frames leaves images
as they are, whatever its options say. Experimental strategies are reconstructions that nothing
could be compared with.

All have the option `positions`: `keep`, the default, or `contiguous`, which renumbers tokens
without gaps, for comparison; see [Positions](../explanation/positions.md).
"""


def page(registry: Registry | None = None) -> str:
    """The page of every registered strategy, of the built-in ones if no registry is given."""
    registry = registry or Registry(installed=False)
    classes = [entry.cls for _, entry in sorted(registry.strategies.items())]
    files: dict[str, list[str]] = {}
    for preset in presets():
        try:
            files.setdefault(get_strategy(preset, registry=registry).name, []).append(preset)
        except TokenFuseError:
            continue  # a preset of a strategy that is not among these
    overview = [
        [
            f"[`{cls.name}`](#{cls.name})" + (" (experimental)" if cls.experimental else ""),
            ", ".join(f"`{stage}`" for stage in stages(cls)),
            ", ".join(f"`{need}`" for need in sorted(cls.needs)) or NONE,
            _paper(cls) or NONE,
            _first_sentence(cls),
        ]
        for cls in classes
    ]
    parts = [HEAD, table(["strategy", "stage", "needs", "paper", "what it does"], overview, left=5)]
    parts += [_section(cls, files.get(cls.name, [])) for cls in classes]
    return "\n".join(parts)


def _section(cls: type[Strategy], files: Iterable[str]) -> str:
    schema = cls.model_json_schema(ref_template="{model}")
    needed = schema.get("required", [])
    rows = [
        [
            f"`{key}`",
            _type(option, schema.get("$defs", {})),
            "required" if key in needed else f"`{_value(option.get('default'))}`",
            option.get("description", ""),
        ]
        for key, option in schema["properties"].items()
        if key not in Strategy.model_fields
    ]
    facts = ["Stage " + ", ".join(f"`{stage}`" for stage in stages(cls))]
    if cls.needs:
        facts.append("needs " + ", ".join(f"`{need}`" for need in sorted(cls.needs)))
    if cls.temporal:
        facts.append("leaves images as they are")
    facts += [text for text in (_paper(cls), "experimental" if cls.experimental else "") if text]
    shipped = ", ".join(f"`{name}`" for name in sorted(files))
    lines = [f"## {cls.name}", "; ".join(facts) + ".", _prose(cls)]
    lines += [f"Presets: {shipped}."] if shipped else []
    if rows:
        lines.append(table(["option", "type", "default", "meaning"], rows, left=4))
    return "\n\n".join(lines)


def _prose(cls: type[Strategy]) -> str:
    """The docstring as Markdown: code has single backticks there."""
    return inspect.cleandoc(cls.__doc__ or "").replace("``", "`")


def _first_sentence(cls: type[Strategy]) -> str:
    first = re.sub(r"\s+", " ", _prose(cls).partition("\n\n")[0])
    return re.split(r"(?<=\.) (?=[A-Z])", first)[0]


def _paper(cls: type[Strategy]) -> str:
    number = re.fullmatch(r"arXiv (\d{4}\.\d{4,5})", cls.paper)
    return f"[{cls.paper}](https://arxiv.org/abs/{number[1]})" if number else cls.paper


def _type(option: Mapping[str, Any], models: Mapping[str, Any]) -> str:
    """A JSON Schema in words: ``number, > 0, ≤ 1``, ``\"mean\" or \"keep\"``."""
    if "$ref" in option:
        return _type(models.get(option["$ref"], {}), models)
    if "anyOf" in option:
        return " or ".join(_type(each, models) for each in option["anyOf"])
    if "oneOf" in option:
        return " or ".join(_type(each, models) for each in option["oneOf"])
    if "enum" in option:
        return " or ".join(f"`{_value(value)}`" for value in option["enum"])
    if "const" in option:
        return f"`{_value(option['const'])}`"
    kind = str(option.get("type", "any"))
    kind = {"null": "`null`", "array": "list", "object": "mapping"}.get(kind, kind)
    if "items" in option:
        kind += f" of {_type(option['items'], models)}"
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    # A seed's bounds are those of its generator, and say nothing.
    bounds = {key: sign for key, sign in signs.items() if abs(option.get(key, 2**53)) < 2**53}
    return ", ".join([kind, *(f"{sign} {option[key]:g}" for key, sign in bounds.items())])


def _value(value: Any) -> str:
    """A value as YAML has it."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def main() -> None:
    print(page(), end="")


if __name__ == "__main__":
    main()
