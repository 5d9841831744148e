"""``attach``: a model's own methods, with compression."""

from __future__ import annotations

from typing import Any

from tokenfuse.adapters._vit import VitAdapter
from tokenfuse.config import StrategyLike, get_strategy
from tokenfuse.registry import Registry, default_registry
from tokenfuse.sessions.vit import VitSession
from tokenfuse.sessions.vlm import Session


def attach(
    model: Any,
    strategy: StrategyLike,
    /,
    *,
    frames_as_images: bool = False,
    registry: Registry | None = None,
    **options: Any,
) -> Session:
    """Compress every prompt that ``model`` gets, or merge tokens in it, inside a ``with`` block.

    ``options`` are set over those of ``strategy``: ``attach(model, "ttf", threshold=0.8)``.
    ``frames_as_images=True`` makes one video of the images of each prompt, as for ``compress``. A
    vision transformer gets a VitSession; what follows is about vision-language models.

    ``generate`` returns what it always returns: the caller's own prompt, then the answer. Calling
    the model returns logits of the shorter prompt. Inside the block a later turn on the same cache
    works when its ids begin with the earlier ones. Leaving the block, also by an exception,
    restores the model.

    Raises ConfigError, UnsupportedModelError, and AttachError if the model is attached already.
    """
    registry = registry or default_registry()
    chosen = get_strategy(strategy, **options, registry=registry)
    adapter = registry.adapter(model)
    if isinstance(adapter, VitAdapter):
        return VitSession(adapter, chosen, registry)
    return Session(model, chosen, registry, frames_as_images)
