"""No value of a tensor is read where a strategy says that it reads none, and all of it compiles.

A tensor on the device ``meta`` has no values, so that reading one raises.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tokenfuse import VisualTokens, get_strategy, plan
from tokenfuse.bench.memory import peak_memory
from tokenfuse.errors import TooLargeError
from tokenfuse.ops import similarity, window
from tokenfuse.registry import default_registry
from tokenfuse.strategies import _base

GRID = (5, 4, 4)
READS = {
    "fastvid": "how alike consecutive frames are decides what each keeps",
    "holitom": "how alike places are over time decides the windows",
    "llava_scissor": "links are made until none is left",
    "prunevid": "how alike places are over time decides the scenes",
}
"""Strategies that read values in keep-ratio mode, and why; each says so in its docstring."""
NOT_WHOLE = {
    "mame": "its weights come from a generator of Python's",
    "random": "it draws by a generator of torch's",
    "tomesd": "it draws by a generator of torch's",
}
"""Strategies that read nothing and cannot be compiled as one graph, and why."""
BUDGETED = sorted(
    name
    for name, entry in default_registry().strategies.items()
    if entry.distribution == "tokenfuse"
    and entry.cls.stage == "pre_llm"
    and "keep_ratio" in entry.cls.model_fields
    and name != "compose"
)
QUIET = [name for name in BUDGETED if name not in READS]


def tokens_on(device, seed=0):
    """All that a strategy may need, of the same values on each device that has any."""
    rng = torch.Generator().manual_seed(seed)
    n = 5 * 4 * 4
    features, saliency = torch.randn(n, 8, generator=rng), torch.rand(n, generator=rng)
    text = torch.randn(6, 8, generator=rng)
    moved = (x.to(device) for x in (features, saliency, text))
    return dict(zip(("features", "saliency", "text"), moved, strict=True))


def compressed(strategy, features, saliency, text):
    tokens = VisualTokens.from_grid(features, GRID, saliency=saliency, text=text, check=False)
    plan = strategy.plan(tokens)
    return strategy.fuse(plan, tokens.features), plan.survivors, plan.target


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("name", QUIET)
def test_keep_ratio_mode_reads_no_value(name, ratio):
    strategy = get_strategy(name, keep_ratio=ratio)
    fused, survivors, _ = compressed(strategy, **tokens_on("meta"))
    assert fused.shape[0] == survivors.shape[0] == strategy.num_kept(GRID)


@pytest.mark.parametrize("name", READS)
def test_those_that_read_values_say_so(name):
    strategy = get_strategy(name, keep_ratio=0.3)
    with pytest.raises((RuntimeError, NotImplementedError)):
        compressed(strategy, **tokens_on("meta"))
    assert "ever synchronises" not in type(strategy).__doc__


def test_every_strategy_that_reads_nothing_is_known_to():
    said = [
        n for n in BUDGETED if "ever synchronises" in default_registry().strategies[n].cls.__doc__
    ]
    assert set(said) <= set(QUIET)


COMPILED = """
import sys, torch
from tokenfuse import VisualTokens, get_strategy

torch.manual_seed(0)
given = torch.randn(80, 8), torch.rand(80), torch.randn(6, 8)
for name in sys.argv[1:]:
    strategy = get_strategy(name, keep_ratio=0.3)

    def run(features, saliency, text):
        options = {"saliency": saliency, "text": text, "check": False}
        tokens = VisualTokens.from_grid(features, (5, 4, 4), **options)
        plan = strategy.plan(tokens)
        return strategy.fuse(plan, tokens.features), plan.survivors, plan.target

    torch.compiler.reset()
    try:
        found = torch.compile(run, fullgraph=True, backend="eager")(*given)
        same = all(map(torch.equal, found, run(*given)))
        print(name, "same" if same else "differs")
    except Exception as error:
        print(name, type(error).__name__)
"""


def test_keep_ratio_mode_is_one_graph():
    """``torch.compile(fullgraph=True)`` traces it whole, and it gives the same.

    In a process of its own: Dynamo cannot trace the checks of shapes that tests run with.
    """
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, *QUIET], capture_output=True, text=True, check=True
    )
    found = dict(line.split() for line in done.stdout.splitlines())
    assert found.keys() == set(QUIET)
    assert {name for name, said in found.items() if said != "same"} == NOT_WHOLE.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("attention", "dycoke", "evs", "frame_subsample", "random")),
        *((name, {}) for name in ("ttf", "uniform", "vcast", "vidcom2")),
        ("ttf", {"reference": "previous"}),
        ("ttf", {"reduce": "mean"}),
    ],
)
def test_memory_is_that_of_the_input(name, options, dtype, monkeypatch):
    """A plan and what is fused by it take no more than a tenth over the features of a long video.

    What is held at a time is made as small beside this video as it is beside a really long one.
    """
    monkeypatch.setattr(plan, "AT_A_TIME", 2**17)
    for module in (similarity, window):
        monkeypatch.setattr(module, "CHUNK", 2**17)
    strategy = get_strategy(name, keep_ratio=0.33, **options)
    features = torch.randn(128 * 36, 512).to(dtype)
    tokens = VisualTokens.from_grid(
        features, (128, 6, 6), saliency=torch.rand(128 * 36), check=False
    )
    with peak_memory(features.device) as peak:
        strategy.fuse(strategy.plan(tokens), features)
    assert peak() <= 1.1 * features.numel() * features.element_size()


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("grid", [(32, 8, 8), (4, 32, 32)])
def test_memory_is_within_what_a_strategy_says(name, grid, monkeypatch):
    """``working_copies`` bounds what is held, beside a few times what is held at a time."""
    monkeypatch.setattr(plan, "AT_A_TIME", 2**17)
    for name_of, module in list(sys.modules.items()):
        if name_of.startswith("tokenfuse.") and hasattr(module, "CHUNK"):
            monkeypatch.setattr(module, "CHUNK", 2**17)
    strategy = get_strategy(name, keep_ratio=0.33)
    n, width = grid[0] * grid[1] * grid[2], 1024
    # Bits that are narrower than those of the copies: what is copied is seen.
    base = torch.randn(1, *grid[1:], width)
    features = (base + 0.5 * torch.randn(*grid, width)).bfloat16()
    text = torch.randn(8, width).bfloat16()
    tokens = VisualTokens.from_grid(features, grid, saliency=torch.rand(n), text=text)
    with peak_memory(features.device) as peak:
        strategy.fuse(strategy.plan(tokens), tokens.features)
    copies = max(0.55, strategy.working_copies)  # the fused features are there in any case
    assert peak() <= copies * 4 * n * width + 8 * 4 * 2**17


@pytest.mark.parametrize("name", BUDGETED)
def test_what_does_not_fit_is_refused_before_it_is_copied(name, monkeypatch):
    """The system would end the process; a strategy that streams asks for nothing."""
    monkeypatch.setattr(_base, "ASK_FROM", 1000)
    monkeypatch.setattr(_base, "free_bytes", lambda: 2000)
    strategy = get_strategy(name, keep_ratio=0.33)
    features = torch.randn(GRID[0] * GRID[1] * GRID[2], 32)
    tokens = VisualTokens.from_grid(
        features, GRID, saliency=torch.rand(len(features)), text=torch.randn(4, 32)
    )
    if strategy.working_copies:
        with pytest.raises(TooLargeError, match=r"2 kB are free; expected fewer frames, or"):
            strategy.plan(tokens)
    else:
        strategy.plan(tokens)
    monkeypatch.setattr(_base, "free_bytes", lambda: None)
    strategy.plan(tokens)
