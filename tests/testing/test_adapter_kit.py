"""The kit names what is wrong with an adapter: one broken adapter for each of its promises."""

from __future__ import annotations

import functools
import inspect
from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from families import FAMILIES
from tokenfuse import hookimpl
from tokenfuse.adapters.qwen3_vl import Qwen3VL
from tokenfuse.prompt.realign import Realigned
from tokenfuse.registry import Registry
from tokenfuse.testing import AdapterConformance, MaskedRun

pytestmark = pytest.mark.usefixtures("one_thread")


class Broken(Qwen3VL):
    """A base, so that each broken adapter is the one that is found."""

    name: ClassVar[str] = "broken"


class WrongPositions(Broken):
    """Survivors are numbered without gaps."""

    def realign(self, inputs, encoded, plans, policy="keep", side=None):
        return super().realign(inputs, encoded, plans, "contiguous", side)


class DeepStackNotFused(Broken):
    """DeepStack features of survivors are picked, not fused with what the survivors absorbed."""

    def fuse(self, encoded, plans, fuse, only=None):
        output = super().fuse(encoded, plans, fuse, only)
        picked = super().fuse(encoded, plans, lambda plan, x: plan.select(x), only)
        output.deepstack_features = picked.deepstack_features
        return output


class DeepStackLost(Broken):
    """DeepStack features are forgotten."""

    def fuse(self, encoded, plans, fuse, only=None):
        output = super().fuse(encoded, plans, fuse, only)
        output.deepstack_features = output.deepstack_features[:1]
        return output


class Miscounted(Broken):
    """A placeholder too many stays in the prompt."""

    def kept_columns(self, inputs, encoded, plans):
        keep = super().kept_columns(inputs, encoded, plans)
        gone = (~keep).nonzero()
        if len(gone):
            keep[tuple(gone[0])] = True
        return keep


class StaleDelta(Broken):
    """The rope delta stays that of the uncompressed prompt."""

    def realign(self, inputs, encoded, plans, policy="keep", side=None):
        self.positions({**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])})
        before = super().position_delta()
        short = super().realign(inputs, encoded, plans, policy, side)
        self.model.model.rope_deltas = before
        return short


class FutureSeen(Broken):
    """A mask of the shorter prompt that lets every token see every other."""

    def realign(self, inputs, encoded, plans, policy="keep", side=None):
        short, new = super().realign(inputs, encoded, plans, policy, side)
        self.model.open = new.valid[:, None, None].expand(-1, 1, new.length, -1)
        return short, new


class OtherRows(Broken):
    """Rows of a batch are padded again on the wrong side."""

    def realign(self, inputs, encoded, plans, policy="keep", side=None):
        return super().realign(inputs, encoded, plans, policy, "right")


class WrongOrder(Broken):
    """Survivors change places with their neighbours."""

    def realign(self, inputs, encoded, plans, policy="keep", side=None):
        short, new = super().realign(inputs, encoded, plans, policy, side)
        columns = new.columns.clone()
        columns[:, [2, 3]] = columns[:, [3, 2]]
        swapped = Realigned(columns, new.valid, new.removed)
        short["input_ids"] = swapped.take(inputs["input_ids"], 0)
        return short, new


class AnythingGoes(Broken):
    """Adapts to what is no model at all."""

    @classmethod
    def matches(cls, model):
        return True


class Unchecked(Broken):
    """Counts no placeholders, and cuts features or repeats columns to make them fit."""

    def kept_columns(self, inputs, encoded, plans):
        keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        for part in encoded:
            here = self.placeholders(inputs, part.modality)
            mask = part.keep_mask(plans[part.modality])
            count = int(here.sum())
            mask = torch.cat([mask, mask.new_ones(max(0, count - len(mask)))])[:count]
            keep = keep.masked_scatter(here, mask)
        return keep


CAUGHT = {
    WrongPositions: "test_positions_are_those_of_the_uncompressed_prompt",
    DeepStackNotFused: "test_every_layer_of_features_is_fused",
    DeepStackLost: "test_every_layer_of_features_is_fused",
    Miscounted: "test_every_placeholder_has_a_feature",
    StaleDelta: "test_the_next_position_follows_the_uncompressed_prompt",
    OtherRows: "test_the_padding_side_is_kept_or_chosen",
    WrongOrder: "test_every_placeholder_has_a_feature",
    AnythingGoes: "test_the_adapter_is_found",
    Unchecked: "test_placeholders_without_pixels_are_refused",
}
"""The test that a broken adapter fails, by name."""


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


def test_future_tokens_that_are_seen_are_caught_by_name():
    kit = kit_of(FutureSeen)
    model = kit.model("sdpa")

    def opened(_, args, kwargs):
        mask = vars(model).pop("open", None)
        return args, kwargs if mask is None else {**kwargs, "attention_mask": mask}

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
