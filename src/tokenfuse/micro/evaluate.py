"""Accuracy on held-out clips: ``python -m tokenfuse.micro.evaluate --questions 1000``.

Clips have 4 to 8 temporal patches; inputs come from the processor and answers from
``generate``, as for any user. An answer counts if it is right to the letter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers.video_utils import VideoMetadata

from tokenfuse.config import get_strategy
from tokenfuse.costs import versions
from tokenfuse.inference.run import load
from tokenfuse.micro import CHECKPOINT
from tokenfuse.micro.strata import StratumClip
from tokenfuse.micro.tasks import (
    ANSWERS,
    QUESTIONS,
    SCENE_OF,
    TASKS,
    Clip,
    Question,
    Task,
    make_clip,
)
from tokenfuse.sessions.attach import attach
from tokenfuse.strategies._base import Strategy

PATCHES = range(4, 9)


def held_out(task: Task, count: int) -> list[tuple[Clip, Question]]:
    """``count`` questions of one task about clips that training never sees, sorted by length."""
    found = []
    for patches in PATCHES:
        share = count // len(PATCHES) + (patches - PATCHES[0] < count % len(PATCHES))
        for seed in range(share):
            clip = make_clip(seed, patches=patches, scene=SCENE_OF[task], split="test")
            asked = [q for q in clip.questions if q.task == task]
            found.append((clip, asked[seed % len(asked)]))
    return found


def clip_inputs(
    processor: Any, clips: Sequence[Clip | StratumClip], questions: Sequence[str]
) -> Any:
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
    model: Any,
    processor: Any,
    asked: Sequence[tuple[Clip, Question]],
    strategy: Strategy | None = None,
    batch: int = 20,
) -> tuple[list[str], float]:
    """Greedy answers, in order, and the share of visual tokens that ``strategy`` removed."""
    found: list[str] = []
    before = after = 0
    for start in range(0, len(asked), batch):
        group = asked[start : start + batch]
        inputs = clip_inputs(processor, [c for c, _ in group], [q.text for _, q in group])
        with attach(model, strategy) if strategy else nullcontext() as session:
            ids = model.generate(**inputs.to(model.device), max_new_tokens=6, do_sample=False)
        if session and session.report:
            before += session.report.tokens_before
            after += session.report.tokens_after
        prompt = inputs["input_ids"].shape[1]
        found += processor.batch_decode(ids[:, prompt:], skip_special_tokens=True)
    return found, 1 - after / before if before else 0.0


def evaluate(
    source: str | Path, count: int, strategies: Sequence[str] = (), tasks: Sequence[Task] = TASKS
) -> dict[str, Any]:
    """Right answers to ``count`` questions of each task, uncompressed and with each strategy."""
    model, processor = load(source)
    chosen = {"uncompressed": None, **{name: get_strategy(name) for name in strategies}}
    result: dict[str, Any] = {}
    for task in tasks:
        asked = held_out(task, count)
        result[task] = {"questions": len(asked)}
        for name, strategy in chosen.items():
            given, reduction = answers(model, processor, asked, strategy)
            right = sum(a == q.answer for a, (_, q) in zip(given, asked, strict=True))
            result[task][name] = {"right": right, "reduction": round(reduction, 4)}
            print(f"{task:10} {name:16} {right}/{len(asked)}, {reduction:.1%} removed", flush=True)
    return result


def page(result: Mapping[str, Any], count: int, strategies: Sequence[str]) -> str:
    """The figures as a page of the documentation."""
    columns = ["task", "question", "answers", "uncompressed", *strategies]
    lines = [f"| {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * (len(columns) - 2)]
    for task in (task for task in TASKS if task in result):
        row = result[task]
        cells = [task, QUESTIONS[task][0], str(len(ANSWERS[task]))]
        for name in ("uncompressed", *strategies):
            removed = f" ({row[name]['reduction']:.0%} removed)" if name in strategies else ""
            cells.append(f"{row[name]['right'] / row['questions']:.1%}{removed}")
        lines.append(f"| {' | '.join(cells)} |")
    options = "".join(f" --strategy {name}" for name in strategies)
    return PAGE.format(
        first=PATCHES[0], last=PATCHES[-1], rows="\n".join(lines), count=count, options=options
    )


PAGE = """\
# The micro model's accuracy

The micro Qwen3-VL that the package ships, on {count} questions of each task about clips of
held-out seeds. Clips have {first} to {last} temporal patches in equal shares; inputs come from its
processor, answers from greedy `generate`, and an answer counts if it is right to the letter. In
parentheses: the share of visual tokens removed.

{rows}

The command that made this page:

```console
$ python -m tokenfuse.micro.evaluate --questions {count}{options} --out docs/results/micro
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="checkpoint folder")
    parser.add_argument("--questions", type=int, default=1000, help="questions per task")
    parser.add_argument("--strategy", action="append", default=[], help="also with this strategy")
    parser.add_argument("--out", type=Path, help="file for the figures, without its suffix")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = evaluate(args.model, args.questions, args.strategy)
    if args.out:
        text = json.dumps({"versions": versions(), "tasks": result}, indent=2)
        args.out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        text = page(result, args.questions, args.strategy)
        args.out.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
