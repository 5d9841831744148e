"""The process that decodes one clip: ``python -m tokenfuse.app.decode ORDER``, for ``upload``."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from tokenfuse.errors import VideoError
from tokenfuse.inference.video import open_video, read_video


def main(order: dict[str, Any]) -> None:
    """Decode within the limits of the order; say in one line of JSON what came of it."""
    _limit(order)
    try:
        lasts = _check(order)
        video = read_video(order["path"], frames=order["frames"], max_pixels=order["pixels"])
        # A header may know nothing of it.
        _refuse_long(max(lasts, video.duration), order)
    except VideoError as error:
        print(json.dumps({"error": str(error)}))
        return
    except MemoryError:
        print(json.dumps({"error": "the clip needs more memory than there is; expected a smaller"}))
        return
    np.save(order["out"], video.frames)
    about = {name: getattr(video, name) for name in ("indices", "fps", "total_frames")}
    about |= {"timestamps": video.timestamps, "duration": video.duration}
    print(json.dumps(about))


def _check(order: dict[str, Any]) -> float:
    """Refuse by its header what would be refused after minutes of work; how long it lasts."""
    with open_video(Path(order["path"])) as (container, stream):
        wide, high = stream.codec_context.width, stream.codec_context.height
        lasts = (container.duration or 0) / 1_000_000
    if max(wide, high) > order["side"]:
        raise VideoError(
            f"the clip has {wide} x {high} pixels; expected no side longer than {order['side']}: "
            "scale it down"
        )
    _refuse_long(lasts, order)
    return float(lasts)


def _refuse_long(lasts: float, order: dict[str, Any]) -> None:
    if lasts > order["length"]:
        raise VideoError(
            f"the clip lasts {lasts:.0f} s; expected no more than {order['length']:g}: cut it"
        )


def _limit(order: dict[str, Any]) -> None:
    """Limit memory and processor time, where the system can."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        most = order["memory_mb"] * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        # Beyond the waiting time of the parent, should that have been killed.
        seconds = 4 * ceil(order["wait"])
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
