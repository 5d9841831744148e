"""The clips of the strata: what the generator promises, and what the displacement measures."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from tokenfuse.micro import sheet, strata
from tokenfuse.micro.displacement import group, measure
from tokenfuse.micro.motion import CANVAS, MOTIONS, backdrop, canvas, view
from tokenfuse.micro.questions import PLAIN, STRATUM_ANSWERS, STRATUM_QUESTIONS, SUBTLE
from tokenfuse.micro.strata import STRATA, Stratum, make_stratum_clip
from tokenfuse.micro.subtle import SIZES, change
from tokenfuse.micro.tasks import COLORS, DIRECTIONS, QUADRANTS, SCENES, SIZE, make_clip

GROUPS = {
    "still": "low",
    "slow": "low",
    "fast": "high",
    "pan_slow": "low",
    "pan_medium": "medium",
    "pan_fast": "high",
    "cut": "low",
    "flicker": "low",
}


def digest(frames):
    return hashlib.sha256(frames.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("scene", "expected"),
    [("motion", "54aea7450513fe29"), ("order", "2bcbbd6c889fb3e7"), ("count", "9af0a7415d359f43")],
)
def test_clips_of_the_micro_model_are_the_bytes_they_were(scene, expected):
    assert scene in SCENES
    assert digest(make_clip(7, patches=8, scene=scene, split="test").frames) == expected


@pytest.mark.parametrize(
    ("task", "motion", "expected"),
    [
        ("end", "fast", "1b08348e55546054"),
        ("count", "pan_medium", "13c0cc3b28e3a2b4"),
        ("repeat", "cut", "dd5198555863b5d8"),
        ("order", "flicker", "8723807b273ee6a8"),
        ("hue", "still", "2947fd3030d0cd9f"),
        ("gap", "pan_slow", "572def1dab5fae8c"),
        ("drift", "flicker", "550b0ebf2d57ef0f"),
    ],
)
def test_the_same_arguments_make_the_same_bytes(task, motion, expected):
    assert digest(make_stratum_clip(Stratum(task, motion), 7).frames) == expected


@pytest.mark.parametrize("stratum", STRATA, ids=str)
def test_a_clip_is_asked_what_its_stratum_asks(stratum):
    for patches in (8, 12):
        clip = make_stratum_clip(stratum, 3, patches=patches)
        assert clip.frames.shape == (2 * patches, SIZE, SIZE, 3)
        assert clip.frames.dtype == np.uint8
        assert clip.question in clip.questions
        assert clip.question.task == stratum.task
        assert (clip.decisive is not None) == (stratum.task in SUBTLE)
        for q in clip.questions:
            assert q.text in STRATUM_QUESTIONS[q.task]
            assert q.answer in STRATUM_ANSWERS[q.task]


def test_train_and_test_clips_differ():
    train, test = (make_stratum_clip(STRATA[0], 3, split=s) for s in ("train", "test"))
    assert train.frames.tobytes() != test.frames.tobytes()


# Strata


def test_strata_are_all_combinations_that_make_sense():
    assert len(STRATA) == len(set(STRATA)) == 7 * 8 + 2 * 7 + 5 * 6
    assert {s.motion for s in STRATA} == set(MOTIONS)
    assert str(Stratum("hue", "still", 30)) == "hue/still/30"
    assert Stratum("hue", "still") == Stratum("hue", "still", SIZES["hue"][1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("direction", "still"), "no direction under still: nothing moves"),
        (("end", "still"), "no end under still"),
        (("drift", "fast"), "no drift under fast: each object of a subtle clip"),
        (("colour", "still"), "task 'colour' is not one of color, "),
        (("color", "zoom"), "motion 'zoom' is not one of still, "),
        (("color", "still", 3), "color has no size; only hue, "),
        (("gap", "still", 2.5), "size 2.5 of gap is not a whole number from 1 to 16"),
        (("hue", "still", 200), "size 200 of hue is not a number from 1 to 180"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Stratum(*arguments)


@pytest.mark.parametrize(
    ("stratum", "options", "message"),
    [
        (Stratum("repeat", "still"), {"patches": 6}, "expected 7 or more"),
        (Stratum("color", "still"), {"patches": 3}, "expected 4 or more"),
        (Stratum("color", "still"), {"decisive": False}, "no decisive difference"),
        (Stratum("drift", "still", 3), {"patches": 12}, "expected 2.27 or less"),
    ],
)
def test_a_clip_that_cannot_be_is_refused(stratum, options, message):
    with pytest.raises(ValueError, match=message):
        make_stratum_clip(stratum, 0, **options)


# Answers


@pytest.fixture
def bare(monkeypatch):
    """Clips without background, light and measurement, for questions alone: fast."""
    monkeypatch.setattr(strata, "measure", lambda video: None)
    dark = np.zeros((16, SIZE, SIZE, 3), np.float32)
    monkeypatch.setattr(strata, "backdrop", lambda motion, rng, patches: dark.copy())
    monkeypatch.setattr(strata, "relight", lambda motion, rng, video: None)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("task", [*PLAIN, *SUBTLE])
def test_answers_are_balanced(task):
    stratum = Stratum(task, "pan_slow")
    seen = Counter(make_stratum_clip(stratum, seed).question.answer for seed in range(60))
    expected = 60 / len(STRATUM_ANSWERS[task])
    excess = sum((seen[a] - expected) ** 2 / expected for a in STRATUM_ANSWERS[task])
    # Chi squared beyond which one in a thousand falls, by degrees of freedom.
    assert excess < {1: 10.8, 2: 13.8, 3: 16.3, 5: 20.5}[len(STRATUM_ANSWERS[task]) - 1]


@pytest.mark.parametrize("task", [*PLAIN, *SUBTLE])
def test_neither_motion_nor_size_has_a_say_in_the_answer(task):
    choices = [s for s in STRATA if s.task == task]
    if task in SUBTLE:
        choices += [Stratum(task, "still", SIZES[task][0]), Stratum(task, "still", SIZES[task][1])]
    for seed in range(3):
        assert len({make_stratum_clip(s, seed).question for s in choices}) == 1


@pytest.mark.parametrize("task", SUBTLE)
def test_only_decisive_frames_depend_on_the_answer(task):
    """One clip with four answers: other frames, and all without the difference, are the same."""
    for seed in range(4):
        clips, plain = [], []
        for quadrant in range(4):
            for decisive, rendered in ((True, clips), (False, plain)):
                rng, video = np.random.default_rng(seed), np.full((16, SIZE, SIZE, 3), 100.0, "f")
                first, end = change(task, rng, video, 8, quadrant, SIZES[task][1], decisive)
                rendered.append(video)
        others = np.r_[0 : 2 * first, 2 * end : 16]
        for clip, without in zip(clips, plain, strict=True):
            np.testing.assert_array_equal(without, plain[0])
            np.testing.assert_array_equal(clip[others], plain[0][others])


@pytest.mark.parametrize("patches", [8, 11])
@pytest.mark.parametrize("stratum", [s for s in STRATA if s.task in SUBTLE], ids=str)
def test_the_difference_is_in_the_decisive_frames_and_quadrant_and_nowhere_else(
    stratum, patches, monkeypatch
):
    monkeypatch.setattr(strata, "measure", lambda video: None)
    for seed in range(3):
        clip, without = (
            make_stratum_clip(stratum, seed, patches=patches, decisive=d) for d in (True, False)
        )
        assert clip.question == without.question
        assert clip.decisive == without.decisive
        differs = (clip.frames != without.frames).any(-1)
        first, end = clip.decisive
        assert 1 <= first < end <= patches
        inside = np.zeros(2 * patches, bool)
        inside[2 * first : 2 * end] = True
        np.testing.assert_array_equal(differs.any((1, 2)), inside)
        column, row = QUADRANTS.index(clip.question.answer) % 2, "bottom" in clip.question.answer
        elsewhere = np.ones((SIZE, SIZE), bool)
        elsewhere[48 * row : 48 * row + 48, 48 * column : 48 * column + 48] = False
        assert not differs[:, elsewhere].any()


@pytest.mark.parametrize(
    ("task", "size", "pixels"), [("patch", 8, 64), ("patch", 3, 9), ("gap", 4, 32), ("gap", 1, 8)]
)
def test_a_difference_is_as_large_as_its_size(task, size, pixels):
    video = [np.full((16, SIZE, SIZE, 3), 7.0, np.float32) for _ in range(2)]
    for picture, decisive in zip(video, (True, False), strict=True):
        change(task, np.random.default_rng(1), picture, 8, 2, size, decisive)
    assert (video[0] != video[1]).any((0, 3)).sum() == pixels


# What plain tasks show


def near(frames, color):
    return np.abs(frames.astype(int) - np.array(color)).max(-1) < 45


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("motion", ["slow", "fast", "pan_fast", "cut"])
def test_the_object_ends_in_the_corner_and_moves_in_the_direction_of_the_answers(motion, seed):
    clip = make_stratum_clip(Stratum("end", motion), seed)
    answer = {q.task: q.answer for q in clip.questions}
    centres = []
    for frame in near(clip.frames, COLORS[answer["color"]]):
        # The angle of the mean on a circle: an object half over the edge has one centre.
        turns = [np.exp(2j * np.pi * x / SIZE).mean() for x in frame.nonzero()[::-1] if len(x) > 40]
        centres.append([np.angle(t) / (2 * np.pi) * SIZE % SIZE for t in turns] or [np.nan] * 2)
    x, y = np.array(centres[-1])
    assert QUADRANTS[(x > 48) + 2 * (y > 48)] == answer["end"]
    steps = (np.diff(centres, axis=0) + 48) % SIZE - 48
    step = np.nanmedian(steps, axis=0)
    assert step @ DIRECTIONS[answer["direction"]] > 1
    assert abs(step @ DIRECTIONS[answer["direction"]][::-1]) < 0.5


def lit(clip):
    """Temporal patches in which the mark shows."""
    return ((clip.frames > 205).all(-1).sum((1, 2)) > 60).reshape(-1, 2).all(1)


@pytest.mark.parametrize("seed", range(8))
def test_flashes_are_as_many_as_the_answer_and_a_dark_patch_apart(seed):
    clip = make_stratum_clip(Stratum("repeat", "pan_medium"), seed)
    shown = lit(clip)
    assert STRATUM_ANSWERS["repeat"][shown.sum() - 1] == clip.question.answer
    assert not (shown[1:] & shown[:-1]).any()


@pytest.mark.parametrize("seed", range(8))
def test_the_event_of_the_answer_comes_first(seed):
    clip = make_stratum_clip(Stratum("events", "slow"), seed)
    color = next(q.answer for q in clip.questions if q.task == "color")
    there = near(clip.frames, COLORS[color]).sum((1, 2)).reshape(-1, 2).min(1) > 40
    flash, shown = lit(clip).argmax(), there.argmax()
    assert flash != shown
    assert clip.question.answer == ("flash" if flash < shown else "object")


# Motion


def test_a_view_of_whole_pixels_is_a_copy_and_of_half_pixels_a_mean():
    picture = canvas(np.random.default_rng(0))
    seen = view(picture, np.array([[0.0, 0.0], [CANVAS - 5.0, 3.0], [0.5, 0.0]]))
    np.testing.assert_array_equal(seen[0], picture[:SIZE, :SIZE])
    np.testing.assert_array_equal(seen[1, :, 5:], picture[3 : SIZE + 3, : SIZE - 5])
    np.testing.assert_allclose(
        seen[2], (picture[:SIZE, :SIZE] + picture[:SIZE, 1 : SIZE + 1]) / 2, rtol=1e-5
    )


def test_a_cut_changes_the_whole_background_at_once():
    for seed in range(5):
        video = backdrop("cut", np.random.default_rng(seed), 8)
        changes = (video[1:] != video[:-1]).mean((1, 2, 3))
        assert set(changes) == {0.0, changes.max()}
        assert changes.max() > 0.99
        assert (changes > 0).sum() in (1, 2)
        assert all(at % 2 for at in changes.nonzero()[0])


def test_light_varies_from_frame_to_frame_and_over_the_clip():
    still, flicker = (
        make_stratum_clip(Stratum("count", m), 1).frames for m in ("still", "flicker")
    )
    mean = [x.mean((1, 2, 3)) for x in (still, flicker)]
    assert np.ptp(mean[1]) > 10 * np.abs(np.diff(mean[0])).mean()
    assert np.abs(np.diff(mean[1])).min() > 0


# Displacement


@pytest.mark.parametrize("pixels", [(0, 0), (3, 0), (0, -8), (-20, 0), (7, 12)])
def test_the_displacement_of_a_shifted_picture_is_its_shift(pixels):
    picture = canvas(np.random.default_rng(2))
    at = np.arange(8)[:, None] * np.array(pixels) / 2
    measured = measure(view(picture, at))
    assert measured.median == pytest.approx(np.hypot(*pixels) / 16)
    assert measured.moving == pytest.approx(np.hypot(*pixels) / 16, abs=0.02)
    assert measured.everywhere == pytest.approx(measured.moving * measured.share)


def test_the_light_does_not_displace():
    picture = canvas(np.random.default_rng(3))
    moving = view(picture, np.arange(8)[:, None] * np.array([4.0, 0.0]))
    light = np.linspace(0.7, 1.2, 8, dtype=np.float32)[:, None, None, None]
    assert measure(moving * light + 20 * light).median == measure(moving).median == 0.5


def test_a_single_patch_has_no_displacement():
    assert measure(np.zeros((2, SIZE, SIZE, 3), np.uint8)).median == 0


def test_the_measure_holds_with_sensor_noise():
    clip = make_stratum_clip(Stratum("color", "pan_medium"), 0)
    assert measure(clip.frames).median == pytest.approx(clip.displacement, abs=0.07)


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_measured_displacement_falls_in_the_group_of_its_motion(motion):
    choices = [s for s in STRATA if s.motion == motion]
    clips = [make_stratum_clip(choices[i % len(choices)], i) for i in range(30)]
    assert all(clip.group == group(clip.displacement) for clip in clips)
    assert sum(clip.group == GROUPS[motion] for clip in clips) >= 28


def test_one_clip_of_each_stratum_is_drawn(tmp_path, monkeypatch):
    from PIL import Image

    path = tmp_path / "sheet.png"
    options = [str(path), "--task", "hue", "--task", "end", "--motion", "cut"]
    monkeypatch.setattr("sys.argv", ["sheet", *options])
    sheet.main()
    assert Image.open(path).size == (3 + 8 * 99, 3 + 2 * 114)
