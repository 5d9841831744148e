"""The kit names what is wrong with an adapter: one broken adapter for each of its promises."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from families import FAMILIES
from tokenfuse import compression, hookimpl
from tokenfuse.adapters import Span
from tokenfuse.adapters.qwen3_vl import Qwen3VL
from tokenfuse.prompt import turn
from tokenfuse.prompt.inputs import Prompt
from tokenfuse.registry import Registry
from tokenfuse.testing import AdapterConformance, MaskedRun

pytestmark = pytest.mark.usefixtures("one_thread")


class Broken(Qwen3VL):
    """A base, so that each broken adapter is the one that is found."""

    name: ClassVar[str] = "broken"


class WrongPositions(Broken):
    """Tokens are counted, as if the prompt showed nothing."""

    def positions(self, prompt):
        found = super().positions(prompt)
        counted = (prompt.mask.long().cumsum(-1) - 1).clamp_min(0)
        return found._replace(ids=counted.expand_as(found.ids))


class DeepStackNotFused(Broken):
    """DeepStack features of survivors are picked, not fused with what the survivors absorbed."""

    def fuse(self, encoded, plans, fuse):
        output = super().fuse(encoded, plans, fuse)
        picked = super().fuse(encoded, plans, lambda plan, x: plan.select(x))
        output.deepstack_features = picked.deepstack_features
        return output


class DeepStackLost(Broken):
    """DeepStack features are forgotten."""

    def fuse(self, encoded, plans, fuse):
        output = super().fuse(encoded, plans, fuse)
        output.deepstack_features = output.deepstack_features[:1]
        return output


class Miscounted(Broken):
    """The first placeholder of a prompt is taken for a word."""

    def placeholders(self, inputs, modality):
        here = super().placeholders(inputs, modality)
        return here & (here.cumsum(-1) > 1)


class StaleDelta(Broken):
    """The rope delta stays that of an earlier prompt."""

    def set_position_delta(self, delta):
        pass


class FutureSeen(Broken):
    """A mask of the shorter prompt that lets every token see every other."""

    def set_position_delta(self, delta):
        super().set_position_delta(delta)
        self.model.open = True


class AnythingGoes(Broken):
    """Adapts to what is no model at all."""

    @classmethod
    def matches(cls, model):
        return True


class FramesApart(Broken):
    """Each frame of a video is an item of its own, so that nothing can compare them."""

    def spans(self, inputs, modality, entries):
        found = super().spans(inputs, modality, entries)
        return [Span((1, *span.grid[1:])) for span in found for _ in range(span.grid[0])]


CAUGHT = {
    WrongPositions: "test_positions_are_those_of_the_uncompressed_prompt",
    DeepStackNotFused: "test_every_layer_of_features_is_fused",
    DeepStackLost: "test_every_layer_of_features_is_fused",
    Miscounted: "test_every_placeholder_has_a_feature",
    StaleDelta: "test_the_next_position_follows_the_uncompressed_prompt",
    AnythingGoes: "test_the_adapter_is_found",
    FramesApart: "test_a_video_is_one_item_of_all_its_frames",
}
"""The test that a broken adapter fails, by name."""


def other_rows(monkeypatch):
    """Rows of a batch are padded again on the wrong side."""

    def shorten(*args, side=None, **kwargs):
        return turn.shorten_prompt(*args, side="right", **kwargs)

    monkeypatch.setattr(compression, "shorten_prompt", shorten)


def wrong_order(monkeypatch):
    """Survivors change places with their neighbours."""

    def shorten(prompt, *args, **kwargs):
        short = turn.shorten_prompt(prompt, *args, **kwargs)
        columns = short.turn.columns.clone()
        columns[:, [2, 3]] = columns[:, [3, 2]]
        ids = prompt.ids.gather(-1, columns).masked_fill(~short.valid, 0)
        return short._replace(turn=dataclasses.replace(short.turn, ids=ids))

    monkeypatch.setattr(compression, "shorten_prompt", shorten)


def unchecked(monkeypatch):
    """Placeholders are not counted."""

    monkeypatch.setattr(Prompt, "_refuse_unshown", lambda self: None)


MUTANTS = {
    other_rows: "test_the_padding_side_is_kept_or_chosen",
    wrong_order: "test_every_placeholder_has_a_feature",
    unchecked: "test_placeholders_without_pixels_are_refused",
}
"""What is wrong with tokenfuse itself, whatever the adapter, and the test that says so."""


def kit_of(cls, family="qwen3_vl"):
    """The kit for an adapter that only this registry knows."""

    class Plugin:
        @hookimpl
        def tokenfuse_register_adapters(self, register):
            register(cls)

    found = FAMILIES[family]
    members = {
        "adapter": cls.name,
        "registry": Registry([Plugin()], installed=False),
        "modalities": found.modalities,
        "model": staticmethod(functools.cache(found.build)),
        "prompt": staticmethod(found.prompt),
    }
    return type("Kit", (AdapterConformance,), members)()


def outcomes(kit, only="test_"):
    """The tests of a kit that fail, with why, on one attention and one case or two of each.

    ``only``: how the names of those begin that are run.
    """
    cases = kit.cases()
    chosen = {
        "attention": ["sdpa"],
        "case": [next(name for name in cases if "," in name), "left"],
        "answered": ["left"],
        "alone": [next(name for name in cases if "," in name)],
        "dropped": ["67 %"],
        "side": ["left"],
        "encoded": ["new alone"],
    }
    failed = {}
    for name, test in inspect.getmembers(kit, inspect.ismethod):
        if not name.startswith(only):
            continue
        grid = [{}]
        for argument in inspect.signature(test).parameters:
            grid = [{**given, argument: value} for given in grid for value in chosen[argument]]
        for arguments in grid:
            try:
                test(**arguments)
            except pytest.skip.Exception:
                continue
            except BaseException as error:
                failed[name] = error
    return failed


def test_a_good_adapter_passes():
    assert outcomes(kit_of(Broken)) == {}


@pytest.mark.parametrize("cls", CAUGHT, ids=lambda cls: cls.__name__)
def test_a_broken_adapter_is_caught_by_name(cls):
    assert CAUGHT[cls] in outcomes(kit_of(cls), CAUGHT[cls])


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_a_broken_road_is_caught_by_name(mutate, monkeypatch):
    mutate(monkeypatch)
    assert MUTANTS[mutate] in outcomes(kit_of(Broken))


def test_frames_that_are_items_are_caught_by_one_test_alone():
    caught = outcomes(kit_of(FramesApart))
    # What acts inside the tower cannot tell its items from such spans either.
    assert [name for name in caught if "tower" not in name] == [CAUGHT[FramesApart]]


def test_future_tokens_that_are_seen_are_caught_by_name():
    kit = kit_of(FutureSeen)
    model = kit.model("sdpa")

    def opened(_, args, kwargs):
        if not vars(model).pop("open", False):
            return args, kwargs
        valid = kwargs["attention_mask"].bool()
        mask = valid[:, None, None].expand(-1, 1, valid.shape[1], -1)
        return args, {**kwargs, "attention_mask": mask}

    handle = model.model.language_model.register_forward_pre_hook(opened, with_kwargs=True)
    try:
        assert outcomes(kit, "test_no_token_sees_the_future")
        assert not outcomes(kit, "test_positions_are_those_of_the_uncompressed_prompt")
    finally:
        handle.remove()


class Says(MaskedRun):
    """An oracle with these logits, whatever it is asked."""

    def __init__(self, logits):
        self.said, self.never = logits, [2]

    def follow(self, tokens):
        return self.said


@pytest.mark.parametrize(
    ("lead", "token", "passes"),
    [(1e-5, 0, True), (1e-5, 1, True), (1e-3, 0, True), (1e-3, 1, False), (1e-3, 3, False)],
)
def test_a_token_other_than_the_best_passes_only_where_rounding_decides(lead, token, passes):
    logits = torch.tensor([[[1.0, 1.0 - lead, 5.0, 0.0]]])
    ids = torch.zeros(1, 3, dtype=torch.long)
    sequences = torch.cat([ids, torch.tensor([[token]])], -1)
    out = SimpleNamespace(sequences=sequences, logits=(logits[:, 0],))
    with nullcontext() if passes else pytest.raises(AssertionError):
        AdapterConformance().agree(out, ids, Says(logits))


def test_other_logits_than_the_oracles_and_another_prompt_do_not_pass():
    logits, ids = torch.tensor([[[1.0, 0.5]]]), torch.tensor([[3, 3]])
    out = SimpleNamespace(sequences=torch.tensor([[3, 3, 0]]), logits=(logits[:, 0],))
    oracle = Says(logits)
    oracle.never = []
    kit = AdapterConformance()
    kit.agree(out, ids, oracle)
    with pytest.raises(AssertionError):
        kit.agree(out, ids + 1, oracle)
    with pytest.raises(AssertionError):
        kit.agree(out, ids[:, :1], oracle)
    with pytest.raises(AssertionError, match="not close"):
        kit.agree(out, ids, Says(logits + 1e-3))
