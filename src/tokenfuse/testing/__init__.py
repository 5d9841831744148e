"""Conformance kits: pytest classes that prove an adapter or a strategy.

They need the extra ``test``.
"""

import pytest

# Asserts of the kits show what they compared, as those of test modules do.
pytest.register_assert_rewrite(
    "tokenfuse.testing.adapters", "tokenfuse.testing.oracle", "tokenfuse.testing.strategies"
)

# ruff: noqa: E402 - what is imported before that is not rewritten
from tokenfuse.testing.adapters import AdapterConformance, Part
from tokenfuse.testing.oracle import DeletedRun, MaskedRun
from tokenfuse.testing.strategies import StrategyConformance, features_of, tokens_of

__all__ = [
    "AdapterConformance",
    "DeletedRun",
    "MaskedRun",
    "Part",
    "StrategyConformance",
    "features_of",
    "tokens_of",
]
