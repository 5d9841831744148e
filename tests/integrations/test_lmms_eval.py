"""The model for lmms-eval: arguments and figures without it, and runs of it where it is there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

import tokenfuse
from tokenfuse.config import get_configuration
from tokenfuse.errors import ConfigError, UnknownNameError
from tokenfuse.inference.inputs import video_inputs
from tokenfuse.inference.load import load
from tokenfuse.inference.video import read_video
from tokenfuse.integrations import lmms_eval
from tokenfuse.integrations.lmms_eval import Measured, compressing, split_args
from tokenfuse.micro import CHECKPOINT, SAMPLE, SAMPLE_QUESTION
from tokenfuse.micro.sample import write_clip
from tokenfuse.micro.tasks import make_clip

ROOT = Path(__file__).parents[2]
OWN = ("pretrained", "device", "max_num_frames")
absent = importlib.util.find_spec("lmms_eval") is None
needs_lmms_eval = pytest.mark.skipif(absent, reason="lmms-eval is not installed")


# Arguments


def test_arguments_go_to_the_model_or_to_the_strategy():
    given = {"pretrained": "a/b", "strategy": "ttf", "threshold": 0.8, "max_num_frames": 8}
    kept, configuration = split_args(given, OWN)
    assert kept == {"pretrained": "a/b", "max_num_frames": 8}
    assert configuration == get_configuration("ttf", threshold=0.8)


@pytest.mark.parametrize("given", [{}, {"strategy": "none"}])
def test_without_a_strategy_there_is_none(given):
    assert split_args({"device": "cpu", **given}, OWN) == ({"device": "cpu"}, None)


def test_a_strategy_may_be_a_preset_or_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("strategy: ttf\nwindow: 5\n")
    assert split_args({"strategy": "ttf-third"}, OWN)[1] == get_configuration("ttf-third")
    expected = get_configuration("ttf", window=5, threshold=0.9)
    assert split_args({"strategy": str(path), "threshold": 0.9}, OWN)[1] == expected


def test_what_nobody_takes_names_both_lists():
    message = r"unknown key max_frames of ttf.*threshold.*of the model: .*max_num_frames"
    with pytest.raises(ConfigError, match=message):
        split_args({"strategy": "ttf", "max_frames": 8}, OWN)


def test_an_option_without_a_strategy_is_refused():
    with pytest.raises(ConfigError, match=r"threshold .*no strategy.*valid: device.*strategy"):
        split_args({"threshold": 0.8}, OWN)


def test_a_wrong_value_is_said_as_everywhere():
    with pytest.raises(ConfigError, match="window: 'wide' is wrong") as caught:
        split_args({"strategy": "ttf", "window": "wide"}, OWN)
    assert "of the model" not in str(caught.value)


def test_a_wrong_name_is_told_the_nearest():
    with pytest.raises(UnknownNameError, match='did you mean "ttf"'):
        split_args({"strategy": "tft"}, OWN)


def test_no_option_of_a_strategy_has_the_name_of_one_of_the_models():
    taken = {"batch_size", "device", "device_map", "fps", "max_pixels", "pretrained", "use_cache"}
    for name, registered in tokenfuse.list_strategies().items():
        assert not taken & set(registered.cls.model_fields), name


# The entry point


def test_lmms_eval_finds_the_manifest_by_its_own_group():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (value,) = project["entry-points"]["lmms_eval.models"].values()
    assert EntryPoint("", value, "lmms_eval.models").load() is lmms_eval.manifest


@pytest.mark.parametrize("ask", [lmms_eval.manifest, lambda: lmms_eval.Qwen3VLChat])
def test_without_lmms_eval_it_says_what_to_install(ask, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lmms_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(ConfigError, match=r'pip install "\.\[eval\]"'):
        ask()


def test_importing_it_does_not_import_lmms_eval():
    code = "import sys, tokenfuse.integrations.lmms_eval; print('lmms_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# The model


class Base:
    """What the plug-in needs of lmms-eval's class, answering questions about the sample."""

    world_size = 1

    def __init__(self, pretrained="", device="cuda", device_map="auto", **kwargs):
        assert not kwargs
        self.device_map = device_map
        self.model, self.processor = load(pretrained)

    def generate_until(self, requests):
        inputs = video_inputs(self.processor, read_video(SAMPLE), SAMPLE_QUESTION)
        return [self.model.generate(**inputs, max_new_tokens=4) for _ in requests]


@pytest.fixture
def evaluator(monkeypatch):
    """Stands for lmms-eval's own, which asks three times."""

    def evaluate(lm):
        return {"answers": lm.generate_until(["", "", ""])}

    module = SimpleNamespace(evaluate=evaluate)
    log = SimpleNamespace(logger=SimpleNamespace(info=print))
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", module)
    monkeypatch.setitem(sys.modules, "loguru", log)
    return module


def test_results_hold_the_configuration_and_the_figures(evaluator):
    model = compressing(Base)(pretrained=CHECKPOINT, device="cpu", strategy="ttf", threshold=0.8)
    found = evaluator.evaluate(lm=model)["tokenfuse"]
    assert model.device_map == "cpu"
    assert found["strategy"] == get_configuration("ttf", threshold=0.8).describe()
    assert (found["prompts"], found["processes"], found["left_whole"]) == (3, 1, {})
    assert 0 < found["tokens_after"] < found["tokens_before"] == 3 * 288
    assert found["reduction"] == 1 - found["tokens_after"] / found["tokens_before"]
    assert found["mean_plan_ms"] > 0
    assert "generate" not in vars(model.model)


def test_an_uncompressed_run_says_so(evaluator):
    model = compressing(Base)(pretrained=CHECKPOINT)
    found = evaluator.evaluate(lm=model)["tokenfuse"]
    assert set(found) == {"strategy", "versions"}
    assert found["strategy"] is None


def test_results_of_other_models_stay_as_they_are(evaluator):
    compressing(Base)(pretrained=CHECKPOINT)
    assert set(evaluator.evaluate(lm=Base(CHECKPOINT))) == {"answers"}


def test_what_stays_whole_is_counted_by_its_reason():
    measured = Measured()
    item = SimpleNamespace(reason="one frame")
    report = SimpleNamespace(
        prompt_before=[9, 9],
        tokens_before=8,
        tokens_after=8,
        plan_ms=1.0,
        reason=None,
        items=[item],
    )
    measured.tokenfuse_compressed(report)
    measured.tokenfuse_compressed(report)
    assert measured.summary() == {
        "prompts": 4,
        "tokens_before": 16,
        "tokens_after": 16,
        "reduction": 0.0,
        "mean_plan_ms": 0.5,
        "left_whole": {"one frame": 2},
    }


# lmms-eval itself, offline, on a task of its own format

TASK = """\
task: micro_clips
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.visual
doc_to_text: !function functions.text
doc_to_target: answer
process_results: !function functions.score
generation_kwargs: {{max_new_tokens: 6, temperature: 0}}
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """\
def visual(doc):
    return [doc["video"]]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a task of 18 questions about six clips."""
    folder = tmp_path_factory.mktemp("task")
    asked = []
    for seed in range(6):
        clip = make_clip(seed, patches=8, scene="motion", split="test")
        video = folder / f"{seed}.mp4"
        write_clip(clip, video, scale=1)
        asked += [
            {"video": str(video), "question": question.text, "answer": question.answer}
            for question in clip.questions
            if question.task in ("color", "direction", "flash")
        ]
    data = folder / "test.json"
    data.write_text(json.dumps(asked))
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "task.yaml").write_text(TASK.format(data=data))
    return folder


def run(task, home, arguments, *options):
    """What lmms-eval writes about the micro model."""
    model = f"pretrained={CHECKPOINT},device=cpu,min_pixels=2304,max_pixels=9216,max_num_frames=16"
    command = [sys.executable, "-m", "lmms_eval", "--model", lmms_eval.NAME]
    command += ["--model_args", model + arguments, "--tasks", "micro_clips"]
    command += ["--include_path", str(task), "--output_path", str(home / "out"), *options]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home / "hf")}
    env = os.environ | offline | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
    written = list((home / "out").rglob("*_results.json"))
    assert len(written) == 1, f"{done.stdout}\n{done.stderr}"
    return json.loads(written[0].read_text("utf-8"))


@needs_lmms_eval
def test_lmms_eval_scores_the_uncompressed_model(task, tmp_path):
    found = run(task, tmp_path, "")
    assert found["results"]["micro_clips"]["right,none"] >= 17 / 18
    assert found["tokenfuse"]["strategy"] is None


@needs_lmms_eval
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (",strategy=ttf,threshold=0.95", ()),
        (",strategy=ttf,threshold=0.95", ("--force_simple", "--batch_size", "4")),
        (",strategy=ttf-causal,attention=proportional", ()),
    ],
)
def test_lmms_eval_writes_what_compression_did(task, tmp_path, arguments, options):
    results = run(task, tmp_path, arguments, *options)
    assert results["results"]["micro_clips"]["right,none"] >= 14 / 18
    found, expected = results["tokenfuse"], get_configuration("ttf", threshold=0.95)
    if "causal" in arguments:
        expected = get_configuration("ttf-causal", attention="proportional")
    assert found["strategy"] == expected.describe()
    assert found["prompts"] == 18
    assert found["tokens_before"] == 18 * 288
    assert 0.5 < found["reduction"] < 1
