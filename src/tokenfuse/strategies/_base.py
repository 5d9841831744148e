"""What every strategy is: a validated configuration that makes a plan."""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from tokenfuse.costs import free_bytes, size
from tokenfuse.errors import ConfigError, PlanError, TooLargeError
from tokenfuse.ops.precision import outside_autocast
from tokenfuse.ops.select import budget, top
from tokenfuse.ops.similarity import on_host
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._fields import KeepRatio, VisionBlock
from tokenfuse.strategies._layers import CachePruning, LayerCut
from tokenfuse.strategies._tower import PixelTokens, TowerCut
from tokenfuse.tokens import Grid, Modality, VisualTokens, describe_rows

Stage = Literal["vit", "tower", "pre_llm", "llm"]
Need = Literal["grid", "saliency", "text"]
Query = Literal["each", "mean"]
ASK_FROM = 2**30
"""Bytes of working memory from which a strategy first looks whether there are as many."""
MANY = 16_384
"""Tokens of an item from which a strategy that compares all pairs says so."""


class Attention(NamedTuple):
    """Which attention of the vision tower a saliency is.

    ``block``: the vision block, negative from the last. ``query``: ``"each"`` is what the class
    token pays to a token or, where there is no class token, the average of what every query of its
    frame pays; ``"mean"`` is what the frame's mean query pays. Both are means over heads, and sum
    to 1 over a frame.
    """

    block: int = -1
    query: Query = "each"


@dataclass(frozen=True)
class Needs:
    """What one configured strategy needs of the adapter, beside features.

    ``attention``: the attention that ``tokens.saliency`` has to be, or None for no saliency.
    ``text``: whether ``tokens.text`` has to be there.
    """

    attention: Attention | None = None
    text: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Compressed:
    """What is left of one item.

    ``features (M, D)``: one row per survivor, fused. ``coords (M, 3)``: where the survivors stand.
    ``sizes (M,)``: how many source tokens each stands for. ``plan``: what made them. Rows come in
    the order in which a prompt would show them: where the plan has a ``frame_order``, whole frames
    have changed places, and the coordinates tell.
    """

    features: Float[Tensor, "M D"]
    coords: Int[Tensor, "M 3"]
    sizes: Int[Tensor, " M"]
    plan: FusionPlan

    @classmethod
    def of(cls, tokens: VisualTokens, plan: FusionPlan, fused: Float[Tensor, "M D"]) -> Compressed:
        """What a plan leaves of tokens, whose ``fused`` features are in the plan's own order."""
        coords = plan.select(tokens.coords)
        if plan.frame_order is None:
            return cls(fused, coords, plan.sizes, plan)
        order = plan.prompt_order(coords[:, 0])
        return cls(fused[order], coords[order], plan.sizes[order], plan)

    def __repr__(self) -> str:
        kept = f"{self.plan.num_kept} of {self.plan.num_source} kept"
        return f"{type(self).__name__}({kept}, {describe_rows(self.features)})"


class Strategy(BaseModel, ABC):
    """Decides which visual tokens survive.

    A subclass declares its options as pydantic fields, sets ``name`` and writes ``plan``. It sees
    tokens, never a model.
    """

    # What a number looks like is no number: yes, true, "0.5".
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: ClassVar[str]
    """What configurations call it."""
    stage: ClassVar[Stage] = "pre_llm"
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What it must have beside features: every place of the ``grid``, ``saliency``, ``text``."""
    temporal: ClassVar[bool] = False
    """Whether it compares frames, so that it leaves an item of one frame as it is."""
    paper: ClassVar[str] = ""
    """Where the method was published."""
    working_copies: ClassVar[float] = 0
    """How many copies of the features in fp32 it holds at once, at most; 0 where it streams."""
    experimental: ClassVar[bool] = False
    """Whether it is a reconstruction that nothing could be compared with."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name in ("plan", "fuse"):
            own = vars(cls).get(name)
            if own is not None and not getattr(own, "__isabstractmethod__", False):
                setattr(cls, name, _outside_autocast(own))

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        # To JSON Schema 3.0 is an integer.
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @abstractmethod
    def plan(self, tokens: VisualTokens) -> FusionPlan:
        """The plan for one item."""

    def fuse(self, plan: FusionPlan, x: Float[Tensor, "N D"]) -> Float[Tensor, "M D"]:
        """Apply ``plan`` to the features, or to one layer's DeepStack features."""
        return plan.fuse(x)

    def compress(self, tokens: VisualTokens) -> Compressed:
        """Tokens and positions in, fewer tokens and their positions out."""
        plan = self.checked_plan(tokens)
        return Compressed.of(tokens, plan, self.checked_fuse(plan, tokens.features))

    def checked_plan(self, tokens: VisualTokens) -> FusionPlan:
        """The plan for one item, held against what every plan has to be.

        Raises PlanError, which names the strategy, for what is no plan for these tokens, and where
        the strategy has written into them. One host synchronisation.
        """
        given = (tokens.features, tokens.coords, tokens.saliency, tokens.text)
        before = [_version(x) for x in given]
        plan = self.plan(tokens)
        if not isinstance(plan, FusionPlan):
            raise PlanError(
                f"strategy {self.name} returned a {type(plan).__name__} as its plan; expected a "
                "FusionPlan"
            )
        if before != [_version(x) for x in given]:
            raise PlanError(
                f"strategy {self.name} wrote into the tokens that it was given; expected that it "
                "leaves them as they are: work on a clone"
            )
        try:
            plan.check(tokens.num_tokens, tokens.grid[0])
        except PlanError as error:
            raise PlanError(f"strategy {self.name}: {error}") from error
        return plan

    def checked_fuse(self, plan: FusionPlan, x: Float[Tensor, "N D"]) -> Float[Tensor, "M D"]:
        """``fuse``, held against what it has to return.

        Raises PlanError, which names the strategy, for another shape, dtype or device, and where
        the strategy has written into ``x``. Whether all is finite is not looked at.
        """
        before = _version(x)
        fused = self.fuse(plan, x)
        shape = (plan.num_kept, *x.shape[1:])
        returned: object = fused
        if not isinstance(returned, Tensor):
            got = type(returned).__name__
        elif (fused.shape, fused.dtype, fused.device) != (shape, x.dtype, x.device):
            got = f"{fused.dtype} {tuple(fused.shape)} on {fused.device}"
        else:
            got = ""
        if got:
            raise PlanError(
                f"strategy {self.name} fused into {got}; expected a tensor {x.dtype} {shape} on "
                f"{x.device}: one row for each survivor"
            )
        if before != _version(x):
            raise PlanError(
                f"strategy {self.name} wrote into the features that it was given; expected that it "
                "leaves them as they are: work on a clone"
            )
        return fused

    def needed(self) -> Needs:
        """What the adapter has to supply for this configuration."""
        return Needs(Attention() if "saliency" in self.needs else None, "text" in self.needs)

    @property
    def needs_grid(self) -> bool:
        """Whether every place of the grid has to be there, so that it comes first in a chain."""
        return "grid" in self.needs

    def for_modality(self, modality: Modality) -> Strategy | None:
        """The strategy for images or for videos; None where they are left as they are."""
        return self

    def tower_plan(self, pixels: PixelTokens) -> FusionPlan | None:
        """The plan for one item before the vision tower reads it, which drops; None for all."""
        return None

    def tower_cuts(self, blocks: int) -> tuple[TowerCut, ...]:
        """What the strategy does inside a vision tower of so many blocks, in their order."""
        return ()

    @property
    def acts_before_tower(self) -> bool:
        """Whether ``tower_plan`` says anything."""
        return type(self).tower_plan is not Strategy.tower_plan

    @property
    def acts_in_tower(self) -> bool:
        """Whether ``tower_cuts`` says anything."""
        return type(self).tower_cuts is not Strategy.tower_cuts

    def cuts(self) -> tuple[LayerCut, ...]:
        """What the strategy does inside the LLM, in ascending order of layers."""
        return ()

    def cache_pruning(self) -> CachePruning | None:
        """Which visual tokens are read while an answer is written; None for all."""
        return None

    def num_kept(self, grid: Grid) -> int | None:
        """Survivors of an item of this grid, or None where the count depends on the content."""
        return None

    def matching_flops(self, grid: Grid, width: int) -> int:
        """Multiply-adds spent on comparing tokens of this grid and feature width."""
        return 0

    def hint(self, grid: Grid) -> str | None:
        """What a user should know of this configuration for an item of this grid, in one line."""
        return None

    def at_share(self, share: float, layers: int) -> Self:
        """The same strategy where a decoder layer reads a ``share`` of the visual tokens.

        On average over the ``layers`` of the decoder, as far as the options say it: a strategy that
        acts before the LLM gets that ``keep_ratio``, one inside it a smaller one.

        Raises ConfigError where no option says it.
        """
        if "keep_ratio" not in type(self).model_fields:
            raise ConfigError(
                f"strategy {self.name} has no option keep_ratio, so that it cannot be compared at "
                "equal numbers of tokens: leave it out, or try it alone with tokenfuse run"
            )
        return self.with_options(keep_ratio=share)

    def with_options(self, **options: Any) -> Self:
        """The same strategy with other options. Raises ConfigError where they do not fit."""
        try:
            return type(self)(**{**dict(self), **options})
        except ValidationError as error:
            found = [
                f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
                for problem in error.errors()
            ]
            raise ConfigError(f"strategy {self.name}: {'; '.join(found)}") from None

    def describe(self) -> dict[str, Any]:
        """The configuration that makes this strategy again, ``{"strategy": name, ...}``."""
        return {"strategy": self.name, **self.model_dump(mode="json")}

    def __str__(self) -> str:
        """The name, and the options that are not at their defaults."""
        changed = [
            f"{option}={_short(value)}"
            for option, field in type(self).model_fields.items()
            if (value := getattr(self, option)) != field.get_default(call_default_factory=True)
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


class SlowWarning(UserWarning):
    """A strategy is about to take long."""


def warn_of_pairs(strategy: Strategy, tokens: VisualTokens) -> None:
    """Warn before a strategy compares so many tokens with all others that it takes long."""
    if tokens.num_tokens >= MANY:
        warnings.warn(
            f"{strategy.name} compares all pairs of {tokens.num_tokens} tokens, in a time that "
            f"grows with their square: expect a minute or more on a CPU from {MANY} tokens on; for "
            "long videos choose a strategy that compares neighbouring frames, such as ttf",
            SlowWarning,
            stacklevel=2,
        )


def refuse_beyond_memory(strategy: Strategy, tokens: VisualTokens) -> None:
    """Raise TooLargeError where what a strategy copies would not fit in the host's memory.

    The system would end the process. On a GPU torch raises an error of its own.
    """
    x = tokens.features
    needed = int(4 * strategy.working_copies * x.numel())
    # What little takes is not worth to ask the system.
    if needed < ASK_FROM or not on_host(x):
        return
    free = free_bytes()
    if free is not None and needed > free:
        raise TooLargeError(
            f"strategy {strategy.name} copies features in fp32: of {tokens.num_tokens} tokens of "
            f"{x.shape[-1]} it takes up to {size(needed)}, and {size(free)} are free; expected "
            "fewer frames, or a strategy that reads frame by frame, such as ttf or dycoke"
        )


def _outside_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` as it is outside ``torch.autocast``."""

    @functools.wraps(method)
    def exact(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = (getattr(x, "features", x) for x in (*args, *kwargs.values()))
        device = next((x.device for x in given if isinstance(x, Tensor)), torch.device("cpu"))
        with outside_autocast(device):
            return method(self, *args, **kwargs)

    return exact


def _version(x: Tensor | None) -> int:
    """A number that grows when a tensor is written to; 0 where torch does not count."""
    return 0 if x is None or x.is_inference() else x._version


def _short(value: Any) -> str:
    """An option's value; strategies in it by their names."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_short, value))}]"
    return str(value)


class Budgeted(Strategy):
    """A strategy that keeps exactly ⌈keep_ratio · N⌉ tokens where ``keep_ratio`` is given.

    A subclass writes ``choose`` instead of ``plan``. It overrides ``num_kept`` where its own
    options fix the count, and writes ``choose_freely`` where they do not.

    A ``temporal`` one keeps all of an item of one frame, whatever its options say.
    """

    keep_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of tokens to keep, exactly, instead of the strategy's own options",
    )

    @abstractmethod
    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        """The plan with ``count`` survivors, at least one and fewer than there are tokens."""

    def choose_freely(self, tokens: VisualTokens) -> FusionPlan:
        """The plan by the strategy's own options, where how many survive depends on the content.

        Raises ConfigError where the strategy has no such options: it needs a ``keep_ratio``.
        """
        raise ConfigError(
            f"strategy {self.name} has no option but keep_ratio to say how many tokens stay; "
            "expected one, such as keep_ratio: 0.5"
        )

    @torch.no_grad()
    def plan(self, tokens: VisualTokens) -> FusionPlan:
        n = tokens.num_tokens
        if self._passes(tokens.grid):
            return FusionPlan.identity(n, tokens.features.device)
        refuse_beyond_memory(self, tokens)
        # In a chain there are fewer tokens than places.
        count = budget(self.keep_ratio, n) if self.keep_ratio else self.num_kept(tokens.grid)
        if count is None:
            return self.choose_freely(tokens)
        if count >= n:
            return FusionPlan.identity(n, tokens.features.device)
        return self.choose(tokens, count)

    def num_kept(self, grid: Grid) -> int | None:
        if self._passes(grid):
            return prod(grid)
        return budget(self.keep_ratio, prod(grid)) if self.keep_ratio else None

    def _passes(self, grid: Grid) -> bool:
        """Whether an item of this grid has nothing to compare."""
        return self.temporal and grid[0] == 1


class Scored(Budgeted):
    """A strategy that keeps the ⌈keep_ratio · N⌉ tokens of greatest score and drops the rest.

    A subclass writes ``score`` and nothing else. The lowest index wins on ties.
    """

    keep_ratio: KeepRatio = 0.5

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Float[Tensor, " N"]:
        """A number for each token, finite or infinite, on the device of the features."""

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        return FusionPlan.from_survivors(top(self.score(tokens), count), tokens.num_tokens)


class Attending(Budgeted):
    """A strategy that reads how much attention tokens get in one block of the vision tower.

    The adapter supplies it as ``tokens.saliency``.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"saliency"})
    query: ClassVar[Query] = "each"
    """Whose attention is read; see Attention."""

    block: VisionBlock = -1

    def needed(self) -> Needs:
        return replace(super().needed(), attention=Attention(self.block, self.query))
