"""A model and its processor from a folder or a hub id."""

from __future__ import annotations

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
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"{source} cannot be loaded as an image-text-to-text model: {first}. Expected a folder "
            "with a transformers checkpoint and its processor, or a hub id such as "
            "Qwen/Qwen3-VL-8B-Instruct"
        ) from error
    return model.eval(), processor
