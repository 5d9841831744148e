"""Runners of vLLM that have to ask the model for positions, which only it knows."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

RUNNERS = {
    "vllm.v1.worker.gpu_model_runner": "GPUModelRunner",
    "vllm.v1.worker.cpu_model_runner": "CPUModelRunner",
}


def mark_runners() -> None:
    """Let every runner that loads a model of tokenfuse ask it for positions.

    vLLM does so where its own pruning is on, and never on a CPU.
    """
    for module, name in RUNNERS.items():
        runner = getattr(import_module(module), name)
        # A class inherits: each is marked once, by what it defines itself.
        if "load_model" in vars(runner) and not hasattr(runner.load_model, "tokenfuse"):
            runner.load_model = _marked(runner.load_model)


def _marked(load_model: Any) -> Any:
    @functools.wraps(load_model)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = load_model(self, *args, **kwargs)
        if getattr(self.get_model(), "tokenfuse", None) is not None:
            self.is_multimodal_pruning_enabled = True
        return found

    load.tokenfuse = True  # type: ignore[attr-defined]
    return load
