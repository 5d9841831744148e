"""Density-peaks clustering against its definition, point by point in double precision."""

import math

import pytest
import torch
from beartype import beartype
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import jaxtyped

from tokenfuse.ops import cluster
from tokenfuse.ops.select import top_per_row

pytestmark = pytest.mark.usefixtures("one_thread")

checked = jaxtyped(typechecker=beartype)
density_peaks, nearest_centre = checked(cluster.density_peaks), checked(cluster.nearest_centre)

SEEDS = st.integers(0, 2**32 - 1)


def gap(x, i, j):
    return (x[i] - x[j]).square().mean().item()


def reference(x, valid, neighbours):
    """Log scores of the points of one row, -inf for those that are not valid or worth nothing."""
    x, points = x.double(), [i for i, ok in enumerate(valid.tolist()) if ok]
    density = {}
    for i in points:
        near = sorted(gap(x, i, j) for j in points)[:neighbours]
        density[i] = -sum(near) / len(near)
    most = max((gap(x, i, j) for i in points for j in points), default=0)
    scores = [-math.inf] * len(x)
    for i in points:
        denser = [j for j in points if (density[j], -j) > (density[i], -i)]
        h = min((gap(x, i, j) for j in denser), default=most)
        scores[i] = math.log(h) / 2 + density[i] if h else -math.inf
    return scores


@st.composite
def rows(draw):
    rng = torch.Generator().manual_seed(draw(SEEDS))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 14), st.integers(1, 6)))
    x = torch.randn(shape, generator=rng, dtype=torch.float64) * draw(st.sampled_from([0.1, 1, 30]))
    valid = torch.rand(shape[:2], generator=rng) < draw(st.sampled_from([0.5, 1.0]))
    return x.float(), valid, draw(st.integers(1, 20))


@st.composite
def letters(draw):
    """Rows of few different points, whose distances fp32 holds exactly; many are equal.

    At a scale of 64 the density of most is exp(-1000) or less, which is 0.
    """
    rng = torch.Generator().manual_seed(draw(SEEDS))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 4, 8])))
    x = torch.randint(-2, 3, shape, generator=rng) * draw(st.sampled_from([1.0, 64.0]))
    valid = torch.rand(shape[:2], generator=rng) < draw(st.sampled_from([0.5, 1.0]))
    return x, valid, draw(st.integers(1, 14))


@given(letters())
def test_scores_are_density_times_distance_to_the_nearest_denser_point(case):
    x, valid, neighbours = case
    scores = density_peaks(x, valid, neighbours)
    assert (scores[~valid] == -math.inf).all()
    assert not scores.isnan().any()
    for row, mask, got in zip(x, valid, scores.double().tolist(), strict=True):
        for point, (a, b) in enumerate(zip(got, reference(row, mask, neighbours), strict=True)):
            worthless = a == float(cluster.WORST) and mask[point]
            assert b == -math.inf if worthless else a == pytest.approx(b, rel=1e-5, abs=1e-5)


@given(rows(), st.integers(1, 60))
def test_the_size_of_a_chunk_changes_nothing(case, chunk):
    x, valid, neighbours = case
    centres = top_per_row(density_peaks(x, valid, neighbours), valid.sum(-1).clamp_max(3))
    expected = density_peaks(x, valid, neighbours), nearest_centre(x, centres)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "CHUNK", chunk)
        scores, home = density_peaks(x, valid, neighbours), nearest_centre(x, centres)
    torch.testing.assert_close(scores, expected[0], rtol=1e-4, atol=1e-3)
    assert torch.equal(home, expected[1])


@given(rows())
def test_points_that_are_not_valid_have_no_say(case):
    x, valid, neighbours = case
    other = torch.where(valid[..., None], x, 7 - x)
    assert torch.equal(density_peaks(x, valid, neighbours), density_peaks(other, valid, neighbours))


@given(rows())
def test_every_point_has_the_nearest_centre_and_a_centre_has_itself(case):
    x, centres, _ = case
    home = nearest_centre(x, centres)
    for row, mask, found in zip(x.double(), centres, home.tolist(), strict=True):
        those = mask.nonzero().flatten().tolist()
        for i, j in enumerate(found if those else []):
            assert j in those
            assert i not in those or i == j
            near = min(gap(row, i, k) for k in those)
            assert gap(row, i, j) <= near * (1 + 1e-3) + 1e-4 * row.square().mean()


@given(st.integers(1, 20), st.integers(1, 9), st.sampled_from([0.0, 1.0, 1e-25, 1e20]))
def test_of_identical_points_the_first_are_chosen(n, neighbours, value):
    x = torch.full((2, n, 5), value)
    valid = torch.ones(2, n, dtype=torch.bool)
    scores = density_peaks(x, valid, neighbours)
    best = top_per_row(scores, torch.tensor([1, min(3, n)]))
    assert best.nonzero().tolist() == [[0, 0], *([1, i] for i in range(min(3, n)))]
    home = nearest_centre(x, best)
    assert home[0].tolist() == [0] * n
    assert home[1, 3:].tolist() == [0] * max(0, n - 3)


@given(SEEDS, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_separate_groups_get_one_centre_each(seed, dtype):
    rng = torch.Generator().manual_seed(seed)
    group = torch.arange(4).repeat(6)
    x = 10 * torch.eye(4, 8)[group] + 0.3 * torch.randn(24, 8, generator=rng)
    valid = torch.ones(1, 24, dtype=torch.bool)
    best = top_per_row(density_peaks(x[None].to(dtype), valid, 4), torch.tensor([4]))
    assert sorted(group[best[0]].tolist()) == [0, 1, 2, 3]
    home = nearest_centre(x[None].to(dtype), best)[0]
    assert torch.equal(group[home], group)


@given(rows())
def test_the_dtype_of_features_that_it_holds_does_not_matter(case):
    x, valid, neighbours = case
    half = x.bfloat16()
    wide = density_peaks(half.float(), valid, neighbours)
    assert torch.equal(density_peaks(half, valid, neighbours), wide)


# --- rounding is never coarser than the signal --------------------------------------------------


def groups(points, count, neighbours):
    x = points[None]
    valid = torch.ones(1, len(points), dtype=torch.bool)
    best = top_per_row(density_peaks(x, valid, neighbours), torch.tensor([count]))
    return nearest_centre(x, best)[0]


def test_points_far_from_zero_are_told_apart():
    x = 1000 + torch.tensor([0, 0.1, 0.2, 1, 1.1, 1.2, 2, 2.1, 2.2])[:, None]
    home = groups(x, 3, 3)
    assert [home[i : i + 3].unique().numel() for i in (0, 3, 6)] == [1, 1, 1]
    assert home.unique().numel() == 3


def exact_groups(points, count, neighbours):
    """Density peaks in fp64, one point at a time."""
    d = (points[:, None] - points[None]).square().mean(-1)
    density = -d.sort(-1).values[:, :neighbours].mean(-1)
    scores = []
    for i in range(len(points)):
        denser = [
            j
            for j in range(len(points))
            if density[j] > density[i] or (density[j] == density[i] and j < i)
        ]
        gap = min((d[i, j] for j in denser), default=d.max())
        scores.append(0.5 * gap.log() + density[i])
    centres = torch.stack(scores).argsort(descending=True, stable=True)[:count].sort().values
    home = centres[d[:, centres].argmin(-1)]
    return home.scatter(0, centres, centres)


@pytest.mark.parametrize("alike", [0.9992, 0.9999, 0.99999, 0.999999])
def test_frames_of_a_still_video_that_drifts_are_grouped_as_in_double_precision(alike):
    agree = 0
    for seed in range(40):
        rng = torch.Generator().manual_seed(seed)
        step = (2 * (1 - alike)) ** 0.5
        x = [torch.randn(256, generator=rng).double()]
        for _ in range(15):
            x.append(x[-1] + step * torch.randn(256, generator=rng).double())
        # fp32 as strategies get it; the exact groups are those of the same numbers.
        frames = torch.stack(x).float()
        agree += torch.equal(groups(frames, 4, 7), exact_groups(frames.double(), 4, 7))
    assert agree == 40
