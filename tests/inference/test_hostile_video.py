"""Files that were made, or broken, to hang, to fill the memory or to show other files.

What may harm the process that reads it is read in another one, with little memory and little time.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import textwrap

import av
import numpy as np
import pytest
from PIL import Image

from tokenfuse.errors import VideoError
from tokenfuse.inference import video as video_module
from tokenfuse.inference.inputs import video_inputs
from tokenfuse.inference.video import FORMATS, MAX_PIXELS, Video, read_video
from tokenfuse.micro.build import build_processor

GIGABYTE = 2**30

READ = """
    import json, os, resource, sys, threading
    from tokenfuse.errors import VideoError
    from tokenfuse.inference.video import read_video

    # On top of what the libraries have mapped.
    mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    found = {}

    def read():
        for path in sys.argv[1:]:
            try:
                clip = read_video(path)
                found[path] = ["frames", list(clip.frames.shape), clip.total_frames]
            except VideoError as error:
                found[path] = ["refused", str(error)]

    # A reader in a server's thread has a small stack.
    threading.stack_size(2**20)
    reader = threading.Thread(target=read)
    before = len(os.listdir("/proc/self/fd"))
    reader.start()
    reader.join()
    found["left open"] = len(os.listdir("/proc/self/fd")) - before
    print(json.dumps(found))
"""


def read_apart(*paths, seconds=60, memory=4 * GIGABYTE):
    """What ``read_video`` says of each path, in a process of its own."""
    program = textwrap.dedent(READ).replace("MEMORY", str(memory))
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    found = json.loads(done.stdout)
    assert found.pop("left open") == 0
    return [found[str(path)] for path in paths]


def write(path, count=8, *, codec="libx264", size=(64, 48), level=0, step=10, gop=4):
    """Grey frames, each brighter than the one before."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"g": str(gop)})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(count):
            image = np.full((size[1], size[0], 3), level + step * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode(None))
    return path


def gif(width, height, frames=1):
    """A valid GIF of any canvas, a few bytes a frame."""
    head = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    image = b"\x2c" + struct.pack("<HHHH", 0, 0, width, height) + b"\0\2\2\x44\1\0"
    return head + image * frames + b"\x3b"


# --- containers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip.webm", "clip.mkv"])
def test_a_part_of_a_size_that_leads_backwards_ends_the_walk(tmp_path, name):
    path = write(tmp_path / name, codec="libvpx" if name.endswith("webm") else "libx264")
    content = path.read_bytes()
    evil = b"\x18\x53\x80\x67\0" + (2**63 - len(content) - 13).to_bytes(8, "big")
    path.write_bytes(content + evil)
    kind = "matroska,webm"
    assert video_module._part_size(evil + bytes(3), kind) == 0
    assert read_apart(path)[0][0] in ("frames", "refused")


def test_a_file_of_endless_small_parts_is_walked_for_a_bounded_time(tmp_path, monkeypatch):
    path = tmp_path / "many.mp4"
    path.write_bytes(b"\0\0\0\x08free" * 50)
    assert video_module._missing_bytes(path, "mov,mp4") == 0
    monkeypatch.setattr(video_module, "MOST_PARTS", 10)
    path.write_bytes(b"\0\0\0\x08free" * 50 + b"\0\0\xff\xffmdat")
    assert video_module._missing_bytes(path, "mov,mp4") == 0


@pytest.mark.parametrize("error", [IndexError("tuple index"), ValueError("x"), RuntimeError("y")])
def test_whatever_the_decoder_raises_is_damage(tmp_path, monkeypatch, error):
    path = write(tmp_path / "clip.mp4")

    def broken(*_):
        raise error
        yield

    monkeypatch.setattr(video_module, "_frames", broken)
    with pytest.raises(VideoError, match="damaged: 0 frames decoded, then"):
        read_video(path)


def test_memory_that_runs_out_is_said(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4")
    monkeypatch.setattr(video_module, "_rgb", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(VideoError, match="more memory than there is for 8 frames"):
        read_video(path)


# --- memory -------------------------------------------------------------------------------------


def test_canvases_of_any_size_ask_for_little_memory(tmp_path):
    paths = []
    for name, content in {
        "tiny.gif": gif(65535, 65535),
        "long.gif": gif(16000, 16000, 800),
        "wide.gif": gif(9000, 9000, 3),
    }.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(content)
    for found in read_apart(*paths, memory=2 * GIGABYTE):
        assert found[0] == "refused"
        assert "8192 x 8192" in found[1]


def test_frames_are_scaled_down_while_they_are_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4", size=(640, 480))
    whole = read_video(path)
    monkeypatch.setattr(video_module, "MAX_PIXELS", 8 * 320 * 240)
    small = read_video(path)
    assert whole.frames.shape == (8, 480, 640, 3)
    assert small.frames.shape == (8, 240, 320, 3)
    assert (small.indices, small.timestamps) == (whole.indices, whole.timestamps)
    assert abs(small.frames.mean((1, 2, 3)) - whole.frames.mean((1, 2, 3))).max() <= 3
    assert MAX_PIXELS > 768 * 588 * 588


def test_by_default_a_sensible_number_of_frames_is_taken(tmp_path):
    path = write(tmp_path / "long.mp4", count=200, step=1, gop=50)
    clip = read_video(path)
    assert (len(clip.frames), clip.total_frames) == (64, 200)
    assert len(read_video(path, fps=10).frames) == 200
    assert len(read_video(path, frames=120).frames) == 120


# --- files that read other files ----------------------------------------------------------------


REFERENCES = {
    "itself": "ffconcat version 1.0\nfile x.mp4\n",
    "concat": "ffconcat version 1.0\nfile ../secret.mp4\n",
    "playlist": "#EXTM3U\n#EXTINF:1,\n../secret.mp4\n#EXT-X-ENDLIST\n",
    "session": "v=0\nm=video 1234 RTP/AVP 96\n",
    "manifest": '<?xml version="1.0"?><MPD></MPD>',
}


def test_no_file_shows_another_one(tmp_path):
    write(tmp_path / "secret.mp4")
    paths = []
    for kind, text in REFERENCES.items():
        (tmp_path / kind).mkdir()
        for suffix in ("mp4", "ffconcat", "m3u8", "sdp", "mpd"):
            paths.append(tmp_path / kind / f"x.{suffix}")
            paths[-1].write_text(text)
    assert {found[0] for found in read_apart(*paths)} == {"refused"}


def test_a_pattern_in_a_name_does_not_read_other_files(tmp_path):
    for number in range(3):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"a{number}.png")
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(tmp_path / "a%d.png")
    with pytest.raises(VideoError, match="cannot be opened"):
        read_video(tmp_path / "a%d.png")


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mov", "libx264"),
        ("a.webm", "libvpx"),
        ("a.mkv", "libx264"),
        ("a.avi", "mpeg4"),
        ("a.ts", "libx264"),
        ("a.mpg", "mpeg2video"),
        ("a.flv", "flv"),
        ("a.ogv", "libtheora"),
    ],
)
def test_every_container_that_holds_its_own_frames_is_read(tmp_path, name, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec} encoder")
    path = write(tmp_path / name, codec=codec)
    assert len(read_video(path).frames) >= 7
    with av.open(str(path)) as container:
        assert set(container.format.name.split(",")) & set(FORMATS)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_an_image_is_a_video_of_one_frame(tmp_path, suffix):
    path = tmp_path / f"still.{suffix}"
    Image.fromarray(np.full((12, 16, 3), 120, np.uint8)).save(path)
    clip = read_video(path)
    assert clip.frames.shape == (1, 12, 16, 3)
    assert abs(clip.frames.mean() - 120) < 3


# --- what opens but is not what it seems --------------------------------------------------------


def test_of_several_streams_the_best_is_read(tmp_path):
    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=10) for _ in range(2)]
        for stream, (width, height) in zip(streams, [(32, 32), (128, 96)], strict=True):
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(9):
            for stream in streams if number == 0 else streams[1:]:
                image = np.full((stream.height, stream.width, 3), 20 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    assert read_video(path).frames.shape == (9, 96, 128, 3)


def test_recordings_joined_byte_by_byte_follow_each_other(tmp_path):
    one, two = (write(tmp_path / f"{n}.ts", count=20, level=n, step=5) for n in (0, 40))
    path = tmp_path / "both.ts"
    path.write_bytes(one.read_bytes() + two.read_bytes())
    clip = read_video(path)
    assert clip.total_frames == 40
    assert clip.duration == pytest.approx(4.0, abs=0.2)
    light = clip.frames.mean((1, 2, 3))
    assert (np.diff(light[:20]) > 0).all()
    assert (np.diff(light[20:]) > 0).all()
    assert np.diff(clip.timestamps).max() < 0.3


@pytest.mark.parametrize(
    ("ticks", "expected"),
    [
        ([], []),
        ([-9000, -8990, -8980], [-9000, -8990, -8980]),  # long before 0, and no jump
        ([0, 30, 10, 20, 40], [0, 30, 10, 20, 40]),  # the order of decoding
        ([0, 10, 500, 0, 10], [0, 10, 500, 510, 520]),
        ([0, 500, 0, 500, 0], [0, 500, 510, 1010, 1020]),
    ],
)
def test_a_clock_that_jumps_back_goes_on(ticks, expected):
    assert video_module._in_one_go(ticks, 10) == expected


def test_an_animated_webp_is_told_from_a_damaged_file(tmp_path):
    frames = [Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)) for i in range(4)]
    path = tmp_path / "moving.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(VideoError, match=r"animated WebP.*save it as a GIF or an mp4"):
        read_video(path)


def test_of_a_folder_it_says_how_to_make_a_video(tmp_path):
    with pytest.raises(VideoError, match=r"is a folder; .*ffmpeg -framerate 25 .*\*\.png"):
        read_video(tmp_path)


def test_frames_that_the_processor_refuses_are_a_typed_error():
    video = Video.from_frames(np.zeros((2, 4, 1000, 3), np.uint8), 2.0)
    with pytest.raises(VideoError, match="refuses a video of 1000x4 pixels"):
        video_inputs(build_processor(), video, "What?")


# --- fuzz ---------------------------------------------------------------------------------------


def mutate(content, rng):
    """Bytes changed, cut out, doubled or appended, most of them near the head."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        at = int(len(data) * rng.random() ** 3)
        kind = rng.integers(5)
        if kind == 0:
            data[at : at + 1] = rng.bytes(1)
        elif kind == 1:
            data[at : at + 8] = b"\xff" * 8
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 64))]
        elif kind == 3:
            data[at:at] = data[at : at + int(rng.integers(1, 256))]
        else:
            data += rng.bytes(16)
    return bytes(data)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.full) for i in range(1, 40))]
)
def test_mutated_files_give_frames_or_a_typed_error(tmp_path, seed):
    """Within a minute and little memory, with nothing left open: a watchdog and limits hold it."""
    rng = np.random.default_rng(seed)
    whole = [
        write(tmp_path / name, codec=codec).read_bytes()
        for name, codec in (("a.mp4", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4"))
    ]
    whole += [write(tmp_path / "a.ts").read_bytes(), gif(32, 32, 5)]
    paths = []
    for number in range(40):
        paths.append(tmp_path / f"m{number}.bin")
        paths[-1].write_bytes(mutate(whole[number % len(whole)], rng))
    for found in read_apart(*paths, seconds=120, memory=3 * GIGABYTE):
        assert found[0] in ("frames", "refused")
