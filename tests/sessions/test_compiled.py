"""Models that ``torch.compile`` has compiled, whole or layer by layer, under a session."""

import pytest
import torch

import tokenfuse
from families import FAMILIES
from tokenfuse.errors import UnsupportedModelError

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

FAMILY = FAMILIES["qwen3_vl"]
HALF = {"strategy": "uniform", "keep_ratio": 0.5}


def answer(model, frames=3):
    config = model.config
    return model.generate(
        **FAMILY.prompt([[("text", 1), ("video", frames), ("text", 2)]], "left"),
        max_new_tokens=4,
        do_sample=False,
        suppress_tokens=[config.image_token_id, config.video_token_id],
    )


class Graphs:
    """A backend that runs what it gets as it is, and counts."""

    def __init__(self):
        self.count = 0

    def __call__(self, module, inputs):
        self.count += 1
        return module.forward


def layers(model, backend):
    for layer in model.get_decoder().layers:
        layer.compile(backend=backend)


def decoder(model, backend):
    model.get_decoder().compile(backend=backend)


def forward(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)


@pytest.fixture(autouse=True)
def reset():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("compiles", [layers, decoder, forward])
def test_a_compiled_model_answers_as_one_that_is_not(compiles, pytestconfig):
    """And new lengths of prompts compile no more graphs than they do without a session."""
    if compiles is not layers and not pytestconfig.getoption("full"):
        pytest.skip("it takes a minute: make test-all runs it")
    with tokenfuse.attach(FAMILY.build("sdpa"), HALF) as session:
        expected = [answer(session.model, frames) for frames in (2, 3, 4)]
    counts = {}
    for attached in (False, True):
        torch.compiler.reset()
        model, graphs = FAMILY.build("sdpa"), Graphs()
        compiles(model, graphs)
        if attached:
            with tokenfuse.attach(model, HALF):
                found = [answer(model, frames) for frames in (2, 3, 4)]
        else:
            for frames in (2, 3, 4):
                answer(model, frames)
        counts[attached] = graphs.count
    assert all(map(torch.equal, found, expected))
    assert 0 < counts[True] <= counts[False]


def test_a_model_that_is_compiled_while_attached(pytestconfig):
    if not pytestconfig.getoption("full"):
        pytest.skip("it takes a quarter of a minute: make test-all runs it")
    model = FAMILY.build("sdpa")
    with tokenfuse.attach(model, HALF):
        expected = answer(model)
        model.compile(backend="eager")
        assert torch.equal(answer(model), expected)


def test_the_wrapper_of_a_compiled_model_is_refused_with_what_to_pass():
    with pytest.raises(UnsupportedModelError, match=r"expected model\._orig_mod: pass that one"):
        tokenfuse.attach(torch.compile(FAMILY.build("sdpa"), backend="eager"), HALF)
