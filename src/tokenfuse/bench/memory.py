"""How much memory a run takes at most, beyond what was there before it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Measure the block; the function it yields tells the bytes afterwards.

    Counted are tensors that are made inside, so neither weights nor inputs. On CUDA the allocator
    counts them, on all devices together; elsewhere every operation is watched, which slows the
    block down: do not time it.
    """
    if device.type != "cuda":
        with _Watch() as watch:
            yield lambda: watch.peak
        return
    devices = range(torch.cuda.device_count())
    for each in devices:
        torch.cuda.synchronize(each)
        torch.cuda.reset_peak_memory_stats(each)
    before = sum(map(torch.cuda.memory_allocated, devices))
    yield lambda: sum(map(torch.cuda.max_memory_allocated, devices)) - before


class _Watch(TorchDispatchMode):
    """Adds up the storages that operations make and the ones that are gone again."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # What an operation was given was there before: a view or an output in place is nothing new.
        self._known.update(_storages((args, kwargs)))
        output = function(*args, **(kwargs or {}))
        for storage in _storages(output):
            if storage not in self._known:
                self._known.add(storage)
                weakref.finalize(storage, self._free, storage.nbytes())
                self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        return output

    def _free(self, count: int) -> None:
        self.live -= count


def _storages(tree: Any) -> list[Any]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
