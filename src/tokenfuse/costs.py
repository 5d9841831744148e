"""What a prompt costs: FLOPs, bytes and milliseconds, and their units for people."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch

FLOPS_FORMULA = (
    "multiply-adds, counted once: layers * (L * (2*h*q + 2*h*kv + 3*h*f) + L^2 * q), "
    "causal; L prompt length, h hidden, q and kv query and key width, "
    "f feed-forward width (active experts)"
)


def versions() -> dict[str, str]:
    """Versions of what decides the figures."""
    names = ("tokenfuse", "torch", "transformers")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def prefill_flops(config: Any, lengths: Sequence[int]) -> int:
    """Multiply-adds of the decoder over prompts of these lengths, by FLOPS_FORMULA."""
    return layered_prefill_flops(config, [lengths] * config.num_hidden_layers)


def layered_prefill_flops(config: Any, lengths: Sequence[Sequence[int]]) -> int:
    """The same where each layer reads prompts of its own ``lengths``, layer by layer."""
    hidden, head = config.hidden_size, _head_dim(config)
    q: int = config.num_attention_heads * head
    kv = config.num_key_value_heads * head
    experts = getattr(config, "num_experts_per_tok", None)
    wide = config.moe_intermediate_size * experts if experts else config.intermediate_size
    weights: int = 2 * hidden * q + 2 * hidden * kv + 3 * hidden * wide
    return sum(n * weights + n * n * q for layer in lengths for n in layer)


def kv_cache_bytes(config: Any, lengths: Sequence[int], element_bytes: float) -> int:
    """Bytes of keys and values that prompts of these lengths leave in the cache.

    Other layers than attention keep a state whose size does not depend on the length.
    """
    return layered_kv_cache_bytes(config, [lengths] * config.num_hidden_layers, element_bytes)


def layered_kv_cache_bytes(
    config: Any, lengths: Sequence[Sequence[int]], element_bytes: float
) -> int:
    """The same where each layer keeps prompts of its own ``lengths``, layer by layer."""
    pairs = zip(attends(config), lengths, strict=True)
    kept = sum(sum(layer) for attention, layer in pairs if attention)
    return int(2 * config.num_key_value_heads * _head_dim(config) * element_bytes * kept)


def attends(config: Any) -> list[bool]:
    """Which layers of a decoder are attention, not linear attention or a convolution."""
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    return [kind.endswith("attention") and not kind.startswith("linear") for kind in kinds]


def _head_dim(config: Any) -> int:
    head = getattr(config, "head_dim", None)
    return int(head or config.hidden_size // config.num_attention_heads)


def size(count: float) -> str:
    """Bytes for people: ``1.2 MB``."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def flops(count: float) -> str:
    """FLOPs for people: ``0.16 GFLOPs``."""
    return _scaled(count, ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs"))


def _scaled(count: float, units: Sequence[str]) -> str:
    *smaller, largest = units
    for unit in smaller:
        # From 999.5 on, three digits would read 1e+03.
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {largest}" if abs(count) < 999.5 else f"{count:.0f} {largest}"


class Stopwatch:
    """``lap()`` ends a step; ``read()`` the milliseconds of each. On CUDA one synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._events: list[torch.Event] = []
        self._marks: list[float] = []
        self.lap()

    def lap(self) -> None:
        """End a step."""
        if self._stream is None:
            self._marks.append(time.perf_counter())
            return
        event = torch.Event(self._stream.device, enable_timing=True)
        event.record(self._stream)
        self._events.append(event)

    def read(self) -> list[float]:
        """Milliseconds of each step so far."""
        if self._stream is None:
            return [(b - a) * 1e3 for a, b in pairwise(self._marks)]
        self._events[-1].synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(self._events)]


def free_bytes() -> int | None:
    """Memory of this machine that is free, None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            values = dict(line.split(":", 1) for line in lines)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None
