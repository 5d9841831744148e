"""Where the visual tokens are among the features that a vision tower returns.

Towers return more than tokens: newline features after rows, a class token, separators. A Span says
which features make a grid; all others stay in the prompt as they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import isqrt, prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tokenfuse.errors import PromptError, UnsupportedModelError
from tokenfuse.tokens import Grid, Modality

RESAMPLERS = ("QFormer", "Perceiver", "Resampler", "Abstractor")
"""Parts of class names of modules whose learned queries read an image, in no grid's order."""


class Span(NamedTuple):
    """Consecutive features: the visual tokens of a grid, and others around them.

    ``grid``: ``(T, H, W)`` of the tokens. ``head`` features come before them, such as a class
    token; ``per_row`` after each row of the grid, such as a newline; ``tail`` after all.
    """

    grid: Grid
    head: int = 0
    per_row: int = 0
    tail: int = 0

    @property
    def plain(self) -> bool:
        """Whether there are only tokens."""
        return self.num_tokens == self.size

    @property
    def num_tokens(self) -> int:
        return prod(self.grid)

    @property
    def size(self) -> int:
        """How many features there are in all."""
        t, h, w = self.grid
        return self.head + t * h * (w + self.per_row) + self.tail

    def tokens(self, device: torch.device | None = None) -> Int[Tensor, " N"]:
        """Which of the features are tokens, in ``(t, h, w)`` order."""
        index = torch.arange(self.num_tokens, device=device)
        return self.head + index + index // self.grid[2] * self.per_row

    def others(self, device: torch.device | None = None) -> Int[Tensor, " E"]:
        """Which of the features are none."""
        # The complement of an arithmetic sequence, without a mask's host synchronisation.
        t, h, w = self.grid
        head = torch.arange(self.head, device=device)
        row = torch.arange(t * h, device=device)[:, None] * (w + self.per_row)
        ends = self.head + row + w + torch.arange(self.per_row, device=device)
        tail = torch.arange(self.size - self.tail, self.size, device=device)
        return torch.cat([head, ends.flatten(), tail])


def flat(features: Tensor | Sequence[Tensor]) -> Tensor:
    """A container of features, ``(..., D)`` each, as one tensor ``(n, D)``."""
    if isinstance(features, Tensor):
        return features.reshape(-1, features.shape[-1])
    parts = [x.reshape(-1, x.shape[-1]) for x in features]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def as_frames(spans: Sequence[Span], videos: Sequence[Hashable]) -> list[Span]:
    """The spans of each video as one, frame by frame; ``videos`` says which each belongs to.

    Raises PromptError where they are not frames of one size.
    """
    whole: list[Span] = []
    for video in dict.fromkeys(videos):
        own = [span for span, of in zip(spans, videos, strict=True) if of == video]
        first = own[0]
        if any(span != first or span.grid[0] != 1 or not span.plain for span in own):
            grids = ", ".join(str(span.grid) for span in own)
            raise PromptError(
                f"frames_as_images is set, but a prompt shows images of the grids {grids}; "
                "expected the frames of one video, all of one size and nothing else: leave out "
                "frames_as_images, or ask about images in another prompt"
            )
        whole.append(Span((len(own), *first.grid[1:])))
    return whole


def refuse_resamplers(model: Any) -> None:
    """Raise UnsupportedModelError where learned queries stand between the tower and the LLM."""
    for module in model.modules():
        name = type(module).__name__
        if any(part.lower() in name.lower() for part in RESAMPLERS):
            raise UnsupportedModelError(
                f"{type(model).__name__} reads images by a {name}, whose queries have no place in "
                "the image; expected visual tokens on a grid: an adapter of its own could say "
                "what they stand for"
            )


def from_pixels(
    entries: Sequence[Tensor],
    pixels: Any,
    vision: Any,
    newline: Tensor | None,
    image_sizes: Any = None,
) -> list[Span]:
    """Spans of images by the pixels' shape, ``(tiles, C, h, w)`` or ``(B, tiles, C, h, w)``.

    ``entries``: the features of each image or prompt, ``(n, D)``. ``vision``: the tower's config,
    for its patch size. ``newline``: the feature that ends a row, where the model has one.
    ``image_sizes``: height and width of each image in pixels, ``(images, 2)``, where they differ.

    Raises UnsupportedModelError where that does not fix the grids.
    """
    patch = _pair(getattr(vision, "patch_size", None))
    if patch is None or not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5):
        shape = tuple(getattr(pixels, "shape", ()))
        raise _unclear(f"pixels of shape {shape} and a patch size of {patch}")
    if newline is not None:
        tile = _patches(pixels.shape[-2:], patch)
        return [span for entry in entries for span in _by_newlines(entry, newline, tile)]
    counts = [len(entry) for entry in entries]
    sizes = [] if image_sizes is None else torch.as_tensor(image_sizes).tolist()
    # Of images padded to the largest; sizes before the processor resized them say nothing.
    if len(sizes) == len(entries) and [max(x) for x in zip(*sizes, strict=True)] == [
        *pixels.shape[-2:]
    ]:
        grids = [_coarse(n, _patches(s, patch)) for n, s in zip(counts, sizes, strict=True)]
        if None not in grids:
            return [Span(grid) for grid in grids if grid]
    # Prompts with fewer tiles than others are padded with black ones, which models leave out.
    tiles = len(pixels) if pixels.ndim == 4 else int((pixels != 0).flatten(2).any(-1).sum())
    total = sum(counts)
    per_tile = total // tiles if tiles and total % tiles == 0 else 0
    grid = _coarse(per_tile, _patches(pixels.shape[-2:], patch))
    if grid is None or any(n % per_tile for n in counts):
        raise _unclear(f"{total} features of {tiles} tile(s) of {tuple(pixels.shape[-2:])} pixels")
    return [Span(grid)] * tiles


def from_video_pixels(
    entries: Sequence[Tensor], pixels: Any, vision: Any, newline: Tensor | None
) -> list[Span]:
    """Spans of videos by the pixels' shape, ``(videos, T, C, h, w)``; see ``from_pixels``."""
    patch = _pair(getattr(vision, "patch_size", None))
    if patch is None or not isinstance(pixels, Tensor) or pixels.ndim != 5:
        shape = tuple(getattr(pixels, "shape", ()))
        raise _unclear(f"pixels of shape {shape} and a patch size of {patch}")
    spans, frames = [], pixels.shape[1]
    for entry in entries:
        tail = 0 if newline is None else int(_is(entry, newline).sum())
        n = len(entry) - tail
        grid = None if n % frames else _coarse(n // frames, _patches(pixels.shape[-2:], patch))
        if grid is None or (tail and not bool(_is(entry[n:], newline).all())):
            raise _unclear(
                f"{len(entry)} features of {frames} frames of {tuple(pixels.shape[-2:])} pixels"
            )
        spans.append(Span((frames, *grid[1:]), tail=tail))
    return spans


def _by_newlines(entry: Tensor, newline: Tensor, tile: tuple[int, int]) -> list[Span]:
    """An image as a small whole, then its tiles joined, each row of which a newline ends."""
    ends = _is(entry, newline).nonzero().flatten().tolist()
    n = len(entry)
    if ends == [n - 1] and (whole := _coarse(n - 1, tile)):
        return [Span(whole, tail=1)]
    if len(ends) > 1:
        pitch = ends[1] - ends[0]
        whole = _coarse(ends[0] - pitch + 1, tile)
        if whole and pitch > 1 and ends == list(range(ends[0], n, pitch)) and ends[-1] == n - 1:
            return [Span(whole), Span((1, len(ends), pitch - 1), per_row=1)]
    raise _unclear(f"{n} features with newlines at {ends[:3]}… of {len(ends)}")


def _is(features: Tensor, newline: Tensor | None) -> Bool[Tensor, " n"]:
    if newline is None:
        return torch.zeros(len(features), dtype=torch.bool, device=features.device)
    return (features == newline.to(features)).all(-1)


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Sequence) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def _patches(size: Sequence[int], patch: tuple[int, int]) -> tuple[int, int]:
    return size[0] // patch[0], size[1] // patch[1]


def _coarse(n: int, patches: tuple[int, int]) -> Grid | None:
    """The grid of ``n`` tokens over ``patches``, each token a square of them, or None."""
    rows, columns = patches
    if n < 1 or not rows or not columns:
        return None
    for side in range(1, isqrt(rows * columns) + 1):
        h, w = -(-rows // side), -(-columns // side)
        if h * w == n:
            return 1, h, w
        if h * w < n:
            return None
    return None


def _unclear(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what} do not say where each visual token is; expected one token per square of patches, "
        "newlines aside: write an adapter whose spans() says it, see "
        "docs/how-to/write-an-adapter.md"
    )


def check_spans(spans: Sequence[Span], features: int, modality: Modality) -> None:
    """Raise PromptError unless the spans are as many features as there are."""
    described = sum(span.size for span in spans)
    if described != features:
        raise PromptError(
            f"the vision tower returned {features} {modality} features, the inputs describe "
            f"{described}: pass the processor's output unchanged"
        )
