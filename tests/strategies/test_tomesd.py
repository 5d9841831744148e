import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenfuse import VisualTokens, get_strategy
from tokenfuse.errors import ConfigError
from tokenfuse.ops.select import budget

pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def item(grid, seed=0):
    return VisualTokens.from_grid(randn(math.prod(grid), 6, seed=seed), grid)


def plan(tokens, keep_ratio=0.5, **options):
    made = get_strategy("tomesd", keep_ratio=keep_ratio, **options).plan(tokens)
    made.check(tokens.num_tokens)
    return made


def roots(made):
    """The survivor of each token, as a source index."""
    return made.survivors[made.target].tolist()


def merged_by_hand(frame, destinations, r):
    """The root of each token of one frame, from the definition."""
    root = list(range(len(frame)))
    units = torch.nn.functional.normalize(frame.double(), dim=-1)
    edges = []
    for i in range(len(frame)):
        if i not in destinations:
            similar = [float(units[i] @ units[j]) for j in destinations]
            edges.append((-max(similar), i, destinations[similar.index(max(similar))]))
    for _, i, j in sorted(edges)[:r]:
        root[i] = j
    return root


@pytest.mark.parametrize("grid", [(1, 4, 6), (1, 5, 7), (3, 4, 4)])
@pytest.mark.parametrize("keep", [0.9, 0.6, 0.5])
def test_the_most_similar_sources_merge_into_the_destinations_of_their_frame(grid, keep):
    t, h, w = grid
    tokens = item(grid)
    first = [i * w + j for i in range(0, h // 2 * 2, 2) for j in range(0, w // 2 * 2, 2)]
    removed = t * h * w - budget(keep, t * h * w)
    made = torch.tensor(roots(plan(tokens, keep, destination="first"))).view(t, h * w)
    lost = [sum(root != i for i, root in enumerate(row.tolist())) for row in made - _starts(grid)]
    assert sum(lost) == removed
    assert max(lost) - min(lost) <= 1
    for frame, row, r in zip(tokens.frames.flatten(1, 2), made - _starts(grid), lost, strict=True):
        assert row.tolist() == merged_by_hand(frame, first, r)


def _starts(grid):
    return torch.arange(grid[0])[:, None] * grid[1] * grid[2]


@pytest.mark.parametrize("destination", ["random", "first"])
@pytest.mark.parametrize(("sy", "sx"), [(2, 2), (2, 3), (1, 2), (4, 1)])
def test_one_destination_stays_in_each_cell(destination, sy, sx):
    t, h, w = grid = (2, 9, 8)
    cells = t * (h // sy) * (w // sx)
    made = plan(item(grid), cells / (t * h * w), sx=sx, sy=sy, destination=destination)
    frame, row, column = (made.survivors // (h * w), made.survivors // w % h, made.survivors % w)
    cell = (frame * (h // sy) + row // sy) * (w // sx) + column // sx
    assert sorted(cell.tolist()) == list(range(cells))
    if destination == "first":
        assert not (row % sy).any()
        assert not (column % sx).any()


def test_the_draw_reaches_every_place_of_a_cell():
    kept = plan(item((1, 20, 20)), 0.25).survivors
    places = set((kept // 20 % 2 * 2 + kept % 2).tolist())
    assert places == {0, 1, 2, 3}


def test_the_draw_depends_on_the_seed_and_is_the_same_for_all_frames():
    grid = (3, 6, 6)
    kept = plan(item(grid), 0.25).survivors
    assert torch.equal(kept, plan(item(grid, seed=9), 0.25).survivors)
    assert not torch.equal(kept, plan(item(grid), 0.25, seed=1).survivors)
    assert torch.equal(kept.view(3, -1) - _starts(grid), kept[:9].expand(3, -1))


def test_the_global_generator_has_no_part_in_it():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    plan(item((1, 6, 6)))
    assert torch.equal(torch.get_rng_state(), before)


def test_merging_and_unmerging():
    tokens = item((1, 8, 8))
    made = plan(tokens)
    merged = made.fuse(tokens.features)
    full = made.expand(merged)
    torch.testing.assert_close(made.fuse(full), merged)
    alone = made.sizes[made.target] == 1
    assert alone.any()
    assert torch.equal(full[alone], tokens.features[alone])
    assert made.sizes.sum() == 64


def test_a_survivor_is_the_plain_mean_of_itself_and_what_it_absorbed():
    tokens = item((2, 4, 4))
    short = get_strategy("tomesd", keep_ratio=0.1).compress(tokens)
    for slot, row in enumerate(short.features):
        torch.testing.assert_close(row, tokens.features[short.plan.target == slot].mean(0))


def test_a_grid_that_the_cells_do_not_divide():
    made = plan(item((1, 63, 63)), 0.3)
    assert made.num_kept == budget(0.3, 63 * 63)


def test_below_one_destination_per_cell_the_grid_of_cells_is_merged_again():
    tokens = item((2, 8, 8))
    made = plan(tokens, 1 / 16, destination="first")
    places = [32 * i + 4 * j for i in range(2) for j in range(2)]
    assert made.survivors.tolist() == places + [64 + place for place in places]
    first = roots(plan(tokens, 1 / 4, destination="first"))
    left = sorted(set(first))
    means = torch.stack(
        [tokens.features[torch.tensor([root == s for root in first])].mean(0) for s in left]
    )
    expected = []
    for frame in range(2):
        second = merged_by_hand(means[16 * frame : 16 * frame + 16], [0, 2, 8, 10], 12)
        expected += [left[16 * frame + place] for place in second]
    assert roots(made) == [expected[left.index(root)] for root in first]


@pytest.mark.parametrize("destination", ["random", "first"])
def test_frames_merge_with_each_other_only_when_each_is_one_token(destination):
    grid = (4, 2, 2)
    each = plan(item(grid), 4 / 16, destination=destination)
    assert (torch.tensor(roots(each)) // 4).tolist() == [i // 4 for i in range(16)]
    for count in (1, 2, 3):
        fewer = plan(item(grid), count / 16, destination=destination)
        assert fewer.num_kept == count
        # What one frame is merged into stays together.
        assert (fewer.target.view(4, 4) == fewer.target.view(4, 4)[:, :1]).all()


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 2)]),
    st.sampled_from(["random", "first"]),
    st.data(),
)
def test_every_count_can_be_met(grid, cell, destination, data):
    n = math.prod(grid)
    kept = data.draw(st.integers(1, n))
    made = plan(item(grid), kept / n, sx=cell[0], sy=cell[1], destination=destination)
    assert made.num_kept == kept
    assert made.sizes.sum() == n


@pytest.mark.parametrize("features", [torch.zeros(32, 4), torch.ones(32, 4)])
def test_tokens_that_tell_nothing_merge_all_the_same(features):
    for kept in range(1, 33):
        short = get_strategy("tomesd", keep_ratio=kept / 32).compress(
            VisualTokens.from_grid(features, (2, 4, 4))
        )
        assert torch.equal(short.features, features[:kept])


def test_a_cell_of_one_place_is_refused():
    with pytest.raises(ConfigError, match="nothing to merge; make one of them 2"):
        get_strategy("tomesd", sx=1, sy=1)


@pytest.mark.parametrize(
    ("keep", "pairs"), [(1.0, 0), (0.5, 2 * 12 * 4), (1 / 16, 2 * 12 * 4 + 2 * 3 * 1)]
)
def test_flops_count_the_pairs_compared(keep, pairs):
    assert get_strategy("tomesd", keep_ratio=keep).matching_flops((2, 4, 4), 10) == pairs * 10
