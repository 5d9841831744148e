"""What the plug-in for vLLM decides without vLLM: strategies, counts and positions.

Inside vLLM it is held against transformers by ``benchmarks/vllm_parity.py``.
"""

from math import prod
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenfuse import VisualTokens, get_strategy
from tokenfuse.errors import ConfigError, PlanError
from tokenfuse.inference.inputs import video_inputs
from tokenfuse.inference.load import load
from tokenfuse.inference.video import read_video
from tokenfuse.integrations._vllm_rows import (
    BASE,
    CARRIED,
    DIGITS,
    from_digits,
    to_digits,
    with_frames,
)
from tokenfuse.integrations._vllm_runner import _marked
from tokenfuse.integrations.vllm import choose, num_kept, strategy_of
from tokenfuse.micro import CHECKPOINT, SAMPLE


def config(**values):
    return SimpleNamespace(tokenfuse=values)


TAKEN = (
    *("divprune", "dycoke", "evs", "frame_subsample", "random"),
    *("tome", "tomesd", "ttf", "uniform", "vcast", "vidcom2"),
)


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_left_of_an_item_is_what_was_announced(name):
    strategy = strategy_of(config(strategy=name, keep_ratio=0.4))
    for modality, grid in (("image", (1, 6, 6)), ("video", (4, 6, 6)), ("video", (7, 5, 3))):
        rows = torch.randn(prod(grid), 3 * 8)
        chosen = choose(strategy, modality, rows, grid, 8)
        assert chosen.rows.shape == (num_kept(strategy, modality, grid), 24)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"strategy": "ttf"}, "depends on what is seen"),
        ({"video": "ttf", "image": {"strategy": "uniform"}}, "depends on what is seen"),
        ({"strategy": "fastv"}, "acts inside the LLM"),
        ({"strategy": "pixelprune"}, "acts in or before the tower"),
        ({"strategy": "cdpruner", "keep_ratio": 0.3}, "reads the question"),
        ({"strategy": "visionzip", "keep_ratio": 0.3}, "reads the tower's attention"),
        ({"strategy": "ttf", "keep_ratio": 0.3, "positions": "contiguous"}, "positions: keep"),
        ({"strategy": "tff", "keep_ratio": 0.3}, 'did you mean "ttf"'),
    ],
)
def test_what_vllm_cannot_do_is_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        strategy_of(config(**values))


def test_a_model_without_a_configuration_is_left_as_it_is():
    assert strategy_of(SimpleNamespace()) is None
    with pytest.raises(ConfigError, match="expected a mapping"):
        strategy_of(SimpleNamespace(tokenfuse="ttf"))


def test_a_model_that_would_not_read_its_configuration_is_refused():
    class Runner:
        model_config = SimpleNamespace(hf_config=config(strategy="ttf", keep_ratio=0.3))
        is_multimodal_pruning_enabled = False

        def __init__(self, model):
            self.model = model

        def get_model(self):
            return self.model

        def load_model(self):
            return "loaded"

    load = _marked(Runner.load_model)
    known = Runner(SimpleNamespace(tokenfuse=get_strategy("ttf", keep_ratio=0.3)))
    assert load(known) == "loaded"
    assert known.is_multimodal_pruning_enabled
    with pytest.raises(ConfigError, match="does not know this vLLM's SimpleNamespace"):
        load(Runner(SimpleNamespace()))
    Runner.model_config = SimpleNamespace(hf_config=SimpleNamespace())
    plain = Runner(SimpleNamespace(tokenfuse=None))
    assert load(plain) == "loaded"
    assert not plain.is_multimodal_pruning_enabled


def test_another_number_than_was_announced_is_an_error(monkeypatch):
    strategy = get_strategy("uniform", keep_ratio=0.5)
    monkeypatch.setattr(type(strategy), "num_kept", lambda self, grid: 7)
    with pytest.raises(PlanError, match="has announced 7"):
        choose(strategy, "video", torch.randn(16, 4), (1, 4, 4), 4)


def test_levels_of_deepstack_are_fused_like_what_the_llm_reads():
    strategy = get_strategy("tome", keep_ratio=0.5)
    main, level = torch.randn(2, 64, 8)
    both = choose(strategy, "video", torch.cat([main, level], -1), (4, 4, 4), 8)
    plan = strategy.checked_plan(VisualTokens.from_grid(main, (4, 4, 4)))
    torch.testing.assert_close(both.rows[:, :8], strategy.fuse(plan, main))
    torch.testing.assert_close(both.rows[:, 8:], strategy.fuse(plan, level))


@given(
    values=st.lists(
        st.lists(st.integers(0, BASE**DIGITS - 1), min_size=CARRIED, max_size=CARRIED),
        min_size=1,
        max_size=9,
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_rows_carry_integers_exactly_in_every_dtype(values, dtype):
    whole = torch.tensor(values)
    assert torch.equal(from_digits(to_digits(whole).to(dtype)), whole)


@pytest.mark.parametrize("frames", [2, 7, 16])
def test_positions_of_a_video_are_those_of_transformers(frames):
    model, processor = load(CHECKPOINT)
    inputs = video_inputs(processor, read_video(SAMPLE, frames=frames), "What color?")
    theirs, _ = model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        video_grid_thw=inputs["video_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    theirs = theirs[-3:, 0].T
    ids = inputs["input_ids"][0]
    visual = ids == model.config.video_token_id
    text = torch.cumsum(~visual, 0) - 1
    text = torch.where(visual, -1, text)[:, None].expand(-1, 3)
    t, h, w = inputs["video_grid_thw"][0].tolist()
    assert torch.equal(with_frames(text, (t, h // 2, w // 2)), theirs)
