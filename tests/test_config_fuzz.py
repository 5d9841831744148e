"""Random configurations: the loader takes what the JSON Schema takes, and refuses the rest."""

from __future__ import annotations

import random

import jsonschema
import pytest

from tokenfuse.config import get_configuration, json_schema
from tokenfuse.errors import ConfigError
from tokenfuse.registry import Registry

REGISTRY = Registry(installed=False)
SCHEMA = json_schema(REGISTRY)
ODD = (None, True, False, "yes", "0.5", "", "keep", "first", [], [1], {}, {"a": 1}, "ttf")
NUMBERS = (-1e308, -2, -1, -0.5, 0, 1e-12, 0.33, 0.5, 1, 1.0, 1.5, 2, 3, 3.0, 4, 7, 99, 1e19, 1e308)


def values(rng, schema):
    """A value for an option: one that its schema names, a number, or something odd."""
    named = [value for part in schema.get("anyOf", [schema]) for value in part.get("enum", [])]
    pool = rng.choice([named or NUMBERS, NUMBERS, ODD])
    return rng.choice(list(pool))


def mapping(rng):
    name = rng.choice(sorted(set(SCHEMA["$defs"]) - {"compose", "by_modality"}))
    options = SCHEMA["$defs"][name]["properties"]
    chosen = rng.sample(
        sorted(set(options) - {"strategy"}), rng.randint(0, min(4, len(options) - 1))
    )
    found = {"strategy": name, **{key: values(rng, options[key]) for key in chosen}}
    if rng.random() < 0.05:
        found["unknown"] = 1
    return found


MORE = [pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 20)]


@pytest.mark.parametrize("seed", [0, *MORE])
def test_loader_and_schema_agree(seed):
    rng = random.Random(seed)
    validators = {
        name: jsonschema.Draft202012Validator({**SCHEMA, "oneOf": [{"$ref": f"#/$defs/{name}"}]})
        for name in SCHEMA["$defs"]
    }
    disagree = []
    for _ in range(1000):
        given = mapping(rng)
        valid = validators[given["strategy"]].is_valid(given)
        try:
            get_configuration(given, registry=REGISTRY)
        except ConfigError as error:
            # What several options say together is beyond a schema.
            if valid and not any(word in str(error) for word in TOGETHER):
                disagree.append((given, str(error)[:200]))
        else:
            if not valid:
                disagree.append((given, "taken"))
    assert not disagree, f"{len(disagree)}: {disagree[:5]}"


TOGETHER = (
    "must be odd",
    "starts at the first frame",
    "nothing to merge",
    "bends a constant r",
    "expected one for each",
)
"""Of messages about rules that JSON Schema cannot say."""
