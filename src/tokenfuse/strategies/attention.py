"""Pruning by attention."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from tokenfuse.strategies._base import Attending, Scored
from tokenfuse.strategies._fields import VisionBlock
from tokenfuse.tokens import VisualTokens


class AttentionPruning(Scored, Attending):
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
    paper: ClassVar[str] = "arXiv 2412.01818"

    block: VisionBlock = -2

    def score(self, tokens: VisualTokens) -> Float[Tensor, " N"]:
        return tokens.needed("saliency")
