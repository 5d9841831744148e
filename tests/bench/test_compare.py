"""``tokenfuse compare``: which strategies take part, their figures, resuming, and the pictures."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

from tokenfuse import FusionPlan, Strategy, VisualTokens, hookimpl
from tokenfuse.adapters.qwen3_vl import Qwen3VL
from tokenfuse.bench import compare as video
from tokenfuse.bench import micro, plot
from tokenfuse.bench.candidates import CONTROLS, candidates, comparable
from tokenfuse.bench.compare import divergence
from tokenfuse.bench.micro import Benchmark, TaskScore, benchmark, interval
from tokenfuse.cli import app
from tokenfuse.config import get_strategy
from tokenfuse.errors import ConfigError, UnknownNameError
from tokenfuse.inference import run as inference_run
from tokenfuse.inference.generate import answers
from tokenfuse.inference.inputs import video_inputs
from tokenfuse.inference.load import load
from tokenfuse.micro import CHECKPOINT, SAMPLE, SAMPLE_QUESTION
from tokenfuse.micro.tasks import held_out
from tokenfuse.registry import Registry
from tokenfuse.sessions.attach import attach
from tokenfuse.strategies._base import Budgeted

pytestmark = pytest.mark.usefixtures("one_thread")

cli = CliRunner()


class Steady(Strategy):
    """A strategy without a keep_ratio."""

    name: ClassVar[str] = "steady"

    def plan(self, tokens: VisualTokens) -> FusionPlan:
        return FusionPlan.identity(tokens.num_tokens)


class Faulty(Budgeted):
    """A strategy with a mistake in it."""

    name: ClassVar[str] = "faulty"

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        raise ZeroDivisionError("one part of nothing")


class Demanding(Budgeted):
    """A strategy that cannot be built without more options."""

    name: ClassVar[str] = "demanding"
    more: int

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        raise NotImplementedError


class Plugin:
    """A plugin with all of them."""

    @hookimpl
    def tokenfuse_register_strategies(self, register):
        for cls in (Steady, Faulty, Demanding):
            register(cls)


class Poor(Qwen3VL):
    """An adapter that supplies nothing beside features."""

    name: ClassVar[str] = "poor"
    supplies: ClassVar = frozenset()


@pytest.fixture(scope="module")
def found():
    return Registry([Plugin()], installed=False)


@pytest.fixture(scope="module")
def model():
    return load(CHECKPOINT)[0]


def run(*arguments):
    result = cli.invoke(app, ["compare", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


# Who takes part


def test_all_are_those_that_a_keep_ratio_alone_builds(found):
    names = list(comparable(found))
    assert {"ttf", "faulty", *CONTROLS} <= set(names)
    assert not {"steady", "demanding", "compose", "by_modality"} & set(names)
    assert names == sorted(names)


def test_every_strategy_comes_at_every_ratio_once(found, model):
    chosen = candidates(
        ["uniform", "ttf-gentle", "uniform"], [0.5, 0.25, 0.5], Qwen3VL(model), found
    )
    assert [(c.label, c.keep_ratio) for c in chosen] == [
        ("uniform", 0.5),
        ("uniform", 0.25),
        ("ttf-gentle", 0.5),
        ("ttf-gentle", 0.25),
    ]
    assert chosen[3].configuration.strategy == get_strategy("ttf-gentle", keep_ratio=0.25)


def test_all_may_stand_beside_names(found, model):
    labels = [c.label for c in candidates(["ttf-gentle", "all"], [0.5], Qwen3VL(model), found)]
    assert labels == ["ttf-gentle", *comparable(found)]
    assert labels[1:] == [c.label for c in candidates([], [0.5], Qwen3VL(model), found)]


def test_what_the_adapter_cannot_supply_is_a_candidate_with_a_reason(found, model):
    chosen = {c.label: c for c in candidates([], [0.5], Poor(model), found)}
    assert "needs saliency, which model family poor does not supply" in chosen["attention"].reason
    assert chosen["attention"].configuration is None
    assert chosen["uniform"].reason is None


@pytest.mark.parametrize(
    ("names", "ratios", "message"),
    [
        (["steady"], [0.5], "strategy steady has no option keep_ratio"),
        (["unifrom"], [0.5], 'did you mean "uniform"'),
        (["demanding"], [0.5], "more"),
        (["uniform"], [1.5], "--keep-ratio 1.5 is no share of tokens"),
        (["uniform"], [], "no ratio is given"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(found, model, names, ratios, message):
    with pytest.raises(ConfigError, match=message):
        candidates(names, ratios, Qwen3VL(model), found)
    if names == ["unifrom"]:
        with pytest.raises(UnknownNameError):
            candidates(names, ratios, Qwen3VL(model), found)


# One video


def test_the_uncompressed_row_comes_first_and_the_others_are_held_against_it():
    result = run(
        *("--strategies", "uniform,ttf", "--keep-ratio", "0.5,0.15"),
        *("--keep-ratio", "1", "--repeats", "2", "--json"),
    )
    found = json.loads(result.stdout)
    plain, *others = found["rows"]
    assert plain["strategy"] == "uncompressed"
    assert plain["keep_ratio"] is plain["kl"] is plain["same_answer"] is plain["plan_ms"] is None
    assert (plain["tokens"], plain["kept"], plain["speedup"]) == (288, 1.0, 1.0)
    wanted = [(name, ratio) for name in ("uniform", "ttf") for ratio in (0.5, 0.15, 1.0)]
    assert [(row["strategy"], row["keep_ratio"]) for row in others] == wanted
    for row in others:
        assert row["tokens"] == math.ceil(row["keep_ratio"] * 288)
        assert row["kept"] == row["tokens"] / 288
        assert row["options"]["keep_ratio"] == row["keep_ratio"]
        assert row["same_answer"] == (row["answer"] == plain["answer"])
        assert row["speedup"] == pytest.approx(plain["ttft_ms"] / row["ttft_ms"])
        assert 0 < row["plan_ms"] < row["ttft_ms"]
        assert 0 < row["peak_bytes"] <= plain["peak_bytes"]
        if row["keep_ratio"] == 1:
            assert row["kl"] == 0
            assert row["same_answer"]
        else:
            assert row["kl"] > 0


def test_a_strategy_that_fails_has_a_reason_and_leaves_the_others_alone(monkeypatch, found):
    monkeypatch.setattr(video, "default_registry", lambda: found)
    result = video.compare(
        SAMPLE, SAMPLE_QUESTION, ["faulty", "uniform"], [0.5], source=CHECKPOINT, repeats=1
    )
    plain, faulty, uniform = result.rows
    assert faulty.reason == "ZeroDivisionError: one part of nothing"
    assert faulty.answer is faulty.kl is faulty.ttft_ms is None
    assert uniform.answer == plain.answer == "yellow"


def test_the_divergence_is_from_the_uncompressed_distribution():
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.2, 0.5, 0.3]])
    by_hand = sum(a * math.log(a / b) for a, b in zip(p[0].tolist(), q[0].tolist(), strict=True))
    # Logits are probabilities' logarithms up to a constant.
    assert float(divergence(p.log() + 3, q.log() - 7)) == pytest.approx(by_hand, rel=1e-5)
    assert float(divergence(q.log(), p.log())) != pytest.approx(by_hand, rel=1e-2)
    assert float(divergence(p.log(), p.log())) == 0


def test_the_table_for_people_has_every_row():
    result = run("--strategies", "uniform", "--keep-ratio", "0.5,0.25", "--repeats", "1")
    for word in ("uncompressed", "uniform", "144 (50.0%)", "72 (25.0%)", "yellow", "yes", "KL"):
        assert word in result.stdout
    assert "timing the first token, 1 of 1" in result.stderr


# The micro model's tasks


def test_scores_are_those_of_questions_asked_one_by_one(model):
    processor = load(CHECKPOINT)[1]

    def ask_each(asked, strategy=None):
        given, left = [], 0
        for clip, question in asked:
            inputs = video_inputs(processor, clip.video, question.text)
            with attach(model, strategy) if strategy else nullcontext() as session:
                given += answers(model, processor, inputs, max_new_tokens=micro.LONGEST)
            left += session.report.tokens_after if session else 0
        return given, left

    result = benchmark(5, ["ttf", "uniform"], [0.25], tasks=("shape", "flash"))
    plain, *others = result.scores
    for task in ("shape", "flash"):
        asked = held_out(task, 5)
        expected = [question.answer for _, question in asked]
        uncompressed, _ = ask_each(asked)
        assert plain.tasks[task].right == sum(map(str.__eq__, uncompressed, expected))
        for score in others:
            given, left = ask_each(asked, get_strategy(score.strategy, keep_ratio=0.25))
            counts = score.tasks[task]
            assert counts.questions == 5
            assert counts.right == sum(map(str.__eq__, given, expected))
            assert counts.same == sum(map(str.__eq__, given, uncompressed))
            assert counts.tokens_after == left
            assert counts.kl > 0
    assert plain.agreement == 1
    assert plain.kl == 0


def test_answers_follow_prompts_that_a_tokenizer_pads_at_their_end(monkeypatch):
    # Two lengths in a batch, so that there is padding.
    monkeypatch.setattr(micro, "_batches", lambda asked: iter([list(asked)]))
    expected = benchmark(2, ["uniform"], [0.25], tasks=("color",))

    def padding_right(source):
        model, processor = load(source)
        processor.tokenizer.padding_side = "right"
        return model, processor

    monkeypatch.setattr(micro, "load", padding_right)
    found = benchmark(2, ["uniform"], [0.25], tasks=("color",))
    assert [score.kl for score in found.scores] == [score.kl for score in expected.scores]
    assert found.scores[0].tasks["color"].right == 2


def test_the_vision_tower_sees_a_clip_once_for_all_that_want_the_same(monkeypatch):
    needs = []
    encode = Qwen3VL.encode

    def counted(self, inputs, asked, *more):
        needs.append(frozenset(asked.items()))
        return encode(self, inputs, asked, *more)

    monkeypatch.setattr(Qwen3VL, "encode", counted)
    benchmark(1, ["ttf", "uniform", "attention"], [0.5, 0.25], tasks=("color",))
    assert len(needs) == len(set(needs)) == 2


def test_a_strategy_that_fails_on_a_task_has_a_reason(monkeypatch, found):
    monkeypatch.setattr(micro, "default_registry", lambda: found)
    _, faulty, uniform = benchmark(1, ["faulty", "uniform"], [0.5], tasks=("color",)).scores
    assert faulty.reason == "ZeroDivisionError: one part of nothing"
    assert faulty.accuracy is faulty.kept is None
    assert uniform.accuracy == 1


def asked_in(monkeypatch):
    """A list that hears which candidates are asked in each batch."""
    heard = []
    ask = micro._ask

    def listening(model, processor, group, chosen, found):
        heard.append([candidate.label for candidate in chosen])
        return ask(model, processor, group, chosen, found)

    monkeypatch.setattr(micro, "_ask", listening)
    return heard


def test_what_the_file_holds_is_not_asked_again(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    first = benchmark(1, ["uniform"], [0.5], tasks=("color",), keep=path)
    heard = asked_in(monkeypatch)
    again = benchmark(1, ["uniform"], [0.5], tasks=("color",), keep=path)
    assert heard == []
    assert again == first == Benchmark.model_validate_json(path.read_bytes())
    # A strategy more; then fewer, of which the file loses none.
    more = benchmark(1, ["random", "uniform"], [0.5], tasks=("color",), keep=path)
    assert heard == [["random"]]
    assert [score.strategy for score in more.scores] == ["uncompressed", "random", "uniform"]
    fewer = benchmark(1, ["uniform"], [0.5], tasks=("color",), keep=path)
    assert {score.strategy for score in fewer.scores} == {"uncompressed", "random", "uniform"}
    assert heard == [["random"]]


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"

    def stop(text):
        if text.startswith("flash"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmark(1, ["uniform"], [0.5], tasks=("color", "flash"), keep=path, say=stop)
    heard = asked_in(monkeypatch)
    result = benchmark(1, ["uniform"], [0.5], tasks=("color", "flash"), keep=path)
    assert heard == [["uncompressed", "uniform"]]
    assert [list(score.tasks) for score in result.scores] == [["color", "flash"]] * 2


def test_scores_of_options_that_have_changed_are_measured_anew(tmp_path, monkeypatch):
    path, mine = tmp_path / "scores.json", tmp_path / "mine.yaml"
    for seed in (1, 2):
        mine.write_text(f"strategy: random\nseed: {seed}\n")
        result = benchmark(1, [str(mine)], [0.5], tasks=("color",), keep=path)
        assert [score.options and score.options["seed"] for score in result.scores] == [None, seed]


def test_scores_of_other_settings_are_not_mixed(tmp_path):
    path = tmp_path / "scores.json"
    benchmark(1, ["uniform"], [0.5], tasks=("color",), keep=path)
    with pytest.raises(ConfigError, match="holds scores for questions 1; this run has 2"):
        benchmark(2, ["uniform"], [0.5], tasks=("color",), keep=path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="holds no scores of this command"):
        benchmark(1, ["uniform"], [0.5], tasks=("color",), keep=path)


def test_counts_add_up():
    one = TaskScore(questions=2, right=1, same=2, kl=0.5, tokens_before=8, tokens_after=4)
    assert one + one == TaskScore(
        questions=4, right=2, same=4, kl=1.0, tokens_before=16, tokens_after=8
    )


@pytest.mark.parametrize(
    ("right", "questions", "low", "high"),
    # Wilson's interval as other programs give it.
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_the_interval_is_wilsons(right, questions, low, high):
    assert interval(right, questions) == pytest.approx((low, high), abs=1e-4)


# Files


def test_out_writes_scores_a_page_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    name = tmp_path / "v1.0"
    result = run(
        *("--micro", "1", "--strategies", "uniform,frame_subsample", "--keep-ratio", "0.5,0.25"),
        *("--threads", "1", "--out", name),
    )
    assert "frame_subsample" in result.stdout
    assert "uniform   " in result.stdout
    scores = Benchmark.model_validate_json((tmp_path / "v1.0.json").read_bytes()).scores
    assert len(scores) == 5
    text = (tmp_path / "v1.0.md").read_text("utf-8")
    command = (
        "--micro 1 --strategies uniform,frame_subsample --keep-ratio 0.5,0.25 --threads 1 "
        f"--out {name}"
    )
    assert f"$ tokenfuse compare {command}\n" in text.replace(" \\\n      ", " ")
    assert "(v1.0.png)" in text
    assert "| `uniform` (control) |" in text
    assert "Wilson" in text
    assert (tmp_path / "v1.0.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))


def test_many_curves_are_drawn_with_a_label_each(tmp_path):
    pytest.importorskip("matplotlib")
    names = [f"strategy_{i}" for i in range(plot.TOGETHER - 3)] + list(CONTROLS)
    lines = {name: [(0.5, 90.0 - i % 3), (0.15, 60.0)] for i, name in enumerate(names)}
    path = tmp_path / "curves.svg"
    plot.draw(plot.Curves(lines, "title", "value", level=100.0), path)
    drawn = path.read_text("utf-8")
    assert all(f"<!-- {name} -->" in drawn for name in [*names, "uncompressed"])
    styles = plot._styles(names)
    looks = {(s["color"], s["marker"], s["linestyle"]) for s in styles.values()}
    assert len(looks) == len(names)
    assert {styles[name]["linestyle"] for name in CONTROLS} == {"--"}


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [0.0, 1e-3], [1e-6, 1.0]])
def test_divergences_are_drawn_with_and_without_zeros(tmp_path, values):
    pytest.importorskip("matplotlib")
    lines = {"ttf": [(0.5 - 0.1 * i, value) for i, value in enumerate(values)]}
    plot.draw(plot.Curves(lines, "title", "KL", log=True), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_labels_keep_their_order_and_distance_and_stay_in_the_picture():
    heights = [-0.2, 0.3, 0.3, 0.31, 0.9, 1.2]
    moved = plot._spread(heights, 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(moved))
    assert moved[0] >= 0
    assert moved[-1] <= 1 + 1e-9
    assert plot._spread([0.2, 0.5], 0.1) == pytest.approx([0.2, 0.5])


# What is refused


def no_model(*_):
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clip.mp4", "--micro", "5"], "VIDEO does not go with --micro"),
        (["--micro", "5", "--repeats", "2"], "--repeats does not go with --micro"),
        (["--out", "scores"], "--out goes with --micro"),
        (["--keep-ratio", "half"], "half"),
        (["--keep-ratio", "0"], "--keep-ratio 0 is no share of tokens"),
        (["--micro", "5", "--keep-ratio", "1.5"], "--keep-ratio 1.5 is no share of tokens"),
        (["--strategies", "unifrom"], 'did you mean "uniform"'),
        (["--micro", "5", "--strategies", "unifrom"], 'did you mean "uniform"'),
        (["--micro", "5", "--out", "."], "--out . is a folder"),
        (["--micro", "5", "--out", ".."], "--out .. is a folder"),
        (["--plot", "curves.docx"], "no suffix of a picture"),
        (["--plot", "no/such/folder/curves.png"], "make no/such/folder first"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(arguments, message, monkeypatch):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(inference_run, "load", no_model)
    monkeypatch.setattr(micro, "load", no_model)
    result = cli.invoke(app, ["compare", *arguments, "--json"])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("option", [[], ["--micro", "1"]])
def test_a_model_of_images_is_refused_by_name(monkeypatch, option):
    class ImageProcessor:
        tokenizer = load(CHECKPOINT)[1].tokenizer

    for place in (inference_run, micro):
        monkeypatch.setattr(place, "load", lambda _: (load(CHECKPOINT)[0], ImageProcessor()))
    result = cli.invoke(app, ["compare", "--strategies", "uniform", *option])
    assert result.exit_code == 2
    assert "ImageProcessor, which takes no video" in result.stderr


def test_a_folder_is_no_file_to_write(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(inference_run, "load", no_model)
    monkeypatch.setattr(micro, "load", no_model)
    for end in (".json", ".md", ".png"):
        (tmp_path / f"scores{end}").mkdir()
        name = str(tmp_path / "scores")
        result = cli.invoke(app, ["compare", "--micro", "1", "--out", name])
        assert result.exit_code == 2
        assert f"scores{end} is a folder" in result.stderr
        (tmp_path / f"scores{end}").rmdir()
    (tmp_path / "x.png").mkdir()
    result = cli.invoke(app, ["compare", "--plot", str(tmp_path / "x.png")])
    assert result.exit_code == 2
    assert "x.png is a folder" in result.stderr


def test_without_matplotlib_only_pictures_are_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    for option in (["--plot", tmp_path / "x.png"], ["--micro", "1", "--out", tmp_path / "x"]):
        result = cli.invoke(app, ["compare", *map(str, option)])
        assert result.exit_code == 2
        assert "pip install matplotlib" in result.stderr
    run("--strategies", "uniform", "--repeats", "1")


def test_more_lines_than_can_be_told_apart_have_a_panel_each(tmp_path):
    many = {f"s{i}": [(0.5, 90.0 - i), (0.25, 80.0 - i)] for i in range(11)} | {"none": []}
    few = dict(list(many.items())[: plot.TOGETHER])
    for name, lines in (("many", many), ("few", few)):
        plot.draw(plot.Curves(lines, "title", "value", level=99.0), tmp_path / f"{name}.svg")
    pictures = {name: (tmp_path / f"{name}.svg").read_text() for name in ("many", "few")}
    panels = {name: text.count('id="axes_') for name, text in pictures.items()}
    assert panels == {"many": 11, "few": 1}
