"""Whether a model is supported, and by which strategies, from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from tokenfuse.compression import prompt_adapter, refuse_unmet_needs
from tokenfuse.config import get_configuration
from tokenfuse.errors import ConfigError, UnsupportedModelError
from tokenfuse.inference.load import unreadable
from tokenfuse.prompt.inputs import MODALITIES
from tokenfuse.registry import Registry, default_registry
from tokenfuse.sessions._decoder import refuse_unfit_cuts
from tokenfuse.strategies._stages import stages


class Support(BaseModel):
    """What a model is, and what can act on it.

    ``shows``: images, videos or both. ``supplies``: what its adapter gives beside features.
    ``strategies``: those that can act, and their stages; ``refused``: those that cannot, and why.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    model_type: str
    architecture: str
    adapter: str
    shows: list[str]
    supplies: list[str]
    strategies: dict[str, list[str]]
    refused: dict[str, str]


def check_model(source: str | Path, registry: Registry | None = None) -> Support:
    """What the configuration of a folder or a hub id says; no weights are loaded.

    Raises UnsupportedModelError where it cannot be read, and where no adapter takes the model.
    """
    known = registry or default_registry()
    model = _empty(source)
    adapter = prompt_adapter(model, known)
    fit: dict[str, list[str]] = {}
    refused: dict[str, str] = {}
    for name, entry in sorted(known.strategies.items()):
        try:
            configuration = get_configuration(name, registry=known)
        except ConfigError:
            continue  # It is nothing without options, such as a chain.
        try:
            refuse_unmet_needs(adapter, configuration)
            refuse_unfit_cuts(model, configuration.strategy, configuration.attention)
        except (UnsupportedModelError, ConfigError) as error:
            refused[name] = str(error)
        else:
            fit[name] = list(map(str, stages(entry.cls)))
    shows = [str(m) for m in MODALITIES if hasattr(model.base_model, f"get_{m}_features")]
    return Support(
        model=str(source),
        model_type=model.config.model_type,
        architecture=type(model).__name__,
        adapter=adapter.name,
        shows=shows,
        supplies=sorted(adapter.supplies),
        strategies=fit,
        refused=refused,
    )


def _empty(source: str | Path) -> Any:
    """The model without values."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config).eval()
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise unreadable(source, error) from error
