"""Figures of one prompt under one strategy."""

from __future__ import annotations

import pytest
import torch

from tokenfuse.inference.measure import Measured


@pytest.mark.parametrize(
    ("times", "median"), [([3.0], 3.0), ([9.0, 1.0, 5.0], 5.0), ([4.0, 1.0, 9.0, 5.0], 4.0)]
)
def test_figures_are_those_of_one_run_the_one_of_median_time(times, median):
    timed = [(ms, f"the report of {ms}") for ms in times]
    found = Measured(None, "yes", torch.zeros(1), timed)
    assert (found.ttft_ms, found.report) == (median, f"the report of {median}")


def test_an_uncompressed_run_has_no_report():
    with pytest.raises(RuntimeError, match="has no report"):
        _ = Measured(None, "yes", torch.zeros(1), [(1.0, None)]).report
