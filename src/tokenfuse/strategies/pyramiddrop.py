"""PyramidDrop."""

from __future__ import annotations

from typing import ClassVar

import torch

from tokenfuse.ops.select import budget, top
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._inside import LayerSchedule, LayerShares, Scheduled
from tokenfuse.strategies._layers import LayerCut, LayerTokens


class PyramidDrop(Scheduled):
    """Drop visual tokens at the ends of stages of the decoder, more and more.

    Source: PyramidDrop, arXiv 2410.17247. At each of ``layers`` the visual tokens that the prompt's
    last token attends to least go: attention of the layer that is about to run, on its own input,
    mean over heads, after a softmax over all that the token sees. ⌈keep_ratio · V⌉ are left, of the
    V that the first layer has read.

    The authors train with it. What differs from their code: it numbers what is left anew at each
    stage, where here positions stay, and prompts are not cut off at the tokenizer's length. Its
    counts are rounded down.

    Synchronises with the host once for each prompt and layer.
    """

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "arXiv 2410.17247"

    layers: LayerSchedule = (8, 16, 24)
    keep_ratio: LayerShares = (0.5, 0.25, 0.125)

    def cuts(self) -> tuple[LayerCut, ...]:
        return tuple(LayerCut(layer, self._plan, queries="last", own=True) for layer in self.layers)

    @torch.no_grad()
    def _plan(self, tokens: LayerTokens) -> FusionPlan:
        n, ratio = tokens.num_visual, self.keep_ratio[self.layers.index(tokens.layer)]
        count = budget(ratio, tokens.source)
        if count >= n:
            return FusionPlan.identity(n, tokens.visual.device)
        return FusionPlan.from_survivors(top(tokens.scores(), count), n)
