"""V-CAST against its definition."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tokenfuse.strategies import vcast
from tokenfuse.strategies.vcast import VCast
from tokenfuse.tokens import VisualTokens

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 2**32 - 1)


def video(grid, seed=0, width=8):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(*grid, width, generator=random) + torch.randn(width, generator=random)
    return VisualTokens.from_grid(x, grid)


def path(angles, h=3, w=4):
    """Frames whose mean points to these angles; the noise of each adds up to nothing."""
    angle = torch.tensor(angles)
    mean = torch.stack([angle.cos(), angle.sin()], -1)[:, None].float()
    random = torch.Generator().manual_seed(0)
    noise = 0.2 * torch.randn(len(angles), h * w // 2, 2, generator=random)
    x = torch.cat([mean + noise, mean - noise], 1)
    return VisualTokens.from_grid(x.view(-1, h, w, 2), (len(angles), h, w))


def cosine(a, b):
    return torch.cosine_similarity(a, b, dim=-1, eps=1e-6).item()


def plainly(tokens, config, count):
    """The definition with loops, in fp64; only where no frame is full and no choice is close."""
    t, h, w = tokens.grid
    x = tokens.features.double().view(t, h * w, -1)
    means = [frame.mean(0) for frame in x]
    g = [m / m.norm() for m in means]
    bends = [1.0] * t
    for f in range(1, t - 1):
        bends[f] = 1 - cosine(g[f] - g[f - 1], g[f + 1] - g[f])
    weights = [math.exp(b / config.temperature) for b in bends]
    base = 1 if count >= t else 0
    quotas = [(count - base * t) * v / sum(weights) for v in weights]
    assume(all(base + q < (h * w if base else 1) for q in quotas))
    counts = [base + int(q) for q in quotas]
    order = sorted(range(t), key=lambda f: (int(quotas[f]) - quotas[f], f))
    rests = sorted(q % 1 for q in quotas)
    close = [b - a for a, b in pairwise(rests)]
    assume(t < 3 or all(c > 1e-3 for c in close))
    for f in order[: count - sum(counts)]:
        counts[f] += 1
    kept = []
    for f in range(t):
        lengths = [token.norm().item() for token in x[f]]
        low, high = min(lengths), max(lengths)
        scores = [
            1 - cosine(token, means[f]) + (length - low) / ((high - low) or 1)
            for token, length in zip(x[f], lengths, strict=True)
        ]
        ordered = sorted(scores)
        assume(all(b - a > 1e-4 for a, b in pairwise(ordered)))
        best = sorted(range(h * w), key=lambda i: -scores[i])[: counts[f]]
        kept += sorted(f * h * w + i for i in best)
    return kept


@given(
    st.tuples(st.integers(1, 6), st.integers(2, 3), st.integers(2, 4)),
    SEEDS,
    st.sampled_from([0.3, 0.7, 2.0]),
    st.data(),
)
def test_survivors_are_those_of_plain_loops(grid, seed, temperature, data):
    n = math.prod(grid)
    count = data.draw(st.integers(1, max(1, n // 2)))
    config = VCast(keep_ratio=count / n, temperature=temperature)
    tokens = video(grid, seed)
    assert config.plan(tokens).survivors.tolist() == plainly(tokens, config, count)


@given(SEEDS, st.integers(1, 1000))
def test_the_count_is_exact_and_no_frame_is_lost_where_the_budget_holds_one_each(seed, thousandths):
    config, grid = VCast(keep_ratio=thousandths / 1000), (6, 3, 3)
    plan = config.plan(video(grid, seed))
    plan.check(54)
    assert plan.num_kept == config.num_kept(grid) == math.ceil(thousandths * 54 / 1000)
    assert plan.frame_counts(grid).count_nonzero() == min(6, plan.num_kept)


@pytest.mark.parametrize("angles", [[0.3], [0.0, 1.0]])
def test_one_or_two_frames_have_no_curvature_but_that_of_ends(angles):
    bends = vcast._curvature(path(angles).frames.flatten(1, 2).mean(1))
    assert bends.tolist() == [1.0] * len(angles)


def test_curvature_is_none_straight_on_and_two_on_the_way_back():
    straight = torch.tensor([[1.0, 0], [1, 0.01], [1, 0.02], [1, 0.01], [1, 0.01]])
    bends = vcast._curvature(straight)
    torch.testing.assert_close(bends, torch.tensor([1.0, 0, 2, 1, 1]), atol=1e-3, rtol=0)


def test_steps_of_rounding_size_are_no_steps():
    still = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).repeat(9, 1)
    jitter = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)) * 2**-24
    assert vcast._curvature(still * (1 + jitter)).tolist() == [1.0] * 9


def test_a_turn_keeps_more_tokens_than_a_straight_stretch():
    tokens = path([0.0, 0.2, 0.4, 0.6, 0.4, 0.2, 0.0])
    held = VCast(keep_ratio=0.4).plan(tokens).frame_counts(tokens.grid)
    assert held.argmax() == 3
    # Straight frames 1, 2, 4, 5; ends 0, 6 between them and the turn.
    assert held[[1, 2, 4, 5]].amax() < held[[0, 6]].amin() < held[3]


def test_a_higher_temperature_makes_frames_more_equal():
    tokens = path([0.0, 0.2, 0.4, 0.6, 0.4, 0.2, 0.0])
    spans = []
    for temperature in (0.3, 0.7, 100.0):
        plan = VCast(keep_ratio=0.4, temperature=temperature).plan(tokens)
        least, most = plan.frame_counts(tokens.grid).aminmax()
        spans.append((most - least).item())
    assert spans[0] > spans[1] > spans[2]
    assert spans[2] <= 1


def test_what_a_full_frame_cannot_take_is_shared_out_among_the_others():
    tokens = path([0.0, 0.2, 0.4, 0.6, 0.4, 0.2, 0.0])
    held = VCast(keep_ratio=0.8, temperature=0.2).plan(tokens).frame_counts(tokens.grid)
    assert held[[0, 3, 6]].tolist() == [12, 12, 12]
    assert held[[1, 2, 4, 5]].aminmax().max - held[[1, 2, 4, 5]].aminmax().min <= 1


def test_odd_and_long_tokens_survive():
    x = torch.ones(1, 2, 4, 4)
    x[0, 0, 1] = torch.tensor([1.0, 1, 1, -1])
    x[0, 1, 2] *= 5
    assert VCast(keep_ratio=2 / 8).plan(
        VisualTokens.from_grid(x, (1, 2, 4))
    ).survivors.tolist() == [
        1,
        6,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_lengths_do_not_count(dtype):
    # Signed permutations of one vector have one length, but for rounding.
    random = torch.Generator().manual_seed(0)
    base = torch.randn(64, generator=random)
    x = torch.stack([base[torch.randperm(64, generator=random)] for _ in range(12)]).to(dtype)
    assert not vcast._relative_length(x[None]).any()


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_equal_tokens_keep_the_lowest_indices_of_every_frame(value):
    tokens = VisualTokens.from_grid(torch.full((3, 2, 2, 4), value), (3, 2, 2))
    assert VCast(keep_ratio=0.5).plan(tokens).survivors.tolist() == [0, 1, 4, 5, 8, 9]
    assert VCast(keep_ratio=1 / 6).plan(tokens).survivors.tolist() == [0, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_fp32_whatever_the_dtype(dtype):
    narrow = video((5, 4, 4)).features.to(dtype)
    plans = [VCast().plan(VisualTokens.from_grid(x, (5, 4, 4))) for x in (narrow, narrow.float())]
    assert torch.equal(plans[0].survivors, plans[1].survivors)


def test_it_never_reads_a_value_and_counts_its_comparisons():
    for grid, count in [((4, 2, 3), 6), ((1, 2, 2), 1)]:
        x = torch.empty(*grid, 8, device="meta")
        assert VCast().plan(VisualTokens.from_grid(x, grid, check=False)).num_kept == count
    assert VCast().matching_flops((4, 2, 3), 8) == (24 + 2) * 8
    assert VCast().matching_flops((1, 2, 3), 8) == 6 * 8
