"""The main job, end to end: a real video file, the real processor, the micro Qwen3-VL."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
from typer.testing import CliRunner

import tokenfuse
from tokenfuse.bench.compare import compare
from tokenfuse.cli import app
from tokenfuse.errors import ConfigError
from tokenfuse.inference import run as inference_run
from tokenfuse.inference.inputs import frames_as_images
from tokenfuse.inference.run import run as run_once
from tokenfuse.micro import CHECKPOINT, SAMPLE
from tokenfuse.micro.sample import write_clip
from tokenfuse.micro.tasks import make_clip

cli = CliRunner()


def run(*arguments):
    result = cli.invoke(app, ["run", *map(str, arguments), "--repeats", "1", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def check_figures(result):
    report = result["report"]
    item = report["items"][0]
    t, h, w = item["grid"]
    assert item["tokens_before"] == t * h * w
    assert sum(item["frame_tokens_after"]) == item["tokens_after"]
    removed = item["tokens_before"] - item["tokens_after"]
    assert report["prompt_before"][0] - report["prompt_after"][0] == removed
    assert report["reduction"] == pytest.approx(removed / item["tokens_before"])
    spent = report["encode_ms"] + report["plan_ms"] + report["realign_ms"]
    assert 0 < spent < result["compressed"]["ttft_ms"]


def test_the_shipped_clip_gets_the_same_answer_from_fewer_tokens():
    result = run()
    assert result["video"] == str(SAMPLE)
    assert result["same_answer"]
    assert result["report"]["reduction"] > 0.5
    check_figures(result)


@pytest.mark.parametrize(
    ("task", "option"), [("color", "threshold=0.7"), ("flash", "keep_ratio=0.33")]
)
def test_a_clip_of_the_callers_own(tmp_path, task, option):
    clip = make_clip(11, patches=8, scene="motion", split="test")
    question = next(q for q in clip.questions if q.task == task)
    path = tmp_path / "clip.mp4"
    write_clip(clip, path)
    result = run(path, "--question", question.text, "--set", option)
    assert result["uncompressed"]["text"] == question.answer
    assert result["compressed"]["text"] == question.answer
    assert result["frames"] == 16
    assert result["report"]["reduction"] > 0.3
    check_figures(result)


def test_options_reach_the_strategy():
    result = run("--set", "threshold=1.0", "--no-compare")
    assert result["report"]["reduction"] == 0
    assert result["report"]["reason"] == "the strategy kept every token"
    assert result["uncompressed"] is None
    third = run("--strategy", "ttf-third", "--set", "window=5", "--no-compare")
    assert third["report"]["strategy"]["window"] == 5
    assert third["report"]["keep_ratio"] == pytest.approx(0.33, abs=0.01)


def test_frames_and_fps_sample_the_file():
    assert run("--frames", "8", "--no-compare")["report"]["items"][0]["grid"][0] == 4
    assert run("--fps", "4", "--no-compare")["frames"] == 8


def test_a_single_pixel_video(tmp_path):
    path = tmp_path / "dot.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=4)
        stream.width, stream.height, stream.pix_fmt = 1, 1, "yuv444p"
        for level in (0, 80, 160, 240):
            frame = av.VideoFrame.from_ndarray(np.full((1, 1, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    result = run(path, "--question", "How many objects are there?")
    assert result["frames"] == 4
    check_figures(result)


def test_a_video_that_a_model_is_shown_as_images_is_one_of_frames():
    assert not frames_as_images({"pixel_values_videos": None, "pixel_values": None})
    assert frames_as_images({"pixel_values": None})


def test_a_still_image_has_nothing_to_compare(tmp_path):
    from PIL import Image

    path = tmp_path / "still.png"
    Image.fromarray(make_clip(0, patches=1, scene="motion").frames[0]).save(path)
    result = run(path)
    assert result["frames"] == 1
    assert "one frame only" in result["report"]["reason"]


def test_the_report_for_people_names_every_figure():
    result = cli.invoke(app, ["run", "--repeats", "1"])
    assert result.exit_code == 0, result.output
    for word in (
        "answer",
        "visual tokens",
        "prompt tokens",
        "KV cache",
        "time to first token",
        "matching",
        "same",
        "36/36",
    ):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.mp4"], "missing.mp4"),
        (["--strategy", "tff"], 'did you mean "ttf"'),
        (["--set", "treshold=0.5"], 'did you mean "threshold"'),
        (["--set", "threshold"], "key=value"),
        (["--set", "window=4"], "odd"),
        (["--frames", "0"], "frames"),
        (["--frames", "4", "--fps", "2"], "fps"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_input_ends_with_a_message_and_status_2(arguments, message):
    result = cli.invoke(app, ["run", *arguments, "--json"])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["strategies", "adapters"])
def test_what_is_registered_is_listed(command):
    rows = json.loads(cli.invoke(app, [command, "--json"]).stdout)
    assert {"strategies": "ttf", "adapters": "qwen3_vl"}[command] in {row["name"] for row in rows}
    table = cli.invoke(app, [command]).stdout
    assert all(row["name"] in table and row["about"][:15] in table for row in rows)


def test_the_schema_is_printed():
    schema = json.loads(cli.invoke(app, ["schema"]).stdout)
    assert schema["discriminator"] == {"propertyName": "strategy"}


def test_a_model_of_images_is_refused_before_it_answers(monkeypatch):
    class ImageProcessor:
        """It has no video_processor."""

    monkeypatch.setattr(inference_run, "load", lambda _: (None, ImageProcessor()))
    result = cli.invoke(app, ["run"])
    assert result.exit_code == 2
    assert "ImageProcessor, which takes no video" in result.stderr


@pytest.mark.parametrize("repeats", [0, -1])
def test_no_timing_has_no_median(repeats):
    uniform = tokenfuse.get_strategy("uniform")
    with pytest.raises(ConfigError, match=f"repeats is {repeats}; expected"):
        run_once(SAMPLE, "What?", uniform, source=CHECKPOINT, repeats=repeats)
    with pytest.raises(ConfigError, match=f"repeats is {repeats}; expected"):
        compare(SAMPLE, "What?", ["uniform"], source=CHECKPOINT, repeats=repeats)
