"""The page of supported models: ``python -m tokenfuse.bench.models_page docs/results/models.json``.

It is made from what the conformance kit recorded, and goes to standard output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenfuse.bench.markdown import table

HEAD = """\
# Supported models

<!-- Made by: python -m tokenfuse.bench.models_page docs/results/models.json \\
     > docs/reference/models.md -->

What the [conformance kit](../how-to/write-an-adapter.md#prove-it) passed, on tiny random models of
each family, fp32 on a CPU, with sdpa and eager attention: the oracle for logits and answers with
33, 67 and 99 % of the tokens dropped and with whole frames emptied, identity, padded batches,
beams, second turns, new items in later turns, many questions about one prompt, and what must be
refused; and cuts inside the vision tower and the LLM, at every layer, in all of these. No
pretrained weights were loaded.

"""

TAIL = """
- *batch*: padded batches give what each prompt gives alone, on both sides.
- *frames*: the model is shown a video as images; pass `frames_as_images=True` to `compress` or
  `attach`, and temporal strategies compare them.
- *saliency*: strategies that prune by attention can be used.
- *inside the tower*: what [strategies that act before or inside the vision
  tower](../explanation/inside-the-tower.md) can remove there: any visual token, or whole frames of
  videos.
- *inside the LLM*: [strategies that act at decoder layers](../explanation/inside-the-llm.md) can be
  used, or what is in their way.
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
    columns = ["family", "class", "adapter", "shows", "rope", "DeepStack", "saliency", "batch"]
    columns += ["inside the tower", "inside the LLM"]
    columns += [f"transformers {version}" for version in versions]
    rows = []
    for name, entry in sorted(newest.items()):
        shown = ", ".join(f"{modality}s" for modality in entry["modalities"])
        kit = entry.get("kit")
        results = [_result(recorded[version].get(name), kit) for version in versions]
        rows.append(
            [
                name.removesuffix("_frames"),
                f"`{entry['model']}`",
                f"`{entry['adapter']}`",
                "frames" if entry["frames_as_images"] else shown,
                entry["rope"],
                _yes(entry["deepstack"]),
                _yes(entry["saliency"]),
                _yes(not entry["failed"]),
                entry["tower"] or "–",
                entry["inside"],
                *results,
            ]
        )
    return HEAD + table(columns, rows, left=len(columns)) + TAIL


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3])


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
    return "yes" if value else "–"


def main() -> None:
    print(page(json.loads(Path(sys.argv[1]).read_text("utf-8"))), end="")


if __name__ == "__main__":
    main()
