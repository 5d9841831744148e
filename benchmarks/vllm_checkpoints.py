"""Small random checkpoints of the families that vLLM reads with a strategy, for two programs here.

All have the processor, the vocabulary and the size of the micro Qwen3-VL.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenfuse.micro import CHECKPOINT

TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 128,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
}
LINEAR = {
    "head_dim": 32,
    "layer_types": ["full_attention"] * 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
        "partial_rotary_factor": 0.5,
    },
}
STAMPED = TOWER | {"num_position_embeddings": 144}
WINDOWS = TOWER | {"window_size": 32, "fullatt_block_indexes": [1], "tokens_per_second": 2}
FAMILIES = {
    "Qwen3-VL": ("Qwen3VL", {}, STAMPED | {"deepstack_visual_indexes": [0]}),
    "Qwen3-VL-MoE": ("Qwen3VLMoe", EXPERTS, STAMPED | {"deepstack_visual_indexes": [0]}),
    "Qwen2.5-VL": ("Qwen2_5_VL", {}, WINDOWS),
    "Qwen3.5": ("Qwen3_5", LINEAR, STAMPED),
    "Qwen3.5-MoE": (
        "Qwen3_5Moe",
        LINEAR | EXPERTS | {"shared_expert_intermediate_size": 64},
        STAMPED,
    ),
}


def write_micro(folder: Path) -> None:
    """Write the micro Qwen3-VL with noise on its weights, so that it is sure of nothing."""
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) * weight.std() + 0.3 * weight)
    model.save_pretrained(folder)
    _add_processor(folder)


def write(
    family: str,
    folder: Path,
    text: dict | None = None,
    tower: dict | None = None,
    processor: dict | None = None,
) -> None:
    """Write a checkpoint with random weights into a folder; the rest is changed in its parts."""
    kind, own, vision = FAMILIES[family]
    micro = json.loads((CHECKPOINT / "config.json").read_text())
    theirs = {k: v for k, v in micro["text_config"].items() if k != "model_type"}
    if kind == "Qwen2_5_VL":
        del theirs["rope_parameters"]["mrope_interleaved"]
    ids = {k: v for k, v in micro.items() if k.endswith("_token_id")}
    config = getattr(transformers, f"{kind}Config")(
        text_config=theirs | copy.deepcopy(own) | (text or {}),
        vision_config=vision | (tower or {}),
        tie_word_embeddings=True,
        **ids,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.1)
    model.save_pretrained(folder)
    _add_processor(folder)
    if processor is not None:
        path = folder / "processor_config.json"
        whole = json.loads(path.read_text())
        changed = {part: whole[part] | more for part, more in processor.items()}
        path.write_text(json.dumps(whole | changed))
    if kind == "Qwen3VLMoe":
        # Checkpoints of this family hold experts transposed; transformers reads both, vLLM these.
        path = folder / "model.safetensors"
        weights = load_file(path)
        experts = {k: v.mT.contiguous() for k, v in weights.items() if ".experts." in k}
        save_file(weights | experts, path, {"format": "pt"})
    if kind == "Qwen2_5_VL":
        written = AutoProcessor.from_pretrained(CHECKPOINT)
        keep = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")
        video = {name: getattr(written.video_processor, name) for name in keep}
        video["size"] = written.image_processor.size  # of one frame
        transformers.Qwen2_5_VLProcessor(
            image_processor=written.image_processor,
            tokenizer=written.tokenizer,
            video_processor=transformers.Qwen2VLVideoProcessor(**video),
            chat_template=written.chat_template,
        ).save_pretrained(folder)


def _add_processor(folder: Path) -> None:
    for path in CHECKPOINT.iterdir():
        if not (folder / path.name).exists():
            shutil.copy(path, folder)
