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
