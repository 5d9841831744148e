"""Real files, encoded here: the brightness of a frame tells its number."""

import os
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from tokenfuse.errors import TokenFuseError, VideoError
from tokenfuse.inference import video as video_module
from tokenfuse.inference.video import Video, _choose, read_video

CLIPS = [
    ("clip.mp4", "libx264"),
    ("clip.mov", "libx264"),
    ("clip.webm", "libvpx"),
    ("clip.webm", "libvpx-vp9"),
    ("clip.mkv", "libx264"),
    ("clip.avi", "mpeg4"),
    ("clip.avi", "mjpeg"),
    ("clip.avi", "libx264"),
    ("clip.ts", "libx264"),
    ("clip.h264", "libx264"),
]
STEP = 12  # grey levels between two frames
VARIABLE = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 50, 90, 95, 100]  # ticks of 1/100 second


def write_clip(
    path,
    codec="libx264",
    *,
    count=20,
    size=(64, 48),
    rate=10,
    pix_fmt=None,
    ticks=None,
    muxer=None,
    title=None,
    images=None,
    **options,
):
    """``count`` grey frames, each ``STEP`` brighter; ``ticks`` are their times in 1/100 second."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec} encoder")
    if images is None:
        images = [np.full((size[1], size[0], 3), STEP * i, np.uint8) for i in range(count)]
    with av.open(str(path), "w", options=muxer or {}) as container:
        if title:
            container.metadata["title"] = title
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = images[0].shape[1], images[0].shape[0]
        stream.pix_fmt = pix_fmt or ("yuvj420p" if codec == "mjpeg" else "yuv420p")
        stream.bit_rate = 4_000_000
        stream.codec_context.thread_count = 1
        if ticks is not None:
            stream.codec_context.time_base = Fraction(1, 100)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts = number if ticks is None else ticks[number]
            frame.time_base = Fraction(1, rate) if ticks is None else Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(clip: Video) -> list[int]:
    """The frame numbers that the brightness of the sampled frames tells."""
    levels = clip.frames.reshape(len(clip.frames), -1).mean(1) / STEP
    assert np.abs(levels - levels.round()).max() < 0.5
    return [int(level) for level in levels.round()]


def patch(path: Path, atom: bytes, offset: int, data: bytes) -> Path:
    """Overwrite bytes of an mp4 atom, counted from the end of its name."""
    content = bytearray(path.read_bytes())
    start = content.index(atom) + len(atom) + offset
    content[start : start + len(data)] = data
    path.write_bytes(content)
    return path


def cut(path: Path, part: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    return path


def be32(*values: int) -> bytes:
    return b"".join(value.to_bytes(4, "big", signed=True) for value in values)


@pytest.fixture(scope="session")
def mp4(tmp_path_factory) -> Path:
    """20 frames at 10 per second, H.264 with B-frames; not to be changed."""
    return write_clip(tmp_path_factory.mktemp("video") / "clip.mp4", bf="3", g="8")


@pytest.fixture
def variable(tmp_path) -> Path:
    """14 frames: ten in the first tenth of a second, four in the rest of it."""
    return write_clip(tmp_path / "variable.mp4", count=14, ticks=VARIABLE, bf="2")


def test_mp4_can_be_tested():
    assert "libx264" in av.codecs_available


@pytest.mark.parametrize(("name", "codec"), CLIPS)
def test_every_frame_in_order(tmp_path, name, codec):
    clip = read_video(str(write_clip(tmp_path / name, codec)))
    assert clip.frames.shape == (20, 48, 64, 3)
    assert clip.frames.dtype == np.uint8
    assert numbers(clip) == clip.indices == clip.processor_indices() == list(range(20))
    assert clip.total_frames == 20
    assert clip.fps == pytest.approx(10)
    assert clip.timestamps == pytest.approx([i / 10 for i in range(20)])
    assert clip.duration == pytest.approx(2)


@pytest.mark.parametrize(("name", "codec"), CLIPS)
def test_evenly_sampled_frames(tmp_path, name, codec):
    clip = read_video(write_clip(tmp_path / name, codec), frames=4)
    assert numbers(clip) == clip.indices == [0, 6, 13, 19]
    assert clip.timestamps == pytest.approx([0, 0.6, 1.3, 1.9])


def test_reordered_frames_come_in_display_order(mp4):
    with av.open(str(mp4)) as container:
        stored = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert stored != sorted(stored)
    assert numbers(read_video(mp4)) == list(range(20))


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
def test_variable_frame_rate_is_sampled_in_time(tmp_path, suffix):
    codec = "libvpx" if suffix == ".webm" else "libx264"
    path = write_clip(tmp_path / f"variable{suffix}", codec, count=14, ticks=VARIABLE)
    clip = read_video(path, frames=3)
    assert numbers(clip) == clip.indices == [0, 10, 13]  # by position it would be 0, 6 or 7, 13
    assert clip.timestamps == pytest.approx([0, 0.5, 1])
    assert clip.fps == pytest.approx(13)
    assert numbers(read_video(path, fps=2)) == [0, 10, 13]


def test_processor_indices_tell_the_time_at_a_variable_frame_rate(variable):
    clip = read_video(variable)
    told = [index / clip.fps for index in clip.processor_indices()]
    assert told == pytest.approx(clip.timestamps, abs=0.5 / clip.fps + 1e-9)
    assert clip.processor_indices() == sorted(clip.processor_indices())
    assert clip.processor_indices() != clip.indices


def test_processor_indices_never_decrease():
    clip = Video(np.zeros((3, 1, 1, 3), np.uint8), [0, 1, 2], 10.0, 3, [0.0, 0.5, 0.4], 1.0)
    assert clip.processor_indices() == [0, 5, 5]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"frames": 1}, [0]),
        ({"frames": 2}, [0, 19]),
        ({"frames": 20}, list(range(20))),
        ({"frames": 1000}, list(range(20))),
        ({"frames": 4, "max_frames": 2}, [0, 6, 13, 19]),
        ({"fps": 1}, [0, 10]),
        ({"fps": 2.5}, [0, 4, 8, 12, 16]),
        ({"fps": 10}, list(range(20))),
        ({"fps": 1000}, list(range(20))),
        ({"fps": 0.01}, [0]),
        ({"fps": 5, "max_frames": 4}, [0, 6, 12, 18]),
        ({"max_frames": 4}, [0, 6, 13, 19]),
        ({"max_frames": 1}, [0]),
        ({}, list(range(20))),
    ],
)
def test_requests(mp4, request_, expected):
    clip = read_video(mp4, **request_)
    assert numbers(clip) == clip.indices == expected
    assert clip.total_frames == 20


# Matrices as the mp4 header stores them, and what a viewer does with the picture.
MATRICES = {
    "upright": ((1, 0, 0, 1), lambda image: image),
    "clockwise": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "upside down": ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    "counterclockwise": ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_rotation_is_applied(tmp_path, name):
    (a, b, c, d), turn = MATRICES[name]
    image = np.zeros((48, 64, 3), np.uint8)
    image[:24, :32] = 240  # top left
    image[:24, 32:] = 120  # top right
    path = write_clip(tmp_path / "turned.mp4", images=[image] * 3)
    one = 1 << 16
    matrix = be32(a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    clip = read_video(patch(path, b"tkhd", 40, matrix))
    expected = turn(image)
    assert clip.frames.shape == (3, *expected.shape)
    assert np.abs(clip.frames.astype(int) - expected).mean() < 4


def test_rotation_agrees_with_the_angle_ffmpeg_reports(tmp_path):
    image = np.zeros((48, 64, 3), np.uint8)
    image[:24, :32] = 240
    path = write_clip(tmp_path / "phone.mp4", images=[image])
    patch(path, b"tkhd", 40, be32(0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30))
    with av.open(str(path)) as container:
        quarter_turns = next(container.decode(video=0)).rotation // 90  # counterclockwise
    expected = np.rot90(image, quarter_turns)
    assert np.abs(read_video(path).frames[0].astype(int) - expected).mean() < 4


def test_frames_that_change_size_are_scaled_to_the_first(tmp_path):
    parts = [
        write_clip(tmp_path / f"{width}.avi", "mjpeg", count=3, size=(width, height))
        for width, height in [(64, 48), (32, 32)]
    ]
    path = tmp_path / "mixed.avi"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number, part in enumerate(parts):
            with av.open(str(part)) as container:
                for packet in container.demux(video=0):
                    if packet.size:
                        packet.pts = packet.dts = packet.pts + 3 * number
                        packet.stream = stream
                        out.mux(packet)
    clip = read_video(path)
    assert clip.frames.shape == (6, 48, 64, 3)
    assert numbers(clip) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("codec", ["rawvideo", "ffv1"])
def test_one_pixel(tmp_path, codec):
    pix_fmt = "bgr24" if codec == "rawvideo" else "bgr0"
    clip = read_video(write_clip(tmp_path / "dot.avi", codec, size=(1, 1), pix_fmt=pix_fmt))
    assert clip.frames.shape == (20, 1, 1, 3)
    assert numbers(clip) == list(range(20))


def test_odd_size_and_colours(tmp_path):
    image = np.zeros((47, 63, 3), np.uint8)
    image[:, :20], image[:, 20:40], image[:, 40:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    path = write_clip(tmp_path / "odd.avi", "ffv1", images=[image], pix_fmt="bgr0")
    np.testing.assert_array_equal(read_video(path).frames, image[None])


def test_an_image_is_one_frame(tmp_path):
    path = write_clip(tmp_path / "still.png", "png", count=1, pix_fmt="rgb24")
    clip = read_video(path, fps=3)
    assert clip.frames.shape == (1, 48, 64, 3)
    assert (clip.indices, clip.timestamps, clip.total_frames) == ([0], [0.0], 1)
    assert clip.fps > 0
    assert clip.duration == pytest.approx(1 / clip.fps)


def test_an_image_with_camera_data(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "maker"
    Image.new("RGB", (64, 48), (3 * STEP,) * 3).save(tmp_path / "photo.jpg", exif=exif)
    assert numbers(read_video(tmp_path / "photo.jpg")) == [3]


def test_a_title_that_is_not_utf8(tmp_path):
    path = write_clip(tmp_path / "title.avi", "mjpeg", title="TITLE")
    content = path.read_bytes()
    assert content.count(b"TITLE") == 1
    path.write_bytes(content.replace(b"TITLE", b"\xe9t\xe9\xff!"))
    assert numbers(read_video(path)) == list(range(20))


def test_one_frame_of_film(tmp_path):
    clip = read_video(write_clip(tmp_path / "one.mp4", count=1), frames=8)
    assert clip.indices == clip.processor_indices() == [0]
    assert clip.fps == pytest.approx(10)


@pytest.mark.skipif(sys.platform == "win32", reason="such names are not allowed there")
def test_names_that_look_like_urls_or_patterns(tmp_path, mp4, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("http: %03d é.mp4", "pipe:0", "-"):
        Path(name).write_bytes(mp4.read_bytes())
        assert read_video(name, frames=1).total_frames == 20


def test_frames_edited_out_do_not_count(tmp_path):
    path = write_clip(tmp_path / "edited.mp4", bf="0")
    # The edit list starts the film at its sixth frame, at 10240 ticks a second.
    clip = read_video(patch(path, b"elst", 12, be32(5 * 1024)))
    assert numbers(clip) == list(range(5, 20))
    assert clip.indices == list(range(15))
    assert clip.timestamps[0] == 0


def test_a_last_frame_without_duration_stays_as_long_as_the_others(mp4, monkeypatch):
    decode = video_module._decode
    monkeypatch.setattr(video_module, "_decode", lambda *args: (*decode(*args)[:3], 0.0))
    assert read_video(mp4).duration == pytest.approx(2)


@pytest.mark.parametrize("mistaken", [[], [0.0], [i / 7 for i in range(50)]])
def test_decoded_frames_overrule_the_packets(mp4, monkeypatch, mistaken):
    monkeypatch.setattr(video_module, "_packet_times", lambda path: mistaken)
    clip = read_video(mp4, frames=4)
    assert numbers(clip) == clip.indices == [0, 6, 13, 19]


def test_only_chosen_frames_become_rgb(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "long.mp4", images=[np.zeros((16, 16, 3), np.uint8)] * 300)
    converted = []
    rgb = video_module._rgb
    monkeypatch.setattr(
        video_module, "_rgb", lambda *args: converted.append(args[0].pts) or rgb(*args)
    )
    clip = read_video(path, frames=5)
    assert clip.total_frames == 300
    assert len(converted) == len(clip.frames) == 5


def check(error: pytest.ExceptionInfo, *words: str) -> None:
    """A message names what was given, what was expected and the mend."""
    text = str(error.value)
    assert isinstance(error.value, TokenFuseError)
    assert isinstance(error.value, ValueError)
    assert "expected" in text
    assert ": " in text.split("expected", 1)[1]
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("request_", "given"),
    [
        ({"frames": 4, "fps": 2}, "frames=4 and fps=2"),
        ({"frames": 0}, "frames=0"),
        ({"frames": -3}, "frames=-3"),
        ({"max_frames": 0}, "max_frames=0"),
        ({"fps": 0}, "fps=0"),
        ({"fps": -1.5}, "fps=-1.5"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"fps": float("inf")}, "fps=inf"),
    ],
)
def test_bad_requests(mp4, request_, given):
    with pytest.raises(VideoError) as error:
        read_video(mp4, **request_)
    check(error, given)


def test_missing_file(tmp_path):
    with pytest.raises(VideoError) as error:
        read_video(tmp_path / "absent.mp4")
    check(error, "absent.mp4", "does not exist")


def test_url():
    with pytest.raises(VideoError) as error:
        read_video("https://example.org/clip.mp4")
    check(error, "example.org", "download")


def test_folder(tmp_path):
    with pytest.raises(VideoError) as error:
        read_video(tmp_path)
    check(error, tmp_path.name, "folder")


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.mp4", b"", ["0 bytes"]),
        ("text.mp4", b"no film at all\n" * 99, ["cannot be opened"]),
        ("notes.txt", b"no film at all\n" * 99, ["cannot be opened"]),
        ("garbage.mp4", np.random.default_rng(0).bytes(5000), ["cannot be opened"]),
        ("zeros.webm", bytes(5000), ["cannot be opened"]),
        ("list.m3u8", PLAYLIST + b"#EXT-X-ENDLIST\n", ["cannot be opened"]),
        ("live.m3u8", PLAYLIST, ["cannot be opened"]),
    ],
)
def test_files_that_are_no_video(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(VideoError) as error:
        read_video(path)
    check(error, name, *words)


def write_sound(path, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec} encoder")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=44100)
        stream.layout = "mono"
        layout = {"pcm_s16le": "s16", "libmp3lame": "s16p"}[codec]
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4608), np.int16), layout, "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_sound_only(tmp_path):
    with pytest.raises(VideoError) as error:
        read_video(write_sound(tmp_path / "sound.wav", "pcm_s16le"))
    check(error, "sound.wav", "no video stream")


def test_the_cover_of_a_song_is_no_video(tmp_path):
    song = write_sound(tmp_path / "song.mp3", "libmp3lame")
    cover = write_clip(tmp_path / "cover.png", "png", count=1, pix_fmt="rgb24").read_bytes()
    picture = b"\0image/png\0\3\0" + cover
    tag = b"APIC" + be32(len(picture)) + b"\0\0" + picture
    size = bytes(len(tag) >> shift & 127 for shift in (21, 14, 7, 0))
    song.write_bytes(b"ID3\3\0\0" + size + tag + song.read_bytes())
    with av.open(str(song)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(VideoError) as error:
        read_video(song)
    check(error, "no video stream")


def test_codec_without_decoder(tmp_path):
    path = write_clip(tmp_path / "strange.avi", "mjpeg")
    path.write_bytes(path.read_bytes().replace(b"MJPG", b"ZQZQ"))
    with pytest.raises(VideoError) as error:
        read_video(path)
    check(error, "strange.avi", "decoder")


@pytest.mark.parametrize(
    ("name", "codec", "muxer"),
    [
        ("cut.mp4", "libx264", {"movflags": "faststart"}),
        ("cut.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("cut.mov", "libx264", {"movflags": "faststart"}),
        ("cut.webm", "libvpx", {}),
        ("cut.webm", "libvpx-vp9", {}),
        ("cut.mkv", "libx264", {}),
        ("cut.avi", "mpeg4", {}),
        ("cut.avi", "mjpeg", {}),
    ],
)
def test_cut_off_file_tells_how_much_decodes(tmp_path, name, codec, muxer):
    noise = np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), np.uint8)
    path = write_clip(tmp_path / name, codec, images=list(noise), muxer=muxer, g="5")
    with pytest.raises(VideoError, match=r"damaged: \d+ frames decoded") as error:
        read_video(cut(path, 0.7), frames=2)
    check(error, name, "ffmpeg")
    decoded = int(str(error.value).split("damaged: ")[1].split()[0])
    assert 10 <= decoded < 30


def test_mp4_cut_off_before_its_index(tmp_path):
    path = cut(write_clip(tmp_path / "cut.mp4"), 0.5)
    with pytest.raises(VideoError) as error:
        read_video(path)
    check(error, "cut.mp4", "copy it again")


def test_damage_inside(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), np.uint8)
    path = write_clip(tmp_path / "scratched.mp4", images=list(noise))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"damaged: \d+ frames decoded") as error:
        read_video(path)
    check(error)


def test_frames_inside_the_decoder_come_out_before_an_error():
    def broken():
        raise av.InvalidDataError(0, "broken")

    packets = [SimpleNamespace(decode=lambda: [0, 1]), SimpleNamespace(decode=broken)]
    container = SimpleNamespace(demux=lambda stream: packets)
    stream = SimpleNamespace(codec_context=SimpleNamespace(), decode=lambda packet: [2, 3])
    seen = []
    with pytest.raises(av.InvalidDataError, match="broken"):
        seen.extend(video_module._frames(container, stream))
    assert seen == [0, 1, 2, 3]


def test_a_frame_that_the_decoder_had_to_guess_is_damage(mp4, monkeypatch):
    guessed = SimpleNamespace(is_corrupt=True)
    monkeypatch.setattr(video_module, "_frames", lambda container, stream: [guessed])
    with pytest.raises(VideoError, match="0 frames decoded, then a frame is only partly") as error:
        read_video(mp4)
    check(error)


def test_no_frame_decodes(tmp_path):
    path = write_clip(tmp_path / "still.png", "png", count=1, pix_fmt="rgb24")
    with pytest.raises(VideoError, match="no frame that can be decoded") as error:
        read_video(cut(path, 0.6))
    check(error, "still.png", "copy it again")


def test_avi_without_its_index_is_whole(tmp_path):
    path = write_clip(tmp_path / "clip.avi", "mjpeg")
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"idx1")])
    assert numbers(read_video(path)) == list(range(20))


def test_live_webm_declares_no_size_and_is_whole(tmp_path):
    path = write_clip(tmp_path / "live.webm", "libvpx", muxer={"live": "1"})
    assert b"\x18S\x80g\1" + b"\xff" * 7 in path.read_bytes()
    assert numbers(read_video(path)) == list(range(20))


@pytest.mark.parametrize(
    ("kind", "head", "size"),
    [
        ("mov,mp4", be32(24) + b"ftyp", 24),
        ("mov,mp4", be32(1) + b"mdat" + be32(2, 5), (2 << 32) + 5),
        ("mov,mp4", be32(0) + b"mdat", 0),  # as far as the file goes
        ("mov,mp4", be32(3) + b"junk", 0),
        ("avi", b"RIFF" + (1000).to_bytes(4, "little"), 1008),
        ("avi", b"RIFF" + b"\xff" * 4, 0),
        ("avi", b"RIFF" + bytes(4), 0),
        ("avi", b"junk" + b"\1" * 4, 0),
        ("matroska,webm", b"\x1aE\xdf\xa3\x9f", 4 + 1 + 31),
        ("matroska,webm", b"\x18S\x80g\x40\xc8", 4 + 2 + 200),
        ("matroska,webm", b"\x18S\x80g\xff", 0),
        ("matroska,webm", b"\x18S\x80g\1" + b"\xff" * 7, 0),
        ("matroska,webm", b"\x18S\x80g\1" + bytes(6) + b"\7", 4 + 8 + 7),
        ("matroska,webm", b"junk\x9f", 0),
        ("mpegts", b"G" * 16, 0),
    ],
)
def test_declared_sizes(kind, head, size):
    assert video_module._part_size(head, kind) == size


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed on Linux")
def test_files_are_closed_on_every_way_out(tmp_path, mp4, monkeypatch):
    opened = []  # keeps the containers alive, so that only close() can close them
    av_open = av.open

    def remember(*args, **kwargs):
        opened.append(av_open(*args, **kwargs))
        return opened[-1]

    sound = write_sound(tmp_path / "sound.wav", "pcm_s16le")
    broken = cut(write_clip(tmp_path / "cut.webm", "libvpx"), 0.7)
    monkeypatch.setattr(av, "open", remember)
    read_video(mp4, frames=2)
    for path in (sound, broken):
        with pytest.raises(VideoError):
            read_video(path)
    assert len(opened) == 5
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.islink(link)]
    assert not {str(mp4), str(sound), str(broken)} & set(targets)


gaps = st.one_of(st.just(0.0), st.just(1 / 30), st.floats(1e-3, 10))
timelines = st.lists(gaps, max_size=60).map(lambda steps: list(np.cumsum([0.0, *steps])))
rates = st.floats(1e-3, 1e4)


@given(timelines, st.none() | st.integers(1, 80), st.integers(1, 80))
def test_choose_by_count(times, frames, max_frames):
    chosen = _choose(times, frames, None, max_frames)
    assert chosen[0] == 0
    assert all(type(index) is int for index in chosen)
    assert chosen == sorted(set(chosen))
    assert chosen[-1] < len(times)
    assert len(chosen) == min(len(times), frames or max_frames)


@given(st.integers(1, 100), st.integers(2, 100), st.floats(1, 240))
def test_choose_by_count_is_even_at_a_constant_rate(total, frames, rate):
    assume(frames <= total)
    chosen = _choose([i / rate for i in range(total)], frames, None, 1)
    ideal = np.linspace(0, total - 1, frames)
    assert np.abs(np.array(chosen) - ideal).max() < 0.5 + 1e-6
    assert chosen[-1] == total - 1


@given(st.integers(1, 100), st.floats(1, 240))
def test_choose_by_the_rate_of_the_file_takes_every_frame(total, rate):
    times = [i / rate for i in range(total)]
    assert _choose(times, None, rate, total) == list(range(total))


@given(timelines, rates, st.integers(1, 80))
def test_choose_by_rate(times, rate, max_frames):
    chosen = _choose(times, None, rate, max_frames)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert chosen[-1] < len(times)
    every = _choose(times, None, rate, len(times))
    assert len(chosen) == min(len(every), max_frames)
    assert set(chosen) <= set(every)


@given(timelines, st.floats(0.1, 100))
def test_choose_by_rate_takes_the_frame_nearest_each_tick(times, rate):
    chosen = np.array(times)[_choose(times, None, rate, len(times))]
    ticks = np.arange(int(times[-1] * rate + 1e-6) + 1) / rate
    nearest = np.abs(np.array(times) - ticks[:, None]).min(1)
    assert np.abs(chosen - ticks[:, None]).min(1) == pytest.approx(nearest, abs=1e-6)
    assert len(chosen) <= len(ticks)


@pytest.mark.parametrize("request_", [(4, None), (None, 2.0), (None, None)])
def test_choose_from_nothing(request_):
    assert _choose([], *request_, 8) == []


def test_a_url_is_named_as_it_was_given():
    with pytest.raises(VideoError, match=r"^https://a\.b/c\.mp4 is a URL; expected a local video"):
        read_video("https://a.b/c.mp4")
