"""What the vision tower saves where patches never enter it.

``python benchmarks/tower_cuts.py > docs/results/tower-cuts.md``: time of a Qwen3-VL tower with
random weights, whole and with half of its visual tokens, side by side.
"""

import argparse
import statistics
import sys
import time

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tokenfuse.bench.markdown import table
from tokenfuse.compression import prompt_adapter
from tokenfuse.registry import default_registry

PAGE = """\
# What the vision tower saves

A Qwen3-VL tower with random weights, {depth} blocks of {width}, over {frames} frames of {side} ×
{side} visual tokens, {dtype}, {device}, {threads} threads, whole and with the share {keep:g} of the
tokens, evenly drawn by lot.

{rows}

*Ideal* is the ratio of the multiply-adds of blocks and merger, {ideal:.2f}: those of the weights in
proportion to the patches, those of attention to their square in each frame. Embedding the patches
and adding positions is done for all. Times are medians of {runs} runs, in turn; at least 85 % of
the ideal is what was asked for, and {reached:.0%} is reached.

```console
$ python benchmarks/tower_cuts.py {arguments}> docs/results/tower-cuts.md
```
"""


def build(args):
    vision = {
        "depth": args.depth,
        "hidden_size": args.width,
        "intermediate_size": 4 * args.width,
        "num_heads": args.width // 64,
        "patch_size": 16,
        "out_hidden_size": 256,
        "deepstack_visual_indexes": [args.depth // 2],
    }
    text = {
        "vocab_size": 64,
        "hidden_size": 256,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
    }
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, args.dtype))
    config = Qwen3VLConfig(text_config=text, vision_config=vision, attn_implementation="sdpa")
    return Qwen3VLForConditionalGeneration(config).eval().to(args.device)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model = build(args)
    adapter = prompt_adapter(model, default_registry())
    grid = torch.tensor([[args.frames, 2 * args.side, 2 * args.side]], device=args.device)
    patches = int(grid.prod())
    inputs = {
        "pixel_values_videos": torch.randn(patches, 3 * 2 * 16 * 16, device=args.device),
        "video_grid_thw": grid,
    }
    n = patches // 4
    lots = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    keep = torch.zeros(n, dtype=torch.bool)
    keep[lots.topk(round(args.keep * n)).indices] = True
    keep = keep.to(args.device)

    def whole():
        return model.base_model.get_video_features(**inputs)

    def cut():
        with adapter.shorter_tower(inputs, "video", keep):
            return model.base_model.get_video_features(**inputs)

    def synchronize():
        if args.device == "cuda":
            torch.cuda.synchronize()

    times = {"whole": [], "cut": []}
    with torch.no_grad():
        for _ in range(args.runs + 1):
            for name, run in (("whole", whole), ("cut", cut)):
                synchronize()
                start = time.perf_counter()
                run()
                synchronize()
                times[name].append(time.perf_counter() - start)
    # The first runs warm up.
    times = {name: each[1:] for name, each in times.items()}
    per_frame = keep.view(args.frames, -1).sum(-1).tolist()

    def cost(frames):
        weights = args.depth * 12 * args.width**2
        return sum(4 * c * weights + args.depth * 2 * (4 * c) ** 2 * args.width for c in frames)

    ideal = cost([args.side**2] * args.frames) / cost(per_frame)
    ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
    rows = [
        [
            name,
            f"{statistics.median(each):.2f}",
            f"{min(each):.2f} – {max(each):.2f}",
            "1.00" if name == "whole" else f"{ratio:.2f}",
            "" if name == "whole" else f"{ratio / ideal:.0%}",
        ]
        for name, each in times.items()
    ]
    arguments, head = (
        " ".join(sys.argv[1:]),
        ["tower", "s", "least – most", "times faster", "of ideal"],
    )
    print(
        PAGE.format(
            depth=args.depth,
            width=args.width,
            frames=args.frames,
            side=args.side,
            dtype=args.dtype,
            device=torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
            threads=torch.get_num_threads(),
            keep=args.keep,
            ideal=ideal,
            reached=ratio / ideal,
            runs=args.runs,
            arguments=f"{arguments} " if arguments else "",
            rows=table(head, rows, left=1).strip(),
        ),
        end="",
    )


if __name__ == "__main__":
    main()
