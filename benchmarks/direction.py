"""Where ``direction`` is lost: ``python benchmarks/direction.py > docs/results/direction.md``.

The picture is a torus: an object that leaves at one side enters at the other. Clips in which it
does are told apart from the others by its pixels.
"""

import argparse

import numpy as np
import torch

from tokenfuse.bench.markdown import table
from tokenfuse.bench.micro import LONGEST
from tokenfuse.compression import compress_prompt, prompt_adapter
from tokenfuse.config import get_configuration
from tokenfuse.inference.generate import answers
from tokenfuse.inference.inputs import batch_inputs
from tokenfuse.inference.load import load
from tokenfuse.micro import INSTRUMENTS
from tokenfuse.micro.motion import MOTIONS
from tokenfuse.micro.strata import STRATA, make_stratum_clip
from tokenfuse.registry import default_registry

SETTINGS = {
    "uncompressed": None,
    "published-third": "ttf-third",
    "published-third-time": {"strategy": "ttf-third", "order": "time"},
    "first": "ttf-first",
    "causal": "ttf-causal",
    "causal, half": {"strategy": "ttf", "reference": "previous", "keep_ratio": 0.5},
    "evs": {"strategy": "evs", "keep_ratio": 0.33},
    "random": {"strategy": "random", "keep_ratio": 0.33},
}
PATCHES = 8
PAGE = """\
# Where `direction` is lost

Right answers in per cent, `plain` / `robust`, to the question in which direction the object moves.
The picture is a torus: an object that leaves at one side enters at the other, and then stands, at
the end, on the wrong side of where it began. {clips} clips of each of the {strata} strata,
{crossing} of them with such an object; the settings keep a third of the tokens, if their name does
not say otherwise.

{table}
```console
$ python benchmarks/direction.py --clips {clips} > docs/results/direction.md
```
"""


def crosses(frames):
    """Whether the coloured object of a clip ``(2 * patches, H, W, 3)`` crosses an edge."""
    size = frames.shape[1]
    x = frames.astype(np.float32)
    coloured = (x.max(-1) - x.min(-1)) > 80
    angle = 2 * np.pi * (np.arange(size) + 0.5) / size
    for weight in (coloured.sum(2), coloured.sum(1)):
        # The place on a circle, since the object may be at both sides at once.
        place = np.angle((weight * np.exp(1j * angle)).sum(1)) % (2 * np.pi)
        if np.abs(np.diff(place)).max() > np.pi:
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=40, help="clips per stratum")
    args = parser.parse_args()
    torch.set_num_threads(1)
    strata = [s for s in STRATA if s.task == "direction"]
    # Of other seeds than the benchmark's, and of no two strata the same.
    batches = [
        [
            make_stratum_clip(
                s, 100_000 + 1000 * MOTIONS.index(s.motion) + seed, patches=PATCHES, measured=False
            )
            for seed in range(args.clips)
        ]
        for s in strata
    ]
    crossing = np.array([crosses(clip.frames) for clips in batches for clip in clips])
    found = {}
    for name, folder in INSTRUMENTS.items():
        model, processor = load(folder)
        adapter = prompt_adapter(model, default_registry())
        for clips in batches:
            inputs = batch_inputs(
                processor, [clip.video for clip in clips], [clip.question.text for clip in clips]
            )
            for label, config in SETTINGS.items():
                short = inputs
                if config is not None:
                    short = compress_prompt(
                        adapter, adapter.read(inputs), get_configuration(config)
                    )
                given = answers(model, processor, short, max_new_tokens=LONGEST)
                found.setdefault((label, name), []).extend(
                    a == clip.question.answer for a, clip in zip(given, clips, strict=True)
                )
    rows = []
    for label in SETTINGS:
        cells = [
            " / ".join(
                f"{100 * np.array(found[label, name])[where].mean():.1f}" for name in INSTRUMENTS
            )
            for where in (~crossing, crossing)
        ]
        rows.append([label, *cells])
    print(
        PAGE.format(
            clips=args.clips,
            strata=len(strata),
            crossing=int(crossing.sum()),
            table=table(["setting", "stays in the picture", "crosses an edge"], rows),
        ),
        end="",
    )


if __name__ == "__main__":
    main()
