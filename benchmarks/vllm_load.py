"""Serve videos with vLLM under load, with and without compression.

    python benchmarks/vllm_environment.py OTHER
    python benchmarks/vllm_load.py --vllm-python OTHER/bin/python

A random Qwen3-VL, as large as two cores carry, in bf16; ``vllm bench serve`` asks it on loopback,
at several numbers of requests at once. Writes docs/results/vllm-load.md and .json. With ``--model``
a checkpoint is served as it is, on whatever vLLM finds: on a GPU with a real one, that is the
command to run; it writes where ``--out`` says.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_checkpoints import write

PORT = 8911
URL = f"http://127.0.0.1:{PORT}"
BENCH = (
    "import argparse, vllm.benchmarks.serve as s; p = argparse.ArgumentParser(); "
    "s.add_cli_args(p); s.main(p.parse_args())"
)
"""``vllm bench serve``: the package for CPUs has another name, which its command stumbles over."""
TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_interleaved": True,
        "mrope_section": [12, 10, 10],
    },
}
TOWER = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_heads": 4,
    "out_hidden_size": 1024,
    "patch_size": 16,
    "deepstack_visual_indexes": [1],
}
PROCESSOR = {
    "image_processor": {"patch_size": 16},
    "video_processor": {
        "patch_size": 16,
        "max_video_tokens": 64,
        "fps": 30,
        "size": {"shortest_edge": 4096, "longest_edge": 2**24},
    },
}
METHODS: list[dict[str, Any] | None] = [
    None,
    {"strategy": "ttf", "keep_ratio": 0.5},
    {"strategy": "ttf", "keep_ratio": 0.25},
    {"strategy": "vidcom2", "keep_ratio": 0.5},
    {"strategy": "vidcom2", "keep_ratio": 0.25},
]
SHAPE = (256, 256, 32)
"""Height, width and frames of each video, all of noise: no two requests share anything."""
PAGE = """\
# vLLM under load

{what} is served by vLLM and asked about videos of {frames} frames of {height}x{width} pixels, with
answers of {answer} tokens. Prompts have {prompt} tokens. `vllm bench serve` asks on loopback,
{requests} requests for each number at once. *Faster* is requests per second against those without
compression; medians of {repeats} rounds, in which servers take turns. *First token* and *next
token* are medians over requests, *KV* the most of its cache that was in use. {device}

{tables}

{words}

```console
$ python benchmarks/vllm_environment.py OTHER
$ {command}
```
"""
OWN = "A random Qwen3-VL of 8 layers, 1,024 wide, in bf16,"
WORDS = """\
Compression shortens what a request waits for before its first token, the LLM's prefill, and what it
holds in the cache meanwhile. It does not shorten what comes before, which is the same in all rows:
decoding the file, the video processor, and the vision tower. So it gains the more, the larger the
LLM is beside the tower, and the more requests wait for each other. Strategies look at features
alone and keep a fixed number of tokens, so no request waits for another one's count.

On a GPU, with a checkpoint of your own (not run here):

```console
$ python benchmarks/vllm_load.py --vllm-python OTHER/bin/python \\
      --model Qwen/Qwen3-VL-8B-Instruct --at-once 1,2,4,8,16,32 --requests 128 --out load.md
```"""


def title(method: dict[str, Any] | None) -> str:
    return "none" if method is None else f"{method['strategy']} {method['keep_ratio']}"


@contextmanager
def served(python: str, model: str, method: Any, port: int, log: Path, own: bool) -> Iterator[str]:
    """A server with a strategy, ready to be asked."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--port", str(port), "--host", "127.0.0.1", "--served-model-name", "served"]
    # Else the same noise could be answered from a cache.
    command += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    # All frames of a video of the benchmark, which lasts about a second.
    command += ["--media-io-kwargs", '{"video": {"fps": 30}}']
    if own:
        command += ["--dtype", "bfloat16", "--max-model-len", "4096"]
        command += ["--enforce-eager", "--gpu-memory-utilization", "0.1"]
    if method is not None:
        command += ["--hf-overrides", json.dumps({"tokenfuse": method})]
    env = os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"}
    if own:
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=out, env=env, start_new_session=True, cwd=log.parent
        )
    try:
        wait(child, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        # Its engine is a process of its own.
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def wait(child: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(1200):
        if child.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    sys.exit(log.read_text()[-6000:])


def metric(url: str, name: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    lines = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return float(lines[0]) if lines else float("nan")


def asked(python: str, url: str, model: str, given: Any, at_once: int, folder: Path) -> dict:
    """What ``vllm bench serve`` measures, and the cache's use meanwhile."""
    found, busy, most = folder / "found.json", threading.Event(), [0.0]

    def watch() -> None:
        while not busy.wait(0.1):
            most[0] = max(most[0], metric(url, "vllm:kv_cache_usage_perc"))

    high, wide, frames = SHAPE
    command = [python, "-c", BENCH, "--backend", "openai-chat", "--base-url", url]
    command += ["--endpoint", "/v1/chat/completions", "--model", "served", "--tokenizer", model]
    command += ["--dataset-name", "random-mm", "--random-mm-base-items-per-request", "1"]
    command += ["--random-mm-limit-mm-per-prompt", '{"image": 0, "video": 1}']
    command += ["--random-mm-bucket-config", f"{{({high}, {wide}, {frames}): 1.0}}"]
    command += ["--random-input-len", "32", "--random-output-len", str(given.answer)]
    command += ["--num-prompts", str(given.requests), "--max-concurrency", str(at_once)]
    command += ["--num-warmups", "1", "--ignore-eos", "--save-result", "--disable-tqdm"]
    command += ["--result-dir", str(folder), "--result-filename", found.name]
    before = metric(url, "vllm:prompt_tokens_total")
    watching = threading.Thread(target=watch)
    watching.start()
    done = subprocess.run(command, capture_output=True, text=True)
    busy.set()
    watching.join()
    if done.returncode != 0:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    result = json.loads(found.read_text())
    if result["completed"] != given.requests:
        sys.exit(f"{given.requests - result['completed']} requests failed: {done.stdout[-3000:]}")
    read = metric(url, "vllm:prompt_tokens_total") - before
    return {
        "requests_per_s": result["request_throughput"],
        "first_token_ms": result["median_ttft_ms"],
        "next_token_ms": result["median_itl_ms"],
        "prompt": read / (given.requests + 1),
        "kv_share": most[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm-python", required=True, help="Python that has vLLM.")
    parser.add_argument("--model", help="A checkpoint; a random one of its own if left out.")
    parser.add_argument("--at-once", default="1,2,4,8", help="Requests at once.")
    parser.add_argument("--requests", type=int, default=12, help="Of each measurement.")
    parser.add_argument("--answer", type=int, default=16, help="Tokens of each answer.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="A .md; a .json is written beside it.")
    given = parser.parse_args()
    given.vllm_python = str(Path(given.vllm_python).absolute())
    own, numbers = given.model is None, [int(x) for x in given.at_once.split(",")]
    docs = Path(__file__).parents[1] / "docs" / "results"
    out = given.out or docs / "vllm-load.md"
    found: dict[str, dict[int, list[dict]]] = {
        title(method): {number: [] for number in numbers} for method in METHODS
    }
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), given.model
        if own:
            model = str(folder / "model")
            Path(model).mkdir()
            write("Qwen3-VL", Path(model), TEXT, TOWER, PROCESSOR)
        for turn in range(given.repeats):
            # In turns forward and back, so that a machine that drifts favours none.
            for place in range(len(METHODS)):
                method = METHODS[place if turn % 2 == 0 else -1 - place]
                log = folder / "server.log"
                with served(given.vllm_python, model, method, PORT, log, own) as url:
                    for number in numbers:
                        cell = asked(given.vllm_python, url, model, given, number, folder)
                        found[title(method)][number].append(cell)
                        print(turn, title(method), number, cell, flush=True)
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    out.write_text(page(found, given, own), "utf-8")
    print(out)


def page(found: dict[str, dict[int, list[dict]]], given: Any, own: bool) -> str:
    def middle(name: str, number: int, value: str) -> float:
        return statistics.median(cell[value] for cell in found[name][number])

    tables = []
    for number in found["none"]:
        tables += ["", f"## {number} at once", ""]
        tables += ["| strategy | requests a second | faster | first token | next token | KV |"]
        tables += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        for name in found:
            ratios = [
                mine["requests_per_s"] / base["requests_per_s"]
                for mine, base in zip(found[name][number], found["none"][number], strict=True)
            ]
            tables.append(
                f"| {name} | {middle(name, number, 'requests_per_s'):.2f} "
                f"| {statistics.median(ratios):.2f} "
                f"| {middle(name, number, 'first_token_ms'):.0f} ms "
                f"| {middle(name, number, 'next_token_ms'):.0f} ms "
                f"| {100 * middle(name, number, 'kv_share'):.1f} % |"
            )
    number = next(iter(found["none"]))
    prompts = [f"{middle(name, number, 'prompt'):.0f} ({name})" for name in found]
    high, wide, frames = SHAPE
    command = "python benchmarks/vllm_load.py --vllm-python OTHER/bin/python"
    return PAGE.format(
        what=OWN if own else given.model,
        frames=frames,
        height=high,
        width=wide,
        prompt=", ".join(prompts),
        answer=given.answer,
        requests=given.requests,
        repeats=given.repeats,
        device=f"{os.cpu_count()} cores of {platform.machine()}." if own else "",
        tables="\n".join(tables).strip(),
        words=WORDS if own else "",
        command=command if own else f"{command} --model {given.model}",
    )


if __name__ == "__main__":
    main()
