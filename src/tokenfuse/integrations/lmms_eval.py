"""Models for lmms-eval that compress their prompts: ``lmms-eval --model tokenfuse_qwen3_vl``.

lmms-eval finds ``manifest`` by the entry-point group ``lmms_eval.models`` and asks for the classes
that it names; nothing of lmms-eval is imported before.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from tokenfuse.config import KEY, PROMPT_OPTIONS, Configuration, get_configuration
from tokenfuse.costs import versions
from tokenfuse.errors import ConfigError, did_you_mean
from tokenfuse.hooks import hookimpl
from tokenfuse.registry import Registry, default_registry
from tokenfuse.report import Report
from tokenfuse.sessions.attach import attach

NAME = "tokenfuse_qwen3_vl"
CLASSES = {"Qwen3VLSimple": "simple", "Qwen3VLChat": "chat"}
"""Classes that this module makes when asked, and where in lmms-eval's models their base is."""


def manifest() -> Any:
    """The ModelManifest for lmms-eval. Raises ConfigError if lmms-eval is not installed."""
    paths = {f"{kind}_class_path": f"{__name__}.{name}" for name, kind in CLASSES.items()}
    return _load("lmms_eval.models.registry_v2").ModelManifest(model_id=NAME, **paths)


def __getattr__(name: str) -> Any:
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = compressing(_load(f"lmms_eval.models.{CLASSES[name]}.qwen3_vl").Qwen3_VL)
    made.__name__ = made.__qualname__ = name
    globals()[name] = made
    return made


def split_args(
    given: Mapping[str, Any], own: Iterable[str]
) -> tuple[dict[str, Any], Configuration | None]:
    """Model arguments apart: those named in ``own``, and the strategy that the others make.

    Without ``strategy``, or with ``strategy=none``, there is none. Raises ConfigError for a name
    that is neither the model's nor the strategy's, and for a value that the strategy refuses.
    """
    own = set(own)
    kept = {name: value for name, value in given.items() if name in own}
    options = {name: value for name, value in given.items() if name not in own}
    source = options.pop(KEY, "none")
    if source == "none":
        for name in options:
            raise ConfigError(
                f"model argument {name} is not the model's, and there is no {KEY} that could take "
                f"it: {did_you_mean(name, {KEY, *own})}"
            )
        return kept, None
    try:
        return kept, get_configuration(source, **options)
    except ConfigError as error:
        fields = {*PROMPT_OPTIONS} | {
            name for e in default_registry().strategies.values() for name in e.cls.model_fields
        }
        for name in options.keys() - fields:
            raise ConfigError(f"{error}; of the model: {did_you_mean(name, own)}") from None
        raise


@dataclass(eq=False)
class Measured:
    """What compression did to all prompts of a run. ``left_whole``: prompts by reason."""

    prompts: int = 0
    tokens_before: int = 0
    tokens_after: int = 0
    plan_ms: float = 0.0
    left_whole: Counter[str] = field(default_factory=Counter)

    @hookimpl
    def tokenfuse_compressed(self, report: Report) -> None:
        """Add the figures of one report."""
        self.prompts += len(report.prompt_before)
        self.tokens_before += report.tokens_before
        self.tokens_after += report.tokens_after
        self.plan_ms += report.plan_ms
        reasons = {report.reason, *(item.reason for item in report.items)}
        self.left_whole.update(reason for reason in reasons if reason)

    def summary(self) -> dict[str, Any]:
        """The figures for a results file."""
        return {
            "prompts": self.prompts,
            "tokens_before": self.tokens_before,
            "tokens_after": self.tokens_after,
            "reduction": 1 - self.tokens_after / self.tokens_before if self.tokens_before else 0.0,
            "mean_plan_ms": self.plan_ms / self.prompts if self.prompts else 0.0,
            "left_whole": dict(self.left_whole),
        }


def compressing(base: Any) -> Any:
    """A subclass of ``base``, a model class of lmms-eval, whose prompts a strategy compresses."""

    class Compressing(base):
        def __init__(self, **given: Any) -> None:
            parameters = inspect.signature(base).parameters.values()
            kept, self.configuration = split_args(
                given, [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
            )
            if not str(kept.get("device", "cuda")).startswith("cuda"):
                # By default lmms-eval's class sends inputs to a GPU, whatever the device.
                kept.setdefault("device_map", kept["device"])
            self.measured = Measured()
            self._registry = Registry([self.measured])
            _write_into_results()
            super().__init__(**kept)
            if self.configuration is not None:
                # A strategy that this model cannot take is refused before any prompt.
                attach(self.model, self.configuration, registry=self._registry).detach()

        def generate_until(self, requests: Any) -> Any:
            if self.configuration is None:
                return super().generate_until(requests)
            with attach(self.model, self.configuration, registry=self._registry):
                return super().generate_until(requests)

        def tokenfuse_summary(self) -> dict[str, Any]:
            if self.configuration is None:
                return {"strategy": None, "versions": versions()}
            # Of several processes the first writes the results, and knows its own prompts only.
            figures = self.measured.summary() | {"processes": self.world_size}
            return {"strategy": self.configuration.describe(), "versions": versions()} | figures

    return Compressing


def _load(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{NAME} needs lmms-eval, which cannot be imported ({error}): "
            'pip install ".[eval]" in a checkout of tokenfuse'
        ) from error


def _write_into_results() -> None:
    """Have the evaluator add the summary: it has no hook by which a model could do so itself."""
    evaluator = _load("lmms_eval.evaluator")
    original = evaluator.evaluate
    if hasattr(original, "tokenfuse"):
        return

    @functools.wraps(original)
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        results = original(*args, **kwargs)
        summary = getattr(kwargs.get("lm"), "tokenfuse_summary", None)
        # Processes other than the first get no results.
        if results is not None and summary is not None:
            results["tokenfuse"] = summary()
            _load("loguru").logger.info(f"tokenfuse: {results['tokenfuse']}")
        return results

    evaluate.tokenfuse = True  # type: ignore[attr-defined] # marks it as ours
    evaluator.evaluate = evaluate
