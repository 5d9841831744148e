"""Which strategies are compared, each at every ratio, and why some cannot run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from tokenfuse.adapters._base import Adapter
from tokenfuse.compression import acts_inside, refuse_unmet_needs
from tokenfuse.config import (
    Configuration,
    get_configuration,
    get_strategy,
    per_cent_hint,
)
from tokenfuse.errors import ConfigError, UnsupportedModelError
from tokenfuse.registry import Registry
from tokenfuse.sessions._decoder import refuse_unfit_cuts

ALL = "all"
CONTROLS = ("uniform", "random", "frame_subsample")
"""Strategies that hardly look at the tokens: what any other one should beat."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """What takes part in a comparison: a strategy at a ratio, or the reason why it cannot."""

    label: str
    keep_ratio: float | None
    configuration: Configuration | None
    reason: str | None = None

    @property
    def title(self) -> str:
        return f"with {self.label} at {self.keep_ratio:g}" if self.configuration else self.label


UNCOMPRESSED = Candidate("uncompressed", None, None)
"""What all others are held against."""


class Row(BaseModel):
    """What came of one candidate: of a strategy at a ratio, or uncompressed, without either.

    ``keep_ratio`` is what was asked for. Where a strategy could not run there is only the
    ``reason``.
    """

    model_config = ConfigDict(frozen=True)

    strategy: str
    keep_ratio: float | None = None
    options: dict[str, Any] | None = None
    reason: str | None = None

    @classmethod
    def of(cls, candidate: Candidate, **figures: Any) -> Self:
        """The row of a candidate, with its figures."""
        values = {
            "strategy": candidate.label,
            "keep_ratio": candidate.keep_ratio,
            "options": candidate.configuration.describe() if candidate.configuration else None,
            "reason": candidate.reason,
        }
        return cls(**(values | figures))


def candidates(
    names: Sequence[str], ratios: Sequence[float], adapter: Adapter | None, registry: Registry
) -> list[Candidate]:
    """Every named strategy at every ratio; ``all`` stands for all that take a ``keep_ratio``.

    One that cannot run on the adapter's model comes with the reason; without an adapter all can.
    Raises ConfigError for an unknown name, one without a ``keep_ratio``, and a ratio that is none.
    """
    for ratio in ratios:
        _check_ratio(ratio, f"{ratio:g}")
    if not ratios:
        raise ConfigError("no ratio is given; expected one such as --keep-ratio 0.33")
    sources: dict[str, None] = {}
    for name in names or [ALL]:
        # "all" may be a plugin's name, too: then it is that one.
        wide = name == ALL and ALL not in registry.strategies
        sources |= dict.fromkeys(comparable(registry) if wide else [name])
    return [
        _candidate(source, ratio, adapter, registry)
        for source in sources
        for ratio in dict.fromkeys(ratios)
    ]


def comparable(registry: Registry) -> Iterator[str]:
    """Registered strategies on prompts that need nothing but a share of tokens, by name."""
    for name, entry in sorted(registry.strategies.items()):
        if entry.cls.stage != "vit":
            try:
                get_strategy(name, registry=registry).at_share(0.5, 32)
            except ConfigError:
                continue
            yield name


def listed(values: Iterable[str]) -> list[str]:
    """Values of an option that may be repeated and may hold several with commas."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def ratios(values: Iterable[str]) -> list[float]:
    """Shares of tokens from such an option. Raises ConfigError."""
    found = []
    for text in listed(values):
        try:
            found.append(float(text))
        except ValueError:
            raise ConfigError(
                f"--keep-ratio {text} is no number; expected shares of tokens such as 0.5,0.33"
                + per_cent_hint(text)
            ) from None
        _check_ratio(found[-1], text)
    return found


def _check_ratio(ratio: float, text: str) -> None:
    if not 0 < ratio <= 1:
        raise ConfigError(
            f"--keep-ratio {text} is no share of tokens; expected (0, 1]" + per_cent_hint(text)
        )


def _candidate(source: str, ratio: float, adapter: Adapter | None, registry: Registry) -> Candidate:
    """``source`` at a ratio: of the tokens that a decoder layer reads on average over layers."""
    plain = get_configuration(source, registry=registry)
    config = None if adapter is None else adapter.model.config.get_text_config()
    try:
        # Without a model, any decoder that is deep enough.
        layers = 1000 if config is None else config.num_hidden_layers
        strategy = plain.strategy.at_share(ratio, layers)
    except ConfigError as error:
        if config is None or not acts_inside(plain.strategy):
            raise
        return Candidate(source, ratio, None, str(error))
    configuration = replace(plain, strategy=strategy)
    try:
        if adapter:
            refuse_unmet_needs(adapter, configuration)
            refuse_unfit_cuts(adapter.model, strategy, configuration.attention)
    except UnsupportedModelError as error:
        return Candidate(source, ratio, None, str(error))
    return Candidate(source, ratio, configuration)
