"""Cosines between the tokens of one item, all held at once only where they are few.

Pure tensor maths, no host synchronisation.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenfuse.kernels.window import STEP, unit
from tokenfuse.strategies.select import CHUNK

ROWS = 512
"""Rows of a block: large enough for a fast product, small enough to waste little."""


def in_steps(cosines: Tensor) -> Tensor:
    """Whole multiples of STEP, so that a tie is a tie whatever order products are summed in."""
    return (cosines / STEP).round_()


class Cosines:
    """Cosine of each token with every other, fp32; 0 where one of them is blank.

    ``hold``: compute all at once, for no more than CHUNK; otherwise each row when asked for.
    """

    def __init__(self, features: Float[Tensor, "N D"], hold: bool) -> None:
        self.units, self.blank = unit(features)
        self.num_tokens, self.width = features.shape
        self._all = self._compute() if hold else None

    def row(self, index: Int[Tensor, " 1"]) -> Float[Tensor, " N"]:
        """The cosines of one token with all, itself included."""
        if self._all is not None:
            return self._all.index_select(0, index)[0]
        return self.units @ self.units.index_select(0, index)[0]

    def nearest(self) -> Float[Tensor, " N"]:
        """The greatest cosine of each token with another; -inf for an only token."""
        if self._all is not None:
            diagonal = self._all.diagonal()
            own = diagonal.clone()
            diagonal.fill_(-torch.inf)
            best = self._all.amax(1)
            diagonal.copy_(own)
            return best
        best = torch.full_like(self.units[:, 0], -torch.inf)
        for start, block in self._blocks():
            block.diagonal().fill_(-torch.inf)
            rows, columns = best[start : start + block.shape[0]], best[start:]
            torch.maximum(columns, block.amax(0), out=columns)
            torch.maximum(rows, block.amax(1), out=rows)
        return best

    def _compute(self) -> Tensor:
        everything = self.units.new_empty((self.num_tokens, self.num_tokens))
        for start, block in self._blocks():
            stop = start + block.shape[0]
            everything[start:stop, start:] = block
            everything[start:, start:stop] = block.T
        return everything

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Rows from ``start``, and columns from ``start`` on: every pair once."""
        step = max(1, min(ROWS, CHUNK // self.num_tokens))
        for start in range(0, self.num_tokens, step):
            yield start, self.units[start : start + step] @ self.units[start:].T
