"""The conformance kit of adapters, once for each family of ``families``."""

from __future__ import annotations

import functools
from typing import ClassVar

import pytest

from families import FAMILIES, TRANSFORMERS
from tokenfuse.testing import AdapterConformance

GENERIC = ["idefics3", "paligemma", "mistral3", "llava_pixtral", "aya_vision", "cohere2_vision"]
ADAPTERS = dict.fromkeys(GENERIC, "generic") | {
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_5_full": "qwen3_5",
    "glm4v_moe": "glm4v",
    "glm46v": "glm4v",
    "llava_siglip": "llava",
    "vipllava": "llava",
    "llava_next_video": "llava_next",
    "idefics3": "smolvlm",
}
"""The adapter of a family whose name is another."""

SIBLINGS = {
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_5_full": "qwen3_5",
    "glm4v_moe": "glm4v",
    "glm46v": "glm4v",
    "llava_siglip": "llava",
    "vipllava": "llava",
    "llava_next": "llava_next_video",
    "idefics3": "smolvlm",
    "llava_pixtral": "mistral3",
    "cohere2_vision": "aya_vision",
}
"""Families whose adapter and layout are those of another: a short kit does, but for ``--full``."""


class Kit(AdapterConformance):
    """The kit as these tests run it."""

    sibling: ClassVar[bool] = False

    def pytest_generate_tests(self, metafunc):
        self.full = metafunc.config.getoption("full")
        if self.sibling and not self.full:
            self.attentions, self.drops = ("sdpa",), ("67 %", "whole frames")
        super().pytest_generate_tests(metafunc)


def kit(family, **options):
    """The kit's class for one family."""
    members = {
        "adapter": ADAPTERS.get(family.name, family.name),
        "modalities": family.modalities,
        "mixed": family.mixed,
        "several": family.several,
        "model": staticmethod(functools.cache(family.build)),
        "prompt": staticmethod(family.prompt),
        "sibling": family.name in SIBLINGS,
    }
    return type(f"Test_{family.name}", (Kit,), members | options)


OPTIONS = {
    # What it is asked is read in both directions, what it answers is not.
    "paligemma": {"causal": False, "text_type": 1},
}
FRAMES = {"adapter": None, "modalities": ("video",), "mixed": False, "several": False}

if TRANSFORMERS < (5, 23):
    skipped = pytest.mark.skip(reason="in 5.19.0 the forward of this model itself raises")
    OPTIONS["vipllava"] = {"pytestmark": [skipped]}

KITS = {family.name: kit(family, **OPTIONS.get(family.name, {})) for family in FAMILIES.values()}
for name in ("internvl", "smolvlm"):
    # These models are shown a video as images.
    found = kit(FAMILIES[name], **FRAMES, frames_as_images=True)
    found.__name__ = f"Test_{name}_frames"
    KITS[f"{name}_frames"] = found
