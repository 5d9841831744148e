"""What a strategy does that merges tokens between the blocks of a vision transformer."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float, Int
from torch import Tensor

from tokenfuse.plan import FusionPlan


class VitStrategy(ABC):
    """A strategy that can be attached to a vision transformer; mixed into a Strategy."""

    @abstractmethod
    def merges(self, blocks: int, tokens: int) -> list[int]:
        """How many tokens each block merges away, of ``tokens`` that may merge before the first."""

    @abstractmethod
    def match(self, keys: Float[Tensor, "B N C"], r: int, protected: int) -> FusionPlan:
        """The plan, for all ``B * N`` rows, that removes ``r`` tokens of each image.

        ``keys``: the block's keys, averaged over heads. The first ``protected`` tokens stay alone.
        """

    @abstractmethod
    def key_bias(self, sizes: Int[Tensor, "B N"]) -> Float[Tensor, "B N"] | None:
        """What is added to every attention logit of each key, or None for nothing."""
