"""Thresholds on one's own clips: counts are those of the plans, and a wanted share is met."""

import json

import pytest
import yaml
from typer.testing import CliRunner

import tokenfuse
from tokenfuse.bench.calibrate import Calibration, as_yaml, calibrate, cells, curves
from tokenfuse.cli import app
from tokenfuse.config import get_configuration
from tokenfuse.errors import ConfigError, VideoError
from tokenfuse.inference.inputs import video_inputs
from tokenfuse.inference.load import load
from tokenfuse.inference.video import read_video
from tokenfuse.micro import CHECKPOINT, SAMPLE
from tokenfuse.micro.sample import write_clip
from tokenfuse.micro.tasks import make_clip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "other.mp4"
    write_clip(make_clip(7, patches=6, scene="motion", split="test"), path)
    return path


@pytest.fixture(scope="module")
def found(other):
    configuration = get_configuration("ttf", window=5)
    ratios = (0.3, 0.5)
    return calibrate([SAMPLE, other], configuration, source=CHECKPOINT, ratios=ratios)


def test_counts_are_those_of_the_report(found, other):
    model, processor = load(CHECKPOINT)
    row = found.rows[4]
    assert row.threshold == 0.7
    for number, path in enumerate((SAMPLE, other)):
        inputs = video_inputs(processor, read_video(path), "What?")
        report = tokenfuse.compress(model, inputs, "ttf", window=5, threshold=0.7).report
        assert row.kept_by_clip[number] == report.keep_ratio
        assert found.tokens[number] == report.tokens_before
    weighted = sum(a * b for a, b in zip(row.kept_by_clip, found.tokens, strict=True))
    assert row.kept == pytest.approx(weighted / sum(found.tokens))
    kept = [row.kept for row in found.rows]
    assert kept == sorted(kept)
    assert found.rows[0].empty_frames > found.rows[-1].empty_frames


def test_a_wanted_share_is_met_and_pasted(found):
    for wanted in found.wanted:
        assert wanted.found.kept == pytest.approx(wanted.keep_ratio, abs=0.01)
        pasted = yaml.safe_load(as_yaml(found, wanted))
        assert pasted == {"strategy": "ttf", "window": 5, "threshold": wanted.found.threshold}
        assert tokenfuse.get_strategy(pasted).threshold == wanted.found.threshold
    assert Calibration.model_validate_json(found.model_dump_json()) == found
    assert len(cells(found.rows[0])) == 5
    assert list(curves(found).lines) == ["all clips", SAMPLE.name, "other.mp4"]


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("uniform", {}, "has no threshold that says"),
        ("ttf", {"keep_ratio": 0.5}, "keeps that share whatever the threshold"),
        ("earlytom", {}, "has no threshold that says"),
    ],
)
def test_what_no_threshold_decides_is_refused(strategy, options, message):
    with pytest.raises(ConfigError, match=message):
        calibrate([SAMPLE], get_configuration(strategy, **options), source="nowhere")


def test_other_mistakes_are_refused(tmp_path):
    ttf = get_configuration("ttf")
    with pytest.raises(ConfigError, match="no clip or no threshold"):
        calibrate([], ttf, source="nowhere")
    with pytest.raises(ConfigError, match="threshold"):
        calibrate([SAMPLE], ttf, source="nowhere", thresholds=[-3])
    with pytest.raises(VideoError, match=r"none\.mp4"):
        calibrate([tmp_path / "none.mp4"], ttf, source=CHECKPOINT)


def test_the_command(tmp_path):
    cli, plot = CliRunner(), tmp_path / "plot.png"
    words = ["calibrate", str(SAMPLE), "--thresholds", "0.6,0.9", "--plot", str(plot)]
    done = cli.invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "strategy: ttf\nthreshold: 0." in done.stdout
    assert plot.is_file()
    done = cli.invoke(app, [*words, "--json"])
    assert [row["threshold"] for row in json.loads(done.stdout)["rows"]] == [0.6, 0.9]
    done = cli.invoke(app, ["calibrate", str(SAMPLE), "--thresholds", "much"])
    assert done.exit_code == 2
    assert "no number" in done.output
