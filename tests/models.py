"""Tiny random Qwen3-VL models and prompts for them, the same for every test."""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

import tokenfuse
from tokenfuse import FusionPlan, Strategy, hookimpl
from tokenfuse.micro.build import MERGE, PATCH, SIZE, SPECIAL, build_processor
from tokenfuse.micro.tasks import make_clip
from tokenfuse.registry import Registry

processor = functools.cache(build_processor)


def build(kind="dense", attention="sdpa", seed=0, layers=3, deepstack=(0, 1)):
    """A random model in eval mode; ``kind`` is dense or moe.

    ``deepstack``: the vision blocks whose features are added after the first layers.
    """
    tokenizer = processor().tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "mrope_section": [2, 2, 2],
            "mrope_interleaved": True,
        },
        "pad_token_id": ids["<|endoftext|>"],
        # At the usual 0.02 the logits of so small a model hardly depend on its input.
        "initializer_range": 0.3,
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": 48,
        "num_position_embeddings": (SIZE // PATCH) ** 2,
        "deepstack_visual_indexes": list(deepstack),
        "initializer_range": 0.3,
    }
    model_class, config_class = Qwen3VLForConditionalGeneration, Qwen3VLConfig
    if kind == "moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        model_class, config_class = Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig
    config = config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        attn_implementation=attention,
    )
    torch.manual_seed(seed)
    model = model_class(config).eval()
    # A trained model answers in words; a random one might in placeholders or padding.
    with torch.no_grad():
        model.lm_head.weight[list(ids.values())] = 0
    # No end token: answers have the length that a test asks for.
    model.generation_config = GenerationConfig(
        pad_token_id=ids["<|endoftext|>"], bos_token_id=ids["<|endoftext|>"], do_sample=False
    )
    return model


model_of = functools.cache(build)


def frames(seed, patches=2, step=2):
    """A video of ``patches`` temporal patches, ``(2 * patches, 96 / step, 96 / step, 3)``."""
    return make_clip(seed, patches=patches).frames[:, ::step, ::step]


def user(*parts):
    """A user's message of ``"image"``, ``"video"`` and texts, as a prompt."""
    content = [
        {"type": p} if p in ("image", "video") else {"type": "text", "text": p} for p in parts
    ]
    return processor().apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def prompt(texts, *, images=(), videos=(), side="left"):
    """The processor's inputs for a batch of texts."""
    metadata = [
        {"fps": 4, "total_num_frames": len(v), "frames_indices": list(range(len(v)))}
        for v in videos
    ]
    batch = processor()(
        text=texts,
        images=list(images) or None,
        videos=list(videos) or None,
        video_metadata=metadata or None,
        do_sample_frames=False,
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )
    return dict(batch)


def image(seed):
    return frames(seed)[seed % 4]


def one_video(seed=1, patches=3, question="What shape is the moving object?"):
    return prompt([user("video", question)], videos=[frames(seed, patches)])


def one_image(seed=1):
    return prompt([user("image", "What color is it?")], images=[image(seed)])


def image_then_video():
    text = user("Look:", "image", "and", "video", "How many objects are there?")
    return prompt([text], images=[image(1)], videos=[frames(2)])


def video_then_image():
    text = user("video", "then", "image", "What color?")
    return prompt([text], images=[image(3)], videos=[frames(4)])


def two_videos():
    text = user("video", "or", "video", "Which color appears first?")
    return prompt([text], videos=[frames(5, 2), frames(6, 3)])


ROWS = (
    (user, ("video", "What shape is the moving object?"), (), ((7, 3),)),
    (user, ("image", "and", "video", "and", "video", "Which?"), (8,), ((9, 1), (10, 2))),
    (user, ("image", "then", "image", "How many objects are there in all of these?"), (11, 12), ()),
)


def batch(side="left", rows=(0, 1, 2)):
    """Prompts of unequal lengths with several images and videos, and how each is alone."""
    chosen = [ROWS[i] for i in rows]
    return prompt(
        [make(*parts) for make, parts, _, _ in chosen],
        images=[image(seed) for _, _, seeds, _ in chosen for seed in seeds],
        videos=[frames(*video) for _, _, _, videos in chosen for video in videos],
        side=side,
    )


class Drop(Strategy):
    """Drops tokens at random, and the whole of every second frame if ``frames`` says so."""

    name: ClassVar[str] = "drop"
    reduction: float = 0.33
    seed: int = 0
    frames: bool = False

    def plan(self, tokens):
        t, h, w = tokens.grid
        n = tokens.num_tokens
        # The draw depends on the grid: not on an item's place in a batch, nor on rounding.
        own = t * 10007 + h * 101 + w
        noise = torch.rand(n, generator=torch.Generator().manual_seed(self.seed * 1009 + own))
        if self.frames:
            noise = noise + (torch.arange(n) // (h * w) % 2 == 0) * 2
            kept = max(1, round(-(-t // 2) * h * w * (1 - self.reduction)))
        else:
            kept = max(1, round(n * (1 - self.reduction)))
        survivors = noise.topk(kept).indices.sort().values
        return FusionPlan.from_survivors(survivors.to(tokens.features.device), n)


class Halves(Strategy):
    """Fuses each token of the second half of an item into the one as far into the first half."""

    name: ClassVar[str] = "halves"

    def plan(self, tokens):
        n = tokens.num_tokens
        kept = -(-n // 2)
        index = torch.arange(n, device=tokens.features.device)
        return FusionPlan.from_roots(index[:kept], index % kept)


class Plugin:
    @hookimpl
    def tokenfuse_register_strategies(self, register):
        register(Drop)
        register(Halves)


AMONG = Registry([Plugin()], installed=False)


def drop(reduction=0.33, **options):
    return Drop(reduction=reduction, **options)


HALF = drop(0.5)


def compress(model, inputs, strategy=HALF, **options):
    return tokenfuse.compress(model, inputs, strategy, registry=AMONG, **options)


def attach(model, strategy=HALF, **options):
    return tokenfuse.attach(model, strategy, registry=AMONG, **options)


def visual_ids():
    tokenizer = processor().tokenizer
    return {m: tokenizer.convert_tokens_to_ids(f"<|{m}_pad|>") for m in ("image", "video")}


ROUNDING = 1e-4
"""Largest difference of logits that is rounding."""


class Forced(LogitsProcessor):
    """Lets ``generate`` answer as ``sequences (B, L + S)`` go on, whatever the logits say.

    The logits of two ways to compute one answer can then be compared, also where two tokens of a
    random model tie but for rounding.
    """

    def __init__(self, sequences):
        self.sequences = sequences

    def __call__(self, input_ids, scores):
        chosen = self.sequences[:, input_ids.shape[1], None]
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0)


class Oracle:
    """The full-length run of the same model, in which a 4-D mask hides the dropped tokens.

    It shares nothing with tokenfuse but the plans' keep masks: positions are the model's own for
    the uncompressed prompt, and every step reads the whole conversation anew, without a cache.
    """

    def __init__(self, model, inputs, plans):
        self.model, self.inputs = model, inputs
        self.ids = inputs["input_ids"]
        self.real = inputs["attention_mask"].bool()
        grids = {k: inputs.get(k) for k in ("image_grid_thw", "video_grid_thw")}
        self.positions, self.delta = model.model.get_rope_index(
            self.ids, inputs["mm_token_type_ids"], attention_mask=inputs["attention_mask"], **grids
        )
        self.seen = self.real.clone()
        for modality, parts in plans.items():
            row, column = (self.ids == visual_ids()[modality]).nonzero(as_tuple=True)
            dropped = ~torch.cat([plan.keep_mask for plan in parts])
            self.seen[row[dropped], column[dropped]] = False

    def append(self, ids, mask=None):
        mask = torch.ones_like(ids) if mask is None else mask
        counts = self.real.sum(-1, keepdim=True) + mask.cumsum(-1) - 1
        self.ids = torch.cat([self.ids, ids], -1)
        self.real = torch.cat([self.real, mask.bool()], -1)
        self.seen = torch.cat([self.seen, mask.bool()], -1)
        self.positions = torch.cat([self.positions, (counts + self.delta).expand(3, -1, -1)], -1)

    @torch.no_grad()
    def logits(self):
        length = self.ids.shape[1]
        causal = torch.ones(length, length).tril().bool()
        visible = causal & self.seen[:, None, None]
        hidden = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        pixels = {k: v for k, v in self.inputs.items() if "pixel" in k or "grid" in k}
        # The class's own forward, also while the model is attached.
        output = type(self.model).forward(
            self.model,
            input_ids=self.ids,
            attention_mask=hidden,
            position_ids=self.positions,
            use_cache=False,
            **pixels,
        )
        return output.logits

    def follow(self, tokens):
        """Append an answer ``(B, S)``, and give the logits ``(B, S, V)`` that choose its tokens."""
        self.append(tokens)
        return self.logits()[:, -tokens.shape[1] - 1 : -1]

    def says(self, tokens):
        """Whether an answer ``(B, S)`` is the greedy one, which is appended.

        Where two tokens of a random model tie but for rounding, either may be chosen.
        """
        logits = self.follow(tokens)
        best, chosen = logits.max(-1).values, logits.gather(-1, tokens[..., None])[..., 0]
        return float((best - chosen).max()) <= 2 * ROUNDING
