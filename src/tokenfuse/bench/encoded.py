"""A prompt that the vision tower reads once, however many configurations shorten it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenfuse.adapters._base import Adapter, Encoded
from tokenfuse.compression import (
    CompressedInputs,
    acts_at_tower,
    compress_prompt,
    encode_prompt,
    needs_of,
)
from tokenfuse.config import Configuration
from tokenfuse.plan import FusionPlan
from tokenfuse.tokens import Modality


class EncodedPrompt:
    """A batch of prompts, encoded once for each kind of thing that strategies ask for."""

    def __init__(self, adapter: Adapter, inputs: Mapping[str, Any]) -> None:
        self.adapter = adapter
        self.prompt = adapter.read(inputs)
        self._seen: dict[Any, list[Encoded]] = {}

    def encoded(self, configuration: Configuration) -> list[Encoded]:
        """What the vision tower makes of the prompts for this configuration."""
        key = self.key(configuration)
        if key not in self._seen:
            self._seen[key] = self.encode(configuration)
        return self._seen[key]

    def key(self, configuration: Configuration) -> Any:
        """What tells apart what the vision tower has to do for a configuration."""
        strategy = configuration.strategy
        # A plug-in's options may have no hash.
        early = str(strategy.describe()) if acts_at_tower(strategy) else None
        return frozenset(needs_of(strategy).items()), early

    def encode(self, configuration: Configuration) -> list[Encoded]:
        """The same as ``encoded``, computed anew."""
        return encode_prompt(self.adapter, self.prompt, configuration.strategy)

    def shorten(
        self,
        configuration: Configuration,
        plans: Mapping[Modality, Sequence[FusionPlan]] | None = None,
    ) -> CompressedInputs:
        """The shorter inputs; ``plans`` take the place of the strategy's own."""
        return compress_prompt(
            self.adapter,
            self.prompt,
            configuration,
            encoded=self.encoded(configuration),
            plans=plans,
        )
