"""Cuts inside the LLM: fewer tokens from a decoder layer on, on the unmodified model.

Between layers the hidden states keep the length that the model gave them, so that whatever it does
there, such as adding DeepStack features, finds them as it expects. Each layer reads the rows that
are left, and its cache holds no others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenfuse.adapters._hooks import Hook
from tokenfuse.costs import Stopwatch
from tokenfuse.errors import PlanError, PromptError, UnsupportedModelError
from tokenfuse.ops.precision import outside_autocast
from tokenfuse.ops.row_attention import received_attention, row_attention
from tokenfuse.ops.select import true_indices
from tokenfuse.plan import FusionPlan
from tokenfuse.prompt.cache import CACHES, cache_of
from tokenfuse.prompt.layers import Kept, Layers, pad_left
from tokenfuse.prompt.turn import Turn
from tokenfuse.sessions._calls import Call, Cut, Row, leave
from tokenfuse.sessions._decoder import attention_of, decoder_layers
from tokenfuse.sessions._masks import Entries, cut_mask
from tokenfuse.sessions._rows import (
    HeardKeys,
    all_rows,
    along,
    arguments_of,
    given_rows,
    hearing,
    visible_rows,
)
from tokenfuse.strategies._base import Strategy
from tokenfuse.strategies._layers import CachePruning, LayerCut, LayerTokens, StepState


class LayerCounts(NamedTuple):
    """How many visual tokens the layers have read, by layer and row, earlier turns included."""

    visual: list[list[int]]
    score_ms: float

    @property
    def by_row(self) -> list[float]:
        """How many visual tokens of each row a layer reads, on average over layers."""
        return [sum(row) / len(row) for row in zip(*self.visual, strict=True)]

    @property
    def average(self) -> float:
        """The same of all rows together."""
        return sum(self.by_row)


@contextmanager
def layer_stage(
    model: Any, strategy: Strategy | None, turn: Turn | None
) -> Iterator[LayerStage | None]:
    """Cut the prompt of ``turn`` inside the LLM as the strategy says, within the block.

    What a cache holds of earlier turns was cut already, and is read as it is. None where nothing is
    cut. Calls in other threads, and those with another cache, are left alone.

    Raises UnsupportedModelError where the layers ran without their hooks.
    """
    new = turn is not None and turn.visuals is not None
    if strategy is None or turn is None or (not new and turn.layers is None):
        yield None
        return
    cuts, pruning = strategy.cuts() if new else (), strategy.cache_pruning()
    repeated = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if model.training and repeated:
        raise UnsupportedModelError(
            f"strategy {strategy.name} acts in the forward pass only, and gradient checkpointing "
            "repeats it in the backward pass: switch that off, or act before the LLM"
        )
    stage = LayerStage(model, strategy, cuts, pruning, turn)
    with ExitStack() as hooks:
        stage.place(hooks)
        yield stage
    if not stage.began:
        raise UnsupportedModelError(
            f"the layers of {type(model).__name__} ran without their hooks, so that strategy "
            f"{strategy.name} had no effect; expected a model that was not compiled before: call "
            "torch.compiler.reset(), attach, then compile"
        )


class LayerStage:
    """The hooks of one call of a model's method."""

    def __init__(
        self,
        model: Any,
        strategy: Strategy,
        cuts: Sequence[LayerCut],
        pruning: CachePruning | None,
        turn: Turn,
    ) -> None:
        self.model, self.strategy, self.turn = model, strategy, turn
        self.cuts = {cut.layer: cut for cut in cuts}
        self.pruning = pruning
        self.states: list[StepState] = []
        """What pruning remembers of each row from step to step."""
        self.layers = decoder_layers(model)
        self.kind = model.config.get_text_config()._attn_implementation
        self.dtype = model.get_input_embeddings().weight.dtype
        self.before = turn.layers or Layers(())
        self.thread = threading.get_ident()
        self.watch = Stopwatch(model.device)
        self.began = False
        self.cache: Any = None
        self.call: Call | None = None
        self.read: Call | None = None
        """The last call that has read the prompt."""
        self.unsettled: Call | None = None
        """The same until what it has cut is in ``before``."""
        self.heard: HeardKeys | None = None

    def place(self, hooks: ExitStack) -> None:
        """Register the hooks; ``hooks`` removes them."""
        acts = [*self.cuts, *(kept.layer for kept in self.before.kept)]
        if self.pruning is not None:
            acts.append(self.pruning.layer)
            attention = attention_of(self.layers[self.pruning.layer - 1])[1]
            before, after = _bound(self._listen_step, None), _bound(self._choose_read, None)
            hooks.enter_context(attention.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(attention.register_forward_hook(after, with_kwargs=True))
        first = min(acts, default=0)
        for number, layer in enumerate(self.layers):
            if number == 0 or number >= first:
                before, after = _bound(self._before, number), _bound(self._after, number)
                hooks.enter_context(layer.register_forward_pre_hook(before, with_kwargs=True))
                hooks.enter_context(layer.register_forward_hook(after, with_kwargs=True))
        for cut in self.cuts.values():
            if not cut.own and (cut.queries or cut.keys):
                attention = attention_of(self.layers[cut.layer - 1])[1]
                before, after = _bound(self._listen, cut), _bound(self._score, cut)
                hooks.enter_context(attention.register_forward_pre_hook(before, with_kwargs=True))
                hooks.enter_context(attention.register_forward_hook(after, with_kwargs=True))

    def after(self, turn: Turn) -> Turn:
        """The turn, with what the caches hold of it since."""
        if self.read is None:
            return turn
        self._settle()
        found = self.counts
        counts = () if found is None else tuple(map(tuple, found.visual))
        return replace(turn, visuals=None, layers=replace(self.before, counts=counts))

    def _settle(self) -> None:
        """Note what the caches hold after the call that has read the prompt, once."""
        call, self.unsettled = self.unsettled, None
        if call is None or call.rows is None:
            return
        # Also where an earlier turn was cut at other layers.
        marks = {kept.layer for kept in self.before.kept} | {cut.layer for cut in call.cuts}
        visual = self.before.visual
        if self.pruning is not None:
            new = [call.past + row.columns[row.visual] for row in call.rows]
            old = visual or [columns[:0] for columns in new]
            visual = tuple(torch.cat(pair) for pair in zip(old, new, strict=True))
        self.before = Layers(tuple(self._kept(call, layer) for layer in sorted(marks)), visual)

    @property
    def counts(self) -> LayerCounts | None:
        """What each layer has read of the prompt; None where no call has read it."""
        visuals = self.turn.visuals
        if self.read is None or self.read.rows is None or visuals is None:
            return None
        held = () if self.turn.layers is None else self.turn.layers.counts
        earlier = held or (visuals.earlier,) * len(self.layers)
        own = zip(*(row.counts for row in self.read.rows), strict=True)
        visual = [
            [a + b for a, b in zip(*layer, strict=True)] for layer in zip(earlier, own, strict=True)
        ]
        # A lap ends before each score, and one after it.
        return LayerCounts(visual, sum(self.watch.read()[1::2]))

    # --- one call of the decoder -----------------------------------------------------------------

    def _begin(self, hidden: Tensor, cache: Any) -> None:
        """A call of the decoder begins: at the input of its first layer."""
        if not self.began:
            self.began, self.cache = True, cache
        if cache is not self.cache:
            # Another prompt, such as that of guidance.
            self.call = None
            return
        if cache is not None:
            self._settle()
        past = 0 if cache is None else int(cache.get_seq_length())
        shape = (hidden.shape[0], hidden.shape[1])
        times = shape[0] // len(self.turn.ids)
        rows = self._rows(past, shape[1])
        self.call = Call(cache, past, shape, times, rows)
        if rows is not None:
            self.read = self.unsettled = self.call

    def _rows(self, past: int, width: int) -> list[Row] | None:
        """The prompts, if a call reads them whose caches stand for ``past`` columns."""
        visuals, length = self.turn.visuals, self.turn.ids.shape[1]
        if visuals is None or past >= length:
            return None
        if past + width < length:
            raise PromptError(
                f"the prompt is read in parts, and strategy {self.strategy.name} acts inside the "
                "LLM, where it has to see the whole; expected no prefill_chunk_size: unset it"
            )
        more = past + width - length
        real = torch.cat(
            [self.turn.mask[:, past:] != 0, visuals.here.new_ones(len(self.turn.ids), more)], -1
        )
        columns, _ = pad_left(real, [count + more for count in visuals.lengths])
        if self.cuts and not more and bool(visuals.here.gather(1, past + columns[:, -1:]).any()):
            raise PromptError(
                f"a prompt ends with a visual token, which strategy {self.strategy.name} may "
                "remove inside the LLM; expected text after the last image or video: let the "
                "processor end the prompt"
            )
        found = []
        for row, (length, count) in enumerate(zip(visuals.lengths, visuals.counts, strict=True)):
            own = columns[row, columns.shape[1] - length - more :]
            here = torch.zeros_like(own, dtype=torch.bool)
            here[:length] = visuals.here[row, past + own[:length]]
            visual = true_indices(here, count)
            at = past + own[visual]
            found.append(
                Row(
                    own,
                    visual,
                    visuals.coords[row, at],
                    visuals.item[row, at],
                    visuals.sizes[row, at],
                    visuals.originals[row],
                    count,
                )
            )
        return found

    def _before(
        self, number: int, layer: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Before a layer: cut, and give it what is left."""
        if threading.get_ident() != self.thread:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if number == 0:
            self._begin(hidden, cache_of(kwargs))
        call = self.call
        if call is None:
            return None
        if call.rows is not None:
            for row in call.rows:
                # Layers before the first cut have no hooks, and read all.
                row.counts += [len(row.visual)] * (number - len(row.counts))
            if number == 0:
                self._choose(call, hidden)
            if number in self.cuts:
                hidden = self._cut(self.cuts[number], call, layer, hidden, kwargs)
            elif call.columns is not None:
                hidden = self._resume(call, hidden)
            for row in call.rows:
                row.counts.append(len(row.visual))
        if call.columns is None and self.before.at(number) is None and call.unread is None:
            return None
        if call.columns is None:
            # A step of an answer: all that differs is what the caches hold.
            given = kwargs.get("attention_mask")
            mask = self._mask(given, call, number)
            if mask is given and "cache_position" not in kwargs:
                return None
        short = {name: self._short(name, value, call, number) for name, value in kwargs.items()}
        rest = tuple(self._short("", value, call, number) for value in args[1:])
        if args:
            return (hidden, *rest), short
        return rest, {**short, "hidden_states": hidden}

    def _after(
        self, number: int, layer: Any, args: Any, kwargs: dict[str, Any], *output: Any
    ) -> Any:
        """After a layer: put what it has made in its place among all."""
        call = self.call
        if threading.get_ident() != self.thread or not output or call is None:
            return None
        if call.columns is None:
            return None
        made = output[0]
        short = made[0] if isinstance(made, tuple) else made
        index = self._index(call, short)[..., None].expand_as(short)
        whole = short.new_zeros(*call.shape, short.shape[-1]).scatter(1, index, short)
        call.short, call.whole = short, whole
        if number == len(self.layers) - 1:
            call.short = call.whole = None
            call.made.clear()
        return (whole, *made[1:]) if isinstance(made, tuple) else whole

    def _index(self, call: Call, like: Tensor) -> Tensor:
        """The columns that are left, for each row of ``like``, on its device."""
        assert call.columns is not None
        return call.columns.repeat_interleave(call.times, 0).to(like.device)

    def _resume(self, call: Call, hidden: Tensor) -> Tensor:
        """What is left at the input of a layer, with what the model has added since the last."""
        if hidden is call.whole:
            assert call.short is not None
            return call.short
        short = hidden.gather(
            1, self._index(call, hidden)[..., None].expand(-1, -1, hidden.shape[-1])
        )
        assert call.rows is not None
        if call.whole is None or call.short is None or not any(row.fused for row in call.rows):
            return short
        # What has been added to tokens that are fused is fused like them.
        short, width = short.clone(), short.shape[1]
        for number, row in enumerate(call.rows):
            if row.first is None:
                continue
            left = width - len(row.columns)
            for i in range(number * call.times, (number + 1) * call.times):
                added = hidden[i, row.first] - call.whole[i, row.first]
                with outside_autocast(added.device):
                    for plan, fuse in row.fused:
                        added = fuse(plan, added)
                short[i, left + row.visual] = call.short[i, left + row.visual] + added
        return short

    # --- cuts ------------------------------------------------------------------------------------

    def _choose(self, call: Call, hidden: Tensor) -> None:
        """Ask for the rows whose attention later cuts read, at the input of the first layer."""
        assert call.rows is not None
        for cut in self.cuts.values():
            if cut.choose is None:
                continue
            with outside_autocast(hidden.device):
                call.chosen[cut.layer] = [
                    row.columns[cut.choose(self._view(call, row, hidden[i * call.times], 0))]
                    if len(row.visual)
                    else row.columns[:0]
                    for i, row in enumerate(call.rows)
                ]

    def _view(self, call: Call, row: Row, states: Tensor, layer: int, **read: Any) -> LayerTokens:
        """One prompt as a strategy sees it. ``states``: those of all columns of the call."""
        visuals = self.turn.visuals
        assert visuals is not None
        return LayerTokens(
            states=states if len(states) == len(row.columns) else states[row.columns],
            visual=row.visual,
            coords=row.coords,
            item=row.item,
            sizes=row.sizes,
            grids=visuals.grids,
            original=row.original,
            source=row.source,
            layer=layer,
            num_layers=len(self.layers),
            counts=tuple(row.counts),
            norm=getattr(self.model.get_decoder(), "norm", None),
            **read,
        )

    def _cut(
        self, cut: LayerCut, call: Call, layer: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """The input of a layer after a cut: what is left, ``(B, S, D)``."""
        assert call.rows is not None
        self.watch.lap()
        if call.columns is not None and hidden is not call.whole:
            # The model has added something; where tokens are fused it belongs to what is left.
            short = self._resume(call, hidden)
            hidden = hidden.scatter(1, self._index(call, short)[..., None].expand_as(short), short)
        if cut.own:
            self._score_own(cut, call, layer, hidden, kwargs)
        reads = call.read.pop(cut.layer, [{} for _ in call.rows])
        changed = []
        for i, row in enumerate(call.rows):
            if not len(row.visual):
                continue
            states = hidden[i * call.times]
            view = self._view(call, row, states, cut.layer, **reads[i])
            with outside_autocast(states.device):
                plan = self._checked(cut.plan(view), row)
            before = row.columns[row.visual]
            leave(row, plan, cut)
            if plan.is_identity:
                continue
            if cut.fuse is not None:
                changed.append((i, row, plan, before))
            elif row.first is not None:
                row.fused.append((plan, FusionPlan.select))
        if all(len(row.visual) == row.counts[-1] for row in call.rows) and call.columns is None:
            self.watch.lap()
            return hidden
        keep = torch.zeros(len(call.rows), call.shape[1], dtype=torch.bool, device=hidden.device)
        for i, row in enumerate(call.rows):
            keep[i, row.columns] = True
        lengths = [len(row.columns) for row in call.rows]
        call.columns, call.valid = pad_left(keep, lengths)
        call.even = min(lengths) == max(lengths)
        call.made.clear()
        call.cuts.append(Cut(cut.layer, call.columns, call.valid, call.even))
        index = self._index(call, hidden)[..., None].expand(-1, -1, hidden.shape[-1])
        short = hidden.gather(1, index)
        for i, row, plan, before in changed:
            assert cut.fuse is not None
            if row.first is None:
                row.first = before
            row.fused.append((plan, cut.fuse))
            at = short.shape[1] - len(row.columns) + row.visual
            for j in range(i * call.times, (i + 1) * call.times):
                with outside_autocast(hidden.device):
                    short[j, at] = cut.fuse(plan, hidden[j, before]).to(short.dtype)
        self.watch.lap()
        return short

    def _checked(self, plan: FusionPlan, row: Row) -> FusionPlan:
        if not isinstance(plan, FusionPlan):
            raise PlanError(
                f"strategy {self.strategy.name} returned a {type(plan).__name__} as its plan; "
                "expected a FusionPlan"
            )
        try:
            plan.check(len(row.visual))
        except PlanError as error:
            raise PlanError(f"strategy {self.strategy.name}: {error}") from error
        return plan

    def _kept(self, call: Call, number: int) -> Kept:
        """What the caches of the layers from one on hold after a call that has read the prompt."""
        # What follows the prompt in the same call, as with lookup decoding, may be taken back.
        more = call.past + call.shape[1] - self.turn.ids.shape[1]
        last = next((cut for cut in reversed(call.cuts) if cut.layer <= number), None)
        if last is None:
            columns = torch.arange(call.shape[1], device=self.turn.ids.device)
            columns = columns.expand(len(self.turn.ids), -1)
            valid, whole = torch.ones_like(columns, dtype=torch.bool), True
        else:
            columns, valid, whole = last.columns, last.valid, last.even
        end = columns.shape[1] - more
        columns, valid = call.past + columns[:, :end], valid[:, :end]
        before = self.before.at(number)
        if before is not None:
            older, counts = before.until(call.past)
            whole = whole and before.whole
        else:
            older = torch.arange(call.past, device=columns.device).expand(len(columns), -1)
            counts = torch.ones_like(older, dtype=torch.bool)
        columns, valid = torch.cat([older, columns], -1), torch.cat([counts, valid], -1)
        return Kept(number, columns, valid, self.turn.ids.shape[1], whole)

    # --- scores ----------------------------------------------------------------------------------

    def _listen(
        self, cut: LayerCut, module: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Before the attention that a cut is decided by: hear its keys."""
        call = self.call
        if threading.get_ident() != self.thread or call is None or call.rows is None:
            return None
        if not self._asked(cut, call):
            return None
        name = next((name for name in CACHES if name in kwargs), None)
        if name is None:
            raise UnsupportedModelError(
                f"a {type(module).__name__} is called without a cache by name, so that its keys "
                "cannot be read; expected a decoder of transformers"
            )
        self.heard, call_with = hearing(kwargs, name)
        return args, call_with

    def _score(
        self, cut: LayerCut, module: Any, args: Any, kwargs: dict[str, Any], *output: Any
    ) -> None:
        """After the attention that a cut is decided by: read it."""
        call = self.call
        if threading.get_ident() != self.thread or call is None or call.rows is None:
            return
        keys = self._take_keys()
        if not output or keys is None:
            return
        self.watch.lap()
        given = {**kwargs, "hidden_states": args[0]} if args else kwargs
        mask = given.get("attention_mask")
        past = self._held(call, cut.layer - 1)
        found: list[dict[str, Any]] = []
        for i, row in enumerate(call.rows):
            at, places = i * call.times, self._places(call, row)
            read: dict[str, Any] = {}
            if not len(row.visual):
                found.append(read)
                continue
            if cut.keys:
                read["keys"] = keys[at][:, past + places].transpose(0, 1)
            if cut.queries is not None:
                read |= self._read(
                    cut,
                    call,
                    i,
                    places,
                    lambda where, i=at: given_rows(module, given, i, where),
                    lambda where, i=at: visible_rows(mask, i, where, past, keys.shape[2]),
                    keys[at],
                    past,
                )
            pair = given.get("position_embeddings")
            if cut.queries == "chosen" and isinstance(pair, tuple | list):
                # (..., n, d), with or without a batch.
                read["rope"] = tuple(
                    (x[min(at, len(x) - 1)] if x.ndim == 3 else x)[places] for x in pair
                )
            found.append(read)
        call.read[cut.layer] = found
        self.watch.lap()

    def _score_own(
        self, cut: LayerCut, call: Call, layer: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Read the attention of the layer at the input of which a cut is, before it runs."""
        assert call.rows is not None
        name, module = attention_of(layer)
        found: list[dict[str, Any]] = []
        for i, row in enumerate(call.rows):
            if not len(row.visual):
                found.append({})
                continue
            at = i * call.times
            given = arguments_of(layer, name, hidden, kwargs, at, row.columns, call.shape)
            every = torch.arange(len(row.columns), device=hidden.device)
            keys = all_rows(module, given, 0, every).keys
            found.append(
                self._read(
                    cut,
                    call,
                    i,
                    every,
                    lambda where, given=given: given_rows(module, given, 0, where),
                    lambda where, n=keys.shape[1]: visible_rows(None, 0, where, 0, n),
                    keys,
                    0,
                )
            )
        call.read[cut.layer] = found

    def _read(
        self,
        cut: LayerCut,
        call: Call,
        number: int,
        places: Tensor,
        given: Any,
        visible: Any,
        keys: Tensor,
        past: int,
    ) -> dict[str, Any]:
        """The attention that a cut asks for, of one prompt whose tokens stand in ``places``."""
        assert call.rows is not None
        row = call.rows[number]
        own = past + places
        if cut.queries == "all":
            asked = given(places)
            with outside_autocast(keys.device):
                received = received_attention(
                    asked.queries,
                    keys,
                    asked.scale,
                    lambda part: visible(places[part]),
                    asked.softcap,
                )
            return {"received": received[own]}
        if cut.queries == "chosen":
            # No cut removes text, so that they are still there.
            asked = torch.searchsorted(row.columns, call.chosen[cut.layer][number])
        else:
            # The prompt's last token; without a cache, that of the answer so far.
            end = len(row.columns) - 1
            if call.cache is not None:
                end -= call.past + call.shape[1] - self.turn.ids.shape[1]
            asked = torch.tensor([end], device=places.device)
        where = places[asked]
        found = given(where)
        with outside_autocast(keys.device):
            rows = row_attention(found.queries, keys, found.scale, visible(where), found.softcap)
        return {"attention": rows[:, :, own], "rows": asked}

    def _take_keys(self) -> Tensor | None:
        """The keys that have been heard last, once."""
        heard, self.heard = self.heard, None
        return None if heard is None else heard.keys

    def _asked(self, cut: LayerCut, call: Call) -> bool:
        """Whether a cut reads attention or keys of this call."""
        assert call.rows is not None
        return cut.asks is None or any(
            cut.asks(tuple(row.counts), row.original, len(self.layers))
            for row in call.rows
            if len(row.visual)
        )

    def _places(self, call: Call, row: Row) -> Tensor:
        """Where the tokens of a prompt stand in what the layers read now."""
        if call.columns is None:
            return row.columns
        left, width = call.columns.shape[1] - len(row.columns), call.columns.shape[1]
        return torch.arange(left, width, device=row.columns.device)

    def _held(self, call: Call, number: int) -> int:
        """How many entries the cache of a layer has held before this call."""
        before = self.before.at(number)
        if before is None:
            return call.past
        return before.columns.shape[1] + call.past - before.length

    # --- reading the cache in part ---------------------------------------------------------------

    def _listen_step(
        self, _: None, module: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Before the attention that tells what a step reads: hear its keys."""
        call = self.call
        if threading.get_ident() != self.thread or call is None or not self._steps(call):
            return None
        self.heard, call_with = hearing(kwargs, next(name for name in CACHES if name in kwargs))
        return args, call_with

    def _choose_read(
        self, _: None, module: Any, args: Any, kwargs: dict[str, Any], *output: Any
    ) -> None:
        """After that attention: choose what the later layers read of the cache."""
        call = self.call
        if threading.get_ident() != self.thread or call is None or not output:
            return
        keys = self._take_keys()
        if keys is None or self.pruning is None or not self._steps(call):
            return
        given = {**kwargs, "hidden_states": args[0]} if args else kwargs
        number, width = self.pruning.layer - 1, call.past + call.shape[1]
        held, before = self._held(call, number), self.before.at(number)
        rows = call.shape[0]
        if len(self.states) != rows:
            self.states = [StepState() for _ in range(rows)]
        place = torch.zeros(1, dtype=torch.long, device=keys.device)
        unread = torch.zeros(rows, width, dtype=torch.bool, device=keys.device)
        for i in range(rows):
            own, columns = keys[i], self.before.visual[i // call.times]
            if not len(columns):
                continue
            query = given_rows(module, given, i, place)
            visible = visible_rows(given.get("attention_mask"), i, place, held, own.shape[1])
            with outside_autocast(own.device):
                rows_of = row_attention(query.queries, own, query.scale, visible, query.softcap)
                weights = rows_of[:, 0].mean(0)
            entries = columns
            if before is not None:
                stands, counts = before.until(call.past)
                stands, counts = stands[i // call.times], counts[i // call.times]
                index = torch.arange(len(stands), device=keys.device)
                entries = index.new_zeros(width).scatter(0, stands[counts], index[counts])[columns]
            with outside_autocast(own.device):
                chosen = self.pruning.choose(weights[entries], self.states[i])
            unread[i] = unread[i].scatter(0, columns, ~chosen)
        call.unread = unread

    def _steps(self, call: Call) -> bool:
        """Whether a call is a step of an answer."""
        return call.rows is None and call.shape[1] == 1 and bool(self.before.visual)

    # --- what layers are called with -------------------------------------------------------------

    def _short(self, name: str, value: Any, call: Call, number: int) -> Any:
        """An argument of a layer for what is left."""
        if name in CACHES or (value is None and name != "attention_mask"):
            return value
        if name == "attention_mask":
            return self._mask(value, call, number)
        if name == "cache_position":
            return self._held(call, number) + torch.arange(self._width(call), device=value.device)
        if call.columns is None or not isinstance(value, Tensor | tuple | list):
            return value
        key = ("", id(value))
        if key not in call.made:

            def pick(x: Tensor, batch: int, columns: int) -> Tensor:
                index = self._index(call, x)
                if x.ndim < -batch:
                    x = x.expand(1, *x.shape)
                shape = list(x.shape)
                shape[batch] = len(index)
                shape[columns] = index.shape[1]
                x = x.expand(
                    [n if i == columns % x.ndim else shape[i] for i, n in enumerate(x.shape)]
                )
                view = [1] * x.ndim
                view[batch], view[columns] = index.shape
                return x.gather(columns, index.view(view).expand(shape))

            call.made[key] = (value, along(name, value, call.shape, pick))
        return call.made[key][1]

    def _mask(self, mask: Any, call: Call, number: int) -> Any:
        """The mask of a layer for the queries that are left and what its cache then holds."""
        held, before = self._held(call, number), self.before.at(number)
        total = held + self._width(call)
        if call.cache is not None:
            total = int(call.cache.get_mask_sizes(self._width(call), number)[0])
        prunes = self.pruning is not None and number >= self.pruning.layer
        key = (id(mask), before and before.layer, total, held, prunes)
        if key not in call.made:
            entries = Entries.of(
                before,
                call.past,
                call.shape[1],
                len(self.turn.ids),
                call.columns,
                call.valid,
                call.even,
                self.turn.ids.device,
            )
            call.made[key] = (
                mask,
                cut_mask(
                    mask,
                    entries.repeat(call.times),
                    total,
                    kind=self.kind,
                    dtype=self.dtype,
                    unread=call.unread if prunes else None,
                ),
            )
        return call.made[key][1]

    def _width(self, call: Call) -> int:
        """How many columns a layer reads."""
        return call.shape[1] if call.columns is None else call.columns.shape[1]


def _bound(call: Any, first: Any) -> Hook:
    """A hook that calls ``call(first, module, args, kwargs, ...)``."""
    return Hook(lambda *given: call(first, *given), with_kwargs=True)
