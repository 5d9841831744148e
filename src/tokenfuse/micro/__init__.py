"""The micro Qwen3-VL: a real ``Qwen3VLForConditionalGeneration`` that fits into the package.

It answers questions about small synthetic videos (``tokenfuse.micro.tasks``, and the strata of
``tokenfuse.micro.strata``) and stands in wherever pretrained weights are not at hand.
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Folder for ``from_pretrained``: weights, configuration, tokenizer, processor, chat template."""

SAMPLE = Path(__file__).parent / "sample.mp4"
"""A short clip that the micro model has not been trained on."""

SAMPLE_QUESTION = "What color is the moving object?"

INSTRUMENTS = {"plain": CHECKPOINT, "robust": Path(__file__).parent / "robust"}
"""Folders of the models of ``tokenfuse bench retention``.

``plain`` has never seen a prompt with missing tokens, ``robust`` has. They see alike: the vision
tower is the same.
"""

NOTE = (
    "the micro model knows only its own synthetic clips: what it answers to another video means "
    "nothing. Name a model with --model"
)
"""What to tell who shows a micro model another clip."""


def is_micro(source: str | Path) -> bool:
    """Whether a model's folder or hub id is that of a micro model."""
    return Path(source).resolve() in {folder.resolve() for folder in INSTRUMENTS.values()}
