import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import apply_rot_embed_cat
from timm.models.vision_transformer import ResPostBlock
from torch import nn
from torch.nn import functional as F

import models
import tokenfuse
from tokenfuse import attach
from tokenfuse.adapters.timm_vit import TimmViT
from tokenfuse.errors import AttachError, ConfigError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "tome-in-a-vit.md"
SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 4, "num_classes": 5}
NAMES = (
    "deit_small_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch16_224.augreg_in1k",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
    "vit_medium_patch16_gap_256",
    "eva_giant_patch14_224",
    "eva02_tiny_patch14_224",
    "eva02_base_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
)
"""All kinds of blocks, prefixes, keys and heads: LayerScale, registers, rope, attention pooling."""


@torch.no_grad()
def build(name, **options):
    """A small random model in eval mode, every parameter of which matters."""
    size = 56 if "patch14" in name else 64
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **{**SMALL, "img_size": size, **options})
    for parameter in model.parameters():
        # At the usual 0.02 attention is even, and nothing depends on whom it goes to.
        scale = 0.5 if parameter.ndim != 2 else 1.5 * parameter.shape[1] ** -0.5
        parameter.copy_(torch.randn_like(parameter) * scale)
    return model.eval()


model_of = cache(build)


def images_for(model, batch=2):
    size = model.default_cfg["fixed_input_size"] and model.patch_embed.img_size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *(size or (64, 64)), generator=generator)


def hooks(model):
    """Everything that hooks have left in the modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


@pytest.fixture(params=NAMES)
def model(request):
    return model_of(request.param)


@pytest.fixture
def vit():
    return model_of("deit_small_patch16_224")


# The definition, written out


def keys_and_all(attn, x):
    """Raw q, k, v of one image, ``(N, heads, C)``."""
    if attn.qkv is None:
        parts = [attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)]
    else:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        parts = F.linear(x, attn.qkv.weight, bias).chunk(3, -1)
    return [part.unflatten(-1, (attn.num_heads, -1)) for part in parts]


def attention(attn, q, k, v, sizes, rope, protected):
    q, k, v = attn.q_norm(q).transpose(0, 1), attn.k_norm(k).transpose(0, 1), v.transpose(0, 1)
    if rope is not None:
        half = getattr(attn, "rotate_half", False)
        q, k = (
            torch.cat([x[:, :protected], apply_rot_embed_cat(x[:, protected:], rope, half=half)], 1)
            for x in (q, k)
        )
    weights = (q @ k.mT * attn.scale + sizes.log()).softmax(-1)
    return attn.proj(attn.norm((weights @ v).transpose(0, 1).flatten(1)))


def pairs(keys, r, protected):
    """Which token merges into which, one at a time."""
    n = len(keys)
    units = F.normalize(keys.double(), dim=-1)
    edges = []
    for a in range(0, n, 2):
        others = [b for b in range(1, n, 2) if b >= protected]
        if a >= protected and others:
            similar = [(units[a] @ units[b]).item() for b in others]
            edges.append((-max(similar), a, others[similar.index(max(similar))]))
    return [(a, b) for _, a, b in sorted(edges)[: min(r, (n - protected) // 2)]]


def tome_by_hand(model, image, merges, proportional=True):
    """Token merging of one image in a plain loop, and the tokens that each survivor stands for."""
    x = model._pos_embed(model.patch_embed(image[None]))
    x, rope = x if isinstance(x, tuple) else (x, None)
    x, protected = model.norm_pre(x)[0], model.num_prefix_tokens
    groups = [[i] for i in range(len(x))]
    lead = list(range(len(x)))
    for index, (block, r) in enumerate(zip(model.blocks, merges, strict=True)):
        q, k, v = keys_and_all(block.attn, block.norm1(x))
        sizes = torch.tensor([len(group) if proportional else 1 for group in groups])
        turn = None
        if rope is not None:
            turn = rope[index] if getattr(model, "rope_mixed", False) else rope
            turn = turn[..., [i - protected for i in lead[protected:]], :]
        branch = attention(block.attn, q, k, v, sizes.to(x.dtype), turn, protected)
        x = x + scaled(block, 1, branch)
        rows, gone = list(x), set()
        totals = [row * len(group) for row, group in zip(rows, groups, strict=True)]
        for a, b in pairs(k.mean(1), r, protected):
            totals[b], groups[b] = totals[b] + totals[a], groups[b] + groups[a]
            gone.add(a)
        left = [i for i in range(len(rows)) if i not in gone]
        x = torch.stack([totals[i] / len(groups[i]) for i in left])
        groups, lead = [groups[i] for i in left], [lead[i] for i in left]
        x = x + scaled(block, 2, block.mlp(block.norm2(x)))
    place = {i: slot for slot, group in enumerate(groups) for i in group}
    full = x[[place[i] for i in range(len(place))]]
    return model.forward_head(model.norm(full[None]))[0], groups


def scaled(block, number, branch):
    scale = getattr(block, f"ls{number}", None) or getattr(block, f"gamma_{number}", None)
    if scale is None:
        return branch
    return scale(branch) if isinstance(scale, nn.Module) else scale * branch


# Exactness


@pytest.mark.parametrize("r", [0, [0]])
@torch.no_grad()
def test_merging_nothing_is_the_model_itself_bit_by_bit(model, r):
    images = images_for(model)
    expected = model(images)
    with attach(model, "tome", r=r) as session:
        assert torch.equal(model(images), expected)
    assert session.tokens == [session.tokens[0]] * 3
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("merges", [[4, 4, 4], [0, 6, 1], [50, 3, 0]])
@torch.no_grad()
def test_merging_is_the_definition(model, merges):
    images = images_for(model)
    with attach(model, "tome", r=merges) as session:
        got = model(images)
    n = session.plan.num_source // 2
    for index, image in enumerate(images):
        expected, groups = tome_by_hand(model, image, merges)
        target = session.plan.target.view(2, n)[index]
        assert all(len(set(target[group].tolist())) == 1 for group in groups)
        assert len(set(target.tolist())) == len(groups)
        torch.testing.assert_close(got[index], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, model(images), atol=1e-3)


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"scale_attn_norm": True}])
@torch.no_grad()
def test_keys_are_taken_before_their_norm(options):
    model = build("vit_small_patch16_224", **options)
    images = images_for(model, 1)
    with attach(model, "tome", r=5):
        got = model(images)
    expected, _ = tome_by_hand(model, images[0], [5, 5, 5])
    torch.testing.assert_close(got[0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_attention_need_not_be_proportional(vit):
    images = images_for(vit, 1)
    with attach(vit, "tome", r=5, proportional=False):
        got = vit(images)
    expected, _ = tome_by_hand(vit, images[0], [5, 5, 5], proportional=False)
    torch.testing.assert_close(got[0], expected, atol=1e-4, rtol=1e-4)
    with attach(vit, "tome", r=5):
        assert not torch.allclose(vit(images), got, atol=1e-3)


@torch.no_grad()
def test_a_batch_is_what_its_images_are(model):
    images = images_for(model, 3)
    with attach(model, "tome", r=5):
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_fused_and_plain_attention_agree(model):
    images, outputs = images_for(model), []
    attentions = [block.attn for block in model.blocks]
    was = attentions[0].fused_attn
    try:
        for fused in (False, True):
            for attn in attentions:
                attn.fused_attn = fused
            with attach(model, "tome", r=5):
                outputs.append(model(images))
    finally:
        for attn in attentions:
            attn.fused_attn = was
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


# What becomes of the tokens


@torch.no_grad()
def test_every_token_is_accounted_for_and_prefix_tokens_stay_alone(model):
    with attach(model, "tome", r=50) as session:
        model(images_for(model))
    plan, protected = session.plan, model.num_prefix_tokens
    n = session.tokens[0]
    plan.check(2 * n)
    assert plan.sizes.sum() == 2 * n
    sizes = plan.sizes[plan.target].view(2, n)
    assert (sizes[:, :protected] == 1).all()
    for before, after in pairwise([*session.tokens, plan.num_kept // 2]):
        assert after == before - (before - protected) // 2


@torch.no_grad()
def test_keep_ratio_is_what_is_left_after_the_last_block(vit):
    with attach(vit, "tome", keep_ratio=0.5) as session:
        vit(images_for(vit))
    assert session.tokens == [17, 15, 12]
    assert session.plan.num_kept == 2 * (1 + 8)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"r": 2}, {"keep_ratio": 0.5}])
def test_no_images_give_what_the_model_gives(vit, options):
    none = images_for(vit)[:0]
    with tokenfuse.attach(vit, "tome", **options) as session:
        assert vit(none).shape == (0, *vit(images_for(vit)).shape[1:])
        vit(none)
    assert session.plan.num_source == 0


def test_every_block_returns_a_row_for_every_token(model):
    images, seen = images_for(model), []
    handle = model.blocks[1].register_forward_hook(lambda *call: seen.append(call[-1].shape))
    with attach(model, "tome", r=4) as session:
        features = model.forward_features(images)
        maps = model.forward_intermediates(images, norm=True, intermediates_only=True)
    handle.remove()
    assert [tuple(shape) for shape in seen] == [(2, session.tokens[0], 48)] * 2
    assert features.shape == (2, session.tokens[0], 48)
    patches = features[:, model.num_prefix_tokens :]
    torch.testing.assert_close(maps[-1].flatten(2).mT, patches, atol=1e-5, rtol=1e-5)
    rows, plan = features.flatten(0, 1), session.plan
    assert torch.equal(rows, plan.expand(plan.select(rows)))


# Modes


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_it_works_in_half_precision(model, kind):
    half = build(model.default_cfg["architecture"]).to(kind)
    with attach(half, "tome", r=5):
        assert half(images_for(half).to(kind)).isfinite().all()


@torch.inference_mode()
def test_it_works_under_autocast(model):
    images = images_for(model)
    with attach(model, "tome", r=5), torch.autocast("cpu", torch.bfloat16):
        assert model(images).isfinite().all()


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "eva02_tiny_patch14_224"])
def test_gradients_are_those_of_the_definition(name):
    model = build(name)
    image = images_for(model, 1)
    tome_by_hand(model, image[0], [5, 5, 5])[0].square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with attach(model, "tome", r=5):
        model(image).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        scale = gradient.abs().max() + 1e-6
        torch.testing.assert_close(parameter.grad / scale, gradient / scale, atol=1e-3, rtol=1e-3)


def test_a_step_of_training_with_stochastic_depth_is_finite():
    model = build("deit3_small_patch16_224", drop_path_rate=0.3, proj_drop_rate=0.1).train()
    with attach(model, "tome", r=5):
        model(images_for(model, 4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_is_refused_where_it_would_go_wrong():
    model = build("deit_small_patch16_224").train()
    model.set_grad_checkpointing()
    with attach(model, "tome", r=5):
        loss = model(images_for(model)).sum()
        with pytest.raises(AttachError, match="without gradient checkpointing"):
            loss.backward()


# The session


@torch.no_grad()
def test_a_session_leaves_nothing_behind(vit):
    images, before = images_for(vit), hooks(vit)
    names, attributes = list(vit.state_dict()), set(vars(vit))
    with attach(vit, "tome", r=5):
        vit(images)
        assert list(vit.state_dict()) == names
    assert hooks(vit) == before
    assert set(vars(vit)) == attributes


@torch.no_grad()
def test_an_exception_leaves_nothing_behind_and_the_next_pass_is_right(vit):
    images, before = images_for(vit), hooks(vit)
    with attach(vit, "tome", r=5):
        expected = vit(images)
    handle = vit.blocks[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), attach(vit, "tome", r=5):
        vit(images)
    with attach(vit, "tome", r=5):
        with pytest.raises(ZeroDivisionError):
            vit(images)
        handle.remove()
        assert torch.equal(vit(images), expected)
    assert hooks(vit) == before


def test_a_second_session_is_refused_and_the_first_stays(vit):
    session = attach(vit, "tome", r=5)
    with session:
        with pytest.raises(AttachError, match="already attached"):
            attach(vit, "tome", r=2)
        with pytest.raises(AttachError, match="outer with-block"), session:
            pass
        with torch.no_grad():
            vit(images_for(vit))
        assert session.tokens == [17, 12, 7]
    with session, torch.no_grad():
        vit(images_for(vit))


def test_a_hook_that_cannot_be_placed_takes_the_others_with_it(vit, monkeypatch):
    before = hooks(vit)
    monkeypatch.setattr(TimmViT, "watch_keys", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attach(vit, "tome", r=5)
    assert hooks(vit) == before
    monkeypatch.undo()
    with attach(vit, "tome", r=5):
        pass


def test_a_block_out_of_turn_is_refused(vit):
    with attach(vit, "tome", r=5), torch.no_grad():
        with pytest.raises(AttachError, match="call the whole model"):
            vit.blocks[1](torch.zeros(1, 17, 48))
        vit(images_for(vit))


def test_options_are_set_over_any_form_of_strategy(vit):
    forms = ("tome", "tome-published", {"strategy": "tome", "r": 2}, tokenfuse.get_strategy("tome"))
    for given in forms:
        with attach(vit, given, r=3, proportional=False) as session:
            expected = tokenfuse.get_strategy("tome", r=3, proportional=False)
            assert session.strategy == expected
    with pytest.raises(ConfigError, match="unknown key ratio"):
        attach(vit, "tome", ratio=3)
    assert attach(models.build(), "ttf", threshold=0.8).strategy.threshold == 0.8


# What is not supported


@pytest.mark.parametrize("name", ["ttf", "uniform", "tomesd"])
def test_a_strategy_for_prompts_is_refused(vit, name):
    with pytest.raises(UnsupportedModelError, match="inside a vision transformer: tome"):
        attach(vit, name)


def test_a_vision_transformer_has_no_prompt_to_compress(vit):
    with pytest.raises(UnsupportedModelError, match="use attach"):
        tokenfuse.compress(vit, {"input_ids": torch.zeros(1, 1).long()}, "tome")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_base_patch16_rpn_224", "ResPostBlock"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
        ("vit_base_patch16_xp_224", "ParallelScalingBlock"),
        ("eva02_enormous_patch14_clip_224", "EvaBlockPostNorm"),
        ("vit_dlittle_patch16_reg1_gap_256", "DiffAttention"),
        ("vit_relpos_small_patch16_224", "no model family matches VisionTransformerRelPos"),
    ],
)
def test_other_blocks_are_refused(name, said):
    model = timm.create_model(name, pretrained=False, **SMALL)
    before = hooks(model)
    with pytest.raises(UnsupportedModelError, match=said):
        attach(model, "tome", r=5)
    assert hooks(model) == before


def test_one_odd_block_is_enough_to_refuse(vit):
    model = build("deit_small_patch16_224")
    model.blocks[1] = ResPostBlock(48, 4)
    with pytest.raises(UnsupportedModelError, match="ResPostBlock"):
        attach(model, "tome", r=5)


@torch.no_grad()
def test_keys_that_nobody_saw_are_no_reason_to_merge_nothing_silently():
    model = build("deit_small_patch16_224")
    qkv = model.blocks[0].attn.qkv
    with attach(model, "tome", r=5):
        model.blocks[0].attn.qkv = nn.Linear(48, 144)
        with pytest.raises(UnsupportedModelError, match="block 0 computed its keys out of"):
            model(images_for(model))
        model.blocks[0].attn.qkv = qkv
        model(images_for(model))


@pytest.mark.parametrize("argument", [{"attn_mask": torch.zeros(17, 17)}, {"is_causal": True}])
@torch.no_grad()
def test_a_mask_is_refused_where_tokens_have_merged(vit, argument):
    images = images_for(vit)
    expected = vit(images, **argument)
    with attach(vit, "tome", r=5), pytest.raises(UnsupportedModelError, match="leave them out"):
        vit(images, **argument)
    with attach(vit, "tome", r=0):
        assert torch.equal(vit(images, **argument), expected)


# Documentation


def test_python_in_the_page_runs():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert names
