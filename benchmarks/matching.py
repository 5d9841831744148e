"""Time a whole `ttf` plan against one read of the features: ``python benchmarks/matching.py``.

T = 16 frames of 16 × 16 tokens of width 4096, one CPU thread, runs taken in turn, medians. For
scale, a plain loop over the nine shifts of a 3 × 3 window is timed as well. With ``--all`` every
strategy makes its plan for a third of the tokens.
"""

import argparse
import statistics
import time
from functools import partial
from typing import get_args

import torch

from tokenfuse import VisualTokens, get_strategy, list_strategies
from tokenfuse.ops.window import Kernel, using_kernel

GRID, WIDTH = (16, 16, 16), 4096


def shift_loop(frames: torch.Tensor) -> torch.Tensor:
    """Greatest cosine in a 3 × 3 window of the first frame, one shift at a time."""
    t, h, w, _ = frames.shape
    best = torch.full((t, h, w), -2.0)
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            rows = slice(max(0, -di), min(h, h - di))
            cols = slice(max(0, -dj), min(w, w - dj))
            moved = frames[:1, rows.start + di : rows.stop + di, cols.start + dj : cols.stop + dj]
            cosine = torch.cosine_similarity(frames[:, rows, cols], moved, dim=-1)
            best[:, rows, cols] = torch.maximum(best[:, rows, cols], cosine)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--kernel", choices=get_args(Kernel), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = torch.randn(1, *GRID[1:], WIDTH)
    frames = (base + 0.5 * torch.randn(*GRID, WIDTH)).to(getattr(torch, args.dtype))
    tokens = VisualTokens.from_grid(frames, GRID)
    jobs = {
        "one read, features.sum()": tokens.features.sum,
        "ttf threshold=0.7": partial(get_strategy("ttf", guard="none").plan, tokens),
        "ttf keep_ratio=0.33": partial(get_strategy("ttf", keep_ratio=0.33).plan, tokens),
        "ttf threshold=0.7 guard=motion": partial(get_strategy("ttf", guard="motion").plan, tokens),
        "ttf reference=previous": partial(get_strategy("ttf", reference="previous").plan, tokens),
        "loop over 9 shifts, no plan": partial(shift_loop, frames),
    }
    if args.all:
        saliency, text = torch.rand(tokens.num_tokens), torch.randn(24, WIDTH)
        tokens = VisualTokens.from_grid(
            frames, GRID, saliency=saliency.to(frames.dtype), text=text.to(frames.dtype)
        )
        jobs = {"one read, features.sum()": tokens.features.sum} | {
            name: partial(get_strategy(name, keep_ratio=0.33).plan, tokens)
            for name, entry in list_strategies().items()
            if entry.cls.stage == "pre_llm" and "keep_ratio" in entry.cls.model_fields
            if name != "compose"
        }
    times = {name: [] for name in jobs}
    for run in range(args.runs + 1):
        for name, job in jobs.items():
            began = time.perf_counter()
            with using_kernel(args.kernel):
                job()
            if run:
                times[name].append((time.perf_counter() - began) * 1e3)
    read = statistics.median(times["one read, features.sum()"])
    print(f"T, H, W = {GRID}, D = {WIDTH}, {args.dtype}, 1 thread, median of {args.runs}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:31} {median:8.1f} ms  {median / read:6.1f} reads")


if __name__ == "__main__":
    main()
