"""Pictures of what is kept: what they are made of, and what they show, down to the pixel."""

import html
import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from families import FAMILIES
from tokenfuse import FusionPlan, VisualTokens, get_strategy, list_strategies
from tokenfuse.cli import app
from tokenfuse.errors import ConfigError, PromptError, TokensError
from tokenfuse.inference.inputs import video_inputs
from tokenfuse.inference.load import load
from tokenfuse.inference.shown import shown_frames
from tokenfuse.inference.trace import trace
from tokenfuse.inference.video import Video, read_video
from tokenfuse.micro import CHECKPOINT, SAMPLE
from tokenfuse.pictures import TokenMap

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parent / "golden"
GRID = (3, 2, 2)
# Frame 0 is an anchor that takes in all of frame 1 but its last token, and the first of frame 2.
ROOTS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 7, 0, 9, -1, 9])
PLAN = FusionPlan.from_roots(torch.tensor([0, 1, 2, 3, 7, 9]), ROOTS)


def frames(count=3, side=8):
    """Each frame of one colour, so that a pixel tells where it is from."""
    return np.stack([np.full((side, side, 3), 40 + 30 * t, np.uint8) for t in range(count)])


def test_a_map_of_a_plan():
    tokens = TokenMap.from_plan(frames(), PLAN)
    assert tokens.counts == [[4, 1, 1]]
    assert tokens.taken_in == [4, 0, 0]
    assert tokens.target.tolist() == ROOTS.tolist()
    assert repr(tokens) == "TokenMap(plan: 12 -> 6 tokens)"


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_pixels_of_what_went_are_dimmed_and_no_others(data, t, h, w):
    """The middle of each token: its own colour where it is left, lighter where it went."""
    n = t * h * w
    chosen = data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True))
    plan = FusionPlan.from_survivors(torch.tensor(sorted(chosen)), n)
    tokens = TokenMap.from_plan(frames(t, 24), plan, (t, h, w))
    for frame, picture in enumerate(tokens.animation()):
        pixels = np.asarray(picture)[18:]
        high, wide = pixels.shape[:2]
        for i in range(h):
            for j in range(w):
                middle = pixels[(2 * i + 1) * high // (2 * h), (2 * j + 1) * wide // (2 * w)]
                kept = (frame * h + i) * w + j in chosen
                own = 40 + 30 * frame
                assert (middle == own).all() if kept else (middle > own + 5).all()


def test_frames_that_do_not_fit_are_refused():
    for wrong, message in (
        (np.zeros((3, 8, 8)), r"shape \(3, 8, 8\); expected"),
        (np.full((3, 8, 8, 3), 7.0), "expected uint8, or floats from 0 to 1"),
        (np.full((3, 8, 8, 3), np.nan), "expected uint8, or floats"),
    ):
        with pytest.raises(TokensError, match=message):
            TokenMap.from_plan(wrong, PLAN)
    with pytest.raises(TokensError, match="no square grid"):
        TokenMap.from_plan(frames(4), PLAN)
    with pytest.raises(TokensError, match="2 frames and a plan for 12"):
        TokenMap.from_plan(frames(2), PLAN, GRID)
    same = TokenMap.from_plan(torch.from_numpy(frames()), PLAN).frames
    assert (same == frames()).all()
    assert (TokenMap.from_plan(frames() / 255, PLAN).frames == frames()).all()


@pytest.mark.parametrize("count", [1, 16, 17, 125])
def test_at_most_sixteen_frames_are_shown(count):
    plan = FusionPlan.identity(count * 4)
    tokens = TokenMap.from_plan(frames(1).repeat(count, 0), plan, (count, 2, 2))
    chosen = tokens.chosen()
    assert len(chosen) == min(count, 16)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    assert len(set(np.diff(chosen))) <= 2
    said = f"… {count - 16} more frame" in tokens.page()
    assert said == (count > 16)
    assert tokens.page(None).count("<figure>") == count
    with pytest.raises(ConfigError, match="0 frames shows nothing"):
        tokens.chosen(0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 400), (400, 2), (3, 90)])
def test_frames_of_any_shape_can_be_drawn(shape):
    plan = FusionPlan.identity(2 * 40 * 40)
    tokens = TokenMap.from_plan(np.zeros((2, *shape, 3), np.uint8), plan, (2, 40, 40))
    assert len(tokens.animation()) == 2
    assert tokens.sheet().width > 120


def test_a_page_says_where_each_token_went():
    tokens = TokenMap.from_plan(frames(), PLAN, title="a <plan>")
    page = tokens.page()
    said = [html.unescape(text) for text in re.findall(r'data-said="([^"]*)"', page)]
    assert len(said) == 12
    assert said[0] == "frame 0, row 0, column 0 stands for itself and 2 more"
    assert said[5] == "frame 1, row 0, column 1 went into frame 0, row 0, column 1"
    assert said[7] == "frame 1, row 1, column 1 stands for itself"
    assert said[10] == "frame 2, row 1, column 0 was dropped"
    assert "a &lt;plan&gt;" in page
    assert "<plan>" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count(' class="gone"') == 6
    shown = tokens._repr_html_()
    assert shown.startswith('<div class="tf"')
    assert shown.count("<rect") == 12


def test_files_of_every_kind(tmp_path):
    tokens = TokenMap.from_plan(frames(), PLAN)
    for ending in (".png", ".gif", ".mp4", ".html"):
        path = tokens.save(tmp_path / f"kept{ending}")
        assert path.stat().st_size > 500
    assert Image.open(tmp_path / "kept.gif").n_frames == 3
    with av.open(str(tmp_path / "kept.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 4  # the last is shown for its time
    with pytest.raises(ConfigError, match=r"kept\.jpg has no ending of a picture; expected one of"):
        tokens.save(tmp_path / "kept.jpg")
    assert tokens.save(tmp_path / "KEPT.PNG").is_file()
    with pytest.raises(ConfigError, match="is no folder; expected one that is there"):
        tokens.save(tmp_path / "nowhere/kept.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        tokens.save(tmp_path / "folder.png")


def test_a_plan_draws_itself():
    picture = PLAN.show(frames())
    assert isinstance(picture, Image.Image)
    assert "6 of 12 tokens kept, 50.0%" in PLAN._repr_html_()
    many = FusionPlan.identity(100_000)
    assert many._repr_html_().count("<rect") <= 2048
    tokens = VisualTokens.from_grid(torch.randn(12, 4), GRID)
    assert "3 × 2 × 2" in tokens._repr_html_()


INSIDE = {
    "framefusion": {"last_layer": 2},
    "pyramiddrop": {"layers": [1, 2], "keep_ratio": [0.5, 0.3]},
    "sparsevlm": {"layers": [1, 2], "keep_ratio": [0.5, 0.3]},
    "vitcop": {"layers": [1, 2], "keep_ratio": [0.5, 0.3]},
}
"""Options at which strategies fit the few layers of the micro model."""


@pytest.fixture(scope="module")
def micro():
    model, processor = load(CHECKPOINT)
    video = read_video(SAMPLE)
    return model, processor, video, video_inputs(processor, video, "What color is it?")


def test_frames_are_those_that_the_processor_made(micro):
    """An outline lies where the token looks, also where the processor changes the proportions."""
    _, processor, _, _ = micro
    marked = np.zeros((8, 60, 130, 3), np.uint8)
    marked[:, 30:, 65:, 0] = 255  # the lower right quarter
    wide = Video.from_frames(marked, 4.0)
    inputs = video_inputs(processor, wide, "What?")
    t, h, w = (int(x) for x in inputs["video_grid_thw"][0])
    grid = (t, h // 2, w // 2)
    shown = shown_frames(processor, inputs, "video", 0, [grid])
    assert shown.shape == (t, h * 8, w * 8, 3)
    high, width = shown.shape[1:3]
    red = shown[..., 0] > 128
    assert red[:, high // 2 + 4 :, width // 2 + 4 :].all()
    assert not red[:, : high // 2 - 4].any()
    assert not red[:, :, : width // 2 - 4].any()
    assert (shown[..., 1:] < 60).all()


@pytest.mark.parametrize("name", sorted(list_strategies()))
def test_every_strategy_can_be_drawn(name, micro):
    """Counts are those of the report, at every layer where something goes."""
    model, processor, video, inputs = micro
    cls = list_strategies()[name].cls
    if cls.stage == "vit" or name == "compose":
        pytest.skip("it acts in a vision transformer alone, or is made of others")
    options = {"video": "ttf"} if name == "by_modality" else INSIDE.get(name, {})
    strategy = get_strategy(name, **options)
    if "keep_ratio" in cls.model_fields and not options:
        strategy = strategy.at_share(0.5, model.config.text_config.num_hidden_layers)
    (found,) = trace(model, processor, inputs, strategy, timestamps=[video.timestamps])
    import tokenfuse

    with tokenfuse.attach(model, strategy) as session:
        model.generate(**inputs, max_new_tokens=1)
    item = session.report.items[0]
    per_layer = session.report.layer_tokens
    if per_layer is None:
        assert found.counts[-1] == item.frame_tokens_after
    else:
        assert sum(found.counts[-1]) == sum(per_layer[-1])
    inside = [sum(x) for x in per_layer or []]
    assert {sum(c) for c in found.counts} >= set(inside)
    for before, after in zip(found.steps, found.steps[1:], strict=False):
        assert not (after.kept & ~before.kept).any()
    assert found.page().count("<rect") == 288


def test_similarities_are_cosines_of_what_was_compared(micro):
    model, processor, _, inputs = micro
    (found,) = trace(model, processor, inputs, "ttf", threshold=0.8)
    fused = (found.target >= 0) & (found.target != np.arange(288))
    assert np.isnan(found.similarity[~fused]).all()
    assert (found.similarity[fused] > 0.8).all()
    assert re.search(r"went into frame \d, row \d, column \d, cosine 0\.[89]", found.page())


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_other_families_show_the_frames_that_they_are_given(name):
    family = FAMILIES[name]
    kind = "video" if "video" in family.modalities else "image"
    model, inputs = family.build("sdpa"), family.prompt([[(kind, 3), (kind, 5)]])
    with pytest.raises(PromptError, match="expected frames="):
        trace(model, None, inputs, "uniform", keep_ratio=0.5)
    with pytest.raises(PromptError, match="frames are 1 and the prompt shows 2"):
        trace(model, None, inputs, "uniform", keep_ratio=0.5, frames=[frames()])
    given = [frames(6, 16), frames(4, 16)]
    maps = trace(model, None, inputs, "uniform", keep_ratio=0.5, frames=given)
    assert len(maps) == 2
    for found in maps:
        assert found.frames.shape[0] == found.grid[0]
    with pytest.raises(PromptError, match="a batch of 2 prompts"):
        trace(model, None, family.prompt([[(kind, 3)], [(kind, 5)]]), "uniform")


@pytest.mark.parametrize(
    ("name", "strategy", "options"),
    [
        ("ttf", "ttf", {}),
        ("fastv", "fastv", {"keep_ratio": 0.3}),
        ("pixelprune", "pixelprune", {"theta": 0.1}),
    ],
)
def test_sheets_look_as_they_did_when_they_were_looked_at(name, strategy, options, micro):
    """Each of the golden pictures was opened; words and borders may move by what fonts do."""
    model, processor, video, inputs = micro
    (found,) = trace(model, processor, inputs, strategy, timestamps=[video.timestamps], **options)
    mine = found.sheet()
    path = GOLDEN / f"{name}.png"
    golden = Image.open(path).convert("RGB")
    assert mine.size == golden.size
    difference = np.abs(np.asarray(mine, np.int16) - np.asarray(golden, np.int16)).max(-1)
    assert (difference > 24).mean() < 0.01


def test_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = CliRunner()
    done = cli.invoke(app, ["show", "--strategy", "fastv", "--out", "a.png", "--out", "b.html"])
    assert done.exit_code == 0, done.output
    assert "from layer 2 on: 144 of 288 visual tokens left, 50.0%" in done.stdout
    assert "drawn: a.png" in done.stdout
    assert Path("b.html").is_file()
    done = cli.invoke(app, ["run", "--picture", "run.gif", "--repeats", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["report"]
    assert Path("run.gif").is_file()
    for words in (["show", "--out", "a.bmp"], ["run", "--picture", "a.bmp"]):
        done = cli.invoke(app, words)
        assert done.exit_code == 2
        assert "has no ending of a picture" in done.output


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_a_video_that_is_shown_as_images_is_one_map(name):
    family = FAMILIES[name]
    model = family.build("sdpa")
    inputs = family.prompt(
        [[("image", seed) for seed in (1, 2, 4)] if name == "llava" else [("image", 3)]]
    )
    (found,) = trace(
        model, None, inputs, "uniform", keep_ratio=0.5, frames=[frames(6)], frames_as_images=True
    )
    assert sum(found.counts[-1]) == -(-len(found.target) // 2)
    assert len(found.frames) == found.grid[0] == (3 if name == "llava" else 1)
