"""Models without an adapter of their own."""

from __future__ import annotations

from typing import Any, ClassVar

from tokenfuse.adapters._base import Adapter, takes_features
from tokenfuse.prompt.inputs import MODALITIES


class Generic(Adapter):
    """Any other transformers VLM: one visual token per square of patches, newlines aside.

    Where there are fewer tokens than patches, each is taken for a square of patches, row by row; a
    tower that merges otherwise needs an adapter of its own. This one knows what the model's config,
    signatures and inputs say, and refuses what they do not: where learned queries read the image,
    or the tower returns something else than pooled features.
    """

    name: ClassVar[str] = "generic"
    fallback: ClassVar[bool] = True

    @classmethod
    def matches(cls, model: Any) -> bool:
        config = getattr(model, "config", None)
        if getattr(config, "vision_config", None) is None or not takes_features(model):
            return False
        # An encoder-decoder's visual tokens go into its encoder.
        decoder = not getattr(config, "is_encoder_decoder", False)
        return decoder and any(hasattr(model.base_model, f"get_{m}_features") for m in MODALITIES)
