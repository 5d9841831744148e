"""The rules of realignment, as properties of pure tensor functions."""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tokenfuse.prompt.realign import (
    count_positions,
    next_position_delta,
    padding_side,
    realign_positions,
    shorten,
)

ROPES = (1, 3, 4)


@st.composite
def prompts(draw, side=None):
    """A padded batch: mask, what is visual, what is kept, positions, and the side of the padding.

    A visual block of ``n`` tokens moves the positions on by less than ``n``, as M-RoPE does.
    """
    side = side or draw(st.sampled_from(["left", "right"]))
    ropes = draw(st.sampled_from(ROPES))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        blocks = draw(st.lists(st.integers(1, 6), max_size=4))
        visual, rope, at = [], [], 0
        for size in blocks:
            text = draw(st.integers(0, 3))
            visual += [False] * text + [True] * size
            rope += [(at + i,) * 3 for i in range(text)]
            at += text
            width = draw(st.integers(1, size))
            rope += [(at, at + i // width, at + i % width) for i in range(size)]
            at += max(width, -(-size // width))
        text = draw(st.integers(1, 4))
        visual += [False] * text
        rope += [(at + i,) * 3 for i in range(text)]
        keep = [not v or draw(st.booleans()) for v in visual]
        rows.append((visual, keep, rope))
    extra = draw(st.integers(0, 2))
    length = max(len(visual) for visual, _, _ in rows) + extra
    mask, visual, keep = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    positions = torch.zeros(4, len(rows), length, dtype=torch.long)
    for i, (v, k, p) in enumerate(rows):
        where = slice(length - len(v), length) if side == "left" else slice(0, len(v))
        mask[i, where] = 1
        visual[i, where], keep[i, where] = torch.tensor(v).long(), torch.tensor(k).long()
        positions[0, i, where] = torch.arange(len(v))
        positions[1:, i, where] = torch.tensor(p).T
    if ropes == 1:
        positions = positions[1]
    elif ropes == 3:
        positions = positions[1:]
    if draw(st.booleans()):
        mask = mask.bool()
    # What the plans say about padding must not matter.
    keep = keep.bool() | ((mask == 0) & draw(st.booleans()))
    return mask, visual.bool(), keep, positions, side


def rope_of(positions):
    """The rows that rotate, ``(R, B, L)``."""
    return positions[None] if positions.ndim == 2 else positions[-3:]


def each_row(mask, keep, new):
    """Kept columns of the long row, and the columns that hold them in the short one."""
    for i in range(len(mask)):
        kept = (mask[i].bool() & keep[i]).nonzero().flatten()
        yield i, kept, new.valid[i].nonzero().flatten()


@given(prompts())
def test_survivors_keep_their_order_and_positions_and_nothing_else_is_lost(case):
    mask, visual, keep, positions, side = case
    new = shorten(mask, keep, side)
    short = realign_positions(positions, new, "keep")
    ids = torch.arange(mask.numel()).view(mask.shape)
    taken = new.take(ids, -1)
    assert short.shape == (*positions.shape[:-1], new.columns.shape[1])
    assert (taken[~new.valid] == -1).all()
    for i, kept, columns in each_row(mask, keep, new):
        assert taken[i, columns].tolist() == ids[i, kept].tolist()
        assert torch.equal(rope_of(short)[:, i, columns], rope_of(positions)[:, i, kept])
        text = (mask[i].bool() & ~visual[i]).nonzero().flatten()
        assert set(text.tolist()) <= set(kept.tolist())
        if positions.ndim == 3 and len(positions) == 4:
            assert short[0, i, columns].tolist() == list(range(len(columns)))


@given(prompts())
def test_the_batch_is_as_short_as_its_longest_row_and_padded_on_the_asked_side(case):
    mask, _, keep, _, side = case
    new = shorten(mask, keep, side)
    counts = (mask.bool() & keep).sum(-1)
    assert new.columns.shape[1] == int(counts.max())
    assert torch.equal(new.valid.sum(-1), counts)
    assert torch.equal(new.valid, new.valid.sort(-1, descending=side == "right").values)


@given(prompts())
def test_the_next_token_gets_the_position_of_the_uncompressed_run(case):
    mask, _, keep, positions, side = case
    same = shorten(mask, torch.ones_like(keep), side)
    new = shorten(mask, keep, side)
    before = next_position_delta(realign_positions(positions, same, "keep"), same.valid)
    after = next_position_delta(realign_positions(positions, new, "keep"), new.valid)
    length, shorter = mask.bool().sum(-1, keepdim=True), new.valid.sum(-1, keepdim=True)
    assert torch.equal(after + shorter, before + length)
    assert torch.equal(after, before + length - shorter)
    for i in range(len(mask)):
        last = rope_of(positions)[:, i][:, mask[i].bool()].max()
        assert int(after[i] + shorter[i]) == int(last) + 1


@given(prompts())
def test_keeping_all_changes_nothing_but_superfluous_padding(case):
    mask, _, keep, positions, side = case
    new = shorten(mask, torch.ones_like(keep), side)
    short = realign_positions(positions, new, "keep")
    assert torch.equal(new.valid.sum(-1), mask.bool().sum(-1))
    for i, kept, columns in each_row(mask, torch.ones_like(keep), new):
        assert torch.equal(short[..., i, columns], positions[..., i, kept])


@given(prompts(), st.sampled_from(["keep", "contiguous"]))
def test_a_batch_gives_what_its_rows_give_alone(case, policy):
    mask, _, keep, positions, side = case
    new = shorten(mask, keep, side)
    short = realign_positions(positions, new, policy)
    delta = next_position_delta(short, new.valid)
    for i in range(len(mask)):
        one = slice(i, i + 1)
        alone = shorten(mask[one], keep[one], side)
        single = realign_positions(positions[..., one, :], alone, policy)
        columns = new.valid[i].nonzero().flatten()
        assert alone.valid.all()
        assert torch.equal(short[..., i, columns], single[..., 0, :])
        assert torch.equal(delta[one], next_position_delta(single, alone.valid))


@given(prompts())
def test_contiguous_counts_every_row_without_gaps(case):
    mask, _, keep, positions, side = case
    new = shorten(mask, keep, side)
    short = realign_positions(positions, new, "contiguous")
    assert short.shape == (*positions.shape[:-1], new.columns.shape[1])
    for i, _, columns in each_row(mask, keep, new):
        for row in short.view(-1, *short.shape[-2:])[:, i, columns]:
            assert row.tolist() == list(range(len(columns)))
    assert (next_position_delta(short, new.valid) == 0).all()


@given(prompts())
def test_the_side_of_the_padding_is_found(case):
    mask, _, _, _, side = case
    assume(0 in mask)
    assert padding_side(mask) == side


def test_without_padding_the_side_is_that_which_generation_needs():
    assert padding_side(torch.ones(2, 5, dtype=torch.long)) == "left"


def test_holes_and_padding_on_both_sides_are_left_out():
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]])
    ids = torch.arange(15).view(3, 5)
    keep = torch.ones_like(mask, dtype=torch.bool)
    left, right = (shorten(mask, keep, side).take(ids, -1) for side in ("left", "right"))
    assert left.tolist() == [[1, 2, 4], [-1, 5, 6], [-1, 13, 14]]
    assert right.tolist() == [[1, 2, 4], [5, 6, -1], [13, 14, -1]]


def test_positions_are_exact_far_beyond_what_bf16_can_count():
    positions = torch.arange(100_001, 100_101).expand(3, 1, -1)
    mask = torch.ones(1, 100, dtype=torch.long)
    keep = (torch.arange(100) % 3 == 0)[None]
    new = shorten(mask, keep, "left")
    short = realign_positions(positions, new, "keep")
    assert short.dtype == torch.long
    assert short[0, 0].tolist() == list(range(100_001, 100_101, 3))


def test_counting_skips_padding():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]).bool()
    assert count_positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 0]]


def test_a_row_without_tokens_stays_empty():
    mask = torch.tensor([[0, 0, 0], [0, 1, 1]])
    new = shorten(mask, torch.ones(2, 3, dtype=torch.bool), "left")
    assert new.valid.tolist() == [[False, False], [True, True]]
    assert shorten(mask[:1], torch.ones(1, 3, dtype=torch.bool), "left").columns.shape[1] == 0
