"""One prompt answered and timed with several strategies, and without any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tokenfuse.config import Configuration
from tokenfuse.errors import ConfigError
from tokenfuse.inference.generate import decode, first_token_ms, generate
from tokenfuse.inference.inputs import frames_as_images
from tokenfuse.report import Report
from tokenfuse.sessions.attach import attach
from tokenfuse.sessions.vlm import Session

Say = Callable[[str], None]
"""Hears of each step."""


@dataclass(eq=False)
class Measured:
    """What a model did with one prompt under a strategy, or without one.

    ``text``: the answer. ``logits``: the first token's, ``(V,)`` in fp32 on the CPU. ``timed``:
    milliseconds to the first token, vision and compression included, and the report of that run.
    Figures are of the run of median time, so that the parts in its report are parts of that time.
    """

    configuration: Configuration | None
    text: str
    logits: Float[Tensor, " V"]
    timed: list[tuple[float, Report | None]] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float:
        return self._median[0]

    @property
    def report(self) -> Report:
        """What compression did. Raises RuntimeError where there was none."""
        report = self._median[1]
        if report is None:
            raise RuntimeError("the run was not compressed, so that it has no report")
        return report

    @property
    def _median(self) -> tuple[float, Report | None]:
        ordered = sorted(self.timed, key=lambda run: run[0])
        return ordered[(len(ordered) - 1) // 2]


def measure_answer(
    model: Any,
    processor: Any,
    inputs: Any,
    configuration: Configuration | None,
    *,
    max_new_tokens: int,
) -> Measured:
    """Answer one prompt, which also warms up for ``measure_times``."""
    with _attached(model, inputs, configuration):
        found = generate(model, inputs, max_new_tokens=max_new_tokens)
    return Measured(configuration, decode(processor, found.ids)[0], found.logits[0].cpu())


def measure_times(
    model: Any, inputs: Any, measured: Sequence[Measured], repeats: int, say: Say
) -> None:
    """Add ``repeats`` timings to each. They take turns: the machine's drift is in all alike."""
    for turn in range(repeats):
        say(f"timing the first token, {turn + 1} of {repeats}")
        for one in measured:
            with _attached(model, inputs, one.configuration) as session:
                ms = first_token_ms(model, inputs)
            one.timed.append((ms, session.report if session else None))


def check_repeats(repeats: int) -> None:
    """Raise ConfigError for a number of timings that has no median."""
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}; expected a number of timings, 1 or more")


def _attached(
    model: Any, inputs: Any, configuration: Configuration | None
) -> AbstractContextManager[Session | None]:
    if configuration is None:
        return nullcontext()
    session: Session = attach(model, configuration, frames_as_images=frames_as_images(inputs))
    return session
