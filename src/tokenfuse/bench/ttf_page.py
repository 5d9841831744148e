"""The page of what ``ttf`` removes of real videos: ``python -m tokenfuse.bench.ttf_page FILE...``.

Each file is a safetensors file with ``features (N, D)`` of one video; its metadata say the
``grid`` as ``T,H,W``, the ``clip`` and the ``tower``. The page goes to standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tokenfuse.bench.markdown import table
from tokenfuse.errors import ConfigError
from tokenfuse.strategies.ttf import TTF
from tokenfuse.tokens import Grid, VisualTokens

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
WINDOWS = (1, 3, 5, 7)
FORMS: Mapping[str, Mapping[str, Any]] = {
    "published: `anchor: auto`": {},
    "`anchor: first`": {"anchor": "first"},
    "`anchor: first`, `segments: auto` (`ttf-first`)": {"anchor": "first", "segments": "auto"},
    "`segments: auto`": {"segments": "auto"},
    "`reference: previous` (`ttf-causal`)": {"reference": "previous"},
    "published, `guard: motion`": {"guard": "motion"},
    "`ttf-first`, `guard: motion`": {"anchor": "first", "segments": "auto", "guard": "motion"},
    "`ttf-causal`, `guard: motion`": {"reference": "previous", "guard": "motion"},
}

HEAD = """\
# What `ttf` removes of real videos

<!-- Made by: python -m tokenfuse.bench.ttf_page FILE... -->

The micro models' own features are far more alike than those of a large tower. These are the tokens
that DINOv2-S makes of two real clips, one with a camera that stands still for most of the time
(`bigbuckbunny`), one with a camera that moves (`bikes`): the share of tokens removed, in per cent,
by threshold, form and window. How many answers that costs, features alone cannot say.

What they do say:

- **A higher threshold never removes more**, whatever the other options are: neither anchors nor
  matches depend on it. Tests hold it on these features and on random ones.
- **The anchor in the middle removes most.** Under a moving camera the first frame soon shows
  nothing of what the others do; the frame before always does.
- **`segments: auto` helps the first frame**, which needs new anchors as the camera moves on, and
  changes little for `anchor: auto`.
- **`guard: motion` removes less**, at 0.7 by 3 to 11 points against the frame before and by 6 to
  17 with an anchor: where nothing repeats exactly, neighbours seldom agree on one shift. On the
  synthetic clips it keeps answers at a fixed threshold and changes nothing at a fixed share of
  tokens ([Does compression cost answers?](../explanation/retention.md)), so no recommended preset
  has it.

"""

TAIL = """
The first command makes a page of the slices that the repository holds, the second one of any
files of such features. The whole clips are 3 MB each and are not in the repository; the slices are
every second frame of their middle 8 × 8 places.

```console
$ python -m tokenfuse.bench.ttf_page tests/data/bikes-slice.safetensors \\
      tests/data/bigbuckbunny-slice.safetensors
$ python -m tokenfuse.bench.ttf_page FILE...
```
"""


def read(path: Path) -> tuple[VisualTokens, dict[str, str]]:
    """The tokens of one file, fp32, and its metadata. Raises ConfigError."""
    try:
        with safe_open(path, "pt") as file:
            features, about = file.get_tensor("features"), file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} is no safetensors file with features: {error}; expected features (N, D)"
        ) from error
    try:
        t, h, w = map(int, about["grid"].split(","))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{path} says no grid in its metadata; expected grid: T,H,W, such as 16,16,16"
        ) from error
    grid: Grid = (t, h, w)
    return VisualTokens.from_grid(features.to(torch.float32), grid), about


def removed(tokens: VisualTokens, **options: Any) -> str:
    """The share of tokens that a configuration of ``ttf`` removes, in per cent."""
    plan = TTF(**options).plan(tokens)
    return f"{100 * (1 - plan.num_kept / plan.num_source):.1f}"


def section(name: str, tokens: VisualTokens, about: Mapping[str, str]) -> str:
    """The tables of one video."""
    t, h, w = tokens.grid
    made = " ".join(f"{about[key]}." for key in ("clip", "tower") if key in about)
    thresholds = [f"{value:g}" for value in THRESHOLDS]
    forms = table(
        ("form", *thresholds),
        [
            (form, *(removed(tokens, threshold=value, **options) for value in THRESHOLDS))
            for form, options in FORMS.items()
        ],
    )
    windows = table(
        ("published, window", *thresholds),
        [
            (
                f"{window} × {window}",
                *(removed(tokens, threshold=value, window=window) for value in THRESHOLDS),
            )
            for window in WINDOWS
        ],
    )
    return f"## {name}\n\n{t} frames of {h} × {w} tokens. {made}\n\n{forms}\n{windows}\n"


def main(paths: Sequence[str]) -> str:
    """The page. Raises ConfigError."""
    names = [Path(path) for path in paths]
    return HEAD + "".join(section(path.stem, *read(path)) for path in names) + TAIL.lstrip("\n")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tokenfuse.bench.ttf_page FILE...")
    try:
        sys.stdout.write(main(sys.argv[1:]))
    except ConfigError as problem:
        sys.exit(str(problem))
