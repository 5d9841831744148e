"""The page of supported models: ``python -m tokenfuse.bench.models_page docs/results/models.json``.

It is made from what the conformance kit recorded, and goes to standard output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenfuse.bench.markdown import NONE, table

CHECKPOINTS = {
    "aya_vision": "CohereLabs/aya-vision-8b",
    "cohere2_vision": "CohereLabs/command-a-vision-07-2025",
    "gemma3": "google/gemma-3-4b-it",
    "glm4v": "zai-org/GLM-4.1V-9B-Thinking",
    "glm4v_moe": "zai-org/GLM-4.5V",
    "idefics3": "HuggingFaceM4/Idefics3-8B-Llama3",
    "internvl": "OpenGVLab/InternVL3-1B-hf",
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava_next": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_next_video": "llava-hf/LLaVA-NeXT-Video-7B-hf",
    "llava_onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "llava_pixtral": "mistral-community/pixtral-12b",
    "mistral3": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    "paligemma": "google/paligemma2-3b-mix-448",
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen2_vl": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen3_5": "Qwen/Qwen3.5-2B",
    "qwen3_vl": "Qwen/Qwen3-VL-8B-Instruct",
    "qwen3_vl_moe": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "smolvlm": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    "video_llava": "LanguageBind/Video-LLaVA-7B-hf",
}
"""A checkpoint of each family, for people who know their model by that name."""

HEAD = """\
# Supported models

<!-- Made by: python -m tokenfuse.bench.models_page docs/results/models.json \\
     > docs/reference/models.md -->

`tokenfuse check MODEL` says of any checkpoint, from its configuration alone, whether it is
supported and which strategies can act on it. Every family below takes all strategies that look at
features; the columns say what more it takes. Checkpoints are named as examples: no pretrained
weights were loaded here, what was tested is their classes.

"""

PROOF = """
- *shows*: *frames* are images that are the frames of a video; pass `frames_as_images=True` to
  `compress` or `attach`, and temporal strategies compare them.
- *saliency*: strategies that prune by attention can be used.
- *inside the tower*: what [strategies that act before or inside the vision
  tower](../explanation/inside-the-tower.md) can remove there: any visual token, or whole frames of
  videos.
- *inside the LLM*: [strategies that act at decoder layers](../explanation/inside-the-llm.md) can be
  used, or what is in their way.
- A column of a release says ✓ where the whole conformance kit passed.
- Models without a row of their own are taken by the adapter `generic` if their `forward` takes
  `mm_encoder_outputs` and their config says where their tokens are. Those whose image is read by
  learned queries, such as BLIP-2 and Idefics2, and encoder-decoders are refused with the reason.

## What was tested

The [conformance kit](../how-to/write-an-adapter.md#prove-it) on tiny random models of each family,
fp32 on a CPU, with sdpa and eager attention: the oracle for logits and answers with 33, 67 and 99 %
of the tokens dropped and with whole frames emptied, identity, padded batches, beams, second turns,
new items in later turns, many questions about one prompt, and what must be refused; and cuts inside
the vision tower and the LLM, at every layer, in all of these.

"""

TAIL = """
- *batch*: padded batches give what each prompt gives alone, on both sides.
- *generic*: no adapter of its own; the model's config, signatures and inputs say where its tokens
  are. Every other transformers model whose `forward` takes `mm_encoder_outputs` gets the same
  adapter, and is refused with a reason where they do not say it.
- A skipped test is of something that the model itself cannot do, or does not have.
- Qwen3.5 mixes linear attention with full attention, and no mask hides a token from a linear layer.
  Its oracle is the run of the decoder on what is left, instead of the masked run; a second entry
  with full attention only passes the masked one.

Made again by:

```console
$ python -m pytest tests/adapters/test_conformance.py --full --record docs/results/models.json
$ python -m tokenfuse.bench.models_page docs/results/models.json > docs/reference/models.md
```

With `-k` and the name of a family, the first command renews the entry of that family alone.

`transformers` 5.19.0 is the oldest release that is supported: earlier ones lack
`mm_encoder_outputs`. The column of an older release is made by the same commands with that release
installed.
"""


def page(recorded: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, from what was recorded: by version of transformers, then by family."""
    versions = sorted(recorded, key=_number, reverse=True)
    newest = recorded[versions[0]]
    columns = ["family", "for example", "shows", "saliency", "inside the tower"]
    columns += ["inside the LLM", *(f"transformers {version}" for version in versions)]
    proofs = ["family", "class", "adapter", "rope", "DeepStack", "batch"]
    proofs += [f"transformers {version}" for version in versions]
    rows, proof = [], []
    for name, entry in sorted(newest.items()):
        shown = ", ".join(f"{modality}s" for modality in entry["modalities"])
        frames = entry["frames_as_images"]
        family = name.removesuffix("_frames")
        kit = entry.get("kit")
        found = [recorded[version].get(name) for version in versions]
        checkpoint = CHECKPOINTS.get(family)
        rows.append(
            [
                family,
                f"`{checkpoint}`" if checkpoint else NONE,
                "frames" if frames else shown,
                _yes(entry["saliency"]),
                entry["tower"] or NONE,
                entry["inside"],
                *map(_mark, found),
            ]
        )
        proof.append(
            [
                f"{family}, frames" if frames else family,
                f"`{entry['model']}`",
                f"`{entry['adapter']}`",
                entry["rope"],
                _yes(entry["deepstack"]),
                _yes(not entry["failed"]),
                *(_result(each, kit) for each in found),
            ]
        )
    first = table(columns, rows, left=len(columns))
    return HEAD + first + PROOF + table(proofs, proof, left=len(proofs)) + TAIL


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3])


def _mark(entry: Mapping[str, Any] | None) -> str:
    """Whether the kit passed."""
    if entry is None:
        return NONE
    return "✗" if "reason" in entry or entry["failed"] else "✓"


def _result(entry: Mapping[str, Any] | None, kit: str | None) -> str:
    """What a cell says; ``kit`` stands for the tests of the newest column."""
    if entry is None:
        return "not run"
    if "reason" in entry:
        return str(entry["reason"])
    failed = f", **{entry['failed']} failed**" if entry["failed"] else ""
    earlier = "" if entry.get("kit") == kit else ", by an earlier kit"
    return f"{entry['passed']} passed, {entry['skipped']} skipped{failed}{earlier}"


def _yes(value: bool) -> str:
    return "yes" if value else NONE


def main() -> None:
    print(page(json.loads(Path(sys.argv[1]).read_text("utf-8"))), end="")


if __name__ == "__main__":
    main()
