"""The page of all strategies is current, and says of each what there is to say."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import BaseModel, Field

from tokenfuse import FusionPlan, Strategy, VisualTokens, hookimpl
from tokenfuse.bench.strategies_page import page
from tokenfuse.registry import Registry

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "strategies.md"
BUILT_IN = Registry(installed=False)


class Limits(BaseModel):
    least: int = 1


class Odd(Strategy):
    """Keep what is odd, e.g. ``a|b``. The rest goes.

    Source: nowhere.
    """

    name: ClassVar[str] = "odd"
    needs: ClassVar = frozenset({"text", "grid"})
    temporal: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 1234.56789"
    experimental: ClassVar[bool] = True

    share: float | None = Field(None, gt=0, le=1, description="share of `a|b`")
    seed: int = Field(0, ge=0, lt=2**63)
    how: Literal["mean", "max"] = "mean"
    fast: bool = True
    steps: list[int]
    limits: Limits = Limits()

    def plan(self, tokens: VisualTokens) -> FusionPlan:
        return FusionPlan.identity(tokens.num_tokens)


class Brought:
    """A plugin that registers Odd."""

    @hookimpl
    def tokenfuse_register_strategies(self, register):
        register(Odd)


def test_the_page_is_current():
    assert PAGE.read_text("utf-8") == page(), "renew it: make pages"


@pytest.mark.parametrize("name", sorted(BUILT_IN.strategies))
def test_every_built_in_strategy_has_a_row_and_a_section_with_its_options(name):
    cls = BUILT_IN.strategy(name)
    head, *sections = page().split("\n## ")
    assert f"[`{name}`](#{name})" in head
    section = next(text for text in sections if text.startswith(f"{name}\n"))
    for option in set(cls.model_fields) - set(Strategy.model_fields):
        assert f"| `{option}` |" in section


def test_everything_about_a_strategy_is_on_the_page():
    text = page(Registry([Brought()], installed=False))
    link = "[arXiv 1234.56789](https://arxiv.org/abs/1234.56789)"
    for line in (
        "| [`odd`](#odd) (experimental) | `pre_llm` | `grid`, `text` | "
        f"{link} | Keep what is odd, e.g. `a\\|b`. |",
        f"Stage `pre_llm`; needs `grid`, `text`; leaves images as they are; {link}; experimental.",
        "Keep what is odd, e.g. `a|b`. The rest goes.\n\nSource: nowhere.",
        "| `share` | number, > 0, ≤ 1 or `null` | `null` | share of `a\\|b` |",
        "| `seed` | integer, ≥ 0 | `0` |  |",
        "| `how` | `mean` or `max` | `mean` |  |",
        "| `fast` | boolean | `true` |  |",
        "| `steps` | list of integer | required |  |",
    ):
        assert line in text
    assert "`positions` |" not in text


def test_a_preset_stands_with_its_strategy():
    section = page().partition("\n## ttf\n")[2].partition("\n## ")[0]
    assert (
        "Presets: `ttf-causal`, `ttf-first`, `ttf-gentle`, `ttf-published`, `ttf-third`." in section
    )
