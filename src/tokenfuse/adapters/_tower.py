"""Vision towers that read some of their patches only."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from tokenfuse.adapters._hooks import Hook


@contextmanager
def packed_tower(tower: Any, grid: Tensor, keep: Bool[Tensor, " N"]) -> Iterator[None]:
    """Let a tower of Qwen's kind read the visual tokens of ``keep`` only, inside the block.

    ``grid (items, 3)``: as the tower gets it. Blocks get fewer patches, with their own rotary
    positions, in shorter sequences; what the mergers make stands in its place among zeros, so that
    the tower and the model find as many features as they expect. Calls in other threads are left
    alone.
    """
    group, merge = tower.spatial_merge_size**2, tower.spatial_merge_size
    order = None
    if hasattr(tower, "fullatt_block_indexes"):
        # Windows follow each other in the tower.
        find = sys.modules[type(tower).__module__].get_vision_window_index
        order = find(grid, merge, tower.window_size, tower.patch_size)[0].to(keep.device)
    here = keep if order is None else keep[order]
    kept = here.nonzero().flatten()
    patches = (kept[:, None] * group + torch.arange(group, device=kept.device)).flatten()
    counts = torch.cat([here.new_zeros(1, dtype=torch.long), here.long().cumsum(0) * group])
    thread = threading.get_ident()
    made: dict[int, tuple[Any, Any]] = {}

    def shorter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != thread:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        if states.shape[0] == len(here) * group:
            states = states[patches]
        # All blocks of a kind get the same tensors.
        changed = {name: _once(made, name, value, cut) for name, value in kwargs.items()}
        if args:
            return (states, *args[1:]), changed
        return args, {**changed, "hidden_states": states}

    def cut(name: str, value: Any) -> Any:
        if name == "cu_seqlens":
            ends = counts[value.long() // group].to(value.dtype)
            # A frame, or a window, of which nothing is left is none.
            return torch.unique_consecutive(ends)
        if name == "max_seqlen" and value is not None:
            return None
        if isinstance(value, tuple):
            return tuple(x[patches] for x in value)
        return value

    def whole(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if threading.get_ident() != thread or output.shape[0] != len(kept):
            return None
        return output.new_zeros(len(here), output.shape[-1]).index_copy(0, kept, output)

    with ExitStack() as hooks:
        for block in tower.blocks:
            hooks.enter_context(
                block.register_forward_pre_hook(Hook(shorter, with_kwargs=True), with_kwargs=True)
            )
        for merger in (tower.merger, *getattr(tower, "deepstack_merger_list", ())):
            hooks.enter_context(merger.register_forward_hook(Hook(whole)))
        yield


def _once(made: dict[int, tuple[Any, Any]], name: str, value: Any, cut: Any) -> Any:
    if not isinstance(value, Tensor | tuple) and name != "max_seqlen":
        return value
    if id(value) not in made:
        made[id(value)] = (value, cut(name, value))
    return made[id(value)][1]
