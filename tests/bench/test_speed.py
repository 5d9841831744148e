"""The bench of speed, on models so small that only its arithmetic and its refusals are tested."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from families import FAMILIES
from tokenfuse.bench.speed import sizes
from tokenfuse.bench.speed.page import cells, draw, page, sentence
from tokenfuse.bench.speed.run import Speed, speed
from tokenfuse.bench.tables import AT_SIZE
from tokenfuse.cli import app
from tokenfuse.errors import ConfigError, TooLargeError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = sizes.Size(64, 6, 4, 2, 96, 32, 4, 2, 48, (1, 2, 3), head_dim=16)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(sizes.SIZES, "tests/tiny", TINY)


def measured(names=("ttf", "fastv"), **options):
    values = {"like": "tiny", "frames": 4, "side": (4, 4), "repeats": 2, "layers": 3}
    return speed(names, (0.5,), **values | options)


def test_rows_hold_what_reports_say():
    steps = []
    result = measured(say=steps.append)
    plain, ttf, fastv = result.rows
    assert (plain.strategy, plain.keep_ratio, plain.ideal) == ("uncompressed", None, 1.0)
    assert plain.tokens == 64
    assert ttf.tokens == 32
    assert fastv.tokens == pytest.approx(32, abs=1)
    for row in (ttf, fastv):
        assert row.ideal > 1.2
        assert row.kv_bytes < plain.kv_bytes
        assert row.ttft_range[0] <= row.ttft_ms <= row.ttft_range[1]
        assert row.of_ideal == row.llm_speedup / row.ideal
        assert min(row.compress_ms, row.prefill_ms, row.decode_ms, row.peak_bytes) > 0
    assert plain.ttft_speedup == plain.llm_speedup == 1
    assert (result.layers, result.vision_blocks, result.hidden) == (3, 4, 64)
    assert any("s left" in step for step in steps)
    assert Speed.model_validate_json(result.model_dump_json()) == result


def test_a_batch_and_half_precision():
    result = measured(("uniform",), batch=2, dtype="bfloat16", vision_layers=2)
    assert result.rows[1].tokens == 32
    assert result.vision_blocks == 2
    assert result.batch == 2


def test_the_page_and_the_picture(tmp_path):
    result = measured(("ttf", "vitcop"))
    text = page(result, "tokenfuse bench speed")
    assert cells(result.rows[0])[0] == "uncompressed"
    assert sentence(result).startswith("`")
    assert sentence(result) in text
    draw(result, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_what_cannot_run_says_why():
    result = measured(("pyramiddrop",), layers=2)
    assert len(result.rows) == 2
    # Two layers, the first of which has read everything: less than half is not to be had.
    low = speed(["fastv"], (0.3,), like="tiny", frames=2, side=(2, 2), repeats=1, layers=2)
    assert "expected a share above that" in low.rows[1].reason
    assert "expected a share above that" in page(low, "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"like": "Qwen/Qwen9"}, "of no known size; expected one of Qwen/Qwen3-VL-2B"),
        ({"device": "tpu"}, "--device tpu is not here; expected cpu"),
        ({"device": "meta"}, "--device meta is not here"),
        ({"dtype": "int8"}, "none of float32, bfloat16, float16"),
        ({"frames": 0}, "--frames is 0"),
        ({"side": (0, 4)}, "--grid is 0"),
        ({"repeats": 0}, "--repeats is 0"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_made(options, message):
    with pytest.raises(ConfigError, match=message):
        measured(**options)


def test_what_does_not_fit_in_memory_is_refused_beforehand(monkeypatch):
    monkeypatch.setattr(sizes, "free_bytes", lambda: 10_000)
    with pytest.raises(TooLargeError, match=r"10 kB are free on cpu; expected fewer --layers"):
        measured()
    config = sizes.config_of(sizes.size_of("Qwen/Qwen3-VL-8B-Instruct"), None, None)
    needed = sizes.needed_bytes(config, 4096, 1, torch.bfloat16)
    # 8.2 billion weights but for the embeddings of words, two bytes each.
    assert 15e9 < needed < 30e9


def test_other_families_are_refused():
    with pytest.raises(UnsupportedModelError, match="makes prompts for Qwen3-VL"):
        sizes.video_prompt(FAMILIES["llava"].build("sdpa"), (2, 2, 2), 1, torch.float32)


def test_published_sizes_have_the_weights_of_their_names():
    for name, billions in (("2B", 2.0), ("4B", 4.0), ("8B", 8.2), ("32B", 33)):
        size = sizes.size_of(f"Qwen3-VL-{name}-Instruct")
        q, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
        layer = 2 * size.hidden * (q + kv) + 3 * size.hidden * size.feed_forward
        words = 151_936 * size.hidden * (1 if name in ("2B", "4B") else 2)
        assert (size.layers * layer + words) / 1e9 == pytest.approx(billions, rel=0.2)


def test_the_command(tmp_path):
    out = tmp_path / "speed"
    words = ["bench", "speed", "--like", "tests/tiny", "--frames", "2", "--grid", "4x4"]
    words += ["--repeats", "1", "--strategies", "ttf,uniform", "--keep-ratio", "0.6"]
    done = CliRunner().invoke(app, [*words, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    held = json.loads(out.with_suffix(".json").read_text("utf-8"))
    assert [row["strategy"] for row in held["rows"]] == ["uncompressed", "ttf", "uniform"]
    assert "# Speed" in out.with_suffix(".md").read_text("utf-8")
    assert out.with_suffix(".png").is_file()
    done = CliRunner().invoke(app, [*words, "--grid", "16"])
    assert done.exit_code == 2
    assert "rows x columns" in done.output
    done = CliRunner().invoke(app, ["bench", "speed", "--model", "somewhere", "--layers", "2"])
    assert done.exit_code == 2
    assert "--layers is for random weights" in done.output


def test_what_the_console_says_of_real_sizes_is_what_was_measured():
    results = Path(__file__).parents[2] / "docs/results/speed.json"
    rows = Speed.model_validate_json(results.read_text("utf-8")).rows
    ttf = next(row for row in rows if row.strategy == "ttf")
    assert round(ttf.llm_speedup, 1) == AT_SIZE
    assert ttf.of_ideal > 0.95
