"""What each threshold of a strategy removes of one's own clips, and which one removes a share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict

from tokenfuse.bench.plot import Curves
from tokenfuse.compression import encode_prompt, prompt_adapter
from tokenfuse.config import Configuration, get_configuration
from tokenfuse.errors import ConfigError
from tokenfuse.inference.inputs import frames_as_images, video_inputs
from tokenfuse.inference.load import load
from tokenfuse.inference.measure import Say
from tokenfuse.inference.video import read_video
from tokenfuse.registry import default_registry
from tokenfuse.strategies import Strategy
from tokenfuse.tokens import VisualTokens

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
LEAST, MOST = -1.0, 1.0
"""Cosines, between which a threshold is looked for."""
STEPS = 24
"""Halvings of that range: a threshold is found to seven digits."""


class ThresholdRow(BaseModel):
    """What one threshold leaves: the share of all tokens, of each clip's, and of frames.

    ``empty_frames``: the share of frames of which nothing is left.
    """

    model_config = ConfigDict(frozen=True)

    threshold: float
    kept: float
    kept_by_clip: list[float]
    empty_frames: float


class Wanted(BaseModel):
    """The threshold that comes nearest to a wanted share of tokens, and what it leaves."""

    model_config = ConfigDict(frozen=True)

    keep_ratio: float
    found: ThresholdRow


class Calibration(BaseModel):
    """All thresholds, and those for the wanted shares. ``tokens``: of each clip."""

    model_config = ConfigDict(frozen=True)

    strategy: dict[str, Any]
    model: str
    clips: list[str]
    tokens: list[int]
    rows: list[ThresholdRow]
    wanted: list[Wanted]


def check(strategy: Strategy) -> None:
    """Raise ConfigError for a strategy that no threshold decides."""
    if "threshold" not in type(strategy).model_fields or strategy.stage != "pre_llm":
        raise ConfigError(
            f"strategy {strategy.name} has no threshold that says how much stays before the LLM; "
            "expected one such as ttf: others take keep_ratio, which needs no calibration"
        )
    if getattr(strategy, "keep_ratio", None) is not None:
        raise ConfigError(
            "keep_ratio keeps that share whatever the threshold is; expected a strategy without "
            "it, and --keep-ratio for the share that is wanted"
        )


@torch.no_grad()
def calibrate(
    paths: Sequence[str | Path],
    configuration: Configuration,
    *,
    source: str | Path,
    thresholds: Sequence[float] = THRESHOLDS,
    ratios: Sequence[float] = (),
    frames: int | None = None,
    fps: float | None = None,
    say: Say = lambda _: None,
) -> Calibration:
    """Encode clips with a model's vision tower, and plan them at every threshold.

    ``configuration``: the strategy, whose other options stay. ``ratios``: shares of all tokens for
    which the threshold is looked for. ``frames`` or ``fps`` sample each clip as for ``read_video``.
    ``say`` hears of each step.

    Raises ConfigError where no threshold decides or none is given, VideoError for a clip that
    cannot be read, UnsupportedModelError.
    """
    strategy = configuration.strategy
    check(strategy)
    if not paths or not thresholds:
        raise ConfigError("there is no clip or no threshold; expected one of each or more")
    for threshold in thresholds:
        _at(strategy, threshold)
    say("loading the model")
    model, processor = load(source)
    adapter = prompt_adapter(model, default_registry())
    clips: list[list[VisualTokens]] = []
    for number, path in enumerate(paths, 1):
        say(f"encoding {path}, {number} of {len(paths)}")
        video = read_video(path, frames=frames, fps=fps)
        inputs = video_inputs(processor, video, "What?").to(model.device)
        prompt = adapter.read(inputs)
        encoded = encode_prompt(adapter, prompt, strategy, frames_as_images(inputs))
        clips.append([tokens for part in encoded for tokens in part.items])
    rows = []
    for threshold in thresholds:
        say(f"planning at {threshold:g}")
        rows.append(_row(_at(strategy, threshold), threshold, clips))
    wanted = []
    for ratio in ratios:
        say(f"looking for the threshold that keeps {ratio:.0%}")
        wanted.append(Wanted(keep_ratio=ratio, found=_search(strategy, ratio, clips)))
    return Calibration(
        strategy=configuration.describe(),
        model=str(source),
        clips=[str(path) for path in paths],
        tokens=[sum(tokens.num_tokens for tokens in clip) for clip in clips],
        rows=rows,
        wanted=wanted,
    )


def _at(strategy: Strategy, threshold: float) -> Strategy:
    return strategy.with_options(threshold=threshold)


def _row(
    strategy: Strategy, threshold: float, clips: Sequence[Sequence[VisualTokens]]
) -> ThresholdRow:
    kept, total, empty, frames = [], [], 0, 0
    for clip in clips:
        left = 0
        for tokens in clip:
            plan = strategy.plan(tokens)
            left += plan.num_kept
            empty += int((plan.frame_counts(tokens.grid) == 0).sum())
            frames += tokens.grid[0]
        kept.append(left)
        total.append(sum(tokens.num_tokens for tokens in clip))
    return ThresholdRow(
        threshold=threshold,
        kept=sum(kept) / sum(total),
        kept_by_clip=[part / whole for part, whole in zip(kept, total, strict=True)],
        empty_frames=empty / frames,
    )


def _search(
    strategy: Strategy, ratio: float, clips: Sequence[Sequence[VisualTokens]]
) -> ThresholdRow:
    """The threshold that keeps a share of all tokens, or as near as one can come.

    More is kept the greater the threshold is.
    """
    low, high = LEAST, MOST
    best: ThresholdRow | None = None
    for _ in range(STEPS):
        middle = round((low + high) / 2, 6)
        row = _row(_at(strategy, middle), middle, clips)
        if best is None or abs(row.kept - ratio) < abs(best.kept - ratio):
            best = row
        if row.kept < ratio:
            low = middle
        else:
            high = middle
    assert best is not None
    return best


def curves(result: Calibration) -> Curves:
    """The threshold against tokens kept, a line for each clip and one for all together."""
    lines: dict[str, list[tuple[float, float]]] = {
        "all clips": [(row.kept, row.threshold) for row in result.rows]
    }
    if len(result.clips) > 1:
        for number, clip in enumerate(result.clips):
            # Two folders may hold clips of one name.
            name = Path(clip).name
            name = f"{name} ({number})" if name in lines else name
            lines[name] = [(row.kept_by_clip[number], row.threshold) for row in result.rows]
    title = f"What thresholds of {result.strategy['strategy']} keep of {len(result.clips)} clip(s)"
    return Curves(lines, title, "threshold")


HEAD = ["threshold", "kept", "least of a clip", "most", "empty frames"]


def cells(row: ThresholdRow) -> list[str]:
    """One row of the table, in the order of HEAD."""
    return [
        f"{row.threshold:g}",
        f"{row.kept:.1%}",
        f"{min(row.kept_by_clip):.1%}",
        f"{max(row.kept_by_clip):.1%}",
        f"{row.empty_frames:.1%}",
    ]


def as_yaml(result: Calibration, wanted: Wanted) -> str:
    """The configuration with the threshold that was found, ready to paste."""
    strategy = default_strategy(result)
    options = {**strategy, "threshold": wanted.found.threshold}
    said = f"# keeps {wanted.found.kept:.1%} of these {len(result.clips)} clip(s)"
    return f"{said}\n{yaml.safe_dump(options, sort_keys=False).strip()}"


def default_strategy(result: Calibration) -> dict[str, Any]:
    """The strategy's options that are not at their defaults."""
    plain = get_configuration(result.strategy["strategy"]).describe()
    return {
        name: value
        for name, value in result.strategy.items()
        if name == "strategy" or plain.get(name) != value
    }
