"""The parts of the micro Qwen3-VL: configuration, tokenizer, processor, chat template.

Every class is transformers' own, only smaller: 96 × 96 frames in 8 × 8 patches, merged
2 × 2, give 6 × 6 visual tokens per temporal patch of two frames.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tokenfuse.micro.questions import STRATUM_ANSWERS, STRATUM_QUESTIONS
from tokenfuse.micro.tasks import ANSWERS, QUESTIONS, SIZE

PATCH = 8
MERGE = 2
TOKENS_PER_FRAME = (SIZE // PATCH // MERGE) ** 2
MAX_PATCHES = 16

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part.type == 'text' -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE in which every word of the tasks is one token; any other text is bytes."""
    texts = [*QUESTIONS.values(), *STRATUM_QUESTIONS.values()]
    answers = [*ANSWERS.values(), *STRATUM_ANSWERS.values()]
    corpus = [
        *(f"user\n{text}" for asked in texts for text in asked),
        *(f"assistant\n{answer}" for given in answers for answer in given),
        "<0.1 seconds>",
    ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.add_special_tokens(list(SPECIAL))
    return Qwen2Tokenizer(
        vocab=bpe.get_vocab(with_added_tokens=True),
        merges=[tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
        model_max_length=4096,
        padding_side="left",
    )


def build_processor() -> Qwen3VLProcessor:
    """The processor of the micro model: transformers' own, for frames of 96 × 96 at most."""
    vision: dict[str, Any] = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    area = SIZE * SIZE
    return Qwen3VLProcessor(
        tokenizer=build_tokenizer(),
        image_processor=Qwen2VLImageProcessor(
            size={"shortest_edge": area // 4, "longest_edge": area}, **vision
        ),
        video_processor=Qwen3VLVideoProcessor(
            size={"shortest_edge": area // 4, "longest_edge": 768 * area},
            cap_pixels_per_frame=True,
            max_video_tokens=TOKENS_PER_FRAME,
            fps=4,
            min_frames=4,
            max_frames=2 * MAX_PATCHES,
            **vision,
        ),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Qwen3VLProcessor, *, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """A randomly initialised micro Qwen3-VL of about 1.1 M parameters, in fp32."""
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    width = 128
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "initializer_range": 0.07,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "pad_token_id": ids["<|endoftext|>"],
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "initializer_range": 0.07,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": width,
            "num_position_embeddings": (SIZE // PATCH) ** 2,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    # From random embeddings so small a model takes thousands of steps to tell places apart.
    model.model.visual.pos_embed.weight.data.copy_(_waves(SIZE // PATCH, 64))
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"],
        do_sample=False,
    )
    return model


def _waves(side: int, width: int) -> Tensor:
    """Sines and cosines of the places of a ``side × side`` grid, ``(side * side, width)``."""
    at = torch.linspace(-1, 1, side)
    angles = at[:, None] * torch.linspace(0.25, 4, width // 4) * torch.pi
    axis = torch.cat([angles.sin(), angles.cos()], -1)
    rows = axis[:, None].expand(side, side, -1)
    return 0.4 * torch.cat([rows, rows.transpose(0, 1)], -1).flatten(0, 1)
