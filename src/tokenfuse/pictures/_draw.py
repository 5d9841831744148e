"""Contact sheets and animations, drawn with Pillow."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from tokenfuse.pictures.token_map import TokenMap

WIDTH = 232
"""Pixels of a frame in a picture, about."""
COLUMNS = 4
LEAST = 3
"""Pixels of a token at least."""
MARGIN, LINE, GAP = 16, 18, 12
PAPER, INK, FAINT, KEPT, ANCHOR = "#ffffff", "#1c1c1c", "#6b6b6b", "#d9480f", "#1864ab"
DIM = 0.68
"""How far a token that went is blended towards paper."""
STILL = 500
"""Milliseconds of a frame of which nobody knows when it is shown."""


def sheet(tokens: TokenMap, most: int | None) -> Image.Image:
    """All steps, frame beside frame."""
    chosen = tokens.chosen(most)
    panels = [[_panel(tokens, number, frame) for frame in chosen] for number in _steps(tokens)]
    wide, high = panels[0][0].size
    columns = min(COLUMNS, len(chosen))
    rows = ceil(len(chosen) / columns)
    step = 2 * LINE + rows * (high + GAP)
    head = MARGIN + (2 * LINE if tokens.title else 0)
    missing = tokens.grid[0] - len(chosen)
    size = (
        max(2 * MARGIN + columns * (wide + GAP) - GAP, 360),
        head + len(panels) * step + (LINE if missing else 0) + MARGIN,
    )
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    if tokens.title:
        draw.text((MARGIN, MARGIN), tokens.title, INK, _font(15))
    for number, row in enumerate(panels):
        top = head + number * step
        draw.text((MARGIN, top), caption(tokens, number), INK, _font(13))
        for place, panel in enumerate(row):
            left = MARGIN + place % columns * (wide + GAP)
            canvas.paste(panel, (left, top + 2 * LINE + place // columns * (high + GAP)))
    if missing:
        words = f"… {missing} more frame{'s' if missing > 1 else ''}"
        draw.text((MARGIN, size[1] - MARGIN - LINE), words, FAINT, _font(13))
    return canvas


def animation(tokens: TokenMap, most: int | None) -> list[Image.Image]:
    """One picture for each frame, after the last step."""
    last = len(tokens.steps) - 1
    return [_panel(tokens, last, frame) for frame in tokens.chosen(most)]


def write_gif(tokens: TokenMap, path: Path, most: int | None) -> None:
    """The animation as a GIF that repeats."""
    first, *others = animation(tokens, most)
    shown = [max(20, round(ms)) for ms in _durations(tokens, most)]
    first.save(path, save_all=True, append_images=others, duration=shown, loop=0)


def write_film(tokens: TokenMap, path: Path, most: int | None) -> None:
    """The animation as an MP4."""
    import av

    pictures = animation(tokens, most)
    wide, high = (x - x % 2 for x in pictures[0].size)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = wide, high, "yuv420p"
        stream.time_base = Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        # The last picture once more, so that it is shown for its time.
        shown = _durations(tokens, most)
        starts = np.cumsum([0, *shown]).round().astype(int)
        for start, picture in zip(starts.tolist(), [*pictures, pictures[-1]], strict=True):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture)[:high, :wide], format="rgb24")
            frame.pts, frame.time_base = start, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def caption(tokens: TokenMap, number: int) -> str:
    """What is left at a step, in words."""
    step, total = tokens.steps[number], len(tokens.target)
    left = int(step.kept.sum())
    return f"{step.title}: {left} of {total} visual tokens left, {left / total:.1%}"


def label(tokens: TokenMap, number: int, frame: int) -> tuple[str, str]:
    """When a frame is shown with how many of its tokens are left, and what it takes in."""
    per = tokens.grid[1] * tokens.grid[2]
    times = tokens.timestamps
    when = f"{times[frame]:.2f} s" if times else f"frame {frame}"
    taken = tokens.taken_in[frame]
    return f"{when}   {tokens.counts[number][frame]}/{per}", f"anchor, +{taken}" if taken else ""


def _steps(tokens: TokenMap) -> range:
    return range(len(tokens.steps))


def _panel(tokens: TokenMap, number: int, frame: int) -> Image.Image:
    """One frame, with a line of words above it."""
    _, rows, columns = tokens.grid
    kept = tokens.steps[number].kept.reshape(tokens.grid)[frame]
    picture = _scaled(Image.fromarray(tokens.frames[frame]), rows, columns)
    wide, high = picture.size
    # Where cells end, to the pixel: a grid need not divide a picture.
    down = np.arange(high) * rows // high
    right = np.arange(wide) * columns // wide
    alive = kept[down][:, right]
    colors = np.asarray(picture).astype(np.float32)
    grey = colors.mean(-1, keepdims=True)
    faint = grey + (255 - grey) * DIM
    shown = np.where(alive[..., None], colors, faint).round().astype(np.uint8)
    out = Image.new("RGB", (wide, high + LINE), PAPER)
    out.paste(Image.fromarray(shown), (0, LINE))
    draw = ImageDraw.Draw(out)
    words, anchor = label(tokens, number, frame)
    draw.text((0, 0), words, INK, _font(12))
    if anchor:
        length = draw.textlength(anchor, _font(12))
        draw.text((wide - length, 0), anchor, ANCHOR, _font(12))
    edges_y = [ceil(i * high / rows) for i in range(rows + 1)]
    edges_x = [ceil(j * wide / columns) for j in range(columns + 1)]
    for i, (top, bottom) in enumerate(pairwise(edges_y)):
        for j, (left, end) in enumerate(pairwise(edges_x)):
            if kept[i, j]:
                # Neighbours share a line.
                box = (left, top + LINE, min(end, wide - 1), min(bottom, high - 1) + LINE)
                draw.rectangle(box, outline=KEPT)
    if anchor:
        draw.rectangle((0, LINE, wide - 1, high + LINE - 1), outline=ANCHOR, width=3)
    return out


def _scaled(picture: Image.Image, rows: int, columns: int) -> Image.Image:
    """A frame of about WIDTH pixels: small ones by whole steps, so that they stay sharp.

    Never so small that an outline of a token does not fit.
    """
    if picture.width <= WIDTH // 2:
        times = max(1, WIDTH // picture.width)
        size = (max(picture.width * times, LEAST * columns), picture.height * times)
        size = (size[0], max(size[1], LEAST * rows))
        return picture.resize(size, Image.Resampling.NEAREST)
    height = max(LEAST * rows, round(picture.height * WIDTH / picture.width))
    return picture.resize((max(WIDTH, LEAST * columns), height), Image.Resampling.LANCZOS)


def _durations(tokens: TokenMap, most: int | None) -> list[float]:
    """Milliseconds of each frame; the last is shown as long as the one before."""
    chosen = tokens.chosen(most)
    if tokens.timestamps is None or len(chosen) < 2:
        return [STILL] * len(chosen)
    times = [tokens.timestamps[frame] * 1e3 for frame in chosen]
    lengths = [max(20.0, after - before) for before, after in pairwise(times)]
    return [*lengths, lengths[-1]]


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
