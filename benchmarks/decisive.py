"""Which decisive tokens survive: ``python benchmarks/decisive.py > docs/results/decisive.md``.

For every clip of a subtle stratum the tokens are known in which it differs from the same clip
without its difference. No model answers here: the question is what is left to answer from.
"""

import argparse

import numpy as np
import torch

from tokenfuse import get_strategy
from tokenfuse.bench.markdown import table
from tokenfuse.compression import prompt_adapter
from tokenfuse.inference.inputs import batch_inputs
from tokenfuse.inference.load import load
from tokenfuse.micro import INSTRUMENTS
from tokenfuse.micro.questions import SUBTLE
from tokenfuse.micro.strata import STRATA, make_stratum_clip
from tokenfuse.registry import default_registry

PUBLISHED = {"strategy": "ttf"}
SETTINGS = {
    "ttf as published": PUBLISHED,
    "ttf as published, window 1": PUBLISHED | {"window": 1},
    "ttf as published, guard": PUBLISHED | {"guard": "motion"},
    "ttf, first frame": {"strategy": "ttf", "anchor": "first", "segments": "auto"},
    "ttf, previous frame": {"strategy": "ttf", "reference": "previous"},
    "tome": {"strategy": "tome"},
    "evs": {"strategy": "evs"},
    "uniform": {"strategy": "uniform"},
}
PATCHES = 8
PAGE = """\
# Which decisive tokens survive

Per cent of clips of which at least one token that holds the decisive difference survives, in its
own place and temporal patch, and in parentheses the share of such tokens that do. {clips} clips of
each stratum of the subtle tasks, {keep:.0%} of the tokens kept. No model answers here: this is what
is left to answer from. Held-out seeds; features of the micro model's vision tower.

{table}
```console
$ python benchmarks/decisive.py --clips {clips} --keep-ratio {keep:g} > docs/results/decisive.md
```
"""


def holds(stratum, seed):
    """Which tokens hold the difference, ``(patches * 36,)`` bool."""
    here, without = (
        make_stratum_clip(stratum, seed, patches=PATCHES, decisive=d, measured=False).frames
        for d in (True, False)
    )
    pixels = (here != without).any(-1).reshape(PATCHES, 2, 6, 16, 6, 16)
    return pixels.mean((1, 3, 5)).reshape(-1) > 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=20, help="clips per stratum")
    parser.add_argument("--keep-ratio", type=float, default=0.33)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load(INSTRUMENTS["plain"])
    adapter = prompt_adapter(model, default_registry())
    chosen = {
        name: get_strategy({**config, "keep_ratio": args.keep_ratio})
        for name, config in SETTINGS.items()
    }
    found = {(name, task): {} for name in chosen for task in SUBTLE}
    for stratum in (s for s in STRATA if s.task in SUBTLE):
        clips = [
            make_stratum_clip(stratum, seed, patches=PATCHES, measured=False)
            for seed in range(args.clips)
        ]
        inputs = batch_inputs(
            processor, [clip.video for clip in clips], [clip.question.text for clip in clips]
        )
        with torch.no_grad():
            items = adapter.encode(adapter.read(inputs))[0].items
        camera = stratum.motion if stratum.motion == "still" else stratum.motion[:3]
        for seed, item in enumerate(items):
            decisive = holds(stratum, seed)
            for name, strategy in chosen.items():
                kept = strategy.plan(item).keep_mask.numpy() & decisive
                share = kept.sum() / decisive.sum()
                found[name, stratum.task].setdefault(camera, []).append(share)
    rows = []
    for task in SUBTLE:
        for name in chosen:
            by = found[name, task]
            cells = [np.array(x) for x in (by["still"], by["pan"], by["cut"] + by["fli"])]
            shown = [f"{100 * (x > 0).mean():.0f} ({100 * x.mean():.0f})" for x in cells]
            rows.append([name, task, *shown])
    found = table(["setting", "task", "still", "pan", "cut, flicker"], rows, left=2)
    print(PAGE.format(clips=args.clips, keep=args.keep_ratio, table=found), end="")


if __name__ == "__main__":
    main()
