"""Clips of strangers: decoded in a process of their own, within limits of time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenfuse.errors import VideoError
from tokenfuse.inference.video import Video

MB = 2**20


@dataclass(frozen=True)
class Limits:
    """What a clip may cost.

    ``frames``: sampled of it. ``file_mb``: size of the file. ``length``: seconds that it lasts.
    ``side``: pixels of its longer side. ``pixels``: of all sampled frames together, which are
    scaled down to that. ``wait``: seconds that decoding may take. ``memory_mb``: of the process
    that decodes, where the system can limit it.
    """

    frames: int = 16
    file_mb: int = 100
    length: float = 600
    side: int = 4096
    pixels: int = 2**23
    wait: float = 20
    memory_mb: int = 2048


def read_upload(path: str | Path, limits: Limits) -> Video:
    """The frames of a clip that nobody has looked at yet.

    Decoding happens in a process of its own, so that a file made to crash, stall or exhaust a
    decoder takes down that process only.

    Raises VideoError for what ``read_video`` refuses, and for a clip beyond the limits.
    """
    path = Path(path)
    size = path.stat().st_size if path.is_file() else 0
    if size > limits.file_mb * MB:
        raise VideoError(
            f"{path.name} has {size / MB:.0f} MB; expected no more than {limits.file_mb}: cut or "
            "scale the clip"
        )
    with tempfile.TemporaryDirectory(prefix="tokenfuse-") as folder:
        out = Path(folder) / "frames.npy"
        order = json.dumps({"path": str(path.resolve()), "out": str(out), **asdict(limits)})
        try:
            done = subprocess.run(
                [sys.executable, "-m", "tokenfuse.app.decode", order],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=limits.wait,
            )
        except subprocess.TimeoutExpired as error:
            raise VideoError(
                f"{path.name} was not decoded within {limits.wait:g} s; expected a shorter or "
                "smaller clip"
            ) from error
        said = _said(done.stdout)
        if "error" in said:
            raise VideoError(str(said["error"]).replace(str(path.resolve()), path.name))
        if done.returncode or not out.is_file():
            raise VideoError(
                f"{path.name} stopped the decoder (exit status {done.returncode}); expected a clip "
                "that plays: encode it again, with smaller frames if they are large"
            )
        return Video(np.load(out), **said)


def _said(stdout: bytes) -> dict[str, Any]:
    """What the process said last; nothing where it was stopped."""
    try:
        found = json.loads(stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
