"""Wall-clock milliseconds of consecutive steps, right on a GPU too."""

from __future__ import annotations

import time
from itertools import pairwise

import torch


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
