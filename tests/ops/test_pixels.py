"""Patches that their neighbours predict."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from tokenfuse.ops.pixels import unpredicted

DATA = Path(__file__).parents[1] / "data/pixelprune.safetensors"
ONE = torch.ones(1)


def rebuilt(pixels, kept, scale, theta, metric="max"):
    """What the rule makes of the survivors alone, one patch after the other."""
    t, h, w = kept.shape
    out = torch.where(kept[..., None, None], pixels, torch.nan)

    def like(a, b):
        apart = ((a - b) * scale[:, None]).abs()
        value = {"max": apart.max(), "mae": apart.mean(), "rmse": apart.square().mean().sqrt()}
        return bool(value[metric] <= theta)

    for f in range(t):
        for i in range(h):
            for j in range(w):
                if kept[f, i, j]:
                    continue
                own, options = pixels[f, i, j], []
                if f:
                    options.append(out[f - 1, i, j])
                if i or j:
                    left, above = out[f, i, max(j - 1, 0)], out[f, max(i - 1, 0), j]
                    up = j == 0
                    if i and j:
                        between = out[f, i - 1, j - 1]
                        up = like(between, left) and not like(between, above)
                    options.append(above if up else left)
                # The one before in time goes first.
                out[f, i, j] = next(option for option in options if like(own, option))
    return out


@pytest.mark.parametrize("form", ["kept", "kept_sliding"])
@pytest.mark.parametrize("case", range(6))
def test_it_gives_what_the_published_code_gives(case, form):
    with safe_open(DATA, "pt") as file:
        parameters = json.loads(file.metadata()[f"case{case}"])
        pixels, expected = (file.get_tensor(f"case{case}.{name}") for name in ("pixels", form))
    t, h, w = parameters["grid"]
    merge, metric = parameters["merge"], parameters["metric"]
    kept = unpredicted(
        pixels.view(t, h // merge, w // merge, 1, -1),
        ONE,
        parameters["threshold"],
        "max" if metric == "exact" else metric,
        anchored=form == "kept",
    )
    assert kept.flatten().nonzero().flatten().tolist() == expected.tolist()


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([0.0, 0.1, 0.4]),
    st.sampled_from(["max", "mae", "rmse"]),
    st.integers(0, 50),
)
def test_what_is_left_tells_the_rest(grid, theta, metric, seed):
    """To within theta, however long the chains are; exactly at 0."""
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 4, (*grid, 2, 3), generator=rng) / 8
    scale = torch.tensor([1.0, 0.5])
    kept = unpredicted(pixels, scale, theta, metric)
    assert bool(kept[0, 0, 0])
    found = rebuilt(pixels, kept, scale, theta, metric)
    apart = ((found - pixels) * scale[:, None]).abs().flatten(3)
    worst = {"max": apart.amax(-1), "mae": apart.mean(-1), "rmse": apart.square().mean(-1).sqrt()}
    assert float(worst[metric].max()) <= theta + 1e-6
    if theta == 0:
        assert torch.equal(found, pixels)


def test_a_still_video_costs_one_frame_and_a_cut_another():
    rng = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 1, 6, 6, 3, 8, generator=rng)
    scale = torch.ones(3)
    still = first.expand(8, -1, -1, -1, -1)
    assert int(unpredicted(still, scale, 0.0).sum()) == 36
    assert int(unpredicted(torch.cat([still, second]), scale, 0.0).sum()) == 72
    # A cursor that moves by one place in each frame.
    moving = still.clone()
    for frame in range(1, 8):
        moving[frame, 2, frame - 1 if frame < 7 else 5] = 0.5
    kept = unpredicted(moving, scale, 0.0).sum((1, 2)).tolist()
    assert kept[0] == 36
    assert all(0 < count <= 2 for count in kept[1:-1])


def test_no_value_is_read_on_the_way():
    """Tensors on ``meta`` have none. What is left is counted by whoever asks."""
    pixels, scale = torch.empty(3, 4, 5, 3, 8, device="meta"), torch.empty(3, device="meta")
    for theta in (0.0, 0.1):
        for anchored in (True, False):
            assert unpredicted(pixels, scale, theta, anchored=anchored).shape == (3, 4, 5)


def test_below_zero_everything_stays_and_without_time_every_frame_pays():
    still = torch.zeros(3, 2, 2, 1, 4)
    assert bool(unpredicted(still, ONE, -1.0).all())
    assert unpredicted(still, ONE, 0.0, over_time=False).sum((1, 2)).tolist() == [1, 1, 1]
    assert unpredicted(still, ONE, 0.0).sum((1, 2)).tolist() == [1, 0, 0]
