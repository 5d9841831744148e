"""Which tokens survive, and which survivor each removed token went into."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenfuse.errors import PlanError
from tokenfuse.tokens import Grid

if TYPE_CHECKING:
    from PIL.Image import Image

Reduce = Literal["mean", "keep"]
DROPPED = -1
AT_A_TIME = 2**24
"""Numbers that are fused at a time: 64 MiB of them in fp32."""


@dataclass(frozen=True, eq=False, repr=False)
class FusionPlan:
    """What happens to each of ``N`` source tokens.

    ``survivors``: ``(M,)`` long, strictly increasing source indices of the tokens that stay.
    ``target``: ``(N,)`` long, the survivor slot in ``0..M-1`` that each source token belongs to,
    or -1 where it was dropped. ``frame_order``: ``(T,)`` long, the order in which the frames stand
    in the prompt; None for the order of time. ``drops``: whether nothing is fused, so that each
    survivor stands for itself alone; False where that is not known. Survivors, targets and all that
    a plan is applied to stay in the order of the source, whatever it says.

    Making and applying a plan never synchronises with the host; ``check`` does.
    """

    survivors: Int[Tensor, " M"]
    target: Int[Tensor, " N"]
    frame_order: Int[Tensor, " T"] | None = field(default=None, kw_only=True)
    drops: bool = field(default=False, kw_only=True)

    @classmethod
    def identity(cls, n: int, device: torch.device | None = None) -> FusionPlan:
        """The plan that keeps all ``n`` tokens."""
        index = torch.arange(n, device=device)
        return cls(index, index, drops=True)

    @classmethod
    def from_survivors(cls, survivors: Int[Tensor, " M"], n: int) -> FusionPlan:
        """The plan that keeps ``survivors`` (strictly increasing) of ``n`` and drops the rest."""
        target = torch.full((n,), DROPPED, dtype=torch.long, device=survivors.device)
        slots = torch.arange(survivors.shape[0], device=survivors.device)
        return cls(survivors, target.scatter(0, survivors, slots), drops=True)

    @classmethod
    def from_roots(cls, survivors: Int[Tensor, " M"], roots: Int[Tensor, " N"]) -> FusionPlan:
        """The plan in which token ``i`` belongs to the survivor at source index ``roots[i]``.

        A token whose root is -1 is dropped.
        """
        slots = cls.from_survivors(survivors, roots.shape[0]).target
        target = torch.where(roots == DROPPED, DROPPED, slots[roots.clamp_min(0)])
        return cls(survivors, target)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_kept} of {self.num_source} kept)"

    def _repr_html_(self) -> str:
        from tokenfuse.pictures._html import plan_html

        return plan_html(self)

    def show(self, frames: Any, grid: Grid | None = None, *, most: int | None = 16) -> Image:
        """A picture of what is kept: what went is dimmed, what is left is outlined.

        ``frames``: ``(T, height, width, 3)``, an array or a tensor, uint8 or floats from 0 to 1:
        one picture for each frame of the grid. ``grid``: of the plan's tokens; if left out, that
        of square frames. ``most``: frames that are shown, evenly chosen; None for all.

        Raises TokensError where frames, plan and grid do not fit together.
        """
        from tokenfuse.pictures.token_map import TokenMap

        return TokenMap.from_plan(frames, self, grid).sheet(most)

    @property
    def num_source(self) -> int:
        return self.target.shape[0]

    @property
    def num_kept(self) -> int:
        return self.survivors.shape[0]

    @property
    def keep_ratio(self) -> float:
        """Survivors ÷ source tokens, in (0, 1]."""
        return self.num_kept / self.num_source

    @property
    def is_identity(self) -> bool:
        return self.num_kept == self.num_source and self.frame_order is None

    @property
    def sizes(self) -> Int[Tensor, " M"]:
        """How many source tokens each survivor stands for, itself included."""
        ones = torch.ones_like(self.target)
        return self._sum(ones)

    @property
    def keep_mask(self) -> Bool[Tensor, " N"]:
        mask = torch.zeros(self.num_source, dtype=torch.bool, device=self.target.device)
        return mask.index_fill(0, self.survivors, True)

    def frame_counts(self, grid: Grid) -> Int[Tensor, " T"]:
        """Survivors in each frame of ``grid``."""
        t, h, w = grid
        counts = torch.zeros(t, dtype=torch.long, device=self.survivors.device)
        return counts.index_add(0, self.survivors // (h * w), torch.ones_like(self.survivors))

    def prompt_order(self, frames: Int[Tensor, " M"]) -> Int[Tensor, " M"]:
        """The survivors' slots in the order in which they stand in the prompt.

        ``frames``: the frame of each survivor. Whole frames change places; inside a frame the order
        is that of the source.
        """
        if self.frame_order is None:
            return torch.arange(self.num_kept, device=self.survivors.device)
        return self.frame_order.argsort()[frames].argsort(stable=True)

    def select(self, x: Tensor) -> Tensor:
        """The survivors' rows of ``x (N, ...)``, unchanged: ``(M, ...)``.

        Raises PlanError if ``x`` has not N rows.
        """
        _check_rows(x, self.num_source)
        return x if self.num_kept == self.num_source else x.index_select(0, self.survivors)

    def fuse(self, x: Float[Tensor, "N ..."], reduce: Reduce = "mean") -> Float[Tensor, "M ..."]:
        """One row per survivor: the mean of all that belong to it, or its own row.

        The mean is accumulated in fp32 (fp64 for fp64) and returned in the dtype of ``x``.

        Raises PlanError if ``x`` has not N rows.
        """
        if reduce == "keep" or self.is_identity or self.drops:
            return self.select(x)
        _check_rows(x, self.num_source)
        sizes = self.sizes[:, None]
        # Some columns at a time: fp32 copies of all would be larger than what they are for.
        rows = x.flatten(1) if x.ndim > 1 else x[:, None]
        parts = []
        for part in rows.split(max(1, AT_A_TIME // rows.shape[0]), 1):
            wide, share = _wide(part)
            parts.append((self._sum(wide) / (sizes.to(wide) * share)).to(x.dtype))
        fused = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return fused.view(self.num_kept, *x.shape[1:])

    def absorbed(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "M ..."]:
        """The mean of the tokens that belong to each survivor, itself left out; 0 without any.

        Accumulated and returned as by ``fuse``.

        Raises PlanError if ``x`` has not N rows.
        """
        _check_rows(x, self.num_source)
        wide, share = _wide(x)
        others = wide.index_fill(0, self.survivors, 0)
        count = _column((self.sizes - 1).clamp_min(1), x).to(wide)
        return (self._sum(others) / (count * share)).to(x.dtype)

    def expand(self, y: Tensor) -> Tensor:
        """Undo the merge: each source position gets its survivor's row of ``y (M, ...)``, or 0.

        Raises PlanError if ``y`` has not M rows.
        """
        _check_rows(y, self.num_kept)
        rows = y[self.target.clamp_min(0)]
        return torch.where(_column(self.target != DROPPED, y), rows, torch.zeros_like(rows))

    def compose(self, then: FusionPlan) -> FusionPlan:
        """This plan followed by ``then``, a plan for this plan's survivors, as one plan.

        Frames stand as the second plan says; where it says nothing, as the first does.

        Raises PlanError if ``then`` is for another number of tokens.
        """
        if then.num_source != self.num_kept:
            raise PlanError(
                f"the second plan is for {then.num_source} tokens, the first leaves "
                f"{self.num_kept}: make the second from the first one's survivors"
            )
        moved = then.target[self.target.clamp_min(0)]
        target = torch.where(self.target == DROPPED, self.target, moved)
        order = self.frame_order if then.frame_order is None else then.frame_order
        drops = self.drops and then.drops
        return FusionPlan(self.survivors[then.survivors], target, frame_order=order, drops=drops)

    def check(self, n: int, frames: int | None = None) -> None:
        """Raise PlanError unless this is a valid plan for ``n`` tokens.

        ``frames``: how many frames they come from, where that is known. Synchronises once, and once
        more where frames change places.
        """
        if {self.survivors.dtype, self.target.dtype} != {torch.long}:
            raise PlanError(
                f"a plan has survivors of {self.survivors.dtype} and target of "
                f"{self.target.dtype}; expected torch.long for both"
            )
        if self.survivors.ndim != 1 or self.target.ndim != 1 or self.num_source != n:
            raise PlanError(
                f"a plan has survivors {tuple(self.survivors.shape)} and target "
                f"{tuple(self.target.shape)}; expected (M,) and ({n},)"
            )
        if self.num_kept == 0:
            raise PlanError("a plan keeps no token; expected at least one survivor per item")
        if self.target.is_meta:
            return  # There are no values to look at.
        s, t, m = self.survivors, self.target, self.num_kept
        slots = torch.arange(m, device=s.device)
        rules = torch.stack(
            [
                (s >= 0).all() & (s < n).all(),
                (s[1:] > s[:-1]).all(),
                (t >= DROPPED).all() & (t < m).all(),
                (t[s.clamp(0, n - 1)] == slots).all(),
                (t >= 0).sum() <= (m if self.drops else n),
            ]
        )
        broken = [text for text, ok in zip(_RULES, rules.tolist(), strict=True) if not ok]
        if broken:
            raise PlanError(f"a plan for {n} tokens breaks its contract: {'; '.join(broken)}")
        if self.frame_order is not None:
            self._check_order(self.frame_order, frames)

    def _check_order(self, order: Tensor, frames: int | None) -> None:
        given = order.tolist() if order.ndim == 1 and order.dtype == torch.long else None
        count = len(given or ()) if frames is None else frames
        if given is None or sorted(given) != list(range(count)):
            shown = f"{order.dtype} {tuple(order.shape)}" if given is None else given
            raise PlanError(
                f"a plan has frame_order {shown}; expected every frame once, torch.long, "
                f"0..{count - 1} in some order"
            )

    def _sum(self, x: Tensor) -> Tensor:
        # Dropped tokens are added to one row too many, so that no mask is needed.
        slot = torch.where(self.target == DROPPED, self.num_kept, self.target)
        total = x.new_zeros((self.num_kept + 1, *x.shape[1:]))
        return total.index_add_(0, slot, x)[:-1]


def _check_rows(x: Tensor, rows: int) -> None:
    if x.ndim == 0 or x.shape[0] != rows:
        raise PlanError(
            f"a tensor of shape {tuple(x.shape)} does not fit the plan; expected {rows} rows"
        )


def _wide(x: Tensor) -> tuple[Tensor, float]:
    """``x`` in a dtype to sum it in, and the share of it that this is.

    Where the dtype of ``x`` has as large numbers as that one, a power of two leaves room for the
    sum of all rows, and changes no digit.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.finfo(x.dtype).max < torch.finfo(dtype).max / x.shape[0]:
        return x.to(dtype), 1.0
    share = 2.0 ** -(x.shape[0] - 1).bit_length()
    return x.to(dtype) * share, share


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


_RULES = (
    "survivors must lie in 0..N-1",
    "survivors must be strictly increasing",
    "targets must lie in -1..M-1",
    "each survivor must be its own target",
    "a plan that drops must not fuse",
)
