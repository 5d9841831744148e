"""A processor's inputs for questions about videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenfuse.errors import PromptError, UnsupportedModelError, VideoError
from tokenfuse.inference.video import Video
from tokenfuse.prompt.inputs import PIXELS

Messages = Sequence[Mapping[str, Any]]
"""A conversation as chat templates take it."""


def video_inputs(processor: Any, video: Video, question: str) -> Any:
    """The processor's inputs for one question about one video, ready for ``generate``.

    Raises UnsupportedModelError where the processor takes no video.
    """
    return batch_inputs(processor, [video], [question])


def batch_inputs(processor: Any, videos: Sequence[Video], questions: Sequence[str]) -> Any:
    """The processor's inputs for one question about each video, padded on the left.

    Raises UnsupportedModelError where the processor takes no video, PromptError where a question
    holds special tokens, VideoError where the processor refuses the frames, and ValueError unless
    there are as many questions as videos.
    """
    for question in questions:
        refuse_special_tokens(processor, question)
    pairs = zip(videos, questions, strict=True)
    return _inputs(processor, [video_question(question) for _, question in pairs], videos)


def video_question(question: str) -> Messages:
    """The conversation in which one video is shown and one question asked."""
    return [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]


def shown_frames(processor: Any, video: Video) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """The frames ``(T, H, W, 3)`` that a processor is shown of a video, and their metadata.

    Raises UnsupportedModelError where the processor takes no video.
    """
    refuse_images_only(processor)
    least = getattr(processor.video_processor, "temporal_patch_size", 1)
    frames, indices = video.frames, video.processor_indices()
    if len(frames) < least:
        # A tower that reads frames in pairs sees a single frame twice, as it does an image.
        frames = frames.repeat(least, axis=0)[:least]
        indices = (indices * least)[:least]
    about = {"total_num_frames": video.total_frames, "fps": video.fps, "frames_indices": indices}
    return frames, about


def conversation_inputs(processor: Any, messages: Messages, videos: Sequence[Video]) -> Any:
    """The processor's inputs for a conversation, as chat templates take it, with its videos.

    Raises UnsupportedModelError where the processor takes no video.
    """
    return _inputs(processor, [messages], videos)


def _inputs(processor: Any, conversations: Sequence[Messages], videos: Sequence[Video]) -> Any:
    """Inputs for conversations whose videos are given one after the other."""
    from transformers.video_utils import VideoMetadata

    shown = [shown_frames(processor, video) for video in videos]
    frames = [frames for frames, _ in shown]
    metadata = [VideoMetadata(**about) for _, about in shown]
    text = processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    # Answers follow their prompts, and many tokenizers pad as for training.
    padding = {"padding": True, "padding_side": "left"} if len(conversations) > 1 else {}
    try:
        return processor(
            text=text,
            videos=frames,
            video_metadata=metadata,
            do_sample_frames=False,
            return_tensors="pt",
            **padding,
        )
    except ValueError as error:
        sizes = ", ".join(f"{v.shape[2]}x{v.shape[1]} pixels" for v in frames)
        raise VideoError(
            f"{type(processor).__name__} refuses a video of {sizes}: {error}; expected frames that "
            "it takes: crop or scale them"
        ) from error


def refuse_special_tokens(processor: Any, question: str) -> None:
    """Raise PromptError where a question holds what the tokenizer would not read as text."""
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the question {question!r} is no text: {error.reason}; expected UTF-8"
        ) from error
    tokenizer = getattr(processor, "tokenizer", processor)
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in added if getattr(token, "special", False)}
    special |= set(getattr(tokenizer, "all_special_tokens", ()))
    for token in sorted(special, key=len, reverse=True):
        if token and token in question:
            raise PromptError(
                f"the question holds {token}, a special token of the model, which would not be "
                "read as text; expected a question in plain words: leave it out"
            )


def frames_as_images(inputs: Mapping[str, Any]) -> bool:
    """Whether ``video_inputs`` show the frames as images, as to a model without video input."""
    return PIXELS["video"] not in inputs


def refuse_images_only(processor: Any) -> None:
    """Raise UnsupportedModelError where the processor takes no video."""
    if getattr(processor, "video_processor", None) is None:
        raise UnsupportedModelError(
            f"the processor is a {type(processor).__name__}, which takes no video; expected a "
            "video-language model such as Qwen/Qwen3-VL-8B-Instruct, or images in Python, with "
            "attach or compress"
        )
