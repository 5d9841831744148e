"""How often the road of a prompt waits for a device: reading, planning, shortening, by family.

Counted are operations whose result the host has to wait for on a GPU. The vision tower is left out:
what it reads is the model's own business.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from families import FAMILIES
from tokenfuse.compression import compress_prompt, encode_prompt, prompt_adapter
from tokenfuse.config import get_configuration
from tokenfuse.registry import default_registry

pytestmark = pytest.mark.usefixtures("one_thread")

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}


class Waits(TorchDispatchMode):
    """Counts what waits: values that are read, and results whose shape depends on values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITS:
            self.found.append(func)
        if func in (aten.index.Tensor, aten.index_put_.default):
            marks = [x for x in args[1] if x is not None and x.dtype == torch.bool]
            self.found += [func] * bool(marks)
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def counting(monkeypatch):
    """The number of waits, in a list, after the block. ``tolist`` is no operation of its own."""
    waits, count, tolist = Waits(), [], torch.Tensor.tolist

    def noted(tensor):
        waits.found.append("tolist")
        # It reads each value by itself on a CPU.
        with torch.utils._python_dispatch._disable_current_modes():
            return tolist(tensor)

    with monkeypatch.context() as patch, waits:
        patch.setattr(torch.Tensor, "tolist", noted)
        yield count
    count.append(len(waits.found))


def road(name, videos, monkeypatch):
    """How often the road of a prompt with so many videos waits, and how many items it has."""
    family = FAMILIES[name]
    kind = family.modalities[-1]
    model = family.build("sdpa")
    adapter = prompt_adapter(model, default_registry())
    parts = [("text", 1)]
    for number in range(videos):
        parts += [(kind, number + 1), ("text", number + 2)]
    inputs = family.prompt([parts], "left")
    configuration = get_configuration("uniform", keep_ratio=0.5)
    with torch.no_grad():
        encoded = encode_prompt(adapter, adapter.read(inputs), configuration.strategy)
        # By the model's own method, which reads some values for itself.
        found = adapter.positions(adapter.read(inputs))
        monkeypatch.setattr(type(adapter), "positions", lambda self, prompt: found)
        with counting(monkeypatch) as count:
            compress_prompt(adapter, adapter.read(inputs), configuration, encoded=encoded)
    items = sum(len(part.items) for part in encoded)
    return count[0], items


PROMPT = {
    "whether pixels are missing whose placeholders are there": 1,
    "on which side a batch is padded": 1,
    "how long the longest short prompt is": 1,
    "whether what ends a prompt has stayed": 1,
    "how many tokens are left of each frame": 1,
    "lengths for the report, and whether what was fused is finite": 1,
}
"""What is read once for each prompt, whatever it shows."""
ITEM = {"whether a plan keeps its contract": 1}
"""What is read for each image or video."""


@pytest.mark.parametrize("videos", [1, 2, 3])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.several])
def test_what_the_road_waits_for_is_known(name, videos, monkeypatch):
    waits, items = road(name, videos, monkeypatch)
    assert waits == sum(PROMPT.values()) + items * sum(ITEM.values())
