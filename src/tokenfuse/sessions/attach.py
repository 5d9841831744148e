"""``attach``: a model's own methods, with compression."""

from __future__ import annotations

from typing import Any, Protocol, overload

from torch import nn

from tokenfuse.adapters._vit import VitAdapter
from tokenfuse.config import StrategyLike, get_configuration
from tokenfuse.registry import Registry, default_registry
from tokenfuse.sessions.vit import VitSession
from tokenfuse.sessions.vlm import Session


class _Generates(Protocol):
    """A model that answers prompts."""

    def generate(self, *args: Any, **kwargs: Any) -> Any: ...


@overload
def attach(
    model: _Generates,
    strategy: StrategyLike,
    /,
    *,
    frames_as_images: bool = ...,
    registry: Registry | None = ...,
    **options: Any,
) -> Session: ...


@overload
def attach(
    model: nn.Module,
    strategy: StrategyLike,
    /,
    *,
    frames_as_images: bool = ...,
    registry: Registry | None = ...,
    **options: Any,
) -> VitSession: ...


@overload
def attach(
    model: object,
    strategy: StrategyLike,
    /,
    *,
    frames_as_images: bool = ...,
    registry: Registry | None = ...,
    **options: Any,
) -> Session | VitSession: ...


def attach(
    model: Any,
    strategy: StrategyLike,
    /,
    *,
    frames_as_images: bool = False,
    registry: Registry | None = None,
    **options: Any,
) -> Session | VitSession:
    """Compress every prompt that ``model`` gets, or merge tokens in it, from now on.

    The result is a handle, ``session.detach()`` ends it, and a context manager that detaches at the
    end of its block, also after an exception. ``model`` may be a pipeline, whose model is meant.
    ``options`` are set over those of ``strategy``: ``attach(model, "ttf", threshold=0.8)``.
    ``frames_as_images`` makes one video of the images of each prompt, as for ``compress``. A vision
    transformer gets a VitSession; what follows is about vision-language models.

    ``generate`` returns what it always returns: the caller's own prompt, then the answer. Calling
    the model returns logits of the shorter prompt; ``session.columns`` says which columns of the
    caller's these are. A later turn on the same cache works when its ids begin with the earlier
    ones. Any number of threads may use the model at once.

    Raises ConfigError, UnsupportedModelError, and AttachError if the model is attached already.
    """
    inner = getattr(model, "model", None)
    if not isinstance(model, nn.Module) and isinstance(inner, nn.Module):
        model = inner
    known = registry or default_registry()
    chosen = get_configuration(strategy, registry=known, **options)
    adapter = known.adapter(model)
    if isinstance(adapter, VitAdapter):
        return VitSession(adapter, chosen, known)
    return Session(model, chosen, known, frames_as_images)
