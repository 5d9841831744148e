"""DART."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tokenfuse.ops.select import true_indices
from tokenfuse.ops.similarity import to_steps, unit
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Need, Needs
from tokenfuse.strategies._fields import KeepRatio
from tokenfuse.strategies._inside import PerhapsInside
from tokenfuse.strategies._layers import LayerCut, LayerTokens
from tokenfuse.tokens import Grid, VisualTokens


class DART(PerhapsInside):
    """Keep a few pivot tokens and the tokens least like them, and drop the duplicates.

    Source: DART, arXiv 2502.11494. Pivots are the ``image_pivots`` visual tokens and the
    ``text_pivots`` prompt tokens of greatest L1 norm. In turn, each takes its share of the
    remaining visual tokens, those of lowest cosine to it. The visual pivots stay too.

    With ``layer`` it is the authors' form, inside the LLM: norms are those of the keys of the layer
    before, all heads together, after the rotary embedding, and cosines those of the layer's inputs,
    each through the norm behind the last layer. Text pivots are of what follows the last visual
    token. Without, it is the form of NVIDIA's TensorRT Edge-LLM, which prunes once before the LLM,
    with norms and cosines of embeddings.

    Where the published code iterates over a set, pivots here come in the order of their norms, the
    visual ones first (lowest index on ties). Its rounding per pivot overshoots the share; here the
    visual pivots count, the rest is divided evenly and the first pivots take one more where it does
    not divide. A budget below ``image_pivots`` keeps those of greatest norm. Where the prompt has
    fewer than ``text_pivots`` tokens, all of them are pivots. A blank (zero) vector has no
    direction and is taken last.

    The share is the published reduction of 77.8 %. Loops over pivots, not tokens. Never
    synchronises with the host.
    """

    name: ClassVar[str] = "dart"
    working_copies: ClassVar[float] = 2.1
    needs: ClassVar[frozenset[Need]] = frozenset({"text"})
    paper: ClassVar[str] = "arXiv 2502.11494"

    keep_ratio: KeepRatio = 0.222
    image_pivots: int = Field(4, ge=1, description="visual tokens to compare all others with")
    text_pivots: int = Field(4, ge=0, description="prompt tokens to compare all others with")

    def needed(self) -> Needs:
        return replace(super().needed(), text=self.text_pivots > 0 and self.layer is None)

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        features = tokens.features
        own = _greatest(features, min(self.image_pivots, count))
        prompt = features[:0]
        if self.text_pivots:
            text = tokens.needed("text")
            prompt = text[_greatest(text, self.text_pivots)]
        return self._least_like(features, own, prompt, count)

    def _cut(self, layer: int) -> LayerCut:
        return replace(super()._cut(layer), keys=True)

    def choose_inside(self, tokens: LayerTokens, count: int) -> FusionPlan:
        assert tokens.keys is not None
        keys, norm = tokens.keys.flatten(1), tokens.norm or torch.nn.Identity()
        own = _greatest(keys[tokens.visual], min(self.image_pivots, count))
        text = tokens.text_after
        chosen = text[_greatest(keys[text], self.text_pivots)]
        return self._least_like(norm(tokens.features), own, norm(tokens.states[chosen]), count)

    def _least_like(self, features: Tensor, own: Tensor, prompt: Tensor, count: int) -> FusionPlan:
        """The pivots ``own`` of the tokens and, in turn, what is least like each and the prompt."""
        units, blank = unit(features)
        pivots = torch.cat([units[own], unit(prompt)[0]])
        # Beyond every cosine: nothing is less welcome than a blank token.
        cosines = to_steps(pivots @ units.T).masked_fill(blank, 2)
        share, more = divmod(count - own.shape[0], pivots.shape[0])
        taken = torch.zeros_like(blank).index_fill(0, own, True)
        for i, row in enumerate(cosines):
            order = torch.argsort(row.masked_fill(taken, torch.inf), stable=True)
            taken = taken.index_fill(0, order[: share + (i < more)], True)
        return FusionPlan.from_survivors(true_indices(taken, count), features.shape[0])

    def matching_flops(self, grid: Grid, width: int) -> int:
        return (self.image_pivots + self.text_pivots) * prod(grid) * width


def _greatest(x: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` rows of greatest L1 norm, fewer if there are not as many."""
    norms = x.to(torch.float32).abs().sum(-1)
    return torch.argsort(norms, descending=True, stable=True)[:count]
