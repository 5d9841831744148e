"""The kit names what is wrong with an adapter: one broken adapter for each of its promises."""

from __future__ import annotations

import functools
import inspect
from typing import ClassVar

import pytest
import torch

from families import FAMILIES
from tokenfuse import hookimpl
from tokenfuse.adapters import Span
from tokenfuse.adapters.qwen3_vl import Qwen3VL
from tokenfuse.prompt.realign import Realigned
from tokenfuse.registry import Registry
from tokenfuse.testing import AdapterConformance

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
    OtherRows: "test_the_padding_side_is_kept_or_chosen",
    WrongOrder: "test_every_placeholder_has_a_feature",
    AnythingGoes: "test_the_adapter_is_found",
    Unchecked: "test_placeholders_without_pixels_are_refused",
    FramesApart: "test_a_video_is_one_item_of_all_its_frames",
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


def outcomes(kit):
    """The tests of a kit that fail, with why, on one attention and one case or two of each."""
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
        if not name.startswith("test_"):
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
    assert CAUGHT[cls] in outcomes(kit_of(cls))


def test_frames_that_are_items_are_caught_by_one_test_alone():
    assert list(outcomes(kit_of(FramesApart))) == [CAUGHT[FramesApart]]


def test_future_tokens_that_are_seen_are_caught_by_name():
    kit = kit_of(FutureSeen)
    model = kit.model("sdpa")

    def opened(_, args, kwargs):
        mask = vars(model).pop("open", None)
        return args, kwargs if mask is None else {**kwargs, "attention_mask": mask}

    handle = model.model.language_model.register_forward_pre_hook(opened, with_kwargs=True)
    try:
        failed = outcomes(kit)
    finally:
        handle.remove()
    assert "test_no_token_sees_the_future" in failed
    assert "test_positions_are_those_of_the_uncompressed_prompt" not in failed
