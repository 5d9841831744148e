"""Memory and time of a plan, and of fusing by it, over long videos.

``python benchmarks/long_videos.py > docs/results/long-videos.md``: features of noise in bfloat16,
made beforehand. Memory is the most that tensors take beyond them.
"""

import argparse
import sys
import time

import torch

from tokenfuse import VisualTokens, get_strategy
from tokenfuse.bench.markdown import table
from tokenfuse.bench.memory import peak_memory
from tokenfuse.costs import size

PAGE = """\
# Long videos

A plan, and features fused by it, for videos of {side} × {side} visual tokens of {width} dimensions
in {dtype}, at a keep ratio of 1/3; {device}, {threads} threads. *Beyond the input* is the most
memory that tensors take beside the features themselves, the fused ones included, at the longest
video; *per frame* is its time divided by its frames over the same of the shortest, 1.0 where time
is linear.

{rows}

```console
$ python benchmarks/long_videos.py {arguments}> docs/results/long-videos.md
```
"""
STRATEGIES = {
    "ttf": {"strategy": "ttf"},
    "ttf, reference: previous": {"strategy": "ttf", "reference": "previous"},
    "evs": {"strategy": "evs"},
    "vidcom2": {"strategy": "vidcom2"},
    "dycoke": {"strategy": "dycoke"},
    "vcast": {"strategy": "vcast"},
    "uniform": {"strategy": "uniform"},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--side", type=int, default=14)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    longest, places = max(args.frames), args.side**2
    torch.manual_seed(0)
    whole = torch.empty(longest, places, args.width, dtype=getattr(torch, args.dtype))
    for part in whole.split(64):
        part.normal_()
    rows = []
    for name, options in STRATEGIES.items():
        strategy, times = get_strategy({**options, "keep_ratio": 1 / 3}), []
        for frames in sorted(args.frames):
            features = whole[:frames].flatten(0, 1)
            grid = (frames, args.side, args.side)
            tokens = VisualTokens.from_grid(features, grid, check=False)
            began = time.perf_counter()
            fused = strategy.fuse(strategy.plan(tokens), features)
            times.append(time.perf_counter() - began)
            del fused
        with peak_memory(whole.device) as peak:
            strategy.fuse(strategy.plan(tokens), features)
        first, last = times[0] / min(args.frames), times[-1] / longest
        cells = [f"{value:.1f} s" for value in times]
        rows.append([f"`{name}`", *cells, f"{last / first:.2f}", size(peak())])
    input_size = size(whole.numel() * whole.element_size())
    head = ["strategy", *(f"{n} frames" for n in sorted(args.frames)), "per frame"]
    head.append(f"beyond the input of {input_size}")
    arguments = " ".join(sys.argv[1:])
    print(
        PAGE.format(
            **vars(args),
            device="CPU",
            threads=torch.get_num_threads(),
            rows=table(head, rows, left=1).strip(),
            arguments=f"{arguments} " if arguments else "",
        ),
        end="",
    )


if __name__ == "__main__":
    main()
