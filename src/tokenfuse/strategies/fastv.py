"""FastV."""

from __future__ import annotations

from typing import ClassVar, Self

import torch

from tokenfuse.ops.select import budget, top
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._fields import KeepRatio
from tokenfuse.strategies._inside import Layer, LayerStrategy, in_proportion, share_after
from tokenfuse.strategies._layers import LayerCut, LayerTokens


class FastV(LayerStrategy):
    """Drop the visual tokens that the prompt's last token attends to least in an early layer.

    Source: FastV, arXiv 2403.06764. Scores are the attention of the last token in the layer before
    ``layer``, mean over heads, after a softmax over all that it sees; the paper's text speaks of
    all queries, its code reads the last one. Survivors keep their positions.

    ``keep_ratio`` is one minus the published R; ⌈keep_ratio · V⌉ tokens stay, the lowest index on
    ties. All visual tokens of a prompt compete, whatever item they are of. Layers before ``layer``
    read everything: with ``layer: 2`` and ``keep_ratio: 0.5`` a decoder of 32 layers reads 53 % of
    the tokens, on average.

    With ``layer: 20`` and ``keep_ratio: 0.3`` behind a strategy that acts before the LLM it is the
    late cut of FlashVID, arXiv 2602.08024.

    Scores are fp32; the published code rounds them to the model's dtype, and in bfloat16 the cut
    falls between equals. Synchronises with the host once for each prompt.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "arXiv 2403.06764"

    layer: Layer = 2
    keep_ratio: KeepRatio = 0.5

    def cuts(self) -> tuple[LayerCut, ...]:
        return (LayerCut(self.layer, self._plan, queries="last"),)

    def at_share(self, share: float, layers: int) -> Self:
        """As ever, at layer 1 where the layers before the cut would read more than the share."""
        (layer,) = in_proportion((self.layer,), layers)
        if share * layers <= layer:
            layer = 1
        return self.with_options(layer=layer, keep_ratio=share_after(share, layer, layers))

    @torch.no_grad()
    def _plan(self, tokens: LayerTokens) -> FusionPlan:
        n = tokens.num_visual
        count = budget(self.keep_ratio, n)
        if count == n:
            return FusionPlan.identity(n, tokens.visual.device)
        return FusionPlan.from_survivors(top(tokens.scores(), count), n)
