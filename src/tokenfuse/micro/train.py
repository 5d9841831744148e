"""Train the micro Qwen3-VL: ``python -m tokenfuse.micro.train --out FOLDER``.

All questions of a clip stand in one conversation, in random order, so that one pass over
the video pays for several answers. Clips are short at first and of mixed length later; tasks that
are hard come up more often. ``--drop`` makes the drop-robust model from a checkpoint.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AttentionInterface, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from tokenfuse.micro.build import MERGE, PATCH, TOKENS_PER_FRAME, build_model, build_processor
from tokenfuse.micro.conversations import IGNORE, LEARNT, Conversations


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


def missing(batch: dict[str, Tensor], most: float, rng: np.random.Generator) -> Tensor:
    """Which visual tokens of each video survive, ``(B, n)`` bool: a random choice.

    Of all videos as many are missing, a share up to ``most``; every other time one whole frame
    of each is spared, as an anchor frame would be.
    """
    rows, total = len(batch["frames"]), batch["frames"].shape[1] // 2 * TOKENS_PER_FRAME
    rank = torch.from_numpy(rng.random((rows, total), np.float32))
    if rng.random() < 0.5:
        whole = torch.from_numpy(rng.integers(total // TOKENS_PER_FRAME, size=rows))
        rank.view(rows, -1, TOKENS_PER_FRAME)[torch.arange(rows), whole] += 1
    kept = total - min(int(total * most * rng.random()), total - TOKENS_PER_FRAME)
    return rank >= rank.sort(-1, descending=True).values[:, kept - 1 : kept]


def without(
    model: Qwen3VLForConditionalGeneration, inputs: dict[str, Tensor], survive: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """The inputs without the visual tokens that are missing, and the columns left, ``(B, L')``.

    Those that survive keep their positions.
    """
    ids = inputs["input_ids"]
    seen = ids == model.config.video_token_id
    left = torch.ones_like(seen)
    left[seen] = survive.flatten()
    columns = left.nonzero()[:, 1].view(len(ids), -1)
    encoded = model.model.get_video_features(
        inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
    )
    # As one item: the model joins the features of all items anyway.
    encoded.pooler_output = (torch.cat(encoded.pooler_output)[survive.flatten()],)
    encoded.deepstack_features = [
        (torch.cat(layer)[survive.flatten()],) for layer in encoded.deepstack_features
    ]
    return {
        "input_ids": ids.gather(1, columns),
        "position_ids": inputs["position_ids"].gather(2, columns.expand(3, -1, -1)),
        "mm_encoder_outputs": {"video": encoded},
    }, columns


class Hint:
    """Tells the text model where the decisive differences are, until it finds them by itself.

    A linear read-out of the hidden states in the middle of the text model; it is thrown away after
    training. From answers alone a model of this size does not learn to compare frames in the time
    that it is given.
    """

    def __init__(self, model: Qwen3VLForConditionalGeneration) -> None:
        self.head = nn.Linear(model.config.text_config.hidden_size, 1)
        self.heard: list[Tensor] = []
        layers = model.model.language_model.layers
        layers[len(layers) // 2].register_forward_pre_hook(self._hear)

    def _hear(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.heard[:] = args[:1]

    def loss(self, seen: Tensor, batch: dict[str, Tensor], survive: Tensor | None) -> Tensor:
        """Mean cross-entropy of the read-out over visual tokens of subtle clips.

        ``seen``: where visual tokens stand in the prompts, ``(B, L)`` bool.
        """
        changed = batch["changed"]
        known = changed.flatten() if survive is None else changed[survive]
        told: Tensor = self.head(self.heard[0][seen])[:, 0]
        subtle = ~known.isnan()
        if not subtle.any():
            return told.sum() * 0
        # Few tokens change: they weigh as much as the rest.
        weight = torch.tensor(8.0)
        return nn.functional.binary_cross_entropy_with_logits(
            told[subtle], known[subtle], pos_weight=weight
        )


def answer_loss(
    model: Qwen3VLForConditionalGeneration,
    batch: dict[str, Tensor],
    survive: Tensor | None = None,
    hint: Hint | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over answer tokens; right and asked counts per task, ``(2, tasks)``.

    ``survive``: the visual tokens that the model is shown, ``(B, n)`` bool; all if None.
    ``hint`` adds its loss.
    """
    inputs: dict[str, Any] = model_inputs(model, batch)
    labels, tasks = batch["labels"], batch["tasks"]
    if survive is not None:
        inputs, columns = without(model, inputs, survive)
        labels, tasks = labels.gather(1, columns), tasks.gather(1, columns)
    hidden = model.model(**inputs).last_hidden_state
    labels, tasks = labels[:, 1:], tasks[:, 1:]
    asked = labels != IGNORE
    logits = model.lm_head(hidden[:, :-1][asked])
    labels, tasks = labels[asked], tasks[asked]
    right = (logits.argmax(-1) == labels).float()
    # Every answer ends alike: its last token says nothing.
    telling = (labels != model.generation_config.eos_token_id).float()
    counts = torch.zeros(2, len(LEARNT))
    counts[0].index_add_(0, tasks, right * telling)
    counts[1].index_add_(0, tasks, telling)
    loss = nn.functional.cross_entropy(logits, labels)
    if hint is not None:
        loss = loss + hint.loss(inputs["input_ids"] == model.config.video_token_id, batch, survive)
    return loss, counts


def train(
    *,
    out: Path,
    steps: int,
    batch: int = 32,
    short: float = 0.2,
    longest: int = 8,
    rate: float = 1.5e-3,
    seed: int = 0,
    workers: int = 1,
    init: Path | None = None,
    stop: int | None = None,
    fall: float = 0.25,
    shrink: float = 0.5,
    drop: float = 0.0,
    hint: bool = True,
) -> None:
    """Train from scratch, or from the checkpoint ``init``; save model and processor into ``out``.

    The first ``short`` share of the steps sees clips of 4 and 5 temporal patches, the rest up to
    ``longest``; subtle differences shrink over the first ``shrink`` share. The rate warms up over
    200 steps, holds, and falls linearly over the last ``fall``. ``drop``: up to this share of the
    visual tokens of a prompt is missing; then the vision tower stays as it is.
    """
    processor = build_processor()
    model = build_model(processor, seed=seed)
    if init:
        start(model, processor, init)
    if drop:
        model.model.visual.requires_grad_(False)
    told = Hint(model) if hint else None
    AttentionInterface.register("flash_equal_frames", equal_frames_attention)
    model.model.visual.config._attn_implementation = "flash_equal_frames"
    data = Conversations(
        processor,
        batch=batch,
        seed=seed,
        short=int(short * steps),
        longest=longest,
        shrink=int(shrink * steps),
    )
    loader = iter(DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4))
    learnt = [p for p in model.parameters() if p.requires_grad]
    learnt += told.head.parameters() if told else []
    decay = [p for p in learnt if p.ndim > 1]
    plain = [p for p in learnt if p.ndim <= 1]
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
    rng = np.random.default_rng([seed, 1])
    began, losses, counts = time.monotonic(), [], torch.zeros(2, len(LEARNT))
    for step in range(1, last + 1):
        shown = next(loader)
        loss, found = answer_loss(model, shown, missing(shown, drop, rng) if drop else None, told)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        counts += found
        if step % 50 == 0:
            # Tasks that are hard are seen more often.
            wrong = 1 - counts[0] / counts[1].clamp_min(1)
            data.weights.copy_(0.5 * data.weights + 0.5 * (0.15 + wrong))
            shares = (1 - wrong).tolist()
            scores = "  ".join(f"{task} {x:.2f}" for task, x in zip(LEARNT, shares, strict=True))
            minutes = (time.monotonic() - began) / 60
            loss_now = np.mean(losses[-50:])
            print(
                f"step {step}/{steps}  loss {loss_now:.4f}  {scores}  {minutes:.1f} min", flush=True
            )
            counts.zero_()
        if step % 500 == 0 or step == last:
            save(model, processor, out)


def start(
    model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, source: Path
) -> None:
    """Copy the weights of a checkpoint whose tokenizer may be another: a row for each token."""
    known = Qwen3VLProcessor.from_pretrained(source).tokenizer.get_vocab()
    old = Qwen3VLForConditionalGeneration.from_pretrained(source).state_dict()
    new = model.state_dict()
    vocabulary = processor.tokenizer.get_vocab()
    both = [(vocabulary[token], known[token]) for token in vocabulary if token in known]
    ours, theirs = (torch.tensor(rows) for rows in zip(*both, strict=True))
    for name, value in new.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            value[ours] = old[name][theirs]
        else:
            value.copy_(old[name])


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
    parser.add_argument("--short", type=float, default=0.2, help="share of steps at 4, 5 patches")
    parser.add_argument("--longest", type=int, default=8, help="temporal patches at most")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="greatest learning rate")
    parser.add_argument("--fall", type=float, default=0.25, help="share of steps of falling rate")
    parser.add_argument("--shrink", type=float, default=0.5, help="share of steps of easier clips")
    parser.add_argument("--no-hint", dest="hint", action="store_false", help="answers alone")
    parser.add_argument("--drop", type=float, default=0.0, help="visual tokens missing at most")
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
        shrink=args.shrink,
        drop=args.drop,
        hint=args.hint,
    )


if __name__ == "__main__":
    main()
