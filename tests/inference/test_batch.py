"""Many questions about many videos: every row has one answer or one reason, whatever happens."""

import json
import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tokenfuse.cli import app
from tokenfuse.config import get_configuration
from tokenfuse.errors import ConfigError
from tokenfuse.inference.batch import Answers, answer_all, run_key
from tokenfuse.inference.engines import Reader, Transformers
from tokenfuse.inference.json_lines import JsonLines, alone
from tokenfuse.inference.rows import part_of, read_rows
from tokenfuse.inference.run import run
from tokenfuse.micro import CHECKPOINT, SAMPLE

COLOR, SHAPE = "What color is the moving object?", "What shape is the moving object?"


def write(folder, *rows):
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def clips(tmp_path):
    """A folder with a good clip and one that is cut off."""
    (tmp_path / "good.mp4").write_bytes(SAMPLE.read_bytes())
    (tmp_path / "cut.mp4").write_bytes(SAMPLE.read_bytes()[:3000])
    return tmp_path


def answered(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_answered_as_run_answers_them_and_broken_ones_say_why(clips):
    path = write(
        clips,
        {"id": 1, "video": "good.mp4", "question": COLOR},
        {"id": "cut", "video": "cut.mp4", "question": COLOR},
        {"id": "gone", "video": "gone.mp4", "question": COLOR},
        {"id": "token", "video": "good.mp4", "question": "<|video_pad|>"},
        {"id": "url", "video": "https://x/y.mp4", "question": COLOR},
        {"id": "shape", "video": "good.mp4", "question": SHAPE},
    )
    out = clips / "answers.jsonl"
    command = ["batch", str(path), str(out), "--batch-size", "4"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "2 rows answered, 4 failed" in done.stderr
    found = {row["id"]: row for row in answered(out)}
    assert len(found) == len(answered(out)) == 6
    for name, words in {
        "cut": "cut.mp4",
        "gone": "does not exist",
        "token": "special token",
        "url": "is a URL",
    }.items():
        assert words in found[name]["error"]
        assert "answer" not in found[name]
    for name, question in (("1", COLOR), ("shape", SHAPE)):
        alone = run(SAMPLE, question, get_configuration("ttf"), source=CHECKPOINT, repeats=1)
        assert found[name]["answer"] == alone.compressed.text
        assert [found[name]["prompt_before"]] == alone.report.prompt_before
        assert [found[name]["prompt_after"]] == alone.report.prompt_after
    before = out.read_bytes()
    assert CliRunner().invoke(app, command).exit_code == 1
    assert out.read_bytes() == before
    (clips / "gone.mp4").write_bytes(SAMPLE.read_bytes())
    CliRunner().invoke(app, [*command, "--retry"])
    again = {row["id"]: row for row in answered(out)}
    assert len(answered(out)) == 6
    assert again["gone"]["answer"] == again["1"]["answer"]
    assert "error" in again["cut"]


def test_another_configuration_has_rows_of_its_own(clips):
    path = write(clips, {"id": "a", "video": "good.mp4", "question": COLOR})
    out = clips / "answers.jsonl"
    for more in ((), ("--strategy", "none"), ("--set", "threshold=0.9"), ("--frames", "8")):
        assert CliRunner().invoke(app, ["batch", str(path), str(out), *more]).exit_code == 0
    rows = answered(out)
    assert len({row["run"] for row in rows}) == 4
    assert rows[1]["prompt_before"] == rows[1]["prompt_after"]
    assert rows[3]["frames"] == 8
    write(clips, {"id": "a", "video": "good.mp4", "question": SHAPE})
    done = CliRunner().invoke(app, ["batch", str(path), str(out)])
    assert done.exit_code == 2
    assert "expected another id for another question" in done.stderr


def test_choices_stand_below_the_question_with_their_letters(tmp_path):
    row = {"id": "a", "video": "v", "question": "Which?", "options": ["red", "blue"]}
    (found,) = read_rows(write(tmp_path, row))
    assert found.text.splitlines()[:3] == ["Which?", "A. red", "B. blue"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"line 2: .*expected one JSON object"),
        ("[]", "line 2: expected one JSON object, not list"),
        ('{"id": "b", "video": "v", "qestion": "w"}', "line 2: "),
        ('{"id": "b", "video": "v", "question": "w", "choices": []}', "unknown key choices"),
        ('{"id": "b", "video": 3, "question": "w"}', "line 2: video is wrong"),
        ('{"id": "b", "video": "v", "question": ""}', "line 2: question is wrong"),
        ('{"id": "b", "video": "v", "question": "\\ud800"}', "line 2: question is wrong"),
        ('{"id": "b", "video": "v", "question": "w", "options": ["\\ud800"]}', "is no text"),
        ('{"id": "a", "video": "v", "question": "w"}', "id 'a' is that of line 1, too"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, line, words):
    path = write(tmp_path, {"id": "a", "video": "v", "question": "w"})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=words):
        read_rows(path)


def test_a_file_without_questions_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no questions"):
        read_rows(write(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--frames", "8", "--fps", "2"), "are both given"),
        (("--frames", "0"), "expected 1 or more"),
        (("--strategy", "sparsevlm"), "the decoder of Qwen3VLForConditionalGeneration has 4"),
    ],
)
def test_what_no_row_can_be_answered_with_ends_the_run_before_the_first(clips, options, words):
    path = write(clips, {"id": "a", "video": "good.mp4", "question": COLOR})
    out = clips / "answers.jsonl"
    done = CliRunner().invoke(app, ["batch", str(path), str(out), *options])
    assert done.exit_code == 2
    assert words in done.stderr
    assert not out.exists()


def test_shards_are_all_rows_once(tmp_path):
    rows = read_rows(write(tmp_path, *({"id": i, "video": "v", "question": "q"} for i in range(7))))
    parts = [part_of(rows, f"{i}/3", None) for i in (1, 2, 3)]
    assert sorted(row.id for part in parts for row in part) == sorted(row.id for row in rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [row.id for row in part_of(rows, None, 2)] == ["0", "1"]
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0"):
        with pytest.raises(ConfigError, match="expected i/n"):
            part_of(rows, wrong, None)


def test_a_row_that_the_model_cannot_answer_takes_no_other_with_it(clips, monkeypatch):
    names = [f"r{i}" for i in range(5)]
    path = write(clips, *({"id": n, "video": "good.mp4", "question": n} for n in names))
    whole = Transformers.reply

    def scarce(self, part):
        if any(row.id == "r3" for row, _ in part):
            raise torch.OutOfMemoryError("no room")
        return whole(self, part)

    monkeypatch.setattr(Transformers, "reply", scarce)
    answers = Answers(clips / "answers.jsonl")
    start = partial(Transformers, CHECKPOINT, get_configuration("ttf"), batch_size=3)
    assert answer_all(read_rows(path), answers, start, Reader(clips), key="run") == 1
    errors = {row["id"]: row.get("error") for row in answered(answers.path)}
    assert errors == dict.fromkeys(names) | {"r3": "no room"}


RUN = """
import sys
from functools import partial
from pathlib import Path
from tokenfuse.inference import batch, engines, rows

engines.load = lambda source: (None, None)
engines.refuse_special_tokens = engines.refuse_images_only = lambda *given: None
engines.Transformers.reply = lambda self, part: [engines.Reply("yes", None, 2, 9, 5)] * len(part)
file, out = map(Path, sys.argv[1:])
print("ready", flush=True)
start = partial(engines.Transformers, "m", None, batch_size=2)
reader = engines.Reader(file.parent)
batch.answer_all(rows.read_rows(file), batch.Answers(out), start, reader, key="run")
"""
"""A run without a model: what it writes is what matters."""


def test_a_run_that_is_killed_again_and_again_answers_every_row_once(clips, pytestconfig):
    names = [f"r{i}" for i in range(60)]
    path = write(clips, *({"id": n, "video": "good.mp4", "question": n} for n in names))
    out, chance = clips / "answers.jsonl", random.Random(0)
    kills = 10 if pytestconfig.getoption("full") else 3
    for _ in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-c", RUN, str(path), str(out)], stdout=subprocess.PIPE
        )
        assert child.stdout.readline() == b"ready\n"
        try:
            child.wait(chance.uniform(0.01, 0.15))
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        # And what a process that dies while it writes leaves behind.
        with out.open("ab") as file:
            file.write(b'{"id":"r59","run":')
    last = subprocess.run([sys.executable, "-c", RUN, str(path), str(out)], capture_output=True)
    assert last.returncode == 0, last.stderr
    assert sorted(row["id"] for row in answered(out)) == sorted(names)


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop()),) * 2)
from tokenfuse.cli import app
"""
FULL += (
    RUN[: RUN.index("start = ")] + "app(['batch', *map(str, (file, out)), '--strategy', 'none'])"
)


@pytest.mark.skipif(sys.platform != "linux", reason="only here the limit stands for a full disk")
def test_a_full_disk_is_an_error_and_the_run_goes_on_when_there_is_room(clips):
    names = [f"r{i}" for i in range(9)]
    path = write(clips, *({"id": n, "video": "good.mp4", "question": n} for n in names))
    out = clips / "answers.jsonl"
    command = [sys.executable, "-c", FULL, str(path), str(out)]
    done = subprocess.run([*command, "500"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr
    assert 0 < len(JsonLines(out).lines) < 9
    done = subprocess.run([*command, "100000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(row["id"] for row in answered(out)) == names


def test_two_runs_do_not_write_to_one_file(clips):
    path = write(clips, {"id": "a", "video": "good.mp4", "question": COLOR})
    out = clips / "answers.jsonl"
    with alone(out):
        done = CliRunner().invoke(app, ["batch", str(path), str(out)])
    assert done.exit_code == 2
    assert "another run is adding to" in done.stderr
    assert not out.exists()


def test_a_file_of_something_else_is_refused(clips):
    out = clips / "answers.jsonl"
    out.write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="line 1: this is no answer of tokenfuse batch"):
        Answers(out)


def test_the_hash_of_a_run_tells_what_decides_the_answer():
    ttf = get_configuration("ttf")
    keys = {
        run_key(None, "m", frames=8),
        run_key(ttf, "m", frames=8),
        run_key(ttf, "n", frames=8),
        run_key(ttf, "m", frames=9),
        run_key(get_configuration("ttf", threshold=0.8), "m", frames=8),
    }
    assert len(keys) == 5
    assert run_key(ttf, Path("m"), frames=8) in keys
