"""Conformance kits: pytest classes that prove an adapter or a strategy.

They need the extra ``test``.
"""

import pytest

# Asserts of the kits show what they compared, as those of test modules do.
pytest.register_assert_rewrite(
    "tokenfuse.testing._inside",
    "tokenfuse.testing._tower",
    "tokenfuse.testing.adapters",
    "tokenfuse.testing.layers",
    "tokenfuse.testing.oracle",
    "tokenfuse.testing.strategies",
    "tokenfuse.testing.tower",
)

# ruff: noqa: E402 - what is imported before that is not rewritten
from tokenfuse.testing.adapters import AdapterConformance, Part
from tokenfuse.testing.layers import LayerStrategyConformance, layer_tokens_of
from tokenfuse.testing.oracle import DeletedRun, MaskedRun
from tokenfuse.testing.strategies import StrategyConformance, features_of, tokens_of
from tokenfuse.testing.tower import TowerStrategyConformance, pixel_tokens_of, tower_tokens_of

__all__ = [
    "AdapterConformance",
    "DeletedRun",
    "LayerStrategyConformance",
    "MaskedRun",
    "Part",
    "StrategyConformance",
    "TowerStrategyConformance",
    "features_of",
    "layer_tokens_of",
    "pixel_tokens_of",
    "tokens_of",
    "tower_tokens_of",
]
