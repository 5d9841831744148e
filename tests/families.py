"""Tiny random models of many VLM families, and prompts laid out as their processors write them.

There is no processor and no tokenizer: ids are made by hand. ``FAMILIES`` holds the families
whose visual tokens have a place in an image; in ``RESAMPLED`` learned queries read the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2]))

VOCAB = 128
# Ordinary text, of which FIRST is the bos; the layouts' own words and markers stand above it.
FIRST, WORDS = 4, range(5, 96)
NEWLINE, FRAME, SECONDS, HERE, DIGIT = 96, 97, 98, 99, 100  # DIGIT to DIGIT + 9
PAD, IMAGE, VIDEO, START, END, OPEN, CLOSE = range(112, 119)
FAKE, GLOBAL, BREAK, TILE = range(119, 123)  # TILE to TILE + 3 stand for a tile's place


@dataclass(frozen=True)
class Family:
    """A model and its prompts; both are the same at each call."""

    name: str
    modalities: tuple[str, ...]
    build: Callable[[str], Any]
    prompt: Callable[..., dict]
    mixed: bool = True
    several: bool = True


def build(kind, attention="sdpa", *, text, vision, std=0.2, **options):
    """A model in eval mode of the config class ``<kind>Config``."""
    config = getattr(transformers, f"{kind}Config")(
        text_config=TEXT | text,
        vision_config=VISION | vision,
        attn_implementation=attention,
        **options,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
        for parameter in model.parameters():
            # At the usual scale the logits of so small a model hardly depend on its input, and
            # not all vision towers have a setting for it. Norms and biases stay as they are.
            if parameter.ndim > 1:
                parameter.normal_(std=std)
    # No end token: answers have the length that a test asks for.
    model.generation_config = GenerationConfig(pad_token_id=PAD, do_sample=False)
    return model


TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": FIRST,
    "eos_token_id": None,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


def noise(kind, seed, *shape):
    """The pixels of an item, which depend on nothing but its kind and seed."""
    rng = torch.Generator().manual_seed(2 * seed + (kind == "video"))
    return torch.randn(*shape, generator=rng)


def words(seed):
    """A text of 2 to 5 ids; the first one tells seeds apart."""
    rng = torch.Generator().manual_seed(seed)
    more = torch.randint(WORDS.start, WORDS.stop, (1 + seed % 4,), generator=rng)
    return [WORDS[seed % len(WORDS)], *more.tolist()]


def assemble(rows, side, media, *, types=None, join=None, frame=None):
    """Model inputs of a batch.

    ``media(kind, seed, row)`` gives an item's ids and its tensors, ``join`` a function for each
    of their names which makes one tensor of a list for each row (if none is given, all are
    concatenated), ``types`` the name of the token types and what gives them for a row's ids, and
    ``frame`` the ids of a row from those of its parts (if not given, a bos goes before them).
    """
    ids, found = [], {}
    for n, row in enumerate(rows):
        parts = []
        for kind, seed in row:
            piece, tensors = (words(seed), {}) if kind == "text" else media(kind, seed, row)
            parts.append((kind, piece))
            for name, value in tensors.items():
                found.setdefault(name, [[] for _ in rows])[n].append(value)
        ids.append(frame(parts) if frame else [FIRST, *(i for _, piece in parts for i in piece)])
    columns = {"input_ids": (ids, PAD), "attention_mask": ([[1] * len(row) for row in ids], 0)}
    if types is not None:
        columns[types[0]] = ([types[1](row) for row in ids], 0)
    inputs = {}
    for name, (values, fill) in columns.items():
        padding = [[fill] * (max(map(len, ids)) - len(row)) for row in ids]
        pairs = zip(padding, values, strict=True)
        inputs[name] = torch.tensor([p + v if side == "left" else v + p for p, v in pairs])
    for name, lists in found.items():
        inputs[name] = (join or {}).get(name, flat)(lists)
    return inputs


def flat(lists):
    return torch.cat([value for row in lists for value in row])


def padded(tensors):
    """One tensor of many, which zeros make equally large."""
    sizes = [max(lengths) for lengths in zip(*(t.shape for t in tensors), strict=True)]
    out = tensors[0].new_zeros(len(tensors), *sizes)
    for n, tensor in enumerate(tensors):
        out[(n, *(slice(length) for length in tensor.shape))] = tensor
    return out


def items(lists):
    """Items of several sizes, one after the other."""
    return padded([value for row in lists for value in row])


def by_row(lists):
    """The images of each row, as in Idefics; images of zeros make all rows equally long."""
    nothing = next(row for row in lists if row)[0][:0]
    return padded([torch.cat([nothing, *row]) for row in lists])


def by_id(ids):
    return [{IMAGE: 1, VIDEO: 2}.get(i, 0) for i in ids]


def between_markers(ids):
    """GLM-4V: a frame of a video has the id of an image and stands between a video's markers."""
    kinds, video = [], False
    for i in ids:
        video = (video or i == OPEN) and i != CLOSE
        kinds.append((1 + video) * (i == IMAGE))
    return kinds


def number(n, unit=SECONDS):
    return [DIGIT + n % 10, unit]


# Grids of an image and of a video, in merged tokens, by seed.
IMAGES = ((3, 2), (2, 4), (3, 3))
VIDEOS = ((2, 2, 3), (3, 3, 2), (4, 2, 3))
PATCH, MERGE, STEP = 4, 2, 2  # STEP frames are one


def qwen_like(layout, *, fps=False, types=by_id):
    """Flattened patches and grids; ``layout(t, n)`` has the ids of a video."""

    def media(kind, seed, row):
        t, h, w = VIDEOS[seed % 3] if kind == "video" else (1, *IMAGES[seed % 3])
        patches = noise(kind, seed, t * h * w * MERGE**2, 3 * STEP * PATCH**2)
        grid = torch.tensor([[t, h * MERGE, w * MERGE]])
        if kind == "image":
            tensors = {"pixel_values": patches, "image_grid_thw": grid}
            return [START, *[IMAGE] * (h * w), END], tensors
        tensors = {"pixel_values_videos": patches, "video_grid_thw": grid}
        if fps:
            tensors["second_per_grid_ts"] = torch.tensor([(0.5, 1.0, 2.0)[seed % 3]])
        return layout(t, h * w), tensors

    def prompt(rows, side="left"):
        return assemble(rows, side, media, types=("mm_token_type_ids", types))

    return prompt


def one_block(t, n):
    return [START, *[VIDEO] * (t * n), END]


def stamped(t, n):
    """Qwen3-VL: the processor puts markers around the frames' own ones."""
    frames = [i for f in range(t) for i in [HERE, *number(f), START, *[VIDEO] * n, END]]
    return [START, *frames, END]


def glm_frames(t, n, unit=()):
    """GLM-4V: frames are images between a video's markers, each with its time behind it."""
    frames = [i for f in range(t) for i in [START, *[IMAGE] * n, END, DIGIT + f, *unit]]
    return [OPEN, *frames, CLOSE]


def mrope(*sections, **options):
    return {
        "rope_type": "default",
        "rope_theta": 100.0,
        "mrope_section": list(sections),
        **options,
    }


MARKERS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
QWEN = MARKERS | {"vision_start_token_id": START, "vision_end_token_id": END}
GLM = MARKERS | {
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": OPEN,
    "video_end_token_id": CLOSE,
}
PATCHES = {"patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": STEP}
HEADS = {"depth": 3, "num_heads": 2, "out_hidden_size": 48}
TOWER = {"hidden_size": 32, "intermediate_size": 48, **HEADS, **PATCHES}
QWEN3 = {"head_dim": 12, "rope_parameters": mrope(2, 2, 2, mrope_interleaved=True)}
QWEN3_TOWER = TOWER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
GLM_TEXT = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": mrope(2, 2, 2, partial_rotary_factor=0.5),
}
GLM_TOWER = TOWER | {"image_size": 16}


def qwen3_5(layers):
    return partial(
        build,
        "Qwen3_5",
        text={
            "head_dim": 24,
            "rope_parameters": mrope(2, 2, 2, mrope_interleaved=True, partial_rotary_factor=0.5),
            "layer_types": layers,
            # A linear layer's output may be so small that its norm blows up rounding errors.
            "rms_norm_eps": 1e-4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        vision=TOWER | {"num_position_embeddings": 16},
        std=0.15,
        **QWEN,
    )


def llava_like(write, join=None):
    """Prompts of a family whose items ``write(kind, seed, row)`` lays out."""

    def prompt(rows, side="left"):
        return assemble(rows, side, write, join=join)

    return prompt


SIDE, CELL = 24, 6
CELLS = (SIDE // CELL) ** 2
SQUARE = {"image_size": SIDE, "patch_size": CELL}
CLIP = {"model_type": "clip_vision_model", **SQUARE}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **SQUARE}
PIXTRAL = {"model_type": "pixtral", "image_size": 64, "patch_size": PATCH, "head_dim": 16}
LLAMA = {"model_type": "llama"}
QWEN2 = {"model_type": "qwen2"}
MISTRAL = {"model_type": "mistral", "sliding_window": None, "head_dim": 12}


def square(kind, seed, row, side=SIDE, n=CELLS, around=((), ())):
    """An image of one size and its ``n`` tokens."""
    ids = [*around[0], *[IMAGE] * n, *around[1]]
    return ids, {"pixel_values": noise(kind, seed, 1, 3, side, side)}


# One is cut into two tiles side by side and has a margin above, one below each other, one is one.
SIZES = ((10, 48), (48, 12), (20, 22))
PINPOINTS = [[24, 48], [48, 24], [24, 24]]
# The tiles without their margins, in tokens.
CUT = ((2, 8), (8, 2), (4, 4))
FRAMES = 3  # of all videos: a batch of them is one tensor


def anyres(kind, seed, row, multi=False, newline=False):
    """LLaVA-NeXT's tiles: an overview, then the whole without its margins, a newline each row."""
    if kind == "video":
        n = FRAMES * CELLS // 4 + newline
        return [VIDEO] * n, {"pixel_values_videos": noise(kind, seed, 1, FRAMES, 3, SIDE, SIDE)}
    h, w = CUT[seed % 3]
    tiles = 2 if seed % 3 == 2 else 3
    n = CELLS + h * (w + 1)
    tensors = {"image_sizes": torch.tensor([SIZES[seed % 3]])}
    if multi:
        images = sum(k == "image" for k, _ in row)
        if images > 1:  # LLaVA-OneVision cuts none of several images
            tiles, n = 1, CELLS + 1
        tensors["batch_num_images"] = torch.tensor([images])
    return [IMAGE] * n, {"pixel_values": noise(kind, seed, tiles, 3, SIDE, SIDE), **tensors}


def framed(kind, seed, row):
    """Video-LLaVA: in the tower, and with videos in the prompt, a class token before each frame."""
    if kind == "image":
        return square(kind, seed, row)
    pixels = noise(kind, seed, 1, FRAMES, 3, SIDE, SIDE)
    return [VIDEO] * (FRAMES * (1 + CELLS)), {"pixel_values_videos": pixels}


def once(lists):
    """What all items of a row say of the row."""
    return torch.cat([row[0] for row in lists if row])


def breaks(kind, seed, row):
    """Pixtral: a token ends each row of an image, which zeros make as large as the largest."""
    h, w = IMAGES[seed % 3]
    ids = [*([*[IMAGE] * w, BREAK] * h)[:-1], END]
    pixels = noise(kind, seed, 3, h * 8, w * 8)
    return ids, {"pixel_values": pixels, "image_sizes": torch.tensor([[h * 8, w * 8]])}


# Families that cut an image into tiles of TOKENS tokens, which pixel shuffling makes of 36.
LARGE = {"image_size": 24, "patch_size": 4}
TOKENS = 9
TILES = (1, 3, 2)
CUTS = ((0, 0), (1, 2), (2, 1))


def frames_of(seed):
    return 2 + seed % 3


def tiled(kind, seed, n):
    return {"pixel_values": noise(kind, seed, n, 3, 24, 24)}


def internvl(kind, seed, row):
    """One run for all tiles of an image; a video is images of one tile."""
    if kind == "image":
        n = TILES[seed % 3]
        return [START, *[IMAGE] * (n * TOKENS), END], tiled(kind, seed, n)
    n = frames_of(seed)
    frame = [START, *[IMAGE] * TOKENS, END, NEWLINE]
    ids = [i for f in range(1, n + 1) for i in [FRAME, *number(f, HERE), *frame]]
    return ids[:-1], tiled(kind, seed, n)


OVERVIEW = [FAKE, GLOBAL, *[IMAGE] * TOKENS, FAKE]


def idefics(kind, seed, row):
    """Idefics3 and SmolVLM: a marker before each tile, the overview last; the mask is all ones."""
    if kind == "image":
        rows, columns = CUTS[seed % 3]
        n = rows * columns + 1
        ids = []
        for r in range(rows):
            for c in range(columns):
                ids += [FAKE, TILE + 2 * r + c, *[IMAGE] * TOKENS]
            ids.append(NEWLINE)
        ids += [NEWLINE] * (n > 1) + OVERVIEW
    else:
        n = frames_of(seed)
        frames = [i for f in range(n) for i in [NEWLINE, FRAME, *number(f), *OVERVIEW]]
        ids = [HERE, *number(n, FRAME), NEWLINE, *frames, NEWLINE, NEWLINE]
    tensors = tiled(kind, seed, n)
    return ids, tensors | {"pixel_attention_mask": torch.ones(n, 24, 24, dtype=torch.long)}


def idefics_prompt(rows, side="left"):
    # The processor gives an entry for each row of images, but for each video of videos.
    videos = all(kind != "image" for row in rows for kind, _ in row)
    join = items if videos else by_row
    names = ("pixel_values", "pixel_attention_mask")
    return assemble(rows, side, idefics, join=dict.fromkeys(names, join))


def aya(kind, seed, row):
    """A marker before each tile, the overview last."""
    n = TILES[seed % 3]
    tiles = [i for t in range(n - 1) for i in [TILE + t, *[IMAGE] * TOKENS]]
    return [START, *tiles, GLOBAL, *[IMAGE] * TOKENS, END], tiled(kind, seed, n)


def cohere(kind, seed, row):
    """A line break after each tile."""
    n = TILES[seed % 3]
    return [START, *([*[IMAGE] * TOKENS, BREAK] * n), END], tiled(kind, seed, n)


def bos_behind_images(parts):
    """PaliGemma: the bos follows the last image, so that a prompt may begin with an image."""
    last = max((n for n, (kind, _) in enumerate(parts) if kind == "image"), default=-1) + 1
    before, after = ([i for _, piece in p for i in piece] for p in (parts[:last], parts[last:]))
    return [*before, FIRST, *after, NEWLINE]


def paligemma_prompt(rows, side="left"):
    # The type is that of a prefix, whose tokens all see each other.
    types = ("token_type_ids", lambda ids: [0] * len(ids))
    return assemble(rows, side, square, types=types, frame=bos_behind_images)


def gemma_prompt(rows, side="left"):
    around = ([NEWLINE, START], [END, NEWLINE])
    media = partial(square, n=TOKENS, around=around)
    return assemble(rows, side, media, types=("token_type_ids", by_id))


QUERIES = 8


def idefics2_prompt(rows, side="left"):
    def media(kind, seed, row):
        ids, tensors = square(kind, seed, row, n=QUERIES, around=([FAKE], [FAKE]))
        return ids, tensors | {"pixel_attention_mask": torch.ones(1, SIDE, SIDE, dtype=torch.long)}

    def frame(parts):
        # Of two markers that meet, one is left.
        ids = [i for _, piece in parts for i in piece]
        pairs = zip(ids, [None, *ids], strict=False)
        return [FIRST, *(i for i, before in pairs if not i == before == FAKE)]

    names = ("pixel_values", "pixel_attention_mask")
    return assemble(rows, side, media, join=dict.fromkeys(names, by_row), frame=frame)


def blip2_prompt(rows, side="left"):
    def frame(parts):
        return sorted([FIRST, *(i for _, piece in parts for i in piece)], key=lambda i: i != IMAGE)

    return assemble(rows, side, partial(square, n=QUERIES), frame=frame)


BOTH, STILL, MOVING = ("image", "video"), ("image",), ("video",)
NEXT_IDS = {"image_token_index": IMAGE, "image_grid_pinpoints": PINPOINTS}
NEXT_VIDEO_IDS = NEXT_IDS | {"video_token_index": VIDEO}
NEWLINES = {"pixel_values": items}
MIXED_LAYERS = {
    "head_dim": 12,
    "sliding_window": 512,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
IDEFICS = {
    "text": LLAMA,
    "vision": LARGE,
    "image_token_id": IMAGE,
    "scale_factor": 2,
    "pad_token_id": PAD,
}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "qwen2_vl",
            BOTH,
            partial(
                build,
                "Qwen2VL",
                text={"rope_parameters": mrope(2, 2, 2)},
                vision={**HEADS, **PATCHES, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2},
                **QWEN,
            ),
            qwen_like(one_block),
        ),
        Family(
            "qwen2_5_vl",
            BOTH,
            partial(
                build,
                "Qwen2_5_VL",
                text={"rope_parameters": mrope(2, 2, 2)},
                # Windows of 2 × 2 merged tokens, which reorder all but the smallest grids.
                vision=TOWER
                | {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2},
                **QWEN,
            ),
            qwen_like(one_block, fps=True),
        ),
        Family(
            "qwen3_vl",
            BOTH,
            partial(build, "Qwen3VL", text=QWEN3, vision=QWEN3_TOWER, **QWEN),
            qwen_like(stamped),
        ),
        Family(
            "qwen3_vl_moe",
            BOTH,
            partial(
                build,
                "Qwen3VLMoe",
                text=QWEN3 | EXPERTS | {"num_experts": 4},
                vision=QWEN3_TOWER,
                **QWEN,
            ),
            qwen_like(stamped),
        ),
        Family(
            "qwen3_5",
            BOTH,
            qwen3_5(["linear_attention", "full_attention", "linear_attention"]),
            qwen_like(stamped),
        ),
        Family("qwen3_5_full", BOTH, qwen3_5(["full_attention"] * 3), qwen_like(stamped)),
        # In these an image and a video have one placeholder, and a prompt has either.
        Family(
            "glm4v",
            BOTH,
            partial(build, "Glm4v", text=GLM_TEXT, vision=GLM_TOWER, **GLM),
            qwen_like(glm_frames, types=between_markers),
            mixed=False,
        ),
        Family(
            "glm4v_moe",
            BOTH,
            partial(
                build,
                "Glm4vMoe",
                text=GLM_TEXT | EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1},
                vision=GLM_TOWER,
                **GLM,
            ),
            qwen_like(glm_frames, types=between_markers),
            mixed=False,
        ),
        Family(
            "glm46v",
            BOTH,
            partial(
                build,
                "Glm46V",
                text=GLM_TEXT | {"model_type": "glm4v_text"},
                vision=GLM_TOWER | {"model_type": "glm4v_vision"},
                **GLM,
            ),
            qwen_like(partial(glm_frames, unit=(DIGIT, SECONDS)), types=between_markers),
            mixed=False,
        ),
        Family(
            "llava",
            STILL,
            partial(build, "Llava", text=LLAMA, vision=CLIP, image_token_index=IMAGE),
            llava_like(square),
        ),
        Family(
            "llava_siglip",
            STILL,
            partial(
                build,
                "Llava",
                text=LLAMA,
                vision=SIGLIP,
                image_token_index=IMAGE,
                vision_feature_select_strategy="full",
            ),
            llava_like(square),
        ),
        Family(
            "vipllava",
            STILL,
            partial(
                build,
                "VipLlava",
                text=LLAMA,
                vision=CLIP,
                image_token_index=IMAGE,
                vision_feature_layer=[-2, -3, 1],
            ),
            llava_like(square),
        ),
        Family(
            "video_llava",
            # Earlier releases read the pixels of images by another name.
            BOTH if TRANSFORMERS >= (5, 21) else MOVING,
            partial(
                build,
                "VideoLlava",
                text=LLAMA,
                vision=CLIP,
                image_token_index=IMAGE,
                video_token_index=VIDEO,
            ),
            llava_like(framed),
        ),
        Family(
            "llava_next",
            STILL,
            partial(build, "LlavaNext", text=LLAMA, vision=CLIP, **NEXT_IDS),
            llava_like(anyres, NEWLINES),
        ),
        Family(
            "llava_next_video",
            BOTH,
            partial(build, "LlavaNextVideo", text=LLAMA, vision=CLIP, **NEXT_VIDEO_IDS),
            llava_like(anyres, NEWLINES),
        ),
        Family(
            "llava_onevision",
            BOTH,
            partial(build, "LlavaOnevision", text=QWEN2, vision=SIGLIP, **NEXT_VIDEO_IDS),
            llava_like(
                partial(anyres, multi=True, newline=True), NEWLINES | {"batch_num_images": once}
            ),
        ),
        Family(
            "internvl",
            BOTH,
            partial(
                build,
                "InternVL",
                text=QWEN2,
                vision={
                    "image_size": [24, 24],
                    "patch_size": [4, 4],
                    "layer_scale_init_value": 1.0,
                },
                image_token_id=IMAGE,
                image_seq_length=TOKENS,
                tie_word_embeddings=False,
            ),
            llava_like(internvl),
        ),
        # The processor writes the pixels of videos over those of images.
        Family("smolvlm", BOTH, partial(build, "SmolVLM", **IDEFICS), idefics_prompt, mixed=False),
        Family("idefics3", STILL, partial(build, "Idefics3", **IDEFICS), idefics_prompt),
        Family(
            "gemma3",
            STILL,
            partial(
                build,
                "Gemma3",
                text=MIXED_LAYERS | {"query_pre_attn_scalar": 12},
                vision=SIGLIP | LARGE,
                image_token_index=IMAGE,
                boi_token_index=START,
                eoi_token_index=END,
                mm_tokens_per_image=TOKENS,
            ),
            gemma_prompt,
        ),
        Family(
            "paligemma",
            STILL,
            partial(
                build,
                "PaliGemma",
                text={"model_type": "gemma", "head_dim": 12},
                vision=SIGLIP,
                image_token_index=IMAGE,
                projection_dim=48,
                hidden_size=48,
            ),
            paligemma_prompt,
        ),
        Family(
            "mistral3",
            STILL,
            partial(build, "Mistral3", text=MISTRAL, vision=PIXTRAL, image_token_index=IMAGE),
            llava_like(breaks, NEWLINES),
        ),
        Family(
            "llava_pixtral",
            STILL,
            partial(
                build,
                "Llava",
                text=MISTRAL,
                vision=PIXTRAL | {"patch_size": 8},
                image_token_index=IMAGE,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
            ),
            llava_like(breaks, NEWLINES),
        ),
        Family(
            "aya_vision",
            STILL,
            partial(
                build,
                "AyaVision",
                text=MIXED_LAYERS | {"model_type": "cohere2", "logit_scale": 1.0},
                vision=SIGLIP | LARGE,
                image_token_index=IMAGE,
            ),
            llava_like(aya),
        ),
        Family(
            "cohere2_vision",
            STILL,
            partial(
                build,
                "Cohere2Vision",
                text=MIXED_LAYERS | {"model_type": "cohere2", "logit_scale": 1.0},
                vision=SIGLIP | LARGE,
                image_token_id=IMAGE,
                alignment_intermediate_size=64,
            ),
            llava_like(cohere),
        ),
    )
}

RESAMPLED = {
    family.name: family
    for family in (
        Family(
            "idefics2",
            STILL,
            partial(
                build,
                "Idefics2",
                text=MISTRAL,
                vision=SQUARE,
                perceiver_config={
                    "hidden_size": 48,
                    "resampler_n_latents": QUERIES,
                    "resampler_depth": 2,
                    "resampler_n_heads": 4,
                    "resampler_head_dim": 12,
                    "num_key_value_heads": 2,
                },
                image_token_id=IMAGE,
            ),
            idefics2_prompt,
        ),
        Family(
            "blip_2",
            STILL,
            partial(
                build,
                "Blip2",
                text={
                    "model_type": "opt",
                    "ffn_dim": 64,
                    "word_embed_proj_dim": 48,
                },
                vision=SQUARE,
                qformer_config={
                    "vocab_size": VOCAB,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "encoder_hidden_size": 32,
                },
                num_query_tokens=QUERIES,
                image_token_index=IMAGE,
            ),
            blip2_prompt,
            several=False,
        ),
    )
}
