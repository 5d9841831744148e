"""Accuracy of every strategy on the micro model's tasks.

Clips and questions are those of ``tokenfuse.micro.tasks.held_out``. The vision tower sees each clip
once for all strategies that want the same of it: without that it would take most of the time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field

from tokenfuse.bench.candidates import UNCOMPRESSED, Candidate, Row, candidates
from tokenfuse.bench.compare import divergence, why
from tokenfuse.bench.encoded import EncodedPrompt
from tokenfuse.compression import prompt_adapter
from tokenfuse.costs import versions
from tokenfuse.errors import ConfigError
from tokenfuse.inference.generate import decode, generate
from tokenfuse.inference.inputs import batch_inputs, refuse_images_only
from tokenfuse.inference.load import load
from tokenfuse.inference.measure import Say
from tokenfuse.micro import CHECKPOINT
from tokenfuse.micro.tasks import TASKS, Clip, Question, Task, held_out
from tokenfuse.registry import Registry, default_registry

OWN_MODEL = "tokenfuse.micro"
"""What scores call the micro model: a path of one machine means nothing elsewhere."""
LONGEST = 6
"""Tokens that an answer may have; those of the micro model have up to three."""
BATCH = 20


class TaskScore(BaseModel):
    """Counts and sums over the questions of one task.

    ``right`` answers are right to the letter, ``same`` ones equal the uncompressed model's. ``kl``
    is the sum of KL(uncompressed || compressed) of the first token in nats. ``tokens_after`` are
    those that a decoder layer reads, on average over layers.
    """

    model_config = ConfigDict(frozen=True)

    questions: int = 0
    right: int = 0
    same: int = 0
    kl: float = 0.0
    tokens_before: int = 0
    tokens_after: int = 0
    plan_ms: float = 0.0

    def __add__(self, other: TaskScore) -> TaskScore:
        mine, more = dict(self), dict(other)
        return TaskScore(**{name: mine[name] + more[name] for name in mine})


class Score(Row):
    """The answers of one candidate to the questions of every task.

    ``kept`` is the share of tokens that survived; ``kl`` and ``plan_ms`` are means over the
    questions.
    """

    tasks: dict[Task, TaskScore] = Field(default_factory=dict)

    @property
    def total(self) -> TaskScore:
        """All tasks together."""
        return sum(self.tasks.values(), TaskScore())

    @computed_field  # type: ignore[prop-decorator] # mypy refuses any decorator on a property
    @property
    def accuracy(self) -> float | None:
        """Share of right answers over all tasks."""
        return self._share("right")

    @computed_field  # type: ignore[prop-decorator] # mypy refuses any decorator on a property
    @property
    def agreement(self) -> float | None:
        """Share of answers that equal the uncompressed model's."""
        return self._share("same")

    @computed_field  # type: ignore[prop-decorator] # mypy refuses any decorator on a property
    @property
    def kl(self) -> float | None:
        return self._share("kl")

    @computed_field  # type: ignore[prop-decorator] # mypy refuses any decorator on a property
    @property
    def plan_ms(self) -> float | None:
        return self._share("plan_ms")

    @computed_field  # type: ignore[prop-decorator] # mypy refuses any decorator on a property
    @property
    def kept(self) -> float | None:
        total = self.total
        return total.tokens_after / total.tokens_before if total.tokens_before else None

    def _share(self, name: str) -> float | None:
        total = self.total
        return getattr(total, name) / total.questions if total.questions else None


class Benchmark(BaseModel):
    """All scores, the uncompressed model's first. ``questions`` are per task."""

    model_config = ConfigDict(frozen=True)

    model: str
    questions: int
    device: str
    dtype: str
    versions: dict[str, str]
    scores: list[Score]

    @property
    def settings(self) -> dict[str, Any]:
        """What has to agree for scores to stand side by side."""
        return self.model_dump(exclude={"scores"})


def benchmark(
    questions: int,
    names: Sequence[str] = (),
    ratios: Sequence[float] = (0.33,),
    *,
    source: str | Path = CHECKPOINT,
    tasks: Sequence[Task] = TASKS,
    keep: Path | None = None,
    say: Say = lambda _: None,
) -> Benchmark:
    """Ask ``questions`` questions of each task, uncompressed and with every strategy and ratio.

    ``names`` as in ``candidates``; all strategies if empty. ``keep`` is a JSON file: scores that it
    holds are not measured again, and each task is added to it when done. ``say`` hears of each
    step. Raises ConfigError where ``keep`` holds scores of other settings.
    """
    registry = default_registry()
    # What is wrong is said before the model, which may be large, is loaded.
    candidates(names, ratios, None, registry)
    say("loading the model")
    model, processor = load(source)
    refuse_images_only(processor)
    chosen = candidates(names, ratios, prompt_adapter(model, registry), registry)
    result = Benchmark(
        model=OWN_MODEL if source == CHECKPOINT else str(source),
        questions=questions,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        versions=versions(),
        scores=[],
    )
    known = _read(keep, result.settings) if keep else []
    scores = {candidate: _resume(candidate, known) for candidate in (UNCOMPRESSED, *chosen)}
    # What the file holds beside these stays in it.
    ours = {_key(score) for score in scores.values()}
    others = [score for score in known if _key(score) not in ours]
    began, asked = time.perf_counter(), 0
    for task in tasks:
        missing = [c for c, score in scores.items() if not score.reason and task not in score.tasks]
        if missing:
            groups = list(_batches(held_out(task, questions)))
            sums: dict[Candidate, TaskScore] = {}
            for i, group in enumerate(groups):
                say(f"{task}: questions {_span(groups, i)} of {questions}, {len(missing)} rows")
                for candidate, score in _ask(model, processor, group, missing, registry).items():
                    if isinstance(score, str):
                        scores[candidate] = scores[candidate].model_copy(
                            update={"reason": score, "tasks": {}}
                        )
                    else:
                        sums[candidate] = sums.get(candidate, TaskScore()) + score
                        asked += score.questions
                missing = [c for c in missing if not scores[c].reason]
            for candidate in missing:
                done = {**scores[candidate].tasks, task: sums[candidate]}
                scores[candidate] = scores[candidate].model_copy(update={"tasks": done})
        result = result.model_copy(update={"scores": [*scores.values(), *others]})
        if keep:
            write(keep, result.model_dump_json(indent=2) + "\n")
    seconds = time.perf_counter() - began
    if asked:
        say(f"{asked} answers in {seconds:.0f} s, {asked / seconds:.0f} per second")
    # An earlier run that was stopped may have left others half done.
    whole = [
        s for s in result.scores if s.reason or s.tasks.keys() == result.scores[0].tasks.keys()
    ]
    return result.model_copy(update={"scores": whole})


def interval(right: int, questions: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a share, from counts."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = right / questions, z * z / questions
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * (share * (1 - share) / questions + weight / questions / 4) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def write(path: Path, text: str) -> None:
    """Write a file so that it is never seen half-written."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _read(path: Path, settings: Mapping[str, Any]) -> list[Score]:
    if not path.exists():
        return []
    try:
        held = Benchmark.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(
            f"{path} exists and holds no scores of this command: move it, or choose another --out"
        ) from error
    wrong = [name for name, value in settings.items() if held.settings[name] != value]
    if wrong:
        name = wrong[0]
        raise ConfigError(
            f"{path} holds scores for {name} {held.settings[name]}; this run has {settings[name]}: "
            "move the file to measure anew, or choose another --out"
        )
    return held.scores


def _resume(candidate: Candidate, known: Sequence[Score]) -> Score:
    """The score that the file has of a candidate, or an empty one."""
    fresh = Score.of(candidate)
    held = next((score for score in known if _key(score) == _key(fresh)), None)
    # Options may have changed since, and a reason may be gone.
    return held if held and held.options == fresh.options and not held.reason else fresh


def _key(score: Score) -> tuple[str, float | None]:
    return score.strategy, score.keep_ratio


def _batches(asked: Sequence[tuple[Clip, Question]]) -> Iterator[list[tuple[Clip, Question]]]:
    """Batches of clips of one length, so that hardly anything is padding."""
    for _, group in groupby(asked, key=lambda pair: len(pair[0].frames)):
        same = list(group)
        for start in range(0, len(same), BATCH):
            yield same[start : start + BATCH]


def _span(groups: Sequence[Sequence[Any]], at: int) -> str:
    before = sum(map(len, groups[:at]))
    return f"{before + 1} to {before + len(groups[at])}"


@torch.no_grad()
def _ask(
    model: Any,
    processor: Any,
    group: Sequence[tuple[Clip, Question]],
    chosen: Sequence[Candidate],
    registry: Registry,
) -> dict[Candidate, TaskScore | str]:
    """What each candidate scores on one batch, or why it cannot."""
    videos, questions = [clip.video for clip, _ in group], [question for _, question in group]
    inputs = batch_inputs(processor, videos, [question.text for question in questions])
    inputs = inputs.to(model.device)
    expected = [question.answer for question in questions]
    whole = generate(model, inputs, max_new_tokens=LONGEST)
    plain = decode(processor, whole.ids)
    prompt = EncodedPrompt(prompt_adapter(model, registry), inputs)
    scores: dict[Candidate, TaskScore | str] = {}
    for candidate in chosen:
        if candidate.configuration is None:
            scores[candidate] = _score(plain, plain, expected)
            continue
        try:
            short = prompt.shorten(candidate.configuration)
            strategy = candidate.configuration.strategy
            found = generate(model, short, max_new_tokens=LONGEST, strategy=strategy)
        except Exception as error:
            scores[candidate] = why(error)
            continue
        after, plan_ms = float(short.report.tokens_after), short.report.plan_ms
        if found.layers is not None:
            after, plan_ms = found.layers.average, plan_ms + found.layers.score_ms
        scores[candidate] = _score(decode(processor, found.ids), plain, expected).model_copy(
            update={
                "kl": float(divergence(whole.logits, found.logits).sum()),
                "tokens_before": short.report.tokens_before,
                "tokens_after": round(after),
                "plan_ms": plan_ms,
            }
        )
    return scores


def _score(given: Sequence[str], plain: Sequence[str], expected: Sequence[str]) -> TaskScore:
    return TaskScore(
        questions=len(given),
        right=sum(map(str.__eq__, given, expected)),
        same=sum(map(str.__eq__, given, plain)),
    )
