"""Time a ViT with and without Token Merging: ``python benchmarks/vit.py``.

A timm model with random weights on the CPU, runs taken in turn, medians of the times and of the
ratios within a turn. Merging nothing (r = 0) is timed as well, for what the hooks cost.
"""

import argparse
import statistics
import time
from contextlib import nullcontext

import timm
import torch

from tokenfuse import attach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_384")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--r", type=int, default=23)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = timm.create_model(args.model, pretrained=False).eval()
    images = torch.randn(args.batch, *model.default_cfg["input_size"])
    settings = {
        "plain": nullcontext,
        "r = 0": lambda: attach(model, "tome", r=0),
        f"r = {args.r}": lambda: attach(model, "tome", r=args.r),
    }
    times: dict[str, list[float]] = {name: [] for name in settings}
    with torch.inference_mode():
        for run in range(args.runs + 1):
            for name, setting in settings.items():
                with setting():
                    start = time.perf_counter()
                    model(images)
                    if run:
                        times[name].append(1000 * (time.perf_counter() - start))
    print(f"{args.model}, batch {args.batch}, {args.threads} thread(s), {args.runs} runs")
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["plain"], taken, strict=True))
        print(f"{name:<8} {statistics.median(taken):8.1f} ms  {ratio:5.2f} times as fast")


if __name__ == "__main__":
    main()
