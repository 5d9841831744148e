"""A processor's inputs for one question and for many."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tokenfuse.errors import PromptError
from tokenfuse.inference.generate import answers
from tokenfuse.inference.inputs import batch_inputs, video_inputs
from tokenfuse.inference.load import load
from tokenfuse.inference.video import Video, read_video
from tokenfuse.micro import CHECKPOINT, SAMPLE
from tokenfuse.micro.build import build_processor
from tokenfuse.micro.tasks import make_clip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def loaded():
    return load(CHECKPOINT)


def test_frames_in_memory_are_a_video_like_that_of_a_file():
    read = read_video(SAMPLE)
    made = Video.from_frames(read.frames, read.fps)
    assert made.indices == read.indices == made.processor_indices()
    assert made.total_frames == read.total_frames
    assert made.timestamps == pytest.approx(read.timestamps)
    assert made.duration == pytest.approx(read.duration)


def test_the_processors_own_template_gives_the_same_with_the_options_of_a_video(loaded):
    _, processor = loaded
    video, question = read_video(SAMPLE, frames=10), "What color is the moving object?"
    shown = {"type": "video", "video": video.frames}
    messages = [{"role": "user", "content": [shown, {"type": "text", "text": question}]}]
    made = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=video.processor_options(),
    )
    for name, value in video_inputs(processor, video, question).items():
        assert torch.equal(made[name], value), name


def test_each_row_of_a_batch_is_padded_on_the_left_and_answered_as_alone(loaded, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(processor.tokenizer, "padding_side", "right")
    clips = [make_clip(1, patches=4, scene="count"), make_clip(2, patches=7, scene="motion")]
    questions = [clip.questions[0] for clip in clips]
    videos, texts = [clip.video for clip in clips], [question.text for question in questions]
    inputs = batch_inputs(processor, videos, texts)
    alone = [video_inputs(processor, *pair) for pair in zip(videos, texts, strict=True)]
    for row, one in enumerate(alone):
        ids = one["input_ids"][0]
        padding = inputs["input_ids"].shape[1] - len(ids)
        torch.testing.assert_close(inputs["input_ids"][row, padding:], ids)
        assert inputs["attention_mask"][row].tolist() == [0] * padding + [1] * len(ids)
    expected = [question.answer for question in questions]
    assert answers(model, processor, inputs, max_new_tokens=6) == expected
    assert [answers(model, processor, one, max_new_tokens=6)[0] for one in alone] == expected


def test_every_video_has_a_question(loaded):
    video = Video.from_frames(np.zeros((4, 32, 32, 3), np.uint8), fps=4)
    with pytest.raises(ValueError, match="shorter"):
        batch_inputs(loaded[1], [video, video], ["What?"])


@pytest.mark.parametrize(
    ("question", "named"),
    [
        ("What is <|video_pad|> here?", "<|video_pad|>"),
        ("<|im_end|>", "<|im_end|>"),
        ("a \udcff b", "expected UTF-8"),
    ],
)
def test_a_question_that_would_not_be_read_as_text_is_refused(question, named):
    video = Video.from_frames(np.zeros((2, 32, 32, 3), np.uint8), 2.0)
    with pytest.raises(PromptError, match=re.escape(named)):
        video_inputs(build_processor(), video, question)
