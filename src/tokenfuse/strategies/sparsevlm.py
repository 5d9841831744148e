"""SparseVLM."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from tokenfuse.errors import UnsupportedModelError
from tokenfuse.ops import CHUNK
from tokenfuse.ops.cluster import density_peaks, nearest_centre
from tokenfuse.ops.select import budget, top
from tokenfuse.plan import DROPPED, FusionPlan
from tokenfuse.strategies._inside import LayerSchedule, LayerShares, Scheduled
from tokenfuse.strategies._layers import LayerCut, LayerTokens, WeighedPlan, fuse_weighed

LEAST = 0.1
"""Of what the rotary embedding does to attention at distance 0, that is undone at least."""


class SparseVLM(Scheduled):
    """Drop visual tokens by the attention of the words that speak of what is shown.

    Source: SparseVLM, arXiv 2410.04417. Raters are the tokens after the last visual one that visual
    tokens, as both enter the LLM, are more alike than the average: softmax over the text of the
    plain products, mean over visual tokens, above the mean; all of the text where none is. At each
    of ``layers`` visual tokens are ranked by the attention that raters paid to them in the layer
    before (the paper counts that one: its 2, 6 and 15 are 3, 7 and 16 here), and
    ⌈keep_ratio · V⌉ of the V that the first layer has read stay.

    ``version: v1`` gives a part of the others back: of the E dropped ones the ⌊0.3 · E⌋ + 1 most
    attended become ⌊m / 10⌋ + 1 clusters by density peaks. ``v2`` does not; it divides attention
    by what the rotary embedding alone would make of it, and counts ``heads`` heads only, those with
    most attention of raters to visual tokens (14 of 32 in the published code: as great a share by
    default). ``video`` keeps as many tokens as the attention of raters to visual tokens has ranks,
    and recycles as ``v1``; ``keep_ratio`` is not read.

    What differs from the published code: a cluster stands at its centre's place in the order and
    in the rope, and counts for all that it stands for where it is clustered again. A budget as
    large as the prompt changes nothing, where one token always goes there. Ties in density go to
    the lowest index instead of random noise; with two clusters, where density is that of the
    nearest neighbour alone, mutual neighbours always tie, so that published results depend on the
    draw. What the rotary embedding does is divided by a tenth of its value at distance 0 at least:
    from some 1,700 tokens on it reaches zero and below, depending on the model.

    Synchronises with the host once for each prompt and layer, and once more for each prompt.
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "arXiv 2410.04417"

    layers: LayerSchedule = (3, 7, 16)
    keep_ratio: LayerShares = (0.52, 0.348, 0.19)
    version: Literal["v1", "v2", "video"] = Field(
        "v1", description="v1 recycles, v2 corrects for the rotary embedding, video counts ranks"
    )
    heads: int | None = Field(
        None, ge=1, description="heads that v2 counts; 14 of 32, in proportion, by default"
    )

    def cuts(self) -> tuple[LayerCut, ...]:
        fuse = None if self.version == "v2" else fuse_weighed
        return tuple(
            LayerCut(layer, self._plan, queries="chosen", choose=raters, fuse=fuse)
            for layer in self.layers
        )

    @torch.no_grad()
    def _plan(self, tokens: LayerTokens) -> FusionPlan:
        n, device = tokens.num_visual, tokens.visual.device
        if self.version == "video":
            assert tokens.attention is not None
            rank = torch.linalg.matrix_rank(tokens.attention[:, :, tokens.visual].mean(0))
            count = max(1, int(rank))
        else:
            ratio = self.keep_ratio[self.layers.index(tokens.layer)]
            count = budget(ratio, tokens.source)
        if count >= n:
            return FusionPlan.identity(n, device)
        if self.version == "v2":
            return FusionPlan.from_survivors(top(self.corrected(tokens), count), n)
        return recycled(tokens, count)

    def corrected(self, tokens: LayerTokens) -> Float[Tensor, " V"]:
        """What v2 ranks visual tokens by."""
        assert tokens.attention is not None
        heads = tokens.attention.shape[0]
        attention = tokens.attention[:, :, tokens.visual]
        if tokens.rope is None:
            raise UnsupportedModelError(
                "version v2 of sparsevlm divides by what the rotary embedding does, and the layers "
                "of this model are not given one; expected version: v1"
            )
        cos, sin = (x.float() for x in tokens.rope)
        assert tokens.rows is not None
        # What a query and a key of ones make of each other after the rotation.
        alone = cos[tokens.rows] @ cos[tokens.visual].T + sin[tokens.rows] @ sin[tokens.visual].T
        scale = cos.shape[-1] ** 0.5
        attention = attention / (alone / scale).clamp_min(LEAST * scale)
        most = self.heads or max(1, round(14 / 32 * heads))
        kept = top(attention.sum((1, 2)), min(most, heads))
        scores: Tensor = attention[kept].mean((0, 1))
        return scores


@torch.no_grad()
def raters(tokens: LayerTokens) -> Int[Tensor, " R"]:
    """The tokens after the last visual one that rate, at the input of the LLM."""
    text = tokens.text_after
    rows, words = tokens.features.float(), tokens.states[text].float()
    total = words.new_zeros(len(text))
    for part in rows.split(max(1, CHUNK // max(1, len(text)))):
        total += (part @ words.T).softmax(-1).sum(0)
    mean = total / len(rows)
    chosen = mean > mean.mean()
    found = text[chosen]
    return found if len(found) else text


def recycled(tokens: LayerTokens, count: int) -> WeighedPlan:
    """The plan that keeps ``count`` tokens, and clusters of a part of the others."""
    scores, n = tokens.scores(), tokens.num_visual
    kept = top(scores, count)
    again = int(0.3 * (n - count)) + 1
    clusters = again // 10 + 1
    rest = torch.ones_like(scores, dtype=torch.bool).index_fill(0, kept, False)
    back = top(scores.masked_fill(~rest, -torch.inf), again)
    points = tokens.features[back][None]
    valid = torch.ones_like(back, dtype=torch.bool)[None]
    centres = top(density_peaks(points, valid, clusters)[0], clusters)
    here = torch.zeros_like(valid).index_fill(1, centres, True)
    roots = torch.full((n,), DROPPED, device=scores.device)
    roots[kept] = kept
    roots[back] = back[nearest_centre(points, here)[0]]
    survivors = torch.cat([kept, back[centres]]).sort().values
    plan = FusionPlan.from_roots(survivors, roots)
    return WeighedPlan(plan.survivors, plan.target, tokens.sizes.float())
