"""Where the visual tokens are among the features that a vision tower returns.

Towers return more than visual tokens: class tokens before images or frames, newlines after rows,
separators. A Span says which features make a grid; all others stay in the prompt as they are.
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
    """Consecutive features of a vision tower: the visual tokens of one grid, and others among them.

    The features stand in this order: ``head`` features; then, for each frame, ``per_frame``
    features and the rows of the frame, each followed by ``per_row`` features; then ``tail``
    features. All counts are numbers of features.
    """

    grid: Grid
    """Frames, rows and columns of the visual tokens, ``(T, H, W)``."""
    head: int = 0
    """Features before all frames, such as one class token for the whole item."""
    per_frame: int = 0
    """Features before each frame, such as a class token of the frame."""
    per_row: int = 0
    """Features after each row of each frame, such as a newline."""
    tail: int = 0
    """Features after all frames, such as a separator."""

    @property
    def plain(self) -> bool:
        """Whether all features are visual tokens."""
        return self.num_tokens == self.size

    @property
    def num_tokens(self) -> int:
        """How many of the features are visual tokens."""
        return prod(self.grid)

    @property
    def frame_size(self) -> int:
        """How many features a frame has, those before it and those after its rows included."""
        return self.per_frame + self.grid[1] * (self.grid[2] + self.per_row)

    @property
    def size(self) -> int:
        """How many features there are in all."""
        return self.head + self.grid[0] * self.frame_size + self.tail

    def tokens(self, device: torch.device | None = None) -> Int[Tensor, " N"]:
        """Indices of the features that are visual tokens, in ``(t, h, w)`` order."""
        column = torch.arange(self.grid[2], device=device)
        return (self._rows(device)[..., None] + column).flatten()

    def others(self, device: torch.device | None = None) -> Int[Tensor, " E"]:
        """Indices of the features that are no visual tokens, in no particular order."""
        # Counted: finding them as the complement would be a host synchronisation.
        rows = self._rows(device)
        head = torch.arange(self.head, device=device)
        before = rows[:, :1] - 1 - torch.arange(self.per_frame, device=device)
        behind = rows[..., None] + self.grid[2] + torch.arange(self.per_row, device=device)
        tail = torch.arange(self.size - self.tail, self.size, device=device)
        return torch.cat([head, before.flatten(), behind.flatten(), tail])

    def in_order(self, frames: Int[Tensor, " T"]) -> Int[Tensor, " n"]:
        """Indices of all features, with the frames in another order."""
        every = torch.arange(self.size, device=frames.device)
        end = self.size - self.tail
        own = every[self.head : end].view(-1, self.frame_size)[frames]
        return torch.cat([every[: self.head], own.flatten(), every[end:]])

    def _rows(self, device: torch.device | None) -> Int[Tensor, "T H"]:
        """Index of the first visual token of each row."""
        t, h, w = self.grid
        frame = torch.arange(t, device=device)[:, None] * self.frame_size
        row = torch.arange(h, device=device) * (w + self.per_row)
        return self.head + self.per_frame + frame + row


def flat(features: Tensor | Sequence[Tensor]) -> Tensor:
    """A container of features, ``(..., D)`` each, as one tensor ``(n, D)``."""
    if isinstance(features, Tensor):
        return features.reshape(-1, features.shape[-1])
    parts = [x.reshape(-1, x.shape[-1]) for x in features]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def as_frames(spans: Sequence[Span], videos: Sequence[Hashable]) -> list[Span]:
    """The spans of each video as one, frame by frame; ``videos`` says which each belongs to.

    What stands before the tokens of each image, such as a class token, stands before each frame.

    Raises PromptError where they are not frames of one size, or something stands behind each.
    """
    whole: list[Span] = []
    for video in dict.fromkeys(videos):
        own = [span for span, of in zip(spans, videos, strict=True) if of == video]
        first = own[0]
        if any(span != first or span.grid[0] != 1 or span.tail for span in own):
            grids = ", ".join(str(span.grid) for span in own)
            raise PromptError(
                f"frames_as_images is set, but a prompt shows images of the grids {grids}; "
                "expected the frames of one video, all of one size and nothing behind any: leave "
                "out frames_as_images, or ask about images in another prompt"
            )
        before = first.head + first.per_frame
        whole.append(Span((len(own), *first.grid[1:]), per_frame=before, per_row=first.per_row))
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
