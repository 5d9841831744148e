"""Write the shipped sample clip: ``python -m tokenfuse.micro.sample``."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.stream import VideoStream

from tokenfuse.micro import SAMPLE
from tokenfuse.micro.tasks import Clip, make_clip

SEED = 7
SCALE = 3


def write_clip(clip: Clip, path: Path, *, codec: str = "libx264", scale: int = SCALE) -> None:
    """Encode a clip, each pixel ``scale × scale`` pixels large."""
    frames = clip.frames.repeat(scale, axis=1).repeat(scale, axis=2)
    with av.open(str(path), "w") as container:
        rate = Fraction(clip.fps).limit_denominator(1000)
        stream = cast(VideoStream, container.add_stream(codec, rate=rate))
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def main() -> None:
    write_clip(make_clip(SEED, patches=8, scene="motion", split="test"), SAMPLE)


if __name__ == "__main__":
    main()
