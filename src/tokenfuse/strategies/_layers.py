"""What a strategy sees and says at a decoder layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenfuse.plan import FusionPlan
from tokenfuse.tokens import Grid

Queries = Literal["last", "chosen", "all"]


@dataclass(frozen=True, eq=False)
class LayerTokens:
    """One prompt at the input of a decoder layer.

    ``states (n, D)``: the hidden states of all tokens that are left, in order, without padding.
    ``visual (V,)``: which of them are visual. Of these ``coords (V, 3)``, ``item (V,)``: the number
    of the image or video, an index into ``grids``; ``sizes (V,)``: how many tokens each stands for.
    ``original``: how many visual tokens the vision tower has made, ``source``: how many of them the
    first layer has read, ``counts``: how many each layer so far has. ``layer`` of ``num_layers``:
    the one that is about to run.

    What a LayerCut asks for, else None: ``attention (H, R, n)``, fp32: the softmax of the rows that
    it names, over all that they see; ``rows (R,)``: which tokens these are. ``received (n,)``: the
    attention that each token gets, mean over heads and queries, fp32. ``keys (n, H_kv, d)``: those
    of the layer before, after the rotary embedding. ``rope``: cosines and sines ``(n, d)`` of that
    embedding. ``norm``: the norm behind the last layer.
    """

    states: Float[Tensor, "n D"]
    visual: Int[Tensor, " V"]
    coords: Int[Tensor, "V 3"]
    item: Int[Tensor, " V"]
    sizes: Int[Tensor, " V"]
    grids: tuple[Grid, ...]
    original: int
    source: int
    layer: int
    num_layers: int
    counts: tuple[int, ...] = ()
    attention: Float[Tensor, "H R n"] | None = None
    rows: Int[Tensor, " R"] | None = None
    received: Float[Tensor, " n"] | None = None
    keys: Float[Tensor, "n G d"] | None = None
    rope: tuple[Tensor, Tensor] | None = None
    norm: Callable[[Tensor], Tensor] | None = None

    @property
    def num_visual(self) -> int:
        return self.visual.shape[0]

    @property
    def features(self) -> Float[Tensor, "V D"]:
        """The hidden states of the visual tokens."""
        return self.states[self.visual]

    def scores(self) -> Float[Tensor, " V"]:
        """The attention that visual tokens get from the rows that were asked for, fp32.

        The mean over heads, then rows.
        """
        assert self.attention is not None
        return self.attention[:, :, self.visual].mean((0, 1))

    @property
    def text_after(self) -> Int[Tensor, " T"]:
        """Which tokens follow the last visual one. One host synchronisation."""
        first = int(self.visual[-1]) + 1
        return torch.arange(first, self.states.shape[0], device=self.visual.device)


@dataclass(frozen=True, eq=False, repr=False)
class WeighedPlan(FusionPlan):
    """A plan whose survivors are the mean of all that those they are fused from stand for.

    ``weight (N,)``: how many tokens each stands for.
    """

    weight: Float[Tensor, " N"]

    def mean(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "M D"]:
        """The weighed means, accumulated in fp32; a survivor that nothing joined as it is."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight = self.weight.to(wide)
        total = self._sum(wide * weight[:, None]) / self._sum(weight)[:, None]
        return torch.where((self.sizes == 1)[:, None], x[self.survivors], total.to(x.dtype))


def fuse_weighed(plan: FusionPlan, x: Float[Tensor, "N D"]) -> Float[Tensor, "M D"]:
    """The ``fuse`` of a LayerCut that makes WeighedPlans."""
    return plan.mean(x) if isinstance(plan, WeighedPlan) else plan.fuse(x)


@dataclass(frozen=True)
class LayerCut:
    """What a strategy does at the input of one decoder layer.

    ``plan``: the plan for the visual tokens of a prompt there. ``queries``: whose attention it
    reads, of the layer before as it ran, or with ``own`` of the ``layer`` itself: of the prompt's
    ``"last"`` token, of those that ``choose`` names, or what is received of ``"all"``. ``choose``
    is asked once, at the input of the first layer, and gives indices of tokens that are not visual.
    ``asks``: whether attention has to be read at all, by ``counts``, ``original`` and
    ``num_layers`` of the tokens; None for always. ``keys``: whether the plan
    reads those of the layer before. ``fuse`` applies a plan to the states, where fused tokens are
    more than their survivor; a cut without it drops.
    """

    layer: int
    plan: Callable[[LayerTokens], FusionPlan]
    queries: Queries | None = None
    own: bool = False
    choose: Callable[[LayerTokens], Int[Tensor, " R"]] | None = None
    asks: Callable[[tuple[int, ...], int, int], bool] | None = None
    keys: bool = False
    fuse: Callable[[FusionPlan, Tensor], Tensor] | None = None


@dataclass
class StepState:
    """What a CachePruning remembers of one prompt from step to step.

    ``scores (V,)``: the last ones. ``read (V,)``: which visual tokens are read.
    """

    scores: Float[Tensor, " V"] | None = None
    read: Bool[Tensor, " V"] | None = None


@dataclass(frozen=True)
class CachePruning:
    """Which visual tokens the layers from ``layer`` on read while an answer is written.

    ``choose(scores, state)`` gets the attention ``(V,)`` that the new token paid to them in the
    layer before, mean over heads, fp32, and gives a mask ``(V,)``. The caches stay whole.
    """

    layer: int
    choose: Callable[[Float[Tensor, " V"], StepState], Bool[Tensor, " V"]]
