"""Models of named sizes with random weights, and a prompt that shows them a video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tokenfuse.costs import free_bytes
from tokenfuse.costs import size as readable
from tokenfuse.errors import ConfigError, TooLargeError, UnsupportedModelError

VOCABULARY = 1024
"""Of models with random weights: words make no difference to what is measured, but for the head."""
VIDEO, IMAGE, START, END = range(VOCABULARY - 4, VOCABULARY)
WORDS = 24
"""Tokens of text around a video."""
ALLOWANCE = 1.3
"""What is needed, over what is counted: buffers of kernels and of the allocator."""


@dataclass(frozen=True)
class Size:
    """What decides the time of a Qwen3-VL: depths and widths of its decoder and vision tower."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vision_hidden: int
    vision_depth: int
    vision_heads: int
    vision_feed_forward: int
    deepstack: tuple[int, ...]
    head_dim: int = 128


_SMALL = (1024, 24, 16, 4096, (5, 11, 17))
_LARGE = (1152, 27, 16, 4304, (8, 16, 24))
SIZES = {
    "Qwen/Qwen3-VL-2B-Instruct": Size(2048, 28, 16, 8, 6144, *_SMALL),
    "Qwen/Qwen3-VL-4B-Instruct": Size(2560, 36, 32, 8, 9728, *_SMALL),
    "Qwen/Qwen3-VL-8B-Instruct": Size(4096, 36, 32, 8, 12288, *_LARGE),
    "Qwen/Qwen3-VL-32B-Instruct": Size(5120, 64, 64, 8, 25600, *_LARGE),
}
"""Depths and widths of published models, by their id on the hub."""


def size_of(name: str) -> Size:
    """The size of a model by its id, or by the end of it. Raises ConfigError."""
    found = [key for key in SIZES if key == name or key.partition("/")[2] == name]
    if not found:
        raise ConfigError(f"--like {name} is of no known size; expected one of {', '.join(SIZES)}")
    return SIZES[found[0]]


def config_of(size: Size, layers: int | None, vision_layers: int | None) -> Any:
    """The config of a Qwen3-VL of a size, cut to so many layers and vision blocks."""
    from transformers import Qwen3VLConfig

    depth = vision_layers or size.vision_depth
    # A tower that is cut short adds its features where a whole one does.
    deepstack = sorted({min(depth - 1, i * depth // size.vision_depth) for i in size.deepstack})
    return Qwen3VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": size.hidden,
            "intermediate_size": size.feed_forward,
            "num_hidden_layers": layers or size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "head_dim": size.head_dim,
            "max_position_embeddings": 262144,
        },
        vision_config={
            "depth": depth,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_feed_forward,
            "num_heads": size.vision_heads,
            "patch_size": 16,
            "out_hidden_size": size.hidden,
            "deepstack_visual_indexes": deepstack,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        attn_implementation="sdpa",
    )


def build(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of this config with random weights, the same at each call, in eval mode."""
    from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            model: Any = Qwen3VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)
    return model.requires_grad_(False)


def video_prompt(
    model: Any, grid: tuple[int, int, int], batch: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A prompt for a Qwen3-VL that shows one video of noise with a scene that stays.

    ``grid``: frames as the tower reads them, rows and columns of visual tokens. Neighbouring frames
    differ in a part of their pixels, so that strategies have something to find.

    Raises UnsupportedModelError for models of other families.
    """
    config = model.config
    if getattr(config, "model_type", "") not in ("qwen3_vl", "qwen3_vl_moe"):
        raise UnsupportedModelError(
            f"bench speed makes prompts for Qwen3-VL, and this is a {type(model).__name__}; "
            "expected a Qwen3-VL: time your own model with tokenfuse run --model"
        )
    vision, device = config.vision_config, model.device
    frames, height, width = grid
    merge = vision.spatial_merge_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    rng = torch.Generator().manual_seed(0)
    scene = torch.rand(1, height * width * merge**2, values, generator=rng)
    change = torch.rand(frames, height * width * merge**2, 1, generator=rng) < 0.3
    noise = torch.rand(frames, height * width * merge**2, values, generator=rng)
    pixels = torch.where(change, noise, scene).flatten(0, 1) * 2 - 1
    one = [config.vision_start_token_id]
    one += [config.video_token_id] * (height * width) + [config.vision_end_token_id]
    text = list(range(1, WORDS // 2 + 1))
    ids = torch.tensor([[*text, *one * frames, *text]] * batch, device=device)
    patches = torch.tensor([[frames, height * merge, width * merge]] * batch, device=device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.video_token_id).long() * 2,
        "pixel_values_videos": pixels.repeat(batch, 1).to(device, dtype),
        "video_grid_thw": patches,
    }


def needed_bytes(
    config: Any, tokens: int, batch: int, dtype: torch.dtype, loaded: bool = False
) -> int:
    """Bytes that a run will take at most, roughly: weights, pixels, tower, prefill and cache.

    ``loaded``: the weights are there already.
    """
    text, vision = config.text_config, config.vision_config
    element = torch.empty((), dtype=dtype).element_size()
    q, kv = (n * text.head_dim for n in (text.num_attention_heads, text.num_key_value_heads))
    layer = 2 * text.hidden_size * (q + kv) + 3 * text.hidden_size * text.intermediate_size
    wide = vision.hidden_size
    block = 4 * wide**2 + 2 * wide * vision.intermediate_size
    merge = vision.spatial_merge_size**2
    merger = (merge * wide) ** 2 + merge * wide * text.hidden_size
    weights = text.num_hidden_layers * layer + 2 * text.vocab_size * text.hidden_size
    weights += vision.depth * block + (1 + len(vision.deepstack_visual_indexes)) * merger
    patches = tokens * merge * batch
    pixels = patches * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    tower = patches * (4 * wide + 2 * vision.intermediate_size)
    length = (tokens + WORDS) * batch
    prefill = length * (4 * text.hidden_size + 3 * text.intermediate_size)
    cache = 2 * length * kv * text.num_hidden_layers
    features = 4 * tokens * batch * text.hidden_size
    run = pixels + max(tower, prefill + cache) + features
    return int(ALLOWANCE * element * (run if loaded else weights + run))


FEWER = "fewer --layers, --frames or --batch, a smaller --grid, or --dtype bfloat16"


def check_memory(needed: int, device: torch.device, expected: str = FEWER) -> None:
    """Raise TooLargeError where a run would not fit in the memory that is free."""
    cuda = device.type == "cuda"
    free: int | None = torch.cuda.mem_get_info(device)[0] if cuda else free_bytes()
    if free is not None and needed > free:
        raise TooLargeError(
            f"the run takes about {readable(needed)}, and {readable(free)} are free on {device}; "
            f"expected {expected}"
        )
