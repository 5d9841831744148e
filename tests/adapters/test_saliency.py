"""Saliency of towers whose tokens are squares of patches, in windows or tiles: order and values."""

import functools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tokenfuse
from families import FAMILIES, PINPOINTS, SIDE
from tokenfuse.errors import ConfigError, PromptError, UnsupportedModelError
from tokenfuse.ops import attention as kernel
from tokenfuse.registry import default_registry
from tokenfuse.strategies._base import Attention, Needs

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["qwen2_5_vl", "internvl", "smolvlm", "idefics3", "gemma3", "llava_next"]
NAMES += ["llava_next_video", "video_llava"]
CASES = [(name, kind) for name in NAMES for kind in FAMILIES[name].modalities]
PREFIX = {"internvl": 1, "llava_next": 1, "llava_next_video": 1, "video_llava": 1}


@functools.cache
def adapter_of(name, attention="sdpa"):
    return default_registry().adapter(FAMILIES[name].build(attention))


def rows_of(kind):
    """Items of all sizes, in prompts of unequal lengths."""
    return [
        [("text", 1), (kind, 1), ("text", 2)],
        [("text", 7), (kind, 5), ("text", 3), (kind, 3), ("text", 6)],
    ]


def items_of(adapter, inputs, attention=None, **options):
    needs = dict.fromkeys(("image", "video"), Needs(attention))
    with torch.no_grad():
        return [
            x for part in adapter.encode(adapter.read(inputs), needs, **options) for x in part.items
        ]


def tower_of(adapter, kind="image"):
    base = adapter.model.base_model
    names = ("visual", "vision_model", "vision_tower", f"{kind}_tower")
    return next(getattr(base, name) for name in names if hasattr(base, name))


def attentions_of(adapter, kind):
    tower = tower_of(adapter, kind)
    layers = tower.blocks if hasattr(tower, "blocks") else None
    if layers is None:
        layers = getattr(tower.encoder, "layers", None) or tower.encoder.layer
    names = ("attn", "self_attn", "attention")
    return [getattr(x, next(n for n in names if hasattr(x, n))) for x in layers]


def owners(name, adapter, inputs, kind):
    """The token that each patch belongs to, in the tower's order, -1 where none is.

    A patch's last hidden state is changed, and the token that changes is its own.
    """
    tower, where = tower_of(adapter, kind), []

    def shift(hidden):
        if where:
            hidden.flatten(0, -2)[where[0]] += 1.0
        else:
            sizes.append(hidden.shape[:-1])

    def after(module, args, output):
        llava = "llava" in name
        shift(output.hidden_states[-2] if llava else output.last_hidden_state)

    def before(module, args):
        shift(args[0])

    sizes = []
    windows = hasattr(tower, "merger")
    handle = (
        tower.merger.register_forward_pre_hook(before)
        if windows
        else tower.register_forward_hook(after)
    )
    try:
        plain = torch.cat([x.features for x in items_of(adapter, inputs)])
        places = torch.arange(sizes[0].numel()).view(sizes[0])
        if not windows:
            places = places[:, PREFIX.get(name, 0) :]
        found = []
        for place in places.flatten().tolist():
            where[:] = [place]
            features = torch.cat([x.features for x in items_of(adapter, inputs)])
            changed = (features != plain).any(-1).nonzero().flatten().tolist()
            found.append(changed)
    finally:
        handle.remove()
    return found


@pytest.fixture
def eager_maps(monkeypatch):
    """Has an eager adapter record the maps of every vision attention, ``(heads, n, n)`` each."""

    def listen(adapter, kind):
        maps, attentions = {}, attentions_of(adapter, kind)
        home = sys.modules[type(attentions[0]).__module__]
        eager = home.eager_attention_forward

        def recording(module, *args, **kwargs):
            output, weights = eager(module, *args, **kwargs)
            if module in attentions:
                maps.setdefault(attentions.index(module), []).extend(weights)
            return output, weights

        monkeypatch.setattr(home, "eager_attention_forward", recording)
        return maps

    return listen


@functools.cache
def checked_owners(name, kind):
    adapter = adapter_of(name, "eager")
    return owners(name, adapter, FAMILIES[name].prompt(rows_of(kind)), kind)


@pytest.mark.parametrize("block", [0, 1, -1])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_saliency_is_what_an_eager_forward_s_maps_say(name, kind, block, eager_maps):
    inputs = FAMILIES[name].prompt(rows_of(kind))
    eager = adapter_of(name, "eager")
    belongs = checked_owners(name, kind)
    maps = eager_maps(eager, kind)
    found = items_of(adapter_of(name), inputs, Attention(block))
    assert not maps, "the sdpa model makes no map"
    items = items_of(eager, inputs)
    prefix = PREFIX.get(name, 0)
    received = []
    for weights in maps[block % 3]:
        gets = weights.mean(0)[0, 1:] if prefix else weights.mean((0, 1))
        # What attends together is a frame, a tile or a window: each counts by its size.
        received += (gets / gets.sum() * len(gets)).tolist()
    assert len(received) == len(belongs)
    expected = torch.zeros(sum(x.num_tokens for x in items))
    for share, tokens in zip(received, belongs, strict=True):
        for token in tokens:
            expected[token] += share
    for tokens, part in zip(found, expected.split([x.num_tokens for x in items]), strict=True):
        frames = part.view(tokens.grid[0], -1)
        frames = frames / frames.sum(-1, keepdim=True)
        torch.testing.assert_close(tokens.saliency, frames.flatten(), atol=1e-6, rtol=1e-4)
        assert (frames.std(-1) > 0.01 * frames.mean(-1)).all(), "a flat map would prove nothing"


SHUFFLED = {"internvl": 6, "smolvlm": 6, "idefics3": 6, "gemma3": 6}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_patch_belongs_to_the_token_where_it_is(name, kind):
    """Tokens come in rows from the top, as the grid says, whatever a shuffle transposes."""
    belongs = checked_owners(name, kind)
    assert all(len(tokens) <= 1 for tokens in belongs)
    owned = [token for tokens in belongs for token in tokens]
    items = items_of(adapter_of(name), FAMILIES[name].prompt(rows_of(kind)))
    assert sorted(set(owned)) == list(range(sum(x.num_tokens for x in items)))
    if name in SHUFFLED:
        side = SHUFFLED[name]
        for place, (token,) in enumerate(belongs):
            tile, patch = divmod(place, side * side)
            row, column = divmod(patch, side)
            assert token == tile * 9 + row // 2 * 3 + column // 2


@pytest.mark.parametrize("query", ["each", "mean"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_batch_supplies_what_each_prompt_supplies_alone(name, kind, query):
    adapter, prompt = adapter_of(name), FAMILIES[name].prompt
    asked = Attention(0, query)
    alone = [x for row in rows_of(kind) for x in items_of(adapter, prompt([row]), asked)]
    for side in ("left", "right"):
        together = items_of(adapter, prompt(rows_of(kind), side), asked)
        for one, other in zip(together, alone, strict=True):
            assert one.grid == other.grid
            torch.testing.assert_close(one.saliency, other.saliency, atol=1e-6, rtol=1e-4)
            frames = one.saliency.view(one.grid[0], -1).sum(-1)
            torch.testing.assert_close(frames, torch.ones_like(frames))


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_frames_shown_as_images_are_frames(name):
    inputs = FAMILIES[name].prompt([[("text", 1), ("video", 1), ("text", 2)]])
    adapter = adapter_of(name)
    tiles = items_of(adapter, inputs, Attention(0))
    (video,) = items_of(adapter, inputs, Attention(0), frames_as_images=True)
    assert video.grid == (len(tiles), 3, 3)
    assert torch.equal(video.saliency, torch.cat([tile.saliency for tile in tiles]))


@pytest.mark.parametrize("name", NAMES)
def test_no_hook_stays(name):
    adapter = adapter_of(name)
    inputs = FAMILIES[name].prompt(rows_of(FAMILIES[name].modalities[0]))
    items_of(adapter, inputs, Attention(1))
    with pytest.raises(ConfigError, match=r"has 3; expected -3\.\.2"):
        items_of(adapter, inputs, Attention(3))
    assert all(x.saliency is None for x in items_of(adapter, inputs))
    assert all(not module._forward_pre_hooks for module in adapter.model.modules())


class Interleaved:
    """Two threads in one tower: each runs it from end to end while the other one listens, too."""

    def __init__(self, tower):
        self.met, self.parted = (threading.Barrier(2, timeout=60) for _ in range(2))
        self.first_has_run = threading.Event()
        self.order = []
        self.handles = [
            tower.register_forward_pre_hook(self.enter),
            tower.register_forward_hook(self.leave),
        ]

    def enter(self, *_):
        first = self.met.wait() == 0
        if not first:
            assert self.first_has_run.wait(60)
        self.order.append(threading.get_ident())

    def leave(self, *_):
        self.order.append(threading.get_ident())
        self.first_has_run.set()
        self.parted.wait()

    def run(self, *calls):
        try:
            with ThreadPoolExecutor(len(calls)) as pool:
                return [future.result() for future in [pool.submit(call) for call in calls]]
        finally:
            for handle in self.handles:
                handle.remove()


@pytest.mark.parametrize("asked", [Attention(0), Attention(-1), None])
@pytest.mark.parametrize("name", ["qwen3_vl", *NAMES])
def test_two_threads_hear_their_own_calls_alone(name, asked):
    adapter, listening = adapter_of(name), Attention(0)
    kind = FAMILIES[name].modalities[0]
    one, other = (FAMILIES[name].prompt([row]) for row in rows_of(kind))
    wanted = [(one, listening), (other, asked)]
    expected = [items_of(adapter, *want) for want in wanted]
    threads = Interleaved(tower_of(adapter, kind))
    found = threads.run(*(functools.partial(items_of, adapter, *want) for want in wanted))
    a, b = threads.order[0], threads.order[2]
    assert threads.order == [a, a, b, b]
    assert a != b
    for mine, alone in zip(found, expected, strict=True):
        for tokens, single in zip(mine, alone, strict=True):
            assert torch.equal(tokens.features, single.features)
            assert (tokens.saliency is None) == (single.saliency is None)
            if single.saliency is not None:
                assert torch.equal(tokens.saliency, single.saliency)
    assert all(not module._forward_pre_hooks for module in adapter.model.modules())


# The kernel


@pytest.mark.parametrize(("rows", "columns", "side"), [(4, 6, 2), (6, 3, 3), (5, 7, 2), (2, 3, 1)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_squares_of_patches_are_pooled(rows, columns, side, prefix):
    torch.manual_seed(0)
    n, heads = prefix + rows * columns, 3
    q, k = torch.randn(2, 2 * n, heads, 4)
    options = {"prefix": prefix, "group": side**2, "columns": columns}
    each = kernel.attention_received(q, k, [n, n], 0.7, **options)
    mean = kernel.mean_query_attention(q, k, [n, n], 0.7, **options)
    h, w = rows // side, columns // side
    squares = [
        [prefix + (i * side + y) * columns + j * side + x for y in range(side) for x in range(side)]
        for i in range(h)
        for j in range(w)
    ]
    expected_each, expected_mean = [], []
    for f in range(2):
        queries, keys = q[f * n : f * n + n], k[f * n : f * n + n]
        maps = torch.einsum("qhd,khd->hqk", queries, keys).mul(0.7).softmax(-1)
        gets = maps[:, 0].sum(0) if prefix else maps.sum((0, 1))
        shares = torch.stack([gets[square].sum() for square in squares])
        expected_each.append(shares / shares.sum())
        pooled = torch.stack([keys[square].mean(0) for square in squares])
        logits = torch.einsum("hd,nhd->hn", queries[prefix:].mean(0), pooled) * 0.7
        expected_mean.append(logits.softmax(-1).mean(0))
    torch.testing.assert_close(each, torch.cat(expected_each))
    torch.testing.assert_close(mean, torch.cat(expected_mean))


# What is refused


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_hidden_patches_are_refused_where_saliency_is_asked_for(name, attention):
    inputs = FAMILIES[name].prompt([[("text", 1), ("image", 0), ("text", 2)]])
    inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].clone()
    inputs["pixel_attention_mask"][..., 12:] = 0
    adapter = adapter_of(name, attention)
    assert len(items_of(adapter, inputs)) == 1
    with pytest.raises(UnsupportedModelError, match="pixel_attention_mask hides patches"):
        items_of(adapter, inputs, Attention(0))
    assert all(not module._forward_pre_hooks for module in adapter.model.modules())


def without_sizes(inputs):
    del inputs["image_sizes"]


def other_sizes(inputs):
    inputs["image_sizes"] = torch.tensor([[20, 22]])


def more_images(inputs):
    inputs["image_sizes"] = inputs["image_sizes"].repeat(2, 1)


def fewer_tiles(inputs):
    inputs["pixel_values"] = inputs["pixel_values"][:, :2]


def cut_short(inputs):
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][:, :12]


@pytest.mark.parametrize("name", ["llava_next", "llava_next_video", "llava_onevision"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_sizes, "image_sizes is missing"),
        (other_sizes, r"shows 40 image placeholder\(s\), the image features are 36"),
        (more_images, r"image_sizes describe (\[3, 3\]|2 images, batch_num_images 1)"),
        (fewer_tiles, r"hold \(1, 2\) tiles, image_sizes describe \[3\]"),
        (cut_short, "placeholder"),
    ],
)
def test_tiles_that_do_not_fit_are_refused_before_the_tower_runs(name, spoil, said):
    inputs = FAMILIES[name].prompt([[("text", 1), ("image", 1), ("text", 2)]])
    adapter = adapter_of(name)
    spoil(inputs)
    ran = []
    handle = tower_of(adapter).register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(PromptError, match=said):
        adapter.encode(adapter.read(inputs))
    handle.remove()
    assert not ran


def test_interpolated_tiles_have_the_layout_that_the_model_gives_them():
    adapter = default_registry().adapter(FAMILIES["llava_onevision"].build("sdpa"))
    inputs = FAMILIES["llava_onevision"].prompt([[("image", 2), ("text", 2)]])
    inputs["image_sizes"] = torch.tensor([[48, 40]])
    inputs["pixel_values"] = torch.randn(1, 5, 3, SIDE, SIDE)
    adapter.model.config.image_grid_pinpoints = [*PINPOINTS, [48, 48]]
    adapter.model.config.vision_aspect_ratio = "anyres_max_1"
    # 8 × 6 patches without the margins, of which √3 times fewer are left in each direction.
    n = 16 + 4 * (3 + 1)
    image = adapter.placeholder_id("image")
    inputs["input_ids"] = torch.tensor([[4, *[image] * n, 9, 10]])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    items = items_of(adapter, inputs)
    assert [x.grid for x in items] == [(1, 4, 4), (1, 4, 3)]
    newline = adapter.model.base_model.image_newline
    assert not any((x.features == newline).all(-1).any() for x in items)


@pytest.mark.parametrize(("size", "newlines"), [([1, 48], 0), ([48, 1], 8)])
def test_an_image_that_is_all_margin_is_its_overview(size, newlines):
    adapter = adapter_of("llava_next")
    inputs = FAMILIES["llava_next"].prompt([[("image", 1), ("text", 2)]])
    inputs["image_sizes"] = torch.tensor([size])
    inputs["input_ids"] = torch.tensor(
        [[4, *[adapter.placeholder_id("image")] * (16 + newlines), 9]]
    )
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    (image,) = items_of(adapter, inputs, Attention(0))
    assert image.grid == (1, 4, 4)
    torch.testing.assert_close(image.saliency.sum(), torch.tensor(1.0))
    assert len(tokenfuse.compress(adapter.model, inputs, "attention").plans["image"]) == 1


def test_interpolated_tokens_have_no_saliency():
    inputs = FAMILIES["llava_onevision"].prompt([[("video", 1), ("text", 2)]])
    with pytest.raises(UnsupportedModelError, match="saliency"):
        tokenfuse.compress(adapter_of("llava_onevision").model, inputs, "attention")
