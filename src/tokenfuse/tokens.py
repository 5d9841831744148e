"""The visual tokens of one image or video."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenfuse.errors import TokensError

Grid = tuple[int, int, int]
Modality = Literal["image", "video"]


SHORT_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


@dataclass(frozen=True, eq=False, repr=False)
class VisualTokens:
    """The visual tokens that the LLM would read for one item, an image (``T = 1``) or a video.

    ``features``: ``(N, D)``, any float dtype and device, in ``(t, h, w)`` order.
    ``grid``: ``(T, H, W)`` after the spatial merge, ``N = T * H * W``; between the strategies of a
    chain there may be fewer tokens than places.
    ``coords``: ``(N, 3)`` long, the ``(t, h, w)`` of each token.
    ``saliency``: ``(N,)`` float, non-negative, for strategies that need it.
    ``text``: ``(n, D)`` prompt embeddings, for query-aware strategies.

    Raises TokensError where shapes or dtypes do not fit together.
    """

    features: Float[Tensor, "N D"]
    grid: Grid
    coords: Int[Tensor, "N 3"]
    saliency: Float[Tensor, " N"] | None = None
    text: Float[Tensor, "n D"] | None = None

    def __post_init__(self) -> None:
        t, h, w = self.grid
        if min(t, h, w) < 1:
            raise TokensError(f"grid {self.grid} has an empty axis; expected (T, H, W), each >= 1")
        # A chain's later strategies see fewer tokens than places; the coordinates say which.
        n, given = t * h * w, self.features.shape[:1]
        if self.coords.shape[:1] == given and given and 1 <= given[0] < n:
            n = given[0]
        if self.features.ndim != 2 or not self.features.is_floating_point():
            raise TokensError(
                f"features are {self.features.dtype} of shape {tuple(self.features.shape)}; "
                "expected a float tensor (N, D): flatten (T, H, W, D) first, or use from_grid"
            )
        if not self.features.shape[1]:
            raise TokensError("features have width 0; expected (N, D) with D of 1 or more")
        if self.coords.is_floating_point():
            raise TokensError(f"coords are {self.coords.dtype}; expected whole numbers (t, h, w)")
        expected: dict[str, tuple[int | str, ...]] = {
            "features": (n, "D"),
            "coords": (n, 3),
            "saliency": (n,),
            "text": ("n", self.features.shape[1]),
        }
        for field, shape in expected.items():
            value = getattr(self, field)
            if value is None:
                continue
            got = tuple(value.shape)
            if len(got) != len(shape) or any(
                isinstance(e, int) and e != g for e, g in zip(shape, got, strict=True)
            ):
                raise TokensError(
                    f"{field} has shape {got}; {n} tokens on grid {self.grid}, so expected "
                    f"({', '.join(map(str, shape))}): pass the grid after the spatial merge"
                )

    @classmethod
    def from_grid(
        cls,
        features: Float[Tensor, "..."],
        grid: Grid,
        *,
        saliency: Float[Tensor, " N"] | None = None,
        text: Float[Tensor, "n D"] | None = None,
        check: bool = True,
    ) -> VisualTokens:
        """Tokens of a full grid from features ``(N, D)`` or ``(T, H, W, D)``.

        ``check`` refuses NaN and Inf, and negative saliency, which costs one host synchronisation.

        Raises TokensError where the shape does not fit or a value is none that is expected.
        """
        if len(grid) != 3:
            raise TokensError(f"grid is {tuple(grid)}; expected (T, H, W)")
        grid = (int(grid[0]), int(grid[1]), int(grid[2]))
        if features.ndim == 4:
            if tuple(features.shape[:3]) != grid:
                raise TokensError(
                    f"features have shape {tuple(features.shape)}, which is not grid {grid} "
                    "and a width: pass (T, H, W, D)"
                )
            features = features.flatten(0, 2)
        tokens = cls(features, grid, grid_coords(grid, features.device), saliency, text)
        if check:
            tokens.check_finite()
        return tokens

    def check_finite(self) -> None:
        """Raise TokensError for NaN, Inf and negative saliency. One host synchronisation."""
        sound = [all_finite(self.features)]
        if self.saliency is not None:
            sound.append(all_finite(self.saliency) & (self.saliency >= 0).all())
        if self.text is not None:
            sound.append(all_finite(self.text).to(self.features.device))
        if all(torch.stack(sound).tolist()) if len(sound) > 1 else bool(sound[0]):
            return
        if bool(sound[0]):
            self._refuse_others()
        bad = (~torch.isfinite(self.features)).any(-1).nonzero().flatten()
        t, h, w = self.coords[bad[0]].tolist()
        kind = "NaN" if bool(self.features[bad[0]].isnan().any()) else "Inf"
        raise TokensError(
            f"features hold {kind} in {len(bad)} of {self.num_tokens} tokens, first at "
            f"frame {t}, row {h}, column {w}; expected finite values: check the pixels and the "
            "vision tower's dtype (fp16 overflows where bf16 does not)"
        )

    def _refuse_others(self) -> NoReturn:
        """Raise TokensError for the saliency or the text, one of which is not sound."""
        name, expected, value = "text", "finite values", self.text
        if self.saliency is not None:
            bad = ~torch.isfinite(self.saliency) | (self.saliency < 0)
            if bool(bad.any()):
                name, expected, value = "saliency", "finite values of 0 or more", self.saliency[bad]
        assert value is not None
        kinds = {"NaN": value.isnan(), "Inf": value.isinf(), "negative values": value < 0}
        kind = next(kind for kind, here in kinds.items() if bool(here.any()))
        raise TokensError(
            f"{name} holds {kind}; expected {expected}: check what it was computed from, and its "
            "dtype (fp16 overflows where bf16 does not)"
        )

    def _repr_html_(self) -> str:
        from tokenfuse.pictures._html import tokens_html

        return tokens_html(self)

    def __repr__(self) -> str:
        t, h, w = self.grid
        places = f"{t}×{h}×{w}"
        if self.num_tokens != t * h * w:
            places = f"{self.num_tokens} of {places}"
        return f"{type(self).__name__}({places}, {describe_rows(self.features)})"

    @property
    def num_tokens(self) -> int:
        return self.features.shape[0]

    def after(self, survivors: Int[Tensor, " M"], features: Float[Tensor, "M D"]) -> VisualTokens:
        """The tokens that a plan leaves, with the survivors' coords and saliency.

        ``features``: the survivors' rows, fused.
        """
        saliency = None if self.saliency is None else self.saliency[survivors]
        return replace(self, features=features, coords=self.coords[survivors], saliency=saliency)

    def needed(self, field: Literal["saliency", "text"]) -> Tensor:
        """``saliency`` or ``text``. Raises TokensError where it is not given."""
        value: Tensor | None = getattr(self, field)
        if value is None:
            shape = "(N,)" if field == "saliency" else "(n, D)"
            raise TokensError(
                f"tokens have no {field}, which this strategy needs; expected {shape}: an adapter "
                f"that supplies it, or VisualTokens.from_grid(..., {field}=...)"
            )
        return value

    @property
    def frames(self) -> Float[Tensor, "T H W D"]:
        """The features as ``(T, H, W, D)``, a view.

        Raises TokensError where there are fewer tokens than places.
        """
        t, h, w = self.grid
        if self.num_tokens != t * h * w:
            raise TokensError(
                f"{self.num_tokens} tokens do not fill grid {self.grid}, whose every place this "
                "strategy needs: put it first in a chain"
            )
        return self.features.view(*self.grid, self.features.shape[-1])


def grid_coords(grid: Grid, device: torch.device | None = None) -> Int[Tensor, "N 3"]:
    """``(t, h, w)`` of every cell of ``grid``, in that order, ``(N, 3)`` long."""
    t, h, w = grid
    index = torch.arange(t * h * w, device=device)
    return torch.stack([index // (h * w), index // w % h, index % w], dim=-1)


def describe_rows(x: Float[Tensor, "N D"]) -> str:
    """Width and dtype of ``x`` in a few characters, and its device where that is not the CPU."""
    dtype = str(x.dtype).removeprefix("torch.")
    parts = [f"D={x.shape[-1]}", SHORT_DTYPES.get(dtype, dtype)]
    if x.device.type != "cpu":
        parts.append(str(x.device))
    return ", ".join(parts)


def all_finite(x: Float[Tensor, "*n"]) -> Bool[Tensor, ""]:
    """Whether no value is NaN or infinite, on the device of ``x``.

    In one read: ``isfinite`` makes several tensors of the size of ``x``, which takes ten times as
    long as finding the least and the greatest value, one of which shows what is not finite.
    """
    if not x.numel():
        return torch.ones((), dtype=torch.bool, device=x.device)
    least, most = x.detach().aminmax()
    return least.isfinite() & most.isfinite()
