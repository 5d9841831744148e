"""A processor's inputs for questions about videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenfuse.errors import UnsupportedModelError
from tokenfuse.inference.video import Video
from tokenfuse.prompt.inputs import PIXELS


def video_inputs(processor: Any, video: Video, question: str) -> Any:
    """The processor's inputs for one question about one video, ready for ``generate``.

    Raises UnsupportedModelError where the processor takes no video.
    """
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
    return conversation_inputs(processor, [message], [video])


def conversation_inputs(
    processor: Any, messages: Sequence[Mapping[str, Any]], videos: Sequence[Video]
) -> Any:
    """The processor's inputs for a conversation, as chat templates take it, with its videos.

    Raises UnsupportedModelError where the processor takes no video.
    """
    from transformers.video_utils import VideoMetadata

    refuse_images_only(processor)
    least = getattr(processor.video_processor, "temporal_patch_size", 1)
    frames, metadata = [], []
    for video in videos:
        shown, indices = video.frames, video.processor_indices()
        if len(shown) < least:
            # A tower that reads frames in pairs sees a single frame twice, as it does an image.
            shown = shown.repeat(least, axis=0)[:least]
            indices = (indices * least)[:least]
        frames.append(shown)
        metadata.append(
            VideoMetadata(
                total_num_frames=video.total_frames, fps=video.fps, frames_indices=indices
            )
        )
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return processor(
        text=[text],
        videos=frames,
        video_metadata=metadata,
        do_sample_frames=False,
        return_tensors="pt",
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
