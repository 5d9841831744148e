"""Train the micro Qwen3-VL: ``python -m tokenfuse.micro.train --out FOLDER``.

All questions of a clip stand in one conversation, in random order, so that one pass over
the video pays for several answers. Clips are short at first and of mixed length later.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AttentionInterface, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from tokenfuse.micro.build import MERGE, PATCH, TOKENS_PER_FRAME, build_model, build_processor
from tokenfuse.micro.tasks import FRAMES_PER_PATCH, SCENES, TASKS, Clip, make_clip

IGNORE = -100


def equal_frames_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Vision attention ``(1, heads, frames * P, d)`` of equal frames, as one batch of frames."""
    frames = cu_seq_lens_q.shape[0] - 1

    def split(x: Tensor) -> Tensor:
        _, heads, total, width = x.shape
        return x[0].view(heads, frames, total // frames, width).transpose(0, 1)

    out = nn.functional.scaled_dot_product_attention(
        split(query), split(key), split(value), scale=scaling
    )
    return out.transpose(1, 2).reshape(1, query.shape[2], query.shape[1], -1), None


class Conversations(IterableDataset[dict[str, Any]]):
    """Endless batches of clips with all their questions, ready for the model.

    The first ``short`` batches have 4 temporal patches, later ones 4 to ``longest``. In the first
    ``still`` batches the mark stays for the whole clip. ``motion`` is the share of clips in which
    something moves.
    """

    def __init__(
        self,
        processor: Qwen3VLProcessor,
        *,
        batch: int,
        seed: int = 0,
        short: int = 0,
        longest: int = 4,
        still: int = 0,
        motion: float = 0.5,
    ) -> None:
        self.tokenizer = processor.tokenizer
        self.batch = batch
        self.seed = seed
        self.short = short
        self.longest = longest
        self.still = still
        self.motion = motion

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        index, step = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            rng = np.random.default_rng([self.seed, index])
            patches = 4 if index < self.short else int(rng.integers(4, self.longest + 1))
            # A mark that stays is found sooner; then it learns to flash.
            flash = patches if index < self.still else 1
            shares = (self.motion, *[(1 - self.motion) / 2] * 2)
            scenes = rng.choice(len(SCENES), self.batch, p=shares)
            first = (self.seed << 32) + index * self.batch
            clips = [
                make_clip(first + i, patches=patches, scene=SCENES[s], flash=flash)
                for i, s in enumerate(scenes)
            ]
            yield self._collate(clips, patches, rng)
            index += step

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - one instance, lives as long as the process
    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _collate(self, clips: list[Clip], patches: int, rng: np.random.Generator) -> dict[str, Any]:
        # With and without a pair of vision markers around all frames: the model reads both.
        enclosed = bool(rng.integers(2))
        rows, labels, tasks, heads = [], [], [], []
        for clip in clips:
            ids = self._ids("<|im_start|>user\n" + "<|vision_start|>" * enclosed)[:]
            for t in range(patches):
                seconds = (FRAMES_PER_PATCH * t + 0.5) / clip.fps
                ids += self._ids(f"<{seconds:.1f} seconds><|vision_start|>")
                ids += self._ids("<|video_pad|>") * TOKENS_PER_FRAME
                ids += self._ids("<|vision_end|>")
            ids += self._ids("<|vision_end|>" * enclosed)
            heads.append(len(ids))
            target = [IGNORE] * len(ids)
            task = [IGNORE] * len(ids)
            for turn, q in enumerate(rng.permutation(len(clip.questions))):
                question = clip.questions[q]
                opening = "\n<|im_start|>user\n" if turn else ""
                ask = self._ids(f"{opening}{question.text}<|im_end|>\n<|im_start|>assistant\n")
                answer = self._ids(f"{question.answer}<|im_end|>")
                ids = ids + ask + answer
                target += [IGNORE] * len(ask) + answer
                task += [IGNORE] * len(ask) + [TASKS.index(question.task)] * len(answer)
            rows.append(ids)
            labels.append(target)
            tasks.append(task)
        if len(set(heads)) != 1:
            raise RuntimeError(
                f"videos of one batch must have prompts of one length, got {set(heads)}"
            )
        width = max(map(len, rows))
        pad = self._ids("<|endoftext|>")
        ignore = [IGNORE]
        return {
            "frames": torch.from_numpy(np.stack([clip.frames for clip in clips])),
            "input_ids": torch.tensor([row + pad * (width - len(row)) for row in rows]),
            "labels": torch.tensor([row + ignore * (width - len(row)) for row in labels]),
            "tasks": torch.tensor([row + ignore * (width - len(row)) for row in tasks]),
        }


def patchify(frames: Tensor) -> Tensor:
    """``(B, F, H, W, 3)`` uint8 to ``(patches, 384)``, in the processor's order and scale."""
    b, f, h, w, c = frames.shape
    x = frames.float() / 127.5 - 1
    x = x.view(
        b, f // 2, 2, h // PATCH // MERGE, MERGE, PATCH, w // PATCH // MERGE, MERGE, PATCH, c
    )
    return x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).reshape(-1, c * 2 * PATCH * PATCH)


def model_inputs(
    model: Qwen3VLForConditionalGeneration, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The model's keyword arguments for a batch whose rows share the video part of their prompt."""
    ids, frames = batch["input_ids"], batch["frames"]
    grid = torch.tensor(
        [[frames.shape[1] // 2, frames.shape[2] // PATCH, frames.shape[3] // PATCH]]
    )
    types = torch.where(ids == model.config.video_token_id, 2, 0)
    positions, _ = model.model.get_rope_index(ids[:1], types[:1], video_grid_thw=grid)
    return {
        "input_ids": ids,
        "position_ids": positions.expand(3, len(ids), -1),
        "pixel_values_videos": patchify(frames),
        "video_grid_thw": grid.repeat(len(ids), 1),
        "mm_token_type_ids": types,
    }


def answer_loss(
    model: Qwen3VLForConditionalGeneration, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over answer tokens; right and asked counts per task, ``(2, tasks)``."""
    hidden = model.model(**model_inputs(model, batch)).last_hidden_state
    labels = batch["labels"][:, 1:]
    asked = labels != IGNORE
    logits = model.lm_head(hidden[:, :-1][asked])
    labels, tasks = labels[asked], batch["tasks"][:, 1:][asked]
    right = (logits.argmax(-1) == labels).float()
    # Every answer ends alike: its last token says nothing.
    telling = (labels != model.generation_config.eos_token_id).float()
    counts = torch.zeros(2, len(TASKS))
    counts[0].index_add_(0, tasks, right * telling)
    counts[1].index_add_(0, tasks, telling)
    return nn.functional.cross_entropy(logits, labels), counts


def train(
    *,
    out: Path,
    steps: int,
    batch: int = 32,
    short: float = 0.4,
    longest: int = 10,
    rate: float = 2e-3,
    seed: int = 0,
    workers: int = 1,
    init: Path | None = None,
    stop: int | None = None,
    fall: float = 0.25,
    motion: float = 0.5,
) -> None:
    """Train from scratch, or from the checkpoint ``init``; save model and processor into ``out``.

    The first ``short`` share of the steps sees clips of 4 temporal patches, the rest 4 to
    ``longest``. The rate warms up over 200 steps, holds, and falls linearly over the last ``fall``.
    """
    if init:
        processor = Qwen3VLProcessor.from_pretrained(init)
        model = Qwen3VLForConditionalGeneration.from_pretrained(init)
    else:
        processor = build_processor()
        model = build_model(processor, seed=seed)
    AttentionInterface.register("flash_equal_frames", equal_frames_attention)
    model.model.visual.config._attn_implementation = "flash_equal_frames"
    data = Conversations(
        processor,
        batch=batch,
        seed=seed,
        short=int(short * steps),
        longest=longest,
        still=0 if init else steps // 10,
        motion=motion,
    )
    loader = iter(DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4))
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.98),
    )
    warm = min(200, max(1, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / warm, max(0.01, (steps - i) / (fall * steps)))
    )
    for part in (*model.model.language_model.layers, *model.model.visual.blocks):
        part.compile(dynamic=True)
    model.train()
    last = min(steps, stop or steps)
    began, losses, counts = time.monotonic(), [], torch.zeros(2, len(TASKS))
    for step in range(1, last + 1):
        loss, found = answer_loss(model, next(loader))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        counts += found
        if step % 50 == 0:
            shares = (counts[0] / counts[1].clamp_min(1)).tolist()
            scores = "  ".join(f"{task} {x:.2f}" for task, x in zip(TASKS, shares, strict=True))
            minutes = (time.monotonic() - began) / 60
            loss_now = np.mean(losses[-50:])
            print(
                f"step {step}/{steps}  loss {loss_now:.4f}  {scores}  {minutes:.1f} min", flush=True
            )
            counts.zero_()
        if step % 500 == 0 or step == last:
            save(model, processor, out)


def save(model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, out: Path) -> None:
    """Write the checkpoint: weights rounded to bf16, half the size; loaded, they are fp32 again."""
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    model.save_pretrained(out, state_dict=weights)
    processor.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--short", type=float, default=0.4, help="share of steps at 4 patches")
    parser.add_argument("--longest", type=int, default=10, help="temporal patches at most")
    parser.add_argument("--rate", type=float, default=2e-3, help="greatest learning rate")
    parser.add_argument("--fall", type=float, default=0.25, help="share of steps of falling rate")
    parser.add_argument("--motion", type=float, default=0.5, help="share of clips that move")
    parser.add_argument("--init", type=Path, help="checkpoint to go on from")
    parser.add_argument("--stop", type=int, help="end after this many of the steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(
        out=args.out,
        steps=args.steps,
        batch=args.batch,
        short=args.short,
        longest=args.longest,
        rate=args.rate,
        seed=args.seed,
        init=args.init,
        stop=args.stop,
        fall=args.fall,
        motion=args.motion,
    )


if __name__ == "__main__":
    main()
