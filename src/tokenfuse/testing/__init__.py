"""Conformance kits: pytest classes that prove an adapter or a strategy. Needs tokenfuse[test]."""

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
