"""What a cut inside the LLM saves.

``python benchmarks/layer_cuts.py > docs/results/layer-cuts.md``: time of the prefill side by side,
and peak memory of fresh processes, of a Qwen3-VL with random weights: not compressed, cut by
tokenfuse, and cut by hand, in a loop over the decoder's layers.
"""

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from transformers import DynamicCache, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

import tokenfuse
from tokenfuse.bench.markdown import table
from tokenfuse.costs import flops, layered_prefill_flops, prefill_flops, size
from tokenfuse.ops.row_attention import row_attention
from tokenfuse.ops.select import top

PAGE = """\
# What a cut inside the LLM saves

A Qwen3-VL with random weights: {width} wide, {layers} layers, {tokens} visual tokens of one video
and {text} of text, {dtype}, {device}, {threads} threads. `{strategy}`.

{rows}

*Ideal* is the ratio of the [FLOPs](../explanation/inside-the-llm.md#what-a-budget-means) of the
prefill, {before} and {after}. *By hand* is the same cut written out as a loop over the decoder's
layers, with the last row's attention from queries and keys. Times are medians of {runs} runs, in
turn; they hold the vision tower too, which is tiny here ({tower:.2f} s).

{memory}

Memory is the most that a fresh process held while it read the prompt and kept the cache, beyond
what it held before, by the operating system.

```console
$ python benchmarks/layer_cuts.py {arguments}> docs/results/layer-cuts.md
```
"""
IDS = {
    "image_token_id": 1,
    "video_token_id": 2,
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
}
WAYS = ("not compressed", "tokenfuse", "by hand")


def build(args):
    width = args.width
    text = {
        "vocab_size": 512,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": width // 128,
        "num_key_value_heads": max(1, width // 256),
        "head_dim": 128,
        "max_position_embeddings": 65536,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 1,
        "patch_size": 8,
        "out_hidden_size": width,
        "num_position_embeddings": 1024,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, attn_implementation="sdpa", **IDS
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, args.dtype))
    return Qwen3VLForConditionalGeneration(config).eval().to(args.device)


def prompt(args):
    """One video of ``tokens`` visual tokens in frames of 256, and text."""
    frames, side = max(1, args.tokens // 256), 32
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randn(frames * side * side, 3 * 2 * 8 * 8, generator=rng)
    ids = list(range(10, 10 + args.text // 2))
    for _ in range(frames):
        ids += [3, *[2] * 256, 4]
    ids += list(range(300, 300 + args.text - args.text // 2))
    ids = torch.tensor([ids])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 2).long() * 2,
        "pixel_values_videos": pixels.to(getattr(torch, args.dtype)),
        "video_grid_thw": torch.tensor([[frames, side, side]]),
    }
    return {name: value.to(args.device) for name, value in inputs.items()}


def by_hand(model, inputs, layer, ratio):
    """FastV as a loop: full layers, one row of attention, indexing, short layers."""
    decoder, caught = model.get_decoder(), {}

    class Caught(Exception):
        pass

    def catch(_, args, kwargs):
        caught.update(kwargs)
        raise Caught

    handle = decoder.register_forward_pre_hook(catch, with_kwargs=True)
    with contextlib.suppress(Caught):
        model(**inputs)
    handle.remove()
    read = states = caught["inputs_embeds"]
    visual = caught["visual_pos_masks"][0].nonzero().flatten()
    rope = decoder.rotary_emb(states, caught["position_ids"][-3:])
    deep, cache = caught["deepstack_visual_embeds"], caught["cache"]
    for number, block in enumerate(decoder.layers):
        if number == layer:
            attention = decoder.layers[layer - 1].self_attn
            x = decoder.layers[layer - 1].input_layernorm(read[:, -1:])
            query = attention.q_norm(attention.q_proj(x).view(1, 1, -1, 128)).transpose(1, 2)
            query, _ = apply_rotary_pos_emb(query, query, rope[0][:, -1:], rope[1][:, -1:])
            keys = cache.layers[layer - 1].keys[0]
            scores = row_attention(query[0], keys, 128**-0.5)[:, 0].mean(0)[visual]
            kept = visual[top(scores, -(-int(len(visual) * ratio) // 1))]
            stays = torch.ones(states.shape[1], dtype=torch.bool, device=states.device)
            stays[visual] = False
            stays[kept] = True
            left = stays.nonzero().flatten()
            states, rope = states[:, left], tuple(x[:, left] for x in rope)
        read = states
        states = block(states, position_embeddings=rope, attention_mask=None, cache=cache)
        if deep is not None and number < len(deep):
            states[0, visual] = states[0, visual] + deep[number]
    return model.lm_head(decoder.norm(states)[:, -1:])


def runs(model, inputs, args):
    """The three WAYS, as functions."""

    def plain():
        return model(**inputs, use_cache=True, logits_to_keep=1).logits

    def cut():
        with tokenfuse.attach(model, args.strategy, layer=args.layer, keep_ratio=args.keep_ratio):
            return model(**inputs, use_cache=True, logits_to_keep=1).logits

    def hand():
        whole = {**inputs, "cache": DynamicCache(config=model.config.get_text_config())}
        return by_hand(model, whole, args.layer, args.keep_ratio)

    return {"not compressed": plain, "tokenfuse": cut, "by hand": hand}


def synchronize(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def measure_memory(args, which):
    """The most that a fresh process holds, beyond what it held before."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", which]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def only(args):
    model, inputs = build(args), prompt(args)
    small = prompt(short_of(args))
    with torch.no_grad():
        # What is made once, such as threads and kernels, is not the prompt's.
        runs(model, small, args)[args.only]()
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            runs(model, inputs, args)[args.only]()
            print(json.dumps(torch.cuda.max_memory_allocated() - before))
            return
        before = resident()
        runs(model, inputs, args)[args.only]()
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before))


def short_of(args):
    return argparse.Namespace(**{**vars(args), "tokens": 256})


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--strategy", default="fastv")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=WAYS)
    args = parser.parse_args()
    if args.only:
        return only(args)
    memory = {name: measure_memory(args, name) for name in WAYS[:2]}
    model, inputs = build(args), prompt(args)
    times = {name: [] for name in WAYS}
    with torch.no_grad():
        found = {name: run() for name, run in runs(model, prompt(short_of(args)), args).items()}
        for _ in range(args.runs):
            for name, run in runs(model, inputs, args).items():
                synchronize(args)
                start = time.perf_counter()
                found[name] = run()
                synchronize(args)
                times[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        model.base_model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        tower = time.perf_counter() - start
    torch.testing.assert_close(found["tokenfuse"], found["by hand"], atol=1e-3, rtol=1e-3)
    config = model.config.get_text_config()
    length = inputs["input_ids"].shape[1]
    short = length - args.tokens + -(-args.tokens * args.keep_ratio // 1)
    before = prefill_flops(config, [length])
    after = layered_prefill_flops(
        config, [[length] if n < args.layer else [int(short)] for n in range(args.layers)]
    )
    median = {name: statistics.median(each) for name, each in times.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[WAYS[0]], each, strict=True))
        for name, each in times.items()
    }
    ideal = before / after
    rows = [
        [
            name,
            f"{median[name]:.2f}",
            f"{min(times[name]):.2f} – {max(times[name]):.2f}",
            f"{ratios[name]:.2f}",
            "" if name == WAYS[0] else f"{ideal:.2f}",
            "" if name == WAYS[0] else f"{ratios[name] / ideal:.0%}",
        ]
        for name in WAYS
    ]
    held = [[name, size(value), f"{value / memory[WAYS[0]]:.0%}"] for name, value in memory.items()]
    arguments = " ".join(sys.argv[1:])
    head = ["prefill", "s", "least – most", "times faster", "ideal", "of ideal"]
    page = PAGE.format(
        width=args.width,
        layers=args.layers,
        tokens=args.tokens,
        text=length - args.tokens,
        dtype=args.dtype,
        device=torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        threads=torch.get_num_threads(),
        strategy=f"{args.strategy}, layer {args.layer}, keep ratio {args.keep_ratio}",
        rows=table(head, rows, left=1).strip(),
        before=flops(before),
        after=flops(after),
        runs=args.runs,
        tower=tower,
        memory=table(["peak memory", "", "share"], held, left=1).strip(),
        arguments=f"{arguments} " if arguments else "",
    )
    print(page, end="")
    return None


if __name__ == "__main__":
    main()
