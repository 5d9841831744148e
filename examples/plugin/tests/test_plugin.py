"""tokenfuse's conformance kits on this plug-in, with a tiny model and prompts made by hand."""

import functools

import pytest
import torch
from transformers import GenerationConfig, Lfm2VlConfig, Lfm2VlForConditionalGeneration

from tokenfuse import VisualTokens
from tokenfuse.errors import PromptError
from tokenfuse.testing import AdapterConformance, StrategyConformance
from tokenfuse_example.checkerboard import Checkerboard

VOCAB, WORDS = 128, range(5, 96)
BOS, PAD, IMAGE, START, END, TILE, THUMBNAIL = 4, 112, 113, 114, 115, 116, 120
PATCH, FACTOR, LONGEST = 4, 2, 32
# Patches of each tile of an image, by seed: one wide, one high, two tiles and the whole.
SHAPES = (((4, 6),), ((6, 4),), ((4, 4), (4, 4), (4, 8)))


def build(attention):
    """A random LFM2-VL: convolutions and attention, as in the released models."""
    config = Lfm2VlConfig(
        text_config={
            "model_type": "lfm2",
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 64,
            "block_auto_adjust_ff_dim": False,
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": None,
        },
        vision_config={
            "model_type": "siglip2_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "num_patches": 16,
            "vision_use_head": False,
        },
        image_token_id=IMAGE,
        downsample_factor=FACTOR,
        projector_hidden_size=48,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = Lfm2VlForConditionalGeneration(config).eval()
    # At the usual scale the logits of so small a model hardly depend on its input.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    # No end token: answers have the length that a test asks for.
    model.generation_config = GenerationConfig(pad_token_id=PAD, do_sample=False)
    return model


def image(seed):
    """The ids of an image, and what the tower reads of its tiles."""
    rng = torch.Generator().manual_seed(seed)
    shapes = SHAPES[seed % len(SHAPES)]
    ids, pixels, masks = [START], [], []
    for n, (h, w) in enumerate(shapes):
        if len(shapes) > 1:
            ids.append(THUMBNAIL if n == len(shapes) - 1 else TILE + n)
        ids += [IMAGE] * (h * w // FACTOR**2)
        mask = (torch.arange(LONGEST) < h * w).long()
        pixels.append(torch.randn(LONGEST, 3 * PATCH**2, generator=rng) * mask[:, None])
        masks.append(mask)
    return [*ids, END], {
        "pixel_values": torch.stack(pixels),
        "pixel_attention_mask": torch.stack(masks),
        "spatial_shapes": torch.tensor(shapes),
    }


def words(seed):
    """A text of 2 to 5 ids; the first one tells seeds apart."""
    rng = torch.Generator().manual_seed(seed)
    more = torch.randint(WORDS.start, WORDS.stop, (1 + seed % 4,), generator=rng)
    return [WORDS[seed % len(WORDS)], *more.tolist()]


def prompt(rows, side="left"):
    """What the processor of LFM2-VL would give for a batch of prompts."""
    ids, tensors = [], {}
    for row in rows:
        ids.append([BOS])
        for kind, seed in row:
            piece, found = (words(seed), {}) if kind == "text" else image(seed)
            ids[-1] += piece
            for name, value in found.items():
                tensors.setdefault(name, []).append(value)
    columns = {"input_ids": (ids, PAD), "attention_mask": ([[1] * len(x) for x in ids], 0)}
    inputs = {name: torch.cat(values) for name, values in tensors.items()}
    for name, (values, fill) in columns.items():
        padding = [[fill] * (max(map(len, ids)) - len(x)) for x in ids]
        pairs = zip(padding, values, strict=True)
        inputs[name] = torch.tensor([p + v if side == "left" else v + p for p, v in pairs])
    return inputs


class TestLfm2VL(AdapterConformance):
    adapter = "lfm2_vl"
    modalities = ("image",)
    model = staticmethod(functools.cache(build))
    prompt = staticmethod(prompt)

    def grids(self, case):
        images = [seed for row in self.cases()[case] for kind, seed in row if kind == "image"]
        return [(1, h // FACTOR, w // FACTOR) for seed in images for h, w in SHAPES[seed % 3]]

    def test_each_tile_is_an_item_of_its_own_shape(self):
        inputs = prompt([[("image", 0), ("image", 1), ("image", 2), ("text", 1)]])
        items = self.compress(self.model("sdpa"), inputs).report.items
        grids = [(1, 2, 3), (1, 3, 2), (1, 2, 2), (1, 2, 2), (1, 2, 4)]
        assert [item.grid for item in items] == grids

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"spatial_shapes": None}, "spatial_shapes or pixel_attention_mask is missing"),
            (
                {"spatial_shapes": torch.tensor([[4, 4]])},
                r"describe \[16\] patches, .* marks \[24\]",
            ),
        ],
    )
    def test_shapes_that_do_not_fit_are_refused(self, change, message):
        model, inputs = self.model("sdpa"), prompt([[("text", 1), ("image", 0), ("text", 2)]])
        with pytest.raises(PromptError, match=message):
            self.compress(model, inputs | change)


class TestCheckerboard(StrategyConformance):
    def make(self, **options):
        return Checkerboard(**options)


class TestRowsOfThree(StrategyConformance):
    def make(self, **options):
        return Checkerboard(period=3, pattern="rows", **options)


@pytest.mark.parametrize("pattern", ["diagonal", "rows", "columns"])
@pytest.mark.parametrize("period", [1, 2, 3])
def test_so_many_frames_show_every_place_once(pattern, period):
    tokens = VisualTokens.from_grid(torch.zeros(period * 12, 8), (period, 4, 3))
    kept = Checkerboard(pattern=pattern, period=period).plan(tokens).survivors
    assert sorted((kept % 12).tolist()) == list(range(12))
