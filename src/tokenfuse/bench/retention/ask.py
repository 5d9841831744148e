"""Ask one model all questions of a plan under every setting.

The vision tower sees the clips of a task once; the batch is the same for all settings, and in every
run, so that equal settings give equal answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenfuse.bench.encoded import EncodedPrompt
from tokenfuse.bench.micro import LONGEST
from tokenfuse.bench.retention.plan import BLIND, CHECKS, UNCOMPRESSED, UNDECIDED, Plan, Setting
from tokenfuse.bench.retention.records import Answers, Clips, Described, Header, Records
from tokenfuse.compression import prompt_adapter
from tokenfuse.config import Configuration, get_strategy
from tokenfuse.costs import versions
from tokenfuse.errors import ConfigError
from tokenfuse.inference.generate import decode, generate
from tokenfuse.inference.inputs import batch_inputs
from tokenfuse.inference.load import load
from tokenfuse.micro.questions import SUBTLE, StratumTask
from tokenfuse.micro.strata import StratumClip, make_stratum_clip
from tokenfuse.plan import FusionPlan
from tokenfuse.registry import default_registry

Tick = Callable[[str, int], None]
"""Hears of each setting of each task when it is done: what was done, and how many answers."""


def ask(
    name: str, source: Path, plan: Plan, chosen: Sequence[Setting], records: Records, tick: Tick
) -> None:
    """Add to ``records`` what they lack of the plan.

    Raises ConfigError or UnsupportedModelError.
    """
    model, processor = load(source)
    records.begin(
        Header(
            model=name,
            sha256=fingerprint(model),
            questions=plan.questions,
            patches=plan.patches,
            seed=plan.seed,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            versions=versions(),
        )
    )
    for setting in chosen:
        if setting.key not in records.described:
            records.append(Described(setting=setting.key, config=setting.configuration.describe()))
    for task in plan.tasks:
        missing = list(lacking(plan, chosen, records, task))
        if missing:
            _ask_task(model, processor, plan, task, missing, records, tick)


def lacking(
    plan: Plan, chosen: Sequence[Setting], records: Records, task: StratumTask
) -> Iterator[Setting | str]:
    """The settings, uncompressed and checks first, that have no answers to a task yet.

    Raises ConfigError where there are answers under other motions.
    """
    motions = [stratum.motion for stratum in plan.strata(task)]
    if not motions:
        return
    if task in records.clips and [*records.clips[task].displacement] != motions:
        raise ConfigError(
            f"{records.path} holds answers to {task} under "
            f"{', '.join(records.clips[task].displacement)}; this run has {', '.join(motions)}: "
            "move the file to measure anew, or choose another --out"
        )
    subtle = task in SUBTLE
    for plain in (UNCOMPRESSED, *(c for c in CHECKS if subtle or c != UNDECIDED)):
        if not records.done(task, plain):
            yield plain
    yield from (setting for setting in chosen if not records.done(task, setting.key))


def fingerprint(model: Any) -> str:
    """SHA-256 of the weights, as they are used."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _ask_task(
    model: Any,
    processor: Any,
    plan: Plan,
    task: StratumTask,
    missing: Sequence[Setting | str],
    records: Records,
    tick: Tick,
) -> None:
    clips = [
        make_stratum_clip(stratum, seed, patches=plan.patches)
        for stratum in plan.strata(task)
        for seed in plan.seeds(stratum)
    ]
    if task not in records.clips:
        moved: dict[str, list[float]] = {}
        for clip in clips:
            moved.setdefault(clip.stratum.motion, []).append(round(clip.displacement, 4))
        records.append(Clips(task=task, displacement=moved))
    questions = [clip.question.text for clip in clips]
    inputs = batch_inputs(processor, [clip.video for clip in clips], questions).to(model.device)
    adapter = prompt_adapter(model, default_registry())
    prompt = EncodedPrompt(adapter, inputs)
    for setting in missing:
        strategy = None
        if isinstance(setting, str):
            key, short = setting, _shown(prompt, clips, setting)
        else:
            key, short = setting.key, prompt.shorten(setting.configuration)
            strategy = setting.configuration.strategy
        found = generate(model, short, max_new_tokens=LONGEST, strategy=strategy)
        given = decode(processor, found.ids)
        shown = adapter.placeholders(short, "video") & (short["attention_mask"] != 0)
        left = shown.sum(-1).tolist()
        if found.layers is not None:
            left = [round(count) for count in found.layers.by_row]
        records.append(_answers(clips, key, given, left))
        tick(f"{task}: {key}", len(clips))


def _answers(
    clips: Sequence[StratumClip], key: str, given: Sequence[str], left: Sequence[int]
) -> Answers:
    right: dict[str, str] = {}
    tokens: dict[str, int] = {}
    for clip, text, count in zip(clips, given, left, strict=True):
        motion = clip.stratum.motion
        right[motion] = right.get(motion, "") + "01"[text == clip.question.answer]
        tokens[motion] = tokens.get(motion, 0) + count
    return Answers(task=clips[0].stratum.task, setting=key, right=right, tokens=tokens)


def _shown(prompt: EncodedPrompt, clips: Sequence[StratumClip], check: str) -> Mapping[str, Any]:
    """The inputs without the visual tokens that a check hides."""
    if check == UNCOMPRESSED:
        return prompt.prompt.inputs
    anything = Configuration(get_strategy("uniform"))
    (encoded,) = prompt.encoded(anything)
    plans = []
    for clip, item in zip(clips, encoded.items, strict=True):
        frame = torch.arange(item.num_tokens, device=item.features.device)
        frame //= item.grid[1] * item.grid[2]
        hidden = torch.ones_like(frame, dtype=torch.bool)
        if check != BLIND and clip.decisive is not None:
            hidden = (frame >= clip.decisive[0]) & (frame < clip.decisive[1])
        plans.append(FusionPlan.from_survivors((~hidden).nonzero()[:, 0], item.num_tokens))
    short = prompt.shorten(anything, {"video": plans})
    if check == BLIND:
        # Nothing is shown: a prompt of text.
        return {name: value for name, value in short.items() if name != "mm_encoder_outputs"}
    return short
