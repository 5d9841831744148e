"""Accuracy on held-out clips: ``python -m tokenfuse.micro.evaluate --questions 1000``.

Clips have 4 to 10 temporal patches in turn; inputs come from the processor and answers from
``generate``, as for any user. An answer counts if it is right to the letter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.video_utils import VideoMetadata

from tokenfuse.inference import load
from tokenfuse.micro import CHECKPOINT
from tokenfuse.micro.tasks import SCENE_OF, TASKS, Clip, Question, Task, make_clip

PATCHES = range(4, 11)


def held_out(task: Task, count: int) -> list[tuple[Clip, Question]]:
    """``count`` questions of one task about clips that training never sees, sorted by length."""
    found = []
    for patches in PATCHES:
        for seed in range(count // len(PATCHES) + (patches - PATCHES[0] < count % len(PATCHES))):
            clip = make_clip(seed, patches=patches, scene=SCENE_OF[task], split="test")
            asked = [q for q in clip.questions if q.task == task]
            found.append((clip, asked[seed % len(asked)]))
    return found


def clip_inputs(processor: Any, clips: Sequence[Clip], questions: Sequence[str]) -> Any:
    """The processor's inputs for one question about each clip, left-padded."""
    messages = [
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]
        for text in questions
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    metadata = [
        VideoMetadata(
            total_num_frames=len(clip.frames),
            fps=clip.fps,
            frames_indices=list(range(len(clip.frames))),
        )
        for clip in clips
    ]
    return processor(
        text=text,
        videos=[clip.frames for clip in clips],
        video_metadata=metadata,
        do_sample_frames=False,
        padding=True,
        return_tensors="pt",
    )


def answers(
    model: Any, processor: Any, asked: Sequence[tuple[Clip, Question]], batch: int = 20
) -> list[str]:
    """Greedy answers, in order."""
    found: list[str] = []
    for start in range(0, len(asked), batch):
        group = asked[start : start + batch]
        inputs = clip_inputs(processor, [c for c, _ in group], [q.text for _, q in group])
        ids = model.generate(**inputs.to(model.device), max_new_tokens=6, do_sample=False)
        prompt = inputs["input_ids"].shape[1]
        found += processor.batch_decode(ids[:, prompt:], skip_special_tokens=True)
    return found


def evaluate(source: str | Path, count: int, tasks: Sequence[Task] = TASKS) -> dict[str, Any]:
    """Right answers of ``count`` questions for each task."""
    model, processor = load(source)
    result: dict[str, Any] = {}
    for task in tasks:
        asked = held_out(task, count)
        given = answers(model, processor, asked)
        right = sum(a == q.answer for a, (_, q) in zip(given, asked, strict=True))
        result[task] = {"questions": len(asked), "right": right, "accuracy": right / len(asked)}
        print(f"{task:10} {right}/{len(asked)} = {right / len(asked):.4f}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="checkpoint folder")
    parser.add_argument("--questions", type=int, default=1000, help="questions per task")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = evaluate(args.model, args.questions)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
