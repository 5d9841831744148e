"""vLLM's engine for batches of questions: the plug-in compresses what it is asked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenfuse.config import Configuration
from tokenfuse.errors import ConfigError, EngineError, PromptError
from tokenfuse.inference.engines import Asked, Batched, Reader, Reply
from tokenfuse.inference.inputs import (
    refuse_images_only,
    refuse_special_tokens,
    shown_frames,
    video_question,
)
from tokenfuse.inference.load import unreadable
from tokenfuse.inference.rows import Row
from tokenfuse.inference.video import Video
from tokenfuse.integrations.vllm import KEY, strategy_of


def engine_options(
    configuration: Configuration | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What vLLM's engine is made with: ``options`` are its own, such as ``max_model_len``.

    Raises ConfigError for a strategy that vLLM cannot have.
    """
    made: dict[str, Any] = {"limit_mm_per_prompt": {"video": 1, "image": 0}, **options}
    if configuration is not None:
        described = configuration.describe()
        strategy_of(SimpleNamespace(**{KEY: described}))
        made["hf_overrides"] = {**made.get("hf_overrides", {}), KEY: described}
    return made


def prompt(processor: Any, video: Video, question: str) -> dict[str, Any]:
    """A prompt of vLLM with one video."""
    frames, about = shown_frames(processor, video)
    about |= {"duration": video.duration, "video_backend": "pyav", "do_sample_frames": False}
    text = processor.apply_chat_template(
        video_question(question), add_generation_prompt=True, tokenize=False
    )
    return {"prompt": text, "multi_modal_data": {"video": [(frames, about)]}}


def visual_tokens(processor: Any, video: Video) -> int:
    """How many visual tokens a prompt has of a video without compression."""
    frames, _ = shown_frames(processor, video)
    sizes = [frames.shape[:3]]
    return int(processor._get_num_multimodal_tokens(video_sizes=sizes).num_video_tokens[0])


def uncompressed_length(processor: Any, visual: int, ids: Sequence[int]) -> int:
    """How long the prompt ``ids`` would be with all visual tokens of its video."""
    return len(ids) - list(ids).count(processor.video_token_id) + visual


def sampling_options(source: str | Path, max_new_tokens: int) -> dict[str, Any]:
    """Greedy sampling as transformers does it: what a checkpoint says of repetition holds."""
    from transformers import GenerationConfig

    try:
        penalty = GenerationConfig.from_pretrained(source).repetition_penalty
    except OSError:  # a checkpoint without one
        penalty = None
    greedy = {"temperature": 0.0, "max_tokens": max_new_tokens}
    return greedy if penalty is None else greedy | {"repetition_penalty": penalty}


def load_processor(source: str | Path) -> Any:
    """The processor of a checkpoint. Raises UnsupportedModelError where it takes no video."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise unreadable(source, error) from error
    refuse_images_only(processor)
    return processor


class Vllm(Batched):
    """Answers by vLLM on this machine. ``options``: of ``vllm.LLM``.

    Raises ConfigError where vLLM is not installed, refuses an option or cannot have the strategy,
    UnsupportedModelError where the processor cannot be loaded or takes no video, and EngineError
    where vLLM cannot be started.
    """

    def __init__(
        self,
        source: str | Path,
        configuration: Configuration | None,
        *,
        max_new_tokens: int = 64,
        batch_size: int = 32,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(batch_size)
        made = engine_options(configuration, options or {})
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        # One that is killed in a process of its own is waited for without end.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            from vllm import LLM, SamplingParams
            from vllm.exceptions import VLLMClientError
        except ImportError as error:
            raise ConfigError(
                f"vLLM cannot be imported ({error}); expected it to be installed: "
                'pip install ".[vllm]" in a checkout of tokenfuse'
            ) from error
        self.row_fails = (*Batched.row_fails, ValueError, VLLMClientError)
        self.configuration = configuration
        self.processor = load_processor(source)
        try:
            self.llm = LLM(model=str(source), **made)
        except TypeError as error:
            raise ConfigError(f"vLLM does not take these options: {error}") from error
        except (ValueError, RuntimeError) as error:
            raise EngineError(
                f"vLLM cannot be started with {source}: {error}; expected a model and options that "
                "it takes: what it has written above says more"
            ) from error
        self.sampling = SamplingParams(**sampling_options(source, max_new_tokens))

    def answers(self, rows: Sequence[Row], reader: Reader) -> Iterator[tuple[Row, Reply]]:
        """Yield each row with what became of it. Raises EngineError where vLLM ends meanwhile."""
        try:
            yield from super().answers(rows, reader)
        except RuntimeError as error:  # which no row is to blame for, such as of a GPU
            raise EngineError(
                f"vLLM's engine has ended: {str(error).strip() or type(error).__name__}; what is "
                "answered is written: run again to go on, with a smaller gpu_memory_utilization "
                "where memory was short"
            ) from error

    def check(self, row: Row) -> None:
        refuse_special_tokens(self.processor, row.text)

    def reply(self, part: Sequence[Asked]) -> list[Reply]:
        asked: list[Any] = [prompt(self.processor, video, row.text) for row, video in part]
        replies = []
        outputs = self.llm.generate(asked, self.sampling, use_tqdm=False)
        for (_, video), output in zip(part, outputs, strict=True):
            ids = output.prompt_token_ids
            if ids is None:
                raise PromptError("vLLM has not told the prompt that it has read")
            before = len(ids)
            if self.configuration is not None:
                whole = visual_tokens(self.processor, video)
                before = uncompressed_length(self.processor, whole, ids)
            text = output.outputs[0].text.strip()
            replies.append(Reply(text, None, len(video.frames), before, len(ids)))
        return replies
