"""Which models an adapter fits, and what it supplies to strategies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from families import FAMILIES
from tokenfuse import Adapter
from tokenfuse.adapters.generic import Generic
from tokenfuse.errors import UnsupportedModelError
from tokenfuse.prompt.inputs import MODALITIES
from tokenfuse.registry import default_registry
from tokenfuse.strategies._base import Attention, Needs

pytestmark = pytest.mark.usefixtures("one_thread")

ADAPTERS = [entry.cls for entry in default_registry().adapters.values()]
FAMILIAR = [cls for cls in ADAPTERS if issubclass(cls, Adapter) and cls is not Generic]


class Strange:
    """Looks like a transformers model, as far as ``parts`` say."""

    base_model_prefix = "model"

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)


STRANGERS = {
    "nothing": None,
    "a number": 3,
    "a class": Adapter,
    "a layer": torch.nn.Linear(1, 1),
    "no base model": Strange(config=SimpleNamespace(model_type="gemma3")),
    "no config": Strange(base_model=object(), forward=lambda mm_encoder_outputs: None),
    "no signature": Strange(
        config=SimpleNamespace(model_type="qwen3_vl"), base_model=0, forward=max
    ),
    "no forward": Strange(config=SimpleNamespace(model_type="qwen3_vl"), base_model=object()),
}


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("cls", ADAPTERS, ids=lambda cls: cls.name)
def test_a_strange_model_fits_none_and_raises_nothing(cls, name):
    assert not cls.matches(STRANGERS[name])


@pytest.mark.parametrize("cls", FAMILIAR, ids=lambda cls: cls.name)
@pytest.mark.parametrize(
    "vision", [{}, {"vision_config": None}, {"vision_config": SimpleNamespace()}]
)
def test_a_family_without_its_tower_is_left_to_others(cls, vision):
    """Where the class says nothing of towers, all models of the family fit."""
    for kind in cls.family:
        model = Strange(
            config=SimpleNamespace(model_type=kind, **vision),
            base_model=object(),
            forward=lambda mm_encoder_outputs: None,
        )
        assert cls.matches(model) == (not cls.towers)


class Silent(Adapter):
    """Overrides nothing."""

    name: ClassVar[str] = "silent"


class Telling(Silent):
    """Tells queries and keys."""

    def queries_keys(self, module, modality, **call):
        raise NotImplementedError


class Child(Telling):
    """Inherits them."""


def test_what_an_adapter_supplies_follows_from_what_it_overrides():
    assert Silent(None).supplies == {"text"}
    assert Telling(None).supplies == Child(None).supplies == {"saliency", "text"}


def test_saliency_that_an_adapter_does_not_supply_is_refused_before_the_tower_runs():
    family = FAMILIES["paligemma"]
    adapter = default_registry().adapter(family.build("sdpa"))
    inputs = family.prompt([[("text", 1), ("image", 1), ("text", 2)]])
    with pytest.raises(UnsupportedModelError, match="adapter generic supplies no saliency"):
        adapter.encode(adapter.read(inputs), dict.fromkeys(MODALITIES, Needs(Attention(-1))))
