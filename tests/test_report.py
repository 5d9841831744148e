"""A report's figures against figures worked out by hand, and how people read them."""

from types import SimpleNamespace

import pytest

import tokenfuse
from tokenfuse import Report
from tokenfuse.costs import FLOPS_FORMULA, flops, kv_cache_bytes, prefill_flops, size, versions
from tokenfuse.report import ItemReport

DENSE = SimpleNamespace(
    num_hidden_layers=2,
    hidden_size=8,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=16,
)
# Heads of a width of their own, four queries to one key.
GROUPED = SimpleNamespace(
    num_hidden_layers=3,
    hidden_size=8,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=4,
    intermediate_size=16,
)
EXPERTS = SimpleNamespace(
    num_hidden_layers=2,
    hidden_size=8,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=1000,
    moe_intermediate_size=4,
    num_experts=64,
    num_experts_per_tok=3,
)


def video(after, grid=(2, 2, 3), modality="video"):
    """An item that keeps ``after`` tokens of each frame."""
    return ItemReport(
        modality=modality,
        grid=grid,
        tokens_before=grid[0] * grid[1] * grid[2],
        tokens_after=sum(after),
        frame_tokens_after=list(after),
    )


def report(*items, **values):
    """A report on ``items`` with figures that differ from one another."""
    return Report(
        **{
            "strategy": {"strategy": "ttf", "threshold": 0.7},
            "adapter": "qwen3_vl",
            "items": items,
            "prompt_before": [20, 18],
            "prompt_after": [13, 18],
            "matching_flops": 1_500,
            "prefill_flops_before": 4_000_000,
            "prefill_flops_after": 2_500_000,
            "kv_cache_bytes_before": 999_900,
            "kv_cache_bytes_after": 650,
            "plan_ms": 1.25,
            "realign_ms": 0.5,
            "encode_ms": 30.0,
            "versions": {"tokenfuse": "0"},
            **values,
        }
    )


# Accounting


@pytest.mark.parametrize(
    ("config", "lengths", "expected"),
    [
        # q, k, v, o: 4 * 8 * 8; feed forward: 3 * 8 * 16; attention: 5 * 5 * 8.
        (DENSE, [5], 2 * (5 * (256 + 384) + 200)),
        (DENSE, [5, 3], 2 * (5 * 640 + 200) + 2 * (3 * 640 + 72)),
        # q and o: 2 * 8 * 16; k and v: 2 * 8 * 4; feed forward: 3 * 8 * 16; attention: 25 * 16.
        (GROUPED, [5], 3 * (5 * (256 + 64 + 384) + 400)),
        # Three of the 64 experts, each 4 wide: 3 * 8 * 12.
        (EXPERTS, [5], 2 * (5 * (256 + 288) + 200)),
        (DENSE, [], 0),
    ],
)
def test_prefill_flops_by_hand(config, lengths, expected):
    assert prefill_flops(config, lengths) == expected


@pytest.mark.parametrize(
    ("config", "lengths", "element_bytes", "expected"),
    [
        (DENSE, [5], 2, 2 * 2 * 8 * 5 * 2),
        (DENSE, [5, 3], 4, 2 * 2 * 8 * 8 * 4),
        (GROUPED, [5], 2, 2 * 3 * 4 * 5 * 2),
        (EXPERTS, [5], 2, 2 * 2 * 8 * 5 * 2),
    ],
)
def test_kv_cache_bytes_by_hand(config, lengths, element_bytes, expected):
    assert kv_cache_bytes(config, lengths, element_bytes) == expected


def test_a_head_width_of_none_is_worked_out():
    config = SimpleNamespace(**vars(DENSE), head_dim=None)
    assert prefill_flops(config, [5]) == prefill_flops(DENSE, [5])
    assert kv_cache_bytes(config, [5], 2) == kv_cache_bytes(DENSE, [5], 2)


def test_the_formula_counts_what_the_function_counts():
    formula = FLOPS_FORMULA.partition(": ")[2].partition(", causal")[0].replace("^", "**")
    names = {"layers": 3, "L": 5, "h": 8, "q": 16, "kv": 4, "f": 16}
    assert eval(formula, {}, names) == prefill_flops(GROUPED, [5])


def test_ratios_are_over_all_items():
    both = report(video([6, 0]), video([4], grid=(1, 2, 2), modality="image"))
    assert (both.tokens_before, both.tokens_after) == (16, 10)
    assert both.keep_ratio == 0.625
    assert both.reduction == 0.375


def test_a_prompt_without_items_keeps_everything():
    none = report()
    assert (none.tokens_before, none.keep_ratio, none.reduction) == (0, 1.0, 0.0)


def test_versions_are_of_what_decides_the_figures():
    assert set(versions()) == {"tokenfuse", "python", "torch", "transformers"}
    assert versions()["tokenfuse"] == tokenfuse.__version__


# As text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (999_400, "999 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (999_900, "1 MB"),
        (999_999_999, "1 GB"),
        (3.7e12, "3.7 TB"),
        (1.5e15, "1500 TB"),
    ],
)
def test_sizes_have_three_digits_and_a_unit(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 FLOPs"),
        (999.9, "1 kFLOPs"),
        (156_000_000, "156 MFLOPs"),
        (999_900_000_000, "1 TFLOPs"),
        (2.5e15, "2.5 PFLOPs"),
        (2.5e19, "25000 PFLOPs"),
    ],
)
def test_flops_have_three_digits_and_a_unit(count, text):
    assert flops(count) == text


def test_a_report_reads_as_a_table():
    text = str(report(video([6, 1]), video([4], grid=(1, 2, 2), modality="image")))
    assert text.splitlines() == [
        "strategy      ttf on qwen3_vl",
        "visual tokens 16 -> 11 (31.2% removed)",
        "prompt        20 + 18 -> 13 + 18 tokens",
        "KV cache      1 MB -> 650 B",
        "prefill       4 MFLOPs -> 2.5 MFLOPs",
        "matching      1.5 kFLOPs in 1.2 ms, realignment 0.5 ms",
        "video 0: 12 -> 7; of 6 per frame: 6 1",
        "image 1: 4 -> 4; of 4 per frame: 4",
    ]


def test_a_report_gives_the_reason_for_an_uncompressed_prompt():
    assert "not compressed" not in str(report(video([6, 1])))
    reason = "the prompt has no image or video"
    assert str(report(reason=reason)).splitlines()[-1] == f"not compressed: {reason}"


def test_a_report_says_slower_where_matching_costs_more_than_it_saves():
    saved = {"prefill_flops_before": 4_000, "prefill_flops_after": 3_000}
    assert "slower" not in str(report(video([6, 5]), matching_flops=1_000, **saved))
    assert "slower: matching costs more" in str(
        report(video([6, 5]), matching_flops=1_001, **saved)
    )


# As JSON


def test_a_report_survives_json():
    made = report(video([6, 0]), reason="none", encode_ms=1 / 3)
    text = made.model_dump_json()
    again = Report.model_validate_json(text)
    assert again == made
    assert again.model_dump_json() == text
    assert again.items[0].grid == (2, 2, 3)


def test_json_holds_the_figures_that_are_worked_out():
    dumped = report(video([6, 0])).model_dump(mode="json")
    assert dumped["keep_ratio"] == dumped["reduction"] == 0.5
    assert (dumped["tokens_before"], dumped["tokens_after"]) == (12, 6)
    assert dumped["flops_formula"] == FLOPS_FORMULA


def test_a_report_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        report(video([6, 0])).matching_flops = 0
