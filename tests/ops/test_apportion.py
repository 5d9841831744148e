"""Apportionment against its definition, in exact fractions."""

from fractions import Fraction

import pytest
import torch
from beartype import beartype
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import jaxtyped

from tokenfuse.ops import apportion as module

pytestmark = pytest.mark.usefixtures("one_thread")

apportion = jaxtyped(typechecker=beartype)(module.apportion)

WEIGHTS = st.one_of(
    st.integers(0, 6).map(float), st.floats(0, 1, width=32), st.sampled_from([1e-30, 1e30])
)


@st.composite
def cases(draw):
    """Weights, a total that the caps can take, the caps, the least."""
    weights = draw(st.lists(WEIGHTS, min_size=1, max_size=8))
    caps = [draw(st.integers(0, 12)) for _ in weights]
    total = draw(st.integers(0, sum(caps)))
    return weights, total, caps, draw(st.integers(0, 3))


def counts_of(weights, total, caps, least=0):
    return apportion(torch.tensor(weights), total, torch.tensor(caps), least).tolist()


def plainly(weights, total, caps, least):
    """The definition, round by round. Weights are whole numbers."""
    counts = [min(least, cap) for cap in caps]
    if sum(counts) > total:
        caps, counts = counts, [0] * len(caps)
    weights = weights if any(weights) else [1] * len(weights)
    base, free = list(counts), [i for i, cap in enumerate(caps) if cap > counts[i]]
    quotas = {}
    while free:
        rest = total - sum(base)
        quotas = {i: Fraction(rest * weights[i], sum(weights[j] for j in free)) for i in free}
        full = [i for i in free if base[i] + quotas[i] >= caps[i]]
        if not full:
            break
        for i in full:
            base[i] = caps[i]
        free = [i for i in free if i not in full]
    counts = [b + int(quotas[i]) if i in free else b for i, b in enumerate(base)]
    order = sorted(free, key=lambda i: (int(quotas[i]) - quotas[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


@given(cases())
def test_the_total_is_exact_and_no_cap_is_exceeded(case):
    _, total, caps, _ = case
    counts = counts_of(*case)
    assert sum(counts) == total
    assert all(0 <= count <= cap for count, cap in zip(counts, caps, strict=True))


@given(cases())
def test_every_row_gets_the_least_where_the_total_suffices_and_no_more_where_it_does_not(case):
    _, total, caps, least = case
    floors = [min(least, cap) for cap in caps]
    pairs = list(zip(counts_of(*case), floors, strict=True))
    if total >= sum(floors):
        assert all(count >= floor for count, floor in pairs)
    if total <= sum(floors):
        assert all(count <= floor for count, floor in pairs)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=8),
    st.integers(0, 3),
    st.data(),
)
def test_counts_are_the_largest_remainders_with_overflow_shared_out_again(rows, least, data):
    # The greatest is a power of two, so that whole numbers stay whole and ties stay ties.
    weights, caps = [16, *(w for w, _ in rows)], [5, *(c for _, c in rows)]
    total = data.draw(st.integers(0, sum(caps)))
    expected = plainly(weights, total, caps, least)
    assert counts_of([float(w) for w in weights], total, caps, least) == expected


@given(cases(), st.sampled_from([0.5, 4.0, 1024.0]))
def test_the_scale_of_the_weights_does_not_matter(case, scale):
    weights, total, caps, least = case
    weights = [w if w < 1e20 else 7.0 for w in weights if w == 0 or w > 1e-20]
    caps = caps[: len(weights)]
    if not weights:
        return
    total = min(total, sum(caps))
    scaled = [w * scale for w in weights]
    assert counts_of(scaled, total, caps, least) == counts_of(weights, total, caps, least)


@given(st.lists(st.integers(0, 9).map(float), min_size=1, max_size=8), st.data())
def test_of_rows_with_one_cap_the_heavier_never_gets_less(weights, data):
    total, least = data.draw(st.integers(0, 6 * len(weights))), data.draw(st.integers(0, 3))
    counts = apportion(torch.tensor(weights), total, 6, least).tolist()
    ordered = [count for _, count in sorted(zip(weights, counts, strict=True))]
    assert ordered == sorted(ordered)


def test_known_apportionments():
    # 10 seats over votes of 47 : 16 : 16 : 12 : 6 : 3 per cent, by the largest remainders.
    votes = [47000.0, 16000, 15900, 12000, 6000, 3100]
    assert counts_of(votes, 10, [10] * 6) == [5, 2, 1, 1, 1, 0]
    # What the full row cannot take goes to the others, 1 : 2.
    assert counts_of([100.0, 1, 2], 13, [4, 12, 12]) == [4, 3, 6]
    # The least comes first, the share of the rest on top.
    assert counts_of([1.0, 0, 1], 9, [9, 9, 9], 1) == [4, 1, 4]
    # A zero is served last; nothing but zeros are equals.
    assert counts_of([1.0, 0, 0], 6, [3, 9, 9]) == [3, 2, 1]
    assert counts_of([0.0, 0, 0], 7, [9, 9, 9]) == [3, 2, 2]
    # Too little for the least: by weight, and none twice.
    assert counts_of([1.0, 5, 4], 2, [9, 9, 9], 1) == [0, 1, 1]
    # More than the rows can take.
    assert counts_of([1.0, 2], 99, [3, 4], 1) == [3, 4]
    assert counts_of([1.0], 0, [3], 1) == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_and_a_whole_number_as_cap(dtype):
    counts = apportion(torch.tensor([1.0, 2.0, 1.0], dtype=dtype), 8, 6)
    assert counts.dtype == torch.long
    assert counts.tolist() == [2, 4, 2]


@given(st.integers(0, 2**32 - 1), st.integers(1, 700))
def test_the_total_is_exact_for_long_videos(seed, rows):
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) ** 9
    counts = apportion(weights, rows * 1024 // 7, 1024, 1)
    assert counts.sum() == rows * 1024 // 7
    assert counts.amin() >= 1
    assert counts.amax() <= 1024


def test_it_never_reads_a_value():
    weights = torch.empty(5, device="meta")
    assert apportion(weights, 7, 3, 1).shape == (5,)
    assert apportion(weights, 7, torch.empty(5, dtype=torch.long, device="meta")).shape == (5,)


@given(st.lists(st.integers(1, 10**4), min_size=1, max_size=8), st.integers(0, 10**5))
def test_whole_weights_share_by_exact_remainders(weights, total):
    shares = [Fraction(total * w, sum(weights)) for w in weights]
    whole = [int(share) for share in shares]
    order = sorted(range(len(weights)), key=lambda i: whole[i] - shares[i])
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    assert apportion(torch.tensor(weights), total, total).tolist() == whole


def test_whole_weights_of_zero_get_what_others_cannot_take():
    assert apportion(torch.tensor([0, 3]), 4, 4).tolist() == [0, 4]
    assert apportion(torch.tensor([0, 3]), 6, 4).tolist() == [2, 4]
    assert apportion(torch.tensor([0, 0]), 3, 4).tolist() == [2, 1]
