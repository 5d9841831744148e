"""What a retention benchmark asks, of which models, with which settings."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenfuse.bench.candidates import ALL, comparable
from tokenfuse.config import KEY, Configuration, get_configuration, lines_of, load_yaml, shown
from tokenfuse.errors import ConfigError, did_you_mean
from tokenfuse.micro.motion import MOTIONS, Motion
from tokenfuse.micro.questions import PLAIN, SUBTLE, StratumTask
from tokenfuse.micro.strata import LEAST, LEAST_FOR, Stratum, refusal
from tokenfuse.registry import Registry
from tokenfuse.strategies._base import Strategy

UNCOMPRESSED = "uncompressed"
BLIND = "blind"
UNDECIDED = "undecided"
CHECKS = (BLIND, UNDECIDED)
"""Settings that no model may pass: no visual token; none of the decisive temporal patches."""


AVERAGE = "layer_average"
"""A key of a grid: what layers read on average, whatever option of a strategy says it."""
SEEDS = 1000
"""Seeds of a motion: no two strata of a task share one, so that their questions are independent."""


class Sweep(BaseModel):
    """A strategy at every point of a grid.

    ``strategy``: a name, preset, YAML file or mapping, or ``all`` for every registered one that
    takes a ``keep_ratio``. ``grid``: values of options by name, and of ``layer_average``, the share
    of the visual tokens that a decoder layer reads on average. ``about``: a sentence for the page.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    strategy: str | dict[str, Any]
    grid: dict[str, list[Any]] = {}
    about: str = ""


class Plan(BaseModel):
    """The whole benchmark. ``questions`` are per stratum.

    ``layers``: how many the decoder of every model has. ``focus``: names of sweeps with one
    setting, whose strata are shown one by one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    questions: int = Field(10, ge=1, le=SEEDS)
    patches: int = Field(8, ge=LEAST, le=16)
    seed: int = Field(0, ge=0)
    layers: int = Field(4, ge=2)
    tasks: list[StratumTask] = [*PLAIN, *SUBTLE]
    motions: list[Motion] = list(MOTIONS)
    sweeps: list[Sweep] = [
        Sweep(name="published", strategy="ttf-published"),
        Sweep(name="ttf", strategy="ttf"),
        Sweep(name="strategies", strategy=ALL, grid={"keep_ratio": [0.33]}),
    ]
    focus: list[str] = []

    def strata(self, task: StratumTask) -> list[Stratum]:
        """The strata of one task, none where its clips need more temporal patches."""
        if self.patches < LEAST_FOR.get(task, LEAST):
            return []
        return [Stratum(task, motion) for motion in self.motions if refusal(task, motion) is None]

    def seeds(self, stratum: Stratum) -> range:
        """The seeds of a stratum's clips."""
        first = self.seed + SEEDS * MOTIONS.index(stratum.motion)
        return range(first, first + self.questions)


@dataclass(frozen=True, eq=False)
class Setting:
    """One configuration. ``where``: the sweeps it is a point of, and their grid values."""

    key: str
    configuration: Configuration
    where: dict[str, dict[str, Any]]


def read_plan(path: Path) -> Plan:
    """A plan from YAML. Raises ConfigError that names the key and what was expected."""
    node, values = load_yaml(path)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} holds no mapping; expected keys such as questions and sweeps")
    try:
        return Plan.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        keys = first["loc"]
        places = {} if node is None else lines_of(node, str(path))
        # What is missing, or of no single type, stands where its mapping does.
        known = (places[keys[:end]] for end in range(len(keys), -1, -1) if keys[:end] in places)
        place, at = next(known, f"{path}: "), ".".join(map(str, keys))
        if first["type"] == "extra_forbidden":
            fields = (Sweep if keys[0] == "sweeps" and len(keys) > 1 else Plan).model_fields
            hint = did_you_mean(str(keys[-1]), fields)
            raise ConfigError(f"{place}unknown key {at}: {hint}") from None
        if first["type"] == "missing":
            raise ConfigError(f"{place}{at} is missing; expected it") from None
        message = first["msg"].replace("Input should", "it should")
        raise ConfigError(f"{place}{at}: {shown(first['input'])} is wrong: {message}") from None


def settings(plan: Plan, registry: Registry) -> list[Setting]:
    """Every point of every sweep, equal ones once. Raises ConfigError."""
    found: dict[str, Setting] = {}
    names = [sweep.name for sweep in plan.sweeps]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"sweeps: {', '.join(sorted(twice))}: two have this name: rename one")
    for sweep in plan.sweeps:
        for point, configuration in _points(sweep, plan.layers, registry):
            key = key_of(configuration)
            setting = found.setdefault(key, Setting(key, configuration, {}))
            setting.where[sweep.name] = point
    for name in plan.focus:
        if sum(name in setting.where for setting in found.values()) != 1:
            raise ConfigError(f"focus: {name} is no sweep with one setting: name one that is")
    return list(found.values())


def key_of(configuration: Configuration) -> str:
    """A short name of a configuration: equal configurations have equal ones."""
    text = json.dumps(configuration.describe(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _points(
    sweep: Sweep, layers: int, registry: Registry
) -> Iterator[tuple[dict[str, Any], Configuration]]:
    wide = sweep.strategy == ALL and ALL not in registry.strategies
    every = [name for name in comparable(registry) if _takes_ratio(registry.strategy(name))]
    for source in every if wide else [sweep.strategy]:
        for values in itertools.product(*sweep.grid.values()):
            point = dict(zip(sweep.grid, values, strict=True))
            options = {name: value for name, value in point.items() if name != AVERAGE}
            configuration = get_configuration(source, **options, registry=registry)
            if AVERAGE in point:
                strategy = configuration.strategy.at_share(point[AVERAGE], layers)
                configuration = replace(configuration, strategy=strategy)
            yield {KEY: configuration.strategy.name, **point}, configuration


def _takes_ratio(cls: type[Strategy]) -> bool:
    return cls.stage == "pre_llm" and "keep_ratio" in cls.model_fields
