"""How small a difference survives: ``python benchmarks/sizes.py > docs/results/sizes.md``.

The subtle tasks again, in other sizes than those of ``tokenfuse bench retention``. A size that a
model does not see without compression says nothing about compression.
"""

import argparse

import numpy as np
import torch

from tokenfuse.bench.markdown import table
from tokenfuse.bench.micro import LONGEST
from tokenfuse.bench.retention.summary import COUNTED
from tokenfuse.compression import compress_prompt, prompt_adapter
from tokenfuse.config import get_configuration
from tokenfuse.inference.generate import answers
from tokenfuse.inference.inputs import batch_inputs
from tokenfuse.inference.load import load
from tokenfuse.micro import INSTRUMENTS
from tokenfuse.micro.motion import MOTIONS
from tokenfuse.micro.questions import SUBTLE
from tokenfuse.micro.strata import STRATA, Stratum, make_stratum_clip
from tokenfuse.registry import default_registry

SIZES = {
    "hue": (15, 30, 60, 120),
    "patch": (2, 4, 8, 12),
    "gap": (1, 2, 4, 8),
    "drift": (0.5, 1, 2, 3),
    "vanish": (8, 12, 16, 20),
}
UNITS = {"hue": "degrees", "drift": "pixels per patch"}
SETTINGS = {
    "published-third": "ttf-third",
    "published-third-time": {"strategy": "ttf-third", "order": "time"},
    "first": "ttf-first",
    "causal": "ttf-causal",
    "uniform": {"strategy": "uniform", "keep_ratio": 0.33},
}
PATCHES = 8
PAGE = """\
# How small a difference survives

Retention in per cent, `plain` / `robust`, of the subtle tasks by the size of the difference, at a
third of the tokens, beside the right answers without compression: {clips} clips of each motion,
with the same objects in every size. A token is 16 × 16 pixels. In parentheses where a model answers
less than {counted:.0%} without compression, so that there is little to lose. The settings are those
of [Retention](retention/index.md).

{table}
```console
$ python benchmarks/sizes.py --clips {clips} > docs/results/sizes.md
```
"""


def right(model, processor, adapter, clips, inputs, config):
    short = inputs
    if config is not None:
        short = compress_prompt(adapter, adapter.read(inputs), get_configuration(config))
    given = answers(model, processor, short, max_new_tokens=LONGEST)
    return np.mean([a == clip.question.answer for a, clip in zip(given, clips, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=10, help="clips per stratum")
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {}
    for name, folder in INSTRUMENTS.items():
        model, processor = load(folder)
        models[name] = model, processor, prompt_adapter(model, default_registry())
    rows = []
    for task in SUBTLE:
        strata = [s for s in STRATA if s.task == task]
        for size in SIZES[task]:
            # Of other seeds than the benchmark's, and of no two strata the same.
            clips = [
                make_stratum_clip(
                    Stratum(task, s.motion, size),
                    100_000 + 1000 * MOTIONS.index(s.motion) + seed,
                    patches=PATCHES,
                    measured=False,
                )
                for s in strata
                for seed in range(args.clips)
            ]
            found = []
            for model, processor, adapter in models.values():
                inputs = batch_inputs(
                    processor,
                    [clip.video for clip in clips],
                    [clip.question.text for clip in clips],
                )
                whole = right(model, processor, adapter, clips, inputs, None)
                row = [f"{100 * whole:.0f}"]
                for config in SETTINGS.values():
                    share = right(model, processor, adapter, clips, inputs, config) / whole
                    row.append(f"{100 * share:.0f}" if whole >= COUNTED else f"({100 * share:.0f})")
                found.append(row)
            cells = [" / ".join(pair) for pair in zip(*found, strict=True)]
            unit = UNITS.get(task, "pixels")
            rows.append([task, f"{size:g} {unit}", *cells])
    shown = table(["task", "size", "uncompressed", *SETTINGS], rows)
    print(PAGE.format(clips=args.clips, counted=COUNTED, table=shown), end="")


if __name__ == "__main__":
    main()
