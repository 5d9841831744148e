"""Statistics of two runs on the same questions: what compression costs, and how sure that is."""

from __future__ import annotations

from math import comb
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tokenfuse.errors import ConfigError

Right = npt.NDArray[np.bool_]
"""Whether the answer to each question is right, ``(n,)``."""


class Interval(NamedTuple):
    """A share and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def retention(before: Right, after: Right) -> float:
    """Right answers with compression ÷ right answers without, on the same questions.

    NaN where no answer was right without.

    Raises ConfigError unless the runs are of the same questions.
    """
    _check(before, after)
    return float(after.sum() / before.sum()) if before.any() else float("nan")


def bootstrap(
    before: Right, after: Right, *, draws: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Retention with its percentile bootstrap interval: questions are drawn, with both answers.

    Draws in which no answer is right without compression say nothing and are left out.

    Raises ConfigError unless the runs are of the same questions.
    """
    value = retention(before, after)
    # A draw of n questions is a multinomial count of the four kinds of pairs.
    kinds = np.bincount(2 * before.astype(int) + after.astype(int), minlength=4)
    if not len(before):
        return Interval(value, float("nan"), float("nan"))
    drawn = np.random.default_rng(seed).multinomial(len(before), kinds / len(before), draws)
    was, still = drawn[:, 2] + drawn[:, 3], drawn[:, 1] + drawn[:, 3]
    shares = still[was > 0] / was[was > 0]
    if not len(shares):
        return Interval(value, float("nan"), float("nan"))
    tail = (1 - confidence) / 2
    low, high = np.quantile(shares, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def mcnemar(before: Right, after: Right) -> float:
    """Exact two-sided McNemar test: how likely so uneven a change is, if compression costs nothing.

    Only questions whose answer became right or wrong count, each way being equally likely.

    Raises ConfigError unless the runs are of the same questions.
    """
    _check(before, after)
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    changed, fewer = lost + gained, min(lost, gained)
    tail: float = sum(comb(changed, k) for k in range(fewer + 1)) / 2**changed
    return min(1.0, 2 * tail)


def _check(before: Right, after: Right) -> None:
    if before.shape != after.shape or before.ndim != 1:
        raise ConfigError(
            f"{before.shape} answers without compression stand beside {after.shape} with it; "
            "expected one of each to every question, in the same order"
        )
