"""A contact sheet of clips: a row each, the first frame of every temporal patch in a column."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from tokenfuse.micro.strata import StratumClip
from tokenfuse.micro.tasks import FRAMES_PER_PATCH, SIZE

MARGIN = 3
TEXT = 15


def sheet(clips: Sequence[StratumClip]) -> Image.Image:
    """Rows of frames under a line of text; decisive patches have a white edge."""
    step, high = SIZE + MARGIN, SIZE + MARGIN + TEXT
    patches = max(len(clip.frames) for clip in clips) // FRAMES_PER_PATCH
    picture = Image.new("RGB", (MARGIN + patches * step, MARGIN + len(clips) * high))
    draw = ImageDraw.Draw(picture)
    for row, clip in enumerate(clips):
        top = MARGIN + row * high
        text = f"{clip.stratum}   {clip.question.text} {clip.question.answer}"
        if clip.decisive:
            text += f"   decisive {clip.decisive[0]}..{clip.decisive[1] - 1}"
        draw.text((MARGIN, top), f"{text}   {clip.displacement:.2f} tokens per patch")
        for patch, frame in enumerate(clip.frames[::FRAMES_PER_PATCH]):
            at = (MARGIN + patch * step, top + TEXT)
            if clip.decisive and clip.decisive[0] <= patch < clip.decisive[1]:
                draw.rectangle((at[0] - 2, at[1] - 2, at[0] + SIZE + 1, at[1] + SIZE + 1), "white")
            picture.paste(Image.fromarray(frame), at)
    return picture
