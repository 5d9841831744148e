"""Wall-clock milliseconds of consecutive steps, right on a GPU too."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """``lap()`` ends a step; ``read()`` gives each step's milliseconds, with one synchronisation on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[float | torch.cuda.Event] = []
        self.lap()

    def lap(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def read(self) -> list[float]:
        laps = []
        if self._cuda:
            torch.cuda.synchronize()
        for a, b in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(a, torch.cuda.Event) and isinstance(b, torch.cuda.Event):
                laps.append(a.elapsed_time(b))
            elif isinstance(a, float) and isinstance(b, float):
                laps.append((b - a) * 1e3)
        return laps
