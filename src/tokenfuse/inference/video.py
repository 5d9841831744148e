"""Video files in, RGB frames out: decoded by PyAV, sampled evenly in presentation time.

A file is walked twice. The first walk reads packets only and learns when each frame is shown; the
second decodes and turns only the chosen frames into RGB, so memory holds the sample, not the film.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.codec.context import ThreadType
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from tokenfuse.errors import VideoError

FORMATS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "ogg", "asf", "ivf", "nut"),
    *("mxf", "rm", "dv", "gif", "apng", "mjpeg", "h264", "hevc", "m4v", "obu", "yuv4mpegpipe"),
    *("png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "wav", "mp3", "flac", "aac"),
)
"""Container formats that are opened, by FFmpeg's names: those that hold their own frames.

Playlists, descriptions and references, which make FFmpeg read other files, are not among them.
"""
MAX_FRAME_PIXELS = 2**26
"""Pixels of the largest frame that is decoded, 8192 × 8192."""
MAX_PIXELS = 2**28
"""Pixels of all frames of a sample together; larger ones are scaled down while decoding."""
DEFAULT_FRAMES = 64
"""Frames of a sample where nothing else is asked for."""
MOST_FRAMES = 768
"""Frames of a sample by ``fps``, at most."""
DELAYED = 17
"""Frames by which the order of decoding may differ from that of showing; H.264 allows 16."""
MOST_PARTS = 100_000
"""Parts of a container that are walked before its end is taken for its end."""


@dataclass(frozen=True, eq=False)
class Video:
    """Frames sampled from a video file, and when each of them is shown.

    ``frames``: ``(F, H, W, 3)`` uint8, RGB, turned (not mirrored) as the file asks to be shown, and
    scaled down where all of them together have more than ``max_pixels``.
    ``indices``: ``F`` positions among the decoded frames of the file, strictly increasing.
    ``fps``: mean frames per second of the file, from its first frame to its last.
    ``total_frames``: frames in the file.
    ``timestamps``: ``F`` presentation times in seconds; the first frame of the file is at 0.
    ``duration``: seconds from the first frame to the end of the last.
    """

    frames: npt.NDArray[np.uint8]
    indices: list[int]
    fps: float
    total_frames: int
    timestamps: list[float]
    duration: float

    @classmethod
    def from_frames(cls, frames: npt.NDArray[np.uint8], fps: float) -> Video:
        """A video of all the frames ``(F, H, W, 3)``, uint8 RGB, shown ``fps`` to the second."""
        count = len(frames)
        times = [index / fps for index in range(count)]
        return cls(frames, list(range(count)), fps, count, times, count / fps)

    def processor_indices(self) -> list[int]:
        """``F`` indices, never decreasing, that give ``timestamps`` when divided by ``fps``.

        A processor computes times as index / fps, and at a varying frame rate ``indices`` would
        mislead it; these are right to half a frame. At a constant rate the two are equal.
        """
        return list(accumulate((round(time * self.fps) for time in self.timestamps), max))

    def processor_options(self) -> dict[str, Any]:
        """``processor_kwargs`` of a processor's ``apply_chat_template`` that is shown ``frames``.

        They say when each frame is shown, and that none is to be left out.
        """
        metadata = {
            "fps": self.fps,
            "frames_indices": self.processor_indices(),
            "total_num_frames": self.total_frames,
        }
        return {"do_sample_frames": False, "video_metadata": [metadata]}


def read_video(
    path: str | Path,
    *,
    frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    max_pixels: int | None = None,
) -> Video:
    """Decode a local video file (mp4, webm, avi, mov, ...; an image is one frame) and sample it.

    Of several video streams the best is read, as FFmpeg chooses it. Only FORMATS are opened, and
    nothing but the file itself is ever read.

    ``frames``: that many, first to last, evenly over presentation time, whatever ``max_frames``
    says; all of them, once each, where the file has fewer.
    ``fps``: the frame nearest each 1/fps second, none twice, thinned evenly to ``max_frames``.
    ``max_frames``: the most frames that ``fps`` (by default MOST_FRAMES), or a call with neither
    (by default DEFAULT_FRAMES), returns.
    ``max_pixels``: of all frames together, by default MAX_PIXELS; larger ones are scaled down.

    Raises VideoError where the request contradicts itself, or the file is missing, is not a video,
    has frames of more than MAX_FRAME_PIXELS, or is damaged: a frame that does not decode, or a file
    shorter than it declares. Damage that FFmpeg steps over without a sign (inside webm and mjpeg,
    the tail of mpegts) goes unnoticed.
    """
    if "://" in str(path):
        # A Path would make one slash of the two.
        raise VideoError(f"{path} is a URL; expected a local video file: download it first")
    path = Path(path)
    check_sampling(frames=frames, fps=fps, max_frames=max_frames, max_pixels=max_pixels)
    _check_file(path)
    if max_frames is None:
        max_frames = DEFAULT_FRAMES if fps is None else MOST_FRAMES
    times = _packet_times(path)
    chosen = _choose(times, frames, fps, max_frames)
    pixels = MAX_PIXELS if max_pixels is None else max_pixels
    images, decoded, rate, last = _decode(path, chosen, pixels)
    if decoded != times:
        # Packets mislead where they show nothing or are edited out; decoded frames do not.
        del images
        times = decoded
        chosen = _choose(times, frames, fps, max_frames)
        images, _, rate, last = _decode(path, chosen, pixels)
    mean_fps = (len(times) - 1) / times[-1] if times[-1] > 0 else rate
    shown = [times[index] for index in chosen]
    return Video(images, chosen, mean_fps, len(times), shown, times[-1] + (last or 1 / mean_fps))


def check_sampling(
    *,
    frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    max_pixels: int | None = None,
) -> None:
    """Raise VideoError where ``read_video`` cannot sample any video by these."""
    if frames is not None and fps is not None:
        raise VideoError(
            f"frames={frames} and fps={fps} are both given; expected one: leave the other out"
        )
    for name, count in (("frames", frames), ("max_frames", max_frames), ("max_pixels", max_pixels)):
        if count is not None and count < 1:
            raise VideoError(f"{name}={count}; expected 1 or more: leave it out for the default")
    if fps is not None and not (isfinite(fps) and fps > 0):
        raise VideoError(f"fps={fps}; expected a finite rate above 0: leave it out for all frames")


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise VideoError(
            f"{path} is a folder; expected a video file: make one of the frames in it, such as by "
            f"ffmpeg -framerate 25 -pattern_type glob -i '{path}/*.png' frames.mp4"
        )
    if not path.is_file():
        raise VideoError(f"{path} does not exist; expected a local video file: check the spelling")
    if path.stat().st_size == 0:
        raise VideoError(f"{path} is empty (0 bytes); expected a video: copy or download it again")


def _choose(
    timestamps: Sequence[float], frames: int | None, fps: float | None, max_frames: int
) -> list[int]:
    """Positions to sample from frames shown at ``timestamps`` (seconds, ascending)."""
    times = np.asarray(timestamps, dtype=np.float64)
    if times.size == 0:
        return []
    if fps is None:
        return list(map(int, _spread(times, max_frames if frames is None else frames)))
    # A frame is taken where a tick is nearer to it than to its neighbours. `ticks` counts the
    # ticks up to the end of each frame's surroundings; the tick at 0 belongs to the first frame.
    ends = (times[:-1] + times[1:]) / 2 - times[0]
    all_ticks = np.floor((times[-1] - times[0]) * fps + 1e-6) + 1
    ticks = np.append(np.maximum(np.ceil(ends * fps), 1), all_ticks)
    taken = np.flatnonzero(np.diff(ticks, prepend=0) > 0)
    return list(map(int, taken[_spread(times[taken], max_frames)]))


def _spread(times: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.intp]:
    """``count`` positions, evenly over time and each once; all of them where there are fewer."""
    total = len(times)
    if count >= total:
        return np.arange(total)
    ticks = np.linspace(times[0], times[-1], count)
    after = np.searchsorted(times, ticks).clip(1, total - 1)
    nearest = np.where(ticks - times[after - 1] <= times[after] - ticks, after - 1, after)
    # Where one frame is nearest to several ticks, the later ticks move on to the frames after it,
    # and stop short of the end by as many frames as are still to come.
    slots = np.arange(count)
    return np.minimum(np.maximum.accumulate(nearest - slots), total - count) + slots


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its best true video stream; closed on every way out."""
    # The file: prefix keeps a colon in a name from being read as a protocol; the options keep
    # FFmpeg from reading any other file, and from asking for memory that a canvas of any size says.
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": ",".join(FORMATS),
        "max_pixels": str(MAX_FRAME_PIXELS),
    }
    # Before PyAV 19, a title that is not UTF-8 would make the film unreadable.
    foreign: Any = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
    try:
        container = av.open(f"file:{path}", options=options, **foreign)
    except Exception as error:
        raise VideoError(
            f"{path} cannot be opened ({_said(error)}); expected a whole mp4, webm, avi, mov or "
            "other file that holds its own frames: check that it plays, or copy it again"
        ) from error
    with container:
        # The cover of a song counts as a video stream.
        streams = [
            stream
            for stream in container.streams.video
            if not stream.disposition & Disposition.attached_pic
        ]
        if not streams:
            raise VideoError(
                f"{path} has no video stream (its format is {container.format.long_name}); "
                "expected one: pass the file with the pictures, or copy it again if it was cut off"
            )
        best = container.streams.best("video")
        stream = best if best in streams else streams[0]
        if stream.frames == 1:
            # A preview may be marked as the one to show.
            stream = max(streams, key=lambda other: other.frames)
        if stream.codec_context is None:
            raise VideoError(
                f"{path} uses a codec that no decoder here reads; expected H.264, HEVC, VP9, AV1 "
                "or the like: re-encode it with the tool that made it"
            )
        if not stream.codec_context.width:
            _refuse_animated_webp(path)
            raise VideoError(
                f"{path} has no frame that can be decoded; expected frames of 1 to "
                f"{MAX_FRAME_PIXELS} pixels (8192 x 8192): scale it down, or copy it again"
            )
        yield container, stream


def _said(error: BaseException) -> str:
    """What a decoder's exception says, in one line."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _packet_times(path: Path) -> list[float]:
    """When each frame is shown, in seconds, as far as the packets tell."""
    ticks: list[int | None] = []
    with open_video(path) as (container, stream):
        try:
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    ticks.append(packet.pts)
        except Exception:
            pass  # decoding meets the same damage, and knows how many frames precede it
        return _seconds(ticks, stream)


def _decode(
    path: Path, chosen: list[int], max_pixels: int
) -> tuple[npt.NDArray[np.uint8], list[float], float, float]:
    """Decode the whole file, keep the frames at the ascending positions ``chosen``.

    Returns the kept frames ``(F, H, W, 3)``, the seconds at which every frame of the file is
    shown, the frame rate the file claims, and the seconds its last frame stays (0: it is silent).
    """
    slots = {index: slot for slot, index in enumerate(chosen)}
    kept = np.empty((0, 0, 0, 3), np.uint8)
    ticks: list[int | None] = []
    last: int = 0
    damage = None
    with open_video(path) as (container, stream):
        try:
            for frame in _frames(container, stream):
                if frame.is_corrupt:
                    damage = "a frame is only partly there"
                    break
                slot = slots.get(len(ticks))
                if slot == 0:
                    shape = _scaled(frame, max_pixels // len(chosen))
                    kept = np.empty((len(chosen), *shape, 3), np.uint8)
                if slot is not None:
                    kept[slot] = _rgb(frame, kept.shape[1:3])
                ticks.append(frame.pts)
                last = frame.duration
        except MemoryError as error:
            raise VideoError(
                f"{path} needs more memory than there is for {len(chosen)} frames; expected fewer, "
                "such as frames=16, or a video of smaller frames"
            ) from error
        except Exception as error:
            damage = _said(error)
        missing = _missing_bytes(path, container.format.name)
        # A file cut off inside the index that follows its last frame has lost no frame.
        if missing and not 0 < stream.frames <= len(ticks):
            damage = f"{missing} bytes are missing at its end"
        if not ticks:
            _refuse_animated_webp(path)
        if damage or not ticks:
            raise VideoError(
                f"{path} is damaged: {len(ticks)} frames decoded, then {damage or 'it ends'}; "
                "expected every frame to decode: copy it again, or salvage the frames with "
                f"ffmpeg -err_detect ignore_err -i {path.name} salvaged.mp4"
            )
        seconds_last = float(last * (stream.time_base or 0))
        return kept, _seconds(ticks, stream), _rate(stream), seconds_last


def _frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """All frames in the order they are shown; an error comes after the last that decodes."""
    stream.codec_context.thread_type = ThreadType.AUTO
    try:
        for packet in container.demux(stream):
            yield from packet.decode()
    except av.FFmpegError:
        with suppress(av.FFmpegError):
            yield from stream.decode(None)  # frames that wait inside the decoder
        raise


def _scaled(frame: VideoFrame, most: int) -> tuple[int, int]:
    """Height and width for frames like this one of ``most`` pixels, turned as it is displayed."""
    height, width = frame.height, frame.width
    if round(frame.rotation / 90) % 2:
        height, width = width, height
    share = min(1.0, (most / (height * width)) ** 0.5)
    return max(1, int(height * share)), max(1, int(width * share))


def _rgb(frame: VideoFrame, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The frame as it is displayed, scaled to ``shape`` ``(H, W)``: ``(H, W, 3)``."""
    quarters = round(frame.rotation / 90) % 4  # counterclockwise
    height, width = shape
    if quarters % 2:
        height, width = width, height
    image: npt.NDArray[Any] = frame.to_ndarray(format="rgb24", height=height, width=width)
    return np.rot90(image, quarters)


def _seconds(ticks: list[int | None], stream: VideoStream) -> list[float]:
    """Presentation times in seconds, ascending from 0, of frames in the order they are shown."""
    base = stream.time_base or Fraction(1)
    given = [tick for tick in ticks if tick is not None]
    if len(given) < len(ticks):  # a raw stream, shown at its nominal rate
        return [index / _rate(stream) for index in range(len(ticks))]
    # Sorted, because packets, and H.264 in AVI, carry their times in decoding order.
    known = sorted(_in_one_go(given, max(1, round(1 / (_rate(stream) * base)))))
    return [float((tick - known[0]) * base) for tick in known]


def _in_one_go(ticks: Sequence[int], frame: int) -> list[int]:
    """Times of which no clock jumps back, as where two recordings are joined byte by byte.

    ``frame``: ticks from one frame to the next. The part after a jump follows a frame later. What
    decoding order alone puts back, up to DELAYED frames, is no jump.
    """
    found: list[int] = []
    offset, highest = 0, ticks[0] if ticks else 0
    for tick in ticks:
        if tick + offset + DELAYED * frame < highest:
            offset = highest + frame - tick
        found.append(tick + offset)
        highest = max(highest, found[-1])
    return found


def _rate(stream: VideoStream) -> float:
    """Frames per second that the file claims."""
    return float(stream.guessed_rate or stream.average_rate or 25)


def _missing_bytes(path: Path, kind: str) -> int:
    """How far a mov/mp4, avi or webm/mkv file falls short of the sizes it declares; 0 for others.

    FFmpeg takes the end of such a file for the end of the film.
    """
    end, total = 0, path.stat().st_size
    with path.open("rb") as file:
        for _ in range(MOST_PARTS):
            if end >= total:
                return end - total
            file.seek(end)
            size = _part_size(file.read(16), kind)
            if size <= 0:
                return 0
            end += size
    return 0


def _refuse_animated_webp(path: Path) -> None:
    """Raise VideoError for a file that is whole, but that FFmpeg decodes nothing of."""
    with path.open("rb") as file:
        head = file.read(21)
    if head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and head[20] & 2:
        raise VideoError(
            f"{path} is an animated WebP, which FFmpeg does not decode; expected a video: save it "
            "as a GIF or an mp4, with Pillow or an image viewer"
        )


def _part_size(head: bytes, kind: str) -> int:
    """Bytes of the top-level part that begins with ``head``; 0 where it is unknown or left open."""
    if kind.startswith("mov"):
        size = int.from_bytes(head[:4], "big")
        size = int.from_bytes(head[8:16], "big") if size == 1 else size
        return size if size >= 8 else 0
    if kind == "avi" and head.startswith(b"RIFF"):
        size = int.from_bytes(head[4:8], "little")
        return 8 + size if 0 < size < 0xFFFFFFFF else 0
    if kind.startswith("matroska") and head[:4] in (b"\x1aE\xdf\xa3", b"\x18S\x80g"):
        length = 9 - int.from_bytes(head[4:5], "big").bit_length()
        if length > 8:
            return 0
        size = int.from_bytes(head[4 : 4 + length], "big") - (1 << 7 * length)
        return 4 + length + size if size < (1 << 7 * length) - 1 else 0
    return 0
