"""All kernels of the local window find the same, and the one for GPUs compiles without one."""

import os
import subprocess
import sys
from shutil import which

import pytest
import torch
import torch._dynamo
from hypothesis import given
from hypothesis import strategies as st

from tokenfuse import VisualTokens, get_strategy
from tokenfuse.errors import ConfigError
from tokenfuse.ops._shifts import by_shifts
from tokenfuse.ops.similarity import STEP
from tokenfuse.ops.window import using_kernel, window_match


def features(shape, seed, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1, *shape[1:], generator=rng) + 0.5 * torch.randn(shape, generator=rng)
    x[0, 0, 0] = 0
    return x.to(dtype)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 9), st.integers(1, 40)),
    window=st.sampled_from([1, 3, 5, 7]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    chained=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_shifts_find_what_tiles_find(shape, window, dtype, chained, seed):
    frames = features(shape, seed, dtype)
    index = torch.arange(shape[0])
    reference = (index - 1).clamp_min(0) if chained else index[-1:]
    tiles, shifts = window_match(frames, reference, window), by_shifts(frames, reference, window)
    # A cosine in the middle between two steps may be rounded either way.
    for one, two in zip(tiles[::2], shifts[::2], strict=True):
        torch.testing.assert_close(one, two, atol=1.5 * STEP, rtol=0)
    differs = tiles[1] != shifts[1]
    assert bool((tiles[0][differs] - shifts[0][differs]).abs().le(1.5 * STEP).all())
    assert float(differs.double().mean()) <= 0.2


def test_a_kernel_is_named_or_refused():
    frames = features((3, 4, 5, 8), 0)
    plans = []
    for name in ("auto", "tiles", "shifts"):
        with using_kernel(name):
            tokens = VisualTokens.from_grid(frames, (3, 4, 5))
            plans.append(get_strategy("ttf", keep_ratio=0.4).plan(tokens))
    assert all(torch.equal(plan.target, plans[0].target) for plan in plans)
    with pytest.raises(ConfigError, match="none of auto, tiles, shifts, compiled, triton"):
        using_kernel("fast").__enter__()


@pytest.mark.skipif(which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("chained", [False, True])
def test_the_compiled_kernel_is_made_once_and_finds_what_tiles_find(chained):
    for shape in ((3, 4, 5, 24), (5, 7, 6, 64), (2, 9, 3, 17)):
        frames = features(shape, 0)
        index = torch.arange(shape[0])
        reference = (index - 1).clamp_min(0) if chained else index[:1]
        tiles = window_match(frames, reference, 3)
        again = shape[0] != 3
        with using_kernel("compiled"), torch._dynamo.config.patch(error_on_recompile=again):
            found = window_match(frames, reference, 3)
        assert torch.equal(found[1], tiles[1])
        for one, two in zip(tiles[::2], found[::2], strict=True):
            torch.testing.assert_close(one, two, atol=1.5 * STEP, rtol=0)


INTERPRETED = """
import torch
from tokenfuse.ops._triton import by_triton
from tokenfuse.ops.similarity import STEP
from tokenfuse.ops.window import using_kernel, window_match

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for shape in ((2, 5, 4, 16), (2, 1, 1, 150)):
        frames = (torch.randn(1, *shape[1:]) + 0.5 * torch.randn(shape)).to(dtype)
        frames[0, 0, 0] = 0
        for window in (1, 3):
            for reference in (torch.tensor([1]), (torch.arange(shape[0]) - 1).clamp_min(0)):
                with using_kernel("triton"):
                    mine = window_match(frames, reference, window)
                theirs = window_match(frames, reference, window)
                assert torch.equal(mine[1], theirs[1]), (dtype, shape, window)
                for a, b in zip(mine[::2], theirs[::2]):
                    assert float((a - b).abs().nan_to_num(0).max()) <= 1.5 * STEP
print("agrees")
"""
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tokenfuse.ops._triton import BLOCK, WIDE, window_kernel
from tokenfuse.ops.similarity import NO_MATCH, STEP

for capability in (80, 90, 100):
    for kind in ("*fp32", "*bf16", "*fp16"):
        types = {"frames": kind, "reference": "*i64", "similarity": "*fp32", "index": "*i64"}
        types |= {"own": "*fp32", "height": "i32", "width": "i32", "channels": "i32"}
        constants = {"shared": True, "reach": 1, "no_match": NO_MATCH, "step": STEP}
        constants |= {"block": BLOCK, "wide": WIDE}
        types |= dict.fromkeys(constants, "constexpr")
        at = {(list(types).index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=window_kernel, signature=types, constexprs=at)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        print(capability, kind, "cubin" in made.asm)
"""


def run(code, **variables):
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    # In a process of its own: it reads the variable when it is imported, and cannot read functions
    # that tests have wrapped in checks of shapes.
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def test_the_kernel_of_triton_agrees_in_its_interpreter():
    done = run(INTERPRETED, TRITON_INTERPRET="1")
    assert done.stdout == "agrees\n", done.stderr[-2000:]


def test_the_kernel_of_triton_compiles_for_gpus_that_are_not_here(tmp_path):
    done = run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
    if "ptxas" in done.stderr and "No such file" in done.stderr:
        pytest.skip("this build of Triton brings no assembler")
    kinds = ("*fp32", "*bf16", "*fp16")
    expected = [f"{sm} {kind} True" for sm in (80, 90, 100) for kind in kinds]
    assert done.stdout.splitlines() == expected, done.stderr[-2000:]
