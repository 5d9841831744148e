"""What the vision tower saves where patches never enter it, and what the first token gains.

``python benchmarks/tower_cuts.py > docs/results/tower-cuts.md``: a Qwen3-VL with random weights
reads a video of which half of the tokens are what the frame before says, the tower alone with and
without ``pixelprune``, and a whole prompt with ``ttf`` and with both, side by side.
"""

import argparse
import statistics
import sys
import time

import torch
from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import tokenfuse
from tokenfuse.adapters._tower_packed import PackedStage
from tokenfuse.bench.markdown import table
from tokenfuse.compression import prompt_adapter
from tokenfuse.registry import default_registry

PAGE = """\
# What the vision tower saves

A Qwen3-VL with random weights: a tower of {depth} blocks of {width} over {frames} frames of {side}
× {side} visual tokens, and {layers} decoder layers of {hidden}; {dtype}, {device}, {threads}
threads. In the video {predicted:.0%} of the tokens are bit for bit what the frame before shows at
their place, and `pixelprune` keeps them out of the tower.

{rows}

*Of ideal*, of the tower: the ratio of the multiply-adds of its blocks and merger is {ideal:.2f},
and {reached:.0%} of it is reached; 85 % was asked for. Those of the weights go with the patches,
those of attention with the square of the patches of each frame. Embedding the patches and adding
positions is done for all.

*Of the first token*: `ttf` alone and behind `pixelprune` hand the LLM equally many tokens, a third
of all, so that all that differs is the tower, and what is matched behind it. Predicted is
t(ttf) − t(tower) · (1 − 1 / {ideal:.2f}) = {predicted_s:.2f} s, {measured_s:.2f} s is measured:
{gained:.0%} of the predicted saving.

Times are medians of {runs} runs, in turn.

```console
$ python benchmarks/tower_cuts.py {arguments}> docs/results/tower-cuts.md
```
"""
VIDEO, START, END = 60, 61, 62


def build(args):
    vision = {
        "depth": args.depth,
        "hidden_size": args.width,
        "intermediate_size": 4 * args.width,
        "num_heads": args.width // 64,
        "patch_size": 16,
        "out_hidden_size": args.hidden,
        "deepstack_visual_indexes": [args.depth // 2],
    }
    text = {
        "vocab_size": 64,
        "hidden_size": args.hidden,
        "intermediate_size": 3 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 128,
        "num_key_value_heads": args.hidden // 256,
        "head_dim": 128,
    }
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, args.dtype))
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=59,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        attn_implementation="sdpa",
    )
    model = Qwen3VLForConditionalGeneration(config).eval().to(args.device)
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False, max_new_tokens=1)
    return model


def video(args):
    """A prompt with a video, of which a share of the tokens repeat the frame before."""
    places = args.side**2
    lots = torch.Generator().manual_seed(0)
    frames = torch.rand(args.frames, places, 4 * 3 * 2 * 16 * 16, generator=lots)
    still = torch.rand(args.frames, places, generator=lots)
    # The first frame is all new.
    still = still < args.predicted * args.frames / (args.frames - 1)
    still[0] = False
    for t in range(1, args.frames):
        frames[t, still[t]] = frames[t - 1, still[t]]
    pixels = frames.view(args.frames * places * 4, -1) * 2 - 1
    one = [START, *[VIDEO] * places, END]
    ids = torch.tensor([[1, 2, *one * args.frames, 3, 4, 5]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == VIDEO).long() * 2,
        "pixel_values_videos": pixels.to(torch.get_default_dtype()),
        "video_grid_thw": torch.tensor([[args.frames, 2 * args.side, 2 * args.side]]),
    }
    return {name: value.to(args.device) for name, value in inputs.items()}, (~still).sum(-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--predicted", type=float, default=0.5)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model = build(args)
    inputs, kept = video(args)
    adapter = prompt_adapter(model, default_registry())
    tower = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
    share = 1 / 3
    ttf = {"strategy": "ttf", "keep_ratio": share}
    total = args.frames * args.side**2
    left = int(kept.sum())
    # Rounded up, both leave a third of all.
    count = -(-total // 3)
    chain = {"compose": ["pixelprune", {"strategy": "ttf", "keep_ratio": count / left}]}

    def whole():
        return model.base_model.get_video_features(**tower)

    def cut():
        strategy = tokenfuse.get_strategy("pixelprune")
        stage = PackedStage(model.base_model.visual, tower["video_grid_thw"], strategy)
        stage.before(adapter.pixels(inputs, "video"))
        with stage.running():
            model.base_model.get_video_features(**tower)
        assert stage.plans[0].num_kept == left

    def first_token(strategy):
        with tokenfuse.attach(model, strategy) as session:
            model.generate(**inputs)
        assert session.report.tokens_after == count

    def synchronize():
        if args.device == "cuda":
            torch.cuda.synchronize()

    steps = {
        "tower, whole": whole,
        "tower, `pixelprune`": cut,
        "first token, `ttf`": lambda: first_token(ttf),
        "first token, `pixelprune`, then `ttf`": lambda: first_token(chain),
    }
    times = {name: [] for name in steps}
    with torch.no_grad():
        for _ in range(args.runs + 1):
            for name, run in steps.items():
                synchronize()
                start = time.perf_counter()
                run()
                synchronize()
                times[name].append(time.perf_counter() - start)
    # The first runs warm up.
    times = {name: each[1:] for name, each in times.items()}

    def cost(frames):
        block = args.depth * 12 * args.width**2
        # The merger and one more for DeepStack, for each token of four patches.
        merger = 2 * (16 * args.width**2 + 4 * args.width * args.hidden)
        square = args.depth * 2 * args.width
        return sum(4 * c * block + c * merger + square * (4 * c) ** 2 for c in frames)

    ideal = cost([args.side**2] * args.frames) / cost(kept.tolist())
    each = list(times.values())
    median = [statistics.median(x) for x in each]
    ratio = statistics.median(a / b for a, b in zip(*each[:2], strict=True))
    predicted = median[2] - median[0] * (1 - 1 / ideal)
    gained = (median[2] - median[3]) / (median[2] - predicted)
    quick = ["1.00", f"{ratio:.2f}", "1.00", f"{median[2] / median[3]:.2f}"]
    of_ideal = ["", f"{ratio / ideal:.0%}", "", f"{predicted / median[3]:.0%}"]
    rows = [
        [name, f"{middle:.2f}", f"{min(x):.2f} – {max(x):.2f}", *rest]
        for name, middle, x, *rest in zip(times, median, each, quick, of_ideal, strict=True)
    ]
    arguments = " ".join(sys.argv[1:])
    head = ["", "s", "least – most", "times faster", "of ideal"]
    print(
        PAGE.format(
            **vars(args) | {"predicted": 1 - left / total},
            threads=torch.get_num_threads(),
            ideal=ideal,
            reached=ratio / ideal,
            predicted_s=predicted,
            measured_s=median[3],
            gained=gained,
            arguments=f"{arguments} " if arguments else "",
            rows=table(head, rows, left=1).strip(),
        ).replace("cpu", "CPU"),
        end="",
    )


if __name__ == "__main__":
    main()
