"""Runners of vLLM: that they ask the model for positions, and read no configuration in vain."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

from tokenfuse.errors import ConfigError
from tokenfuse.integrations.vllm import KEY, MODELS

RUNNERS = {
    "vllm.v1.worker.gpu_model_runner": "GPUModelRunner",
    "vllm.v1.worker.cpu_model_runner": "CPUModelRunner",
    "vllm.v1.worker.gpu.model_runner": "GPUModelRunner",
}
"""The runner of old, that of CPUs on top of it, and the new one of GPUs."""
_wrapped: set[Any] = set()
"""The methods that are marked already: vLLM may call a plug-in twice in one process."""


def mark_runners() -> None:
    """Let every runner refuse a model that would leave its configuration unread."""
    for module, name in RUNNERS.items():
        try:
            runner = getattr(import_module(module), name)
        except ImportError:  # of another kind of machine
            continue
        # A class inherits: each is marked once, by what it defines itself.
        if "load_model" in vars(runner) and runner.load_model not in _wrapped:
            runner.load_model = _marked(runner.load_model)


def _marked(load_model: Any) -> Any:
    """Raises ConfigError for a model that would leave its configuration unread."""

    @functools.wraps(load_model)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = load_model(self, *args, **kwargs)
        model = self.get_model()
        if getattr(model, "tokenfuse", None) is not None:
            # Runners of GPUs look at the model's configuration; on a CPU none does.
            self.is_multimodal_pruning_enabled = True
        elif getattr(self.model_config.hf_config, KEY, None) is not None:
            raise ConfigError(
                f"hf_overrides[{KEY!r}] is given, and tokenfuse does not know this vLLM's "
                f"{type(model).__name__}; expected a version that tokenfuse knows and one of "
                f"{', '.join(MODELS)}, or no {KEY!r}"
            )
        return found

    _wrapped.add(load)
    return load
