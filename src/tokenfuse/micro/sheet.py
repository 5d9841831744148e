"""A contact sheet of clips: ``python -m tokenfuse.micro.sheet FILE``.

Each clip is a row, the first frame of each of its temporal patches a column.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from tokenfuse.micro.motion import MOTIONS
from tokenfuse.micro.questions import PLAIN, SUBTLE
from tokenfuse.micro.strata import STRATA, StratumClip, make_stratum_clip
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw one clip of each stratum.")
    parser.add_argument("file", type=Path, help="PNG to write")
    parser.add_argument("--task", action="append", choices=(*PLAIN, *SUBTLE), help="only this")
    parser.add_argument("--motion", action="append", choices=MOTIONS, help="only this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patches", type=int, default=8)
    args = parser.parse_args()
    chosen = [
        s
        for s in STRATA
        if s.task in (args.task or (s.task,)) and s.motion in (args.motion or (s.motion,))
    ]
    clips = [make_stratum_clip(s, args.seed, patches=args.patches) for s in chosen]
    sheet(clips).save(args.file)


if __name__ == "__main__":
    main()
