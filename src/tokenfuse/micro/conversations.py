"""What the micro models are trained on: a conversation of all questions about each clip."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import Qwen3VLProcessor

from tokenfuse.micro.build import MERGE, PATCH, TOKENS_PER_FRAME
from tokenfuse.micro.motion import MOTIONS
from tokenfuse.micro.questions import PLAIN, SUBTLE
from tokenfuse.micro.strata import (
    LEAST,
    LEAST_FOR,
    Stratum,
    StratumClip,
    make_stratum_clip,
    refusal,
)
from tokenfuse.micro.subtle import SIZES, WHOLE, longest_drift
from tokenfuse.micro.tasks import FRAMES_PER_PATCH, SIZE, Clip, make_clip

IGNORE = -100
"""The label of a token that is no answer."""

LEARNT = (*PLAIN, *SUBTLE)
"""Every task that the micro models learn."""


class Conversations(IterableDataset[dict[str, Any]]):
    """Endless batches of clips with all their questions, ready for the model.

    Half of the clips have ``longest`` temporal patches, the others 4 or more, all of a batch as
    many; the first ``short`` batches have 4 or 5. ``scenes`` is the share of clips from
    ``make_clip``; the rest are of the strata, each task as often as ``weights`` say, which may
    change at any time. Subtle differences shrink over ``shrink`` batches to their default sizes.
    """

    def __init__(
        self,
        processor: Qwen3VLProcessor,
        *,
        batch: int,
        seed: int = 0,
        short: int = 0,
        longest: int = 8,
        scenes: float = 0.15,
        shrink: int = 0,
    ) -> None:
        self.tokenizer = processor.tokenizer
        self.batch = batch
        self.seed = seed
        self.short = short
        self.longest = longest
        self.scenes = scenes
        self.shrink = shrink
        # Shared with the process that loads.
        self.weights = torch.ones(len(LEARNT)).share_memory_()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        index, step = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            rng = np.random.default_rng([self.seed, index])
            patches = self._patches(index, rng)
            first = (self.seed << 32) + index * self.batch
            ease = max(0.1, 1 - index / self.shrink) if self.shrink else 0.1
            clips = [self._clip(first + i, patches, ease, rng) for i in range(self.batch)]
            batch = self._collate(clips, patches, rng)
            changed = [self._changed(clip, patches, first + i) for i, clip in enumerate(clips)]
            yield {**batch, "changed": torch.from_numpy(np.stack(changed))}
            index += step

    def _patches(self, index: int, rng: np.random.Generator) -> int:
        if index < self.short:
            return int(rng.integers(4, 6))
        return self.longest if rng.random() < 0.5 else int(rng.integers(4, self.longest + 1))

    def _clip(
        self, seed: int, patches: int, ease: float, rng: np.random.Generator
    ) -> Clip | StratumClip:
        if rng.random() < self.scenes:
            return make_clip(seed, patches=patches)
        choices = [i for i, task in enumerate(LEARNT) if patches >= LEAST_FOR.get(task, LEAST)]
        weights = self.weights.numpy()[choices].astype(float)
        task = LEARNT[choices[int(rng.choice(len(choices), p=weights / weights.sum()))]]
        motions = [motion for motion in MOTIONS if refusal(task, motion) is None]
        size = None
        if task in SIZES:
            _, least, most = SIZES[task]
            if task == "drift":
                most = longest_drift(patches)
            size = least + ease * rng.random() * (most - least)
            size = float(round(size)) if task in WHOLE else size
        stratum = Stratum(task, motions[rng.integers(len(motions))], size)
        return make_stratum_clip(stratum, seed, patches=patches, split="train", measured=False)

    @staticmethod
    def _changed(clip: Clip | StratumClip, patches: int, seed: int) -> npt.NDArray[np.float32]:
        """Where the decisive difference is, 0 or 1 per visual token ``(n,)``; NaN in other clips.

        What the hint of the training looks at: see ``train.Hint``.
        """
        if isinstance(clip, Clip) or clip.decisive is None:
            return np.full(patches * TOKENS_PER_FRAME, np.nan, np.float32)
        without = make_stratum_clip(
            clip.stratum, seed, patches=patches, split="train", decisive=False, measured=False
        )
        side = SIZE // PATCH // MERGE
        pixels = (clip.frames != without.frames).any(-1)
        pixels = pixels.reshape(patches, FRAMES_PER_PATCH, side, SIZE // side, side, SIZE // side)
        # More than the rim of an object that drifts over.
        changed: npt.NDArray[np.float32] = (pixels.mean((1, 3, 5)) > 0.02).astype(np.float32)
        return changed.reshape(-1)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - one instance, lives as long as the process
    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _collate(
        self, clips: list[Clip | StratumClip], patches: int, rng: np.random.Generator
    ) -> dict[str, Any]:
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
                task += [IGNORE] * len(ask) + [LEARNT.index(question.task)] * len(answer)
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
