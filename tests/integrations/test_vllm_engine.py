"""What batches ask of vLLM's engine, without vLLM."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from tokenfuse.cli import app
from tokenfuse.config import get_configuration
from tokenfuse.errors import ConfigError
from tokenfuse.inference.inputs import video_inputs
from tokenfuse.inference.video import read_video
from tokenfuse.integrations.vllm_engine import (
    engine_options,
    load_processor,
    prompt,
    sampling_options,
    uncompressed_length,
    visual_tokens,
)
from tokenfuse.micro import CHECKPOINT, SAMPLE


def test_a_configuration_travels_in_the_overrides_of_the_model():
    chosen = get_configuration("ttf", keep_ratio=0.33)
    made = engine_options(chosen, {"max_model_len": 9, "hf_overrides": {"a": 1}})
    assert made["max_model_len"] == 9
    assert made["hf_overrides"]["a"] == 1
    described = made["hf_overrides"]["tokenfuse"]
    assert get_configuration(described) == chosen
    json.dumps(described)
    assert "hf_overrides" not in engine_options(None, {})


def test_a_strategy_that_vllm_cannot_have_is_refused_before_the_engine_starts():
    with pytest.raises(ConfigError, match="acts inside the LLM"):
        engine_options(get_configuration("fastv"), {})


@pytest.mark.parametrize(("frames", "size"), [(16, (96, 96)), (5, (64, 120)), (1, (96, 96))])
def test_the_length_without_compression_is_that_of_the_processor(frames, size):
    processor = load_processor(CHECKPOINT)
    video = read_video(SAMPLE, frames=frames)
    resized = np.zeros((len(video.frames), *size, 3), dtype=np.uint8)
    video = replace(video, frames=resized)
    whole = video_inputs(processor, video, "What?")["input_ids"][0].tolist()
    visual = visual_tokens(processor, video)
    assert whole.count(processor.video_token_id) == visual
    kept = whole.index(processor.video_token_id)
    short = [token for i, token in enumerate(whole) if token != whole[kept] or i == kept]
    assert uncompressed_length(processor, visual, short) == len(whole)


def test_a_prompt_shows_the_frames_that_were_read():
    made = prompt(load_processor(CHECKPOINT), read_video(SAMPLE, frames=4), "What color?")
    assert "What color?" in made["prompt"]
    assert made["prompt"].count("<|video_pad|>") == 1
    ((frames, about),) = made["multi_modal_data"]["video"]
    assert len(frames) == len(about["frames_indices"]) == 4
    assert about["do_sample_frames"] is False


def test_sampling_is_greedy_and_repeats_as_the_checkpoint_says(tmp_path):
    greedy = {"temperature": 0.0, "max_tokens": 5}
    assert sampling_options(tmp_path, 5) == greedy
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.05}')
    assert sampling_options(tmp_path, 5) == greedy | {"repetition_penalty": 1.05}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--engine-set", "dtype=float32"], "expected --engine vllm or ray beside it"),
        (["--engine", "vllm", "--engine-set", "dtype"], "--engine-set dtype is not of the form"),
        (["--engine", "vllm", "--strategy", "ttf"], "depends on what is seen"),
        (["--engine", "ray", "--strategy", "fastv"], "acts inside the LLM"),
    ],
)
def test_what_no_row_can_be_answered_with_is_refused(more, words, tmp_path):
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"id": 1, "video": "a.mp4", "question": "What?"}\n')
    done = CliRunner().invoke(app, ["batch", str(questions), str(tmp_path / "a.jsonl"), *more])
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())
