"""Pruning by attention."""

from __future__ import annotations

from typing import ClassVar

from tokenfuse.ops.select import top
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Attention, Budgeted, Need, Wants
from tokenfuse.strategies._fields import KeepRatio, VisionBlock
from tokenfuse.tokens import VisualTokens


class AttentionPruning(Budgeted):
    """Keep the tokens that get the most attention in the vision tower and drop the rest.

    Source: FasterVLM, arXiv 2412.01818, which ranks the patches of an image by the attention of the
    class token in the penultimate block. Towers without a class token, as those of video models,
    rank by the attention that a token gets from all queries of its frame. The published code drops
    after the projector and numbers the survivors anew; here they keep their positions unless
    ``positions`` says otherwise.

    Saliency sums to 1 over each frame, so that frames compete for one budget on equal terms. It
    costs the queries and keys of one block once more, and their products. Never synchronises with
    the host.
    """

    name: ClassVar[str] = "attention"
    needs: ClassVar[frozenset[Need]] = frozenset({"saliency"})
    paper: ClassVar[str] = "arXiv 2412.01818"

    keep_ratio: KeepRatio = 0.5
    block: VisionBlock = -2

    def wants(self) -> Wants:
        return Wants(Attention(self.block))

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        return FusionPlan.from_survivors(top(tokens.demand("saliency"), count), tokens.num_tokens)
