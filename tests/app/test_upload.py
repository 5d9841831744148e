"""Clips of strangers: decoded as ever, or refused within seconds with a reason."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from tokenfuse.app.upload import Limits, read_upload
from tokenfuse.errors import VideoError
from tokenfuse.inference.video import read_video
from tokenfuse.micro import SAMPLE

LIMITS = Limits()


def write(path, frames, shape, rate=10, codec="mpeg4"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = shape
        stream.pix_fmt = "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((*shape, 3), np.uint8), format="rgb24")
        for _ in range(frames):
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def test_a_clip_comes_as_it_does_in_this_process():
    here, there = read_video(SAMPLE, frames=LIMITS.frames), read_upload(SAMPLE, LIMITS)
    assert np.array_equal(here.frames, there.frames)
    for name in ("indices", "fps", "total_frames", "timestamps", "duration"):
        assert getattr(here, name) == getattr(there, name)


def test_frames_are_scaled_down_to_what_a_session_may_hold():
    video = read_upload(SAMPLE, replace(LIMITS, pixels=16 * 60 * 60))
    assert video.frames.shape[0] == 16
    assert video.frames.nbytes <= 3 * 16 * 60 * 60


def test_what_is_no_clip_is_refused(tmp_path):
    broken, cut, empty = (tmp_path / name for name in ("broken.mp4", "cut.mp4", "empty.mp4"))
    broken.write_bytes(b"\0" * 5000)
    cut.write_bytes(SAMPLE.read_bytes()[:3000])
    empty.write_bytes(b"")
    for path in (broken, cut, empty, tmp_path / "missing.mp4"):
        with pytest.raises(VideoError, match=path.name) as refused:
            read_upload(path, LIMITS)
        # Where it lies on the server is nobody's business.
        assert str(tmp_path) not in str(refused.value)


def test_what_is_beyond_the_limits_is_refused_by_its_header(tmp_path):
    long = write(tmp_path / "long.mp4", 50, (64, 64), rate=1)
    with pytest.raises(VideoError, match="lasts 50 s; expected no more than 20"):
        read_upload(long, replace(LIMITS, length=20))
    wide = write(tmp_path / "wide.mp4", 2, (64, 512))
    with pytest.raises(VideoError, match="512 x 64 pixels; expected no side longer than 256"):
        read_upload(wide, replace(LIMITS, side=256))
    with pytest.raises(VideoError, match="MB; expected no more than 0"):
        read_upload(wide, replace(LIMITS, file_mb=0))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_file_without_end_is_given_up(tmp_path):
    pipe = tmp_path / "endless.mp4"
    os.mkfifo(pipe)
    link = tmp_path / "link.mp4"
    link.symlink_to("/dev/zero")
    started = time.monotonic()
    for path in (pipe, link):
        with pytest.raises(VideoError):
            read_upload(path, replace(LIMITS, wait=3))
    assert time.monotonic() - started < 20


def test_decoding_that_takes_too_long_is_given_up(tmp_path):
    clip = write(tmp_path / "slow.mp4", 3000, (360, 640))
    started = time.monotonic()
    with pytest.raises(VideoError, match=r"slow.mp4 was not decoded within 0.4 s"):
        read_upload(clip, replace(LIMITS, wait=0.4))
    assert time.monotonic() - started < 5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory")
def test_decoding_that_takes_too_much_memory_is_given_up(tmp_path):
    clip = write(tmp_path / "large.mp4", 20, (2160, 3840))
    with pytest.raises(VideoError, match=r"memory|stopped the decoder"):
        read_upload(clip, replace(LIMITS, memory_mb=500, pixels=2**28))


def test_the_process_that_decodes_needs_no_torch():
    code = "import tokenfuse.app.decode, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    read_upload(SAMPLE, LIMITS)
    with pytest.raises(VideoError):
        read_upload(Path("missing.mp4"), LIMITS)
    assert list(tmp_path.iterdir()) == []
