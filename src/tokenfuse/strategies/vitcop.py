"""ViTCoP's cuts inside the LLM."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from tokenfuse.ops.cluster import density_peaks, nearest_centre
from tokenfuse.ops.select import budget, top
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._fields import Neighbours
from tokenfuse.strategies._inside import LayerSchedule, LayerShares, Scheduled
from tokenfuse.strategies._layers import LayerCut, LayerTokens, WeighedPlan, fuse_weighed


class ViTCoP(Scheduled):
    """Keep the visual tokens whose keys are short; no attention is read.

    Source: ViTCoP (chaser682/ViTCoP, no paper is named there). The score of a token is the length
    of its key in the layer before the cut, mean over key heads, after the rotary embedding; small
    is important. At the first layer the tokens are clustered, where ``clusters`` says how many:
    each cluster keeps some of its best as they are, in proportion to its size, and one mean of the
    rest, ⌈keep_ratio · V⌉ rows in all; where fewer rows than clusters are asked for, the clusters
    of least summed length become one row each and all others one more. Later layers, and the
    first without ``clusters``, only keep the best.

    What differs from the published code: there the clusters come from the vision tower, here from
    density peaks of the hidden states at the layer; its cut of the tower's tokens is not here. A
    merged row is the mean of its members at the middle one's place, where the code adds that member
    to the mean, so that its norm doubles. Positions stay at the second cut, too.

    Models that normalise each head's keys, as Qwen3-VL does, leave little in their lengths: on the
    micro model it keeps the wrong tokens.

    Synchronises with the host once for each prompt and layer, and once more where tokens are
    clustered. Loops over clusters.
    """

    name: ClassVar[str] = "vitcop"

    layers: LayerSchedule = (2, 22)
    keep_ratio: LayerShares = (0.5, 0.1)
    clusters: int | None = Field(
        None, ge=1, lt=2**31, description="clusters at the first layer; none for the best alone"
    )
    neighbours: Neighbours = 5

    def cuts(self) -> tuple[LayerCut, ...]:
        fuse = None if self.clusters is None else fuse_weighed
        first, *later = self.layers
        return (
            LayerCut(first, self._plan, keys=True, fuse=fuse),
            *(LayerCut(layer, self._plan, keys=True) for layer in later),
        )

    @torch.no_grad()
    def _plan(self, tokens: LayerTokens) -> FusionPlan:
        n = tokens.num_visual
        count = budget(self.keep_ratio[self.layers.index(tokens.layer)], tokens.source)
        if count >= n:
            return FusionPlan.identity(n, tokens.visual.device)
        lengths = key_lengths(tokens)
        if self.clusters is None or tokens.layer != self.layers[0]:
            return FusionPlan.from_survivors(top(-lengths, count), n)
        labels = _clustered(tokens.features, min(self.clusters, n), self.neighbours)
        return cluster_plan(lengths, labels, count, tokens.sizes.float())


def key_lengths(tokens: LayerTokens) -> Float[Tensor, " V"]:
    """The length of each visual token's key, mean over heads."""
    assert tokens.keys is not None
    keys: Tensor = torch.linalg.vector_norm(tokens.keys[tokens.visual].float().mean(1), dim=-1)
    return keys


def _clustered(features: Tensor, clusters: int, neighbours: int) -> Int[Tensor, " V"]:
    """The cluster of each token, numbered by its centre's place."""
    valid = torch.ones_like(features[:, 0], dtype=torch.bool)[None]
    centres = top(density_peaks(features[None], valid, neighbours)[0], clusters)
    here = torch.zeros_like(valid).index_fill(1, centres, True)
    return torch.searchsorted(centres, nearest_centre(features[None], here)[0])


def cluster_plan(
    lengths: Float[Tensor, " V"], labels: Int[Tensor, " V"], count: int, weight: Tensor
) -> WeighedPlan:
    """The plan for ``count`` rows of clusters whose members have keys of these ``lengths``.

    ``labels``: the cluster of each, from 0. ``weight``: how many tokens each stands for. One host
    synchronisation.
    """
    own, size = labels.tolist(), lengths.tolist()
    members: dict[int, list[int]] = {}
    for token, label in enumerate(own):
        members.setdefault(label, []).append(token)
    sums = {label: sum(size[i] for i in tokens) for label, tokens in members.items()}
    rising = sorted(members, key=lambda label: (sums[label], label))
    groups: list[list[int]]
    if len(members) > count:
        groups = [members[label] for label in rising[: count - 1]]
        groups.append(sorted(i for label in rising[count - 1 :] for i in members[label]))
    else:
        groups = _quota_groups(members, rising, size, count)
    roots = [0] * len(own)
    for group in groups:
        middle = group[len(group) // 2]
        for token in group:
            roots[token] = middle
    survivors = sorted({group[len(group) // 2] for group in groups})
    plan = FusionPlan.from_roots(labels.new_tensor(survivors), labels.new_tensor(roots))
    return WeighedPlan(plan.survivors, plan.target, weight)


def _quota_groups(
    members: dict[int, list[int]], rising: list[int], size: list[float], count: int
) -> list[list[int]]:
    """The best of each cluster alone, and the rest of each together."""
    spare, singles = len(size) - len(members), count - len(members)
    quota = {
        label: min(len(tokens) - 1, round((len(tokens) - 1) / spare * singles)) if spare else 0
        for label, tokens in members.items()
    }
    missing = singles - sum(quota.values())
    while missing:
        before = missing
        for label in rising if missing > 0 else reversed(rising):
            step = 1 if missing > 0 else -1
            if missing and 0 <= quota[label] + step < len(members[label]):
                quota[label] += step
                missing -= step
        if missing == before:
            break
    groups = []
    for label, tokens in members.items():
        best = sorted(tokens, key=lambda i: (size[i], i))[: quota[label]]
        groups += [[token] for token in best]
        groups.append([token for token in tokens if token not in set(best)])
    return groups
