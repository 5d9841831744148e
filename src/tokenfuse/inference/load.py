"""A model and its processor from a folder or a hub id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from tokenfuse.errors import UnsupportedModelError


def load(source: str | Path) -> tuple[Any, Any]:
    """Model and processor from a folder or a hub id: on a GPU in bf16 where there is one.

    Raises UnsupportedModelError where nothing can be loaded from ``source``.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options: dict[str, Any] = {"dtype": "auto"}
    if torch.cuda.is_available():
        options = {"dtype": torch.bfloat16, "device_map": "auto"}
    try:
        processor = AutoProcessor.from_pretrained(source)
        model = AutoModelForImageTextToText.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        raise unreadable(source, error) from error
    return model.eval(), processor


def unreadable(source: str | Path, error: Exception) -> UnsupportedModelError:
    """What to tell where transformers cannot read a folder or a hub id."""
    words = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if offline or "couldn't connect" in words or "offline" in words.lower():
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        return UnsupportedModelError(
            f"{source} is no folder here and not in the cache, and {why}; expected a folder, or a "
            "network: download it where there is one, with hf download"
        )
    return UnsupportedModelError(
        f"{source} cannot be loaded as an image-text-to-text model: {words}. Expected a folder "
        "with a transformers checkpoint and its processor, or a hub id such as "
        "Qwen/Qwen3-VL-8B-Instruct"
    )
