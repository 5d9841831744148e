"""What models of vLLM need to have a strategy between their vision tower and their LLM.

Written for vLLM 0.32. How many rows an item has is known from its grid, so that the prompt is laid
out before the tower has run; which rows stay, and where they stood, is known only afterwards. vLLM
keeps what the encoder returns as one tensor, in the model's dtype, and gives parts of it to
``recompute_mrope_positions``. So every row carries its position, and which row it is, in channels
of its own behind the features.

A family mixes both classes into vLLM's own, in front, and says how a video is laid out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenfuse.integrations._vllm_rows import CARRIED, DIGITS, Item, block, from_digits, to_digits
from tokenfuse.integrations.vllm import choose, num_kept, strategy_of
from tokenfuse.tokens import Grid, Modality

PRUNED = 0.5
"""What stands for vLLM's own rate of pruning: that it is above 0 is all that is read of it here."""


def merged(size: Any, merge: int) -> Grid:
    """The grid of the tokens behind the merger, from that of the patches."""
    t, h, w = map(int, size.tolist() if isinstance(size, Tensor) else size)
    return t, h // merge, w // merge


def visual_id(config: Any, modality: str) -> int:
    """The id of the placeholder of one visual token."""
    found: int = getattr(config, f"{modality}_token_id")
    return found


class Laying:
    """Of a processor of vLLM: lays out as many tokens for an item as the strategy will leave."""

    info: Any

    def video_layout(self, config: Any, item: Any, grid: Grid, count: int) -> Any:
        """What stands in the prompt for a video of which ``count`` tokens are left."""
        return [visual_id(config, "video")] * count

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        upstream: Any = super()
        updates: Sequence[Any] = upstream._get_prompt_updates(
            mm_items, hf_processor_mm_kwargs, out_mm_kwargs
        )
        config = self.info.get_hf_config()
        strategy = strategy_of(config)
        if strategy is None:
            return updates

        def grid_and_count(modality: Modality, number: int) -> tuple[Grid, int]:
            size = out_mm_kwargs[modality][number][f"{modality}_grid_thw"].data
            grid = merged(size, config.vision_config.spatial_merge_size)
            return grid, num_kept(strategy, modality, grid)

        def image(number: int) -> list[int]:
            return [visual_id(config, "image")] * grid_and_count("image", number)[1]

        def video(number: int) -> Any:
            item = out_mm_kwargs["video"][number]
            return self.video_layout(config, item, *grid_and_count("video", number))

        made = {"image": image, "video": video}
        return [replace(update, replacement=made[update.modality]) for update in updates]


class Compressing:
    """Of a model of vLLM, which stays as it is unless its configuration names a strategy."""

    config: Any
    visual: Any
    times: str
    """Where the times of a video's frames stand in what its processor returns."""

    def video_item(self, grid: Grid, times: Any) -> Item:
        """A video of the uncompressed prompt."""
        raise NotImplementedError

    def __init__(self, *, vllm_config: Any, prefix: str = "model") -> None:
        strategy = strategy_of(vllm_config.model_config.hf_config)
        if strategy is not None:
            # Runners then ask for positions, and the table of rotations reaches those of tokens
            # that are gone: a prompt's last position may lie behind its length.
            vllm_config.model_config.multimodal_config.video_pruning_rate = PRUNED
        upstream: Any = super()
        upstream.__init__(vllm_config=vllm_config, prefix=prefix)
        self.tokenfuse = strategy

    def _postprocess_image_embeds_evs(self, embeds: Any, inputs: Any) -> tuple[Tensor, ...]:
        if self.tokenfuse is None:
            upstream: Any = super()
            found: tuple[Tensor, ...] = upstream._postprocess_image_embeds_evs(embeds, inputs)
            return found
        sizes = inputs["image_grid_thw"]
        return tuple(
            self._left("image", rows, self._merged(size), None)
            for rows, size in zip(embeds, sizes, strict=True)
        )

    def _postprocess_video_embeds_evs(self, embeds: Any, inputs: Any) -> tuple[Tensor, ...]:
        if self.tokenfuse is None:
            upstream: Any = super()
            found: tuple[Tensor, ...] = upstream._postprocess_video_embeds_evs(embeds, inputs)
            return found
        sizes, times = inputs["video_grid_thw"], inputs[self.times]
        return tuple(
            self._left("video", rows, self._merged(size), own)
            for rows, size, own in zip(embeds, sizes, times, strict=True)
        )

    def _left(self, modality: Modality, embeds: Tensor, grid: Grid, times: Any) -> Tensor:
        """What is left of an item in the order of the prompt, with its text and positions."""
        assert self.tokenfuse is not None
        width = getattr(self, "visual_dim", embeds.shape[1])  # levels of DeepStack stand behind
        chosen = choose(self.tokenfuse, modality, embeds, grid, width)
        survivors, device = chosen.plan.survivors, embeds.device
        whole = Item(*(x.to(device) for x in self._item(modality, grid, times)))
        visual = whole.ids == visual_id(self.config, modality)
        number = torch.full((len(embeds),), -1, device=device)
        number[survivors] = torch.arange(len(survivors), device=device)
        stays = visual.logical_not()
        stays[visual] = number >= 0
        rows = stays.nonzero()[:, 0]
        if chosen.plan.frame_order is not None:
            place = chosen.plan.frame_order.argsort()
            rows = rows[place[whole.frames[rows]].argsort(stable=True)]
        of_row = visual[rows]
        source = torch.cumsum(visual, 0) - 1
        full = embeds.new_zeros(len(rows), embeds.shape[1])
        full[of_row] = chosen.rows[number[source[rows[of_row]]]]
        if not of_row.all():
            language: Any = self
            text = language.get_language_model().embed_input_ids(whole.ids[rows[~of_row]])
            full[~of_row, : text.shape[1]] = text.to(full.dtype)
        count = torch.arange(len(rows), device=device)[:, None]
        before = torch.full_like(count, int(visual.nonzero()[0, 0]))
        digits = to_digits(torch.cat([whole.positions[rows], count, before], dim=-1))
        return torch.cat([full, digits.to(full.dtype)], dim=-1)

    def _item(self, modality: Modality, grid: Grid, times: Any) -> Item:
        if modality == "video":
            return self.video_item(grid, times)
        return block(grid, visual_id(self.config, "image"))

    def _merged(self, size: Any) -> Grid:
        return merged(size, self.config.vision_config.spatial_merge_size)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Any
    ) -> tuple[Tensor, int]:
        """Positions of the prompt: right for all text; of what is visual, the item's start."""
        if self.tokenfuse is None:
            upstream: Any = super()
            found: tuple[Tensor, int] = upstream.get_mrope_input_positions(
                input_tokens, mm_features
            )
            return found
        positions = torch.zeros(3, len(input_tokens), dtype=torch.long)
        at = start = 0
        for offset, length, extent in self._items(mm_features):
            text = offset - at
            positions[:, at:offset] = start + torch.arange(text)
            start += text
            positions[:, offset : offset + length] = start
            at, start = offset + length, start + extent
        left = len(input_tokens) - at
        positions[:, at:] = start + torch.arange(left)
        return positions, start + left - len(input_tokens)

    def _items(self, features: Any) -> Iterator[tuple[int, int, int]]:
        """Where each item begins, how many rows it has, and how far the next text is from it."""
        for feature in sorted(features, key=lambda x: x.mm_position.offset):
            data, kind = feature.data, feature.modality
            grid = self._merged(data[f"{kind}_grid_thw"].data)
            times = data[self.times].data if kind == "video" else None
            extent = self._item(kind, grid, times).extent
            yield feature.mm_position.offset, feature.mm_position.length, extent

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Positions with those of the rows that are about to be read."""
        if self.tokenfuse is None:
            upstream: Any = super()
            found: tuple[Sequence[Tensor], Tensor, int] = upstream.recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
            return found
        positions = mrope_positions.clone()
        ids = torch.as_tensor(input_ids, device=positions.device)
        visual = (ids == self.config.image_token_id) | (ids == self.config.video_token_id)
        at, rows = num_computed_tokens, []
        for part in multimodal_embeddings:
            features, digits = part.split(
                [part.shape[1] - CARRIED * DIGITS, CARRIED * DIGITS], dim=-1
            )
            rows.append(features)
            if not len(part):
                continue
            carried = from_digits(digits).to(positions.device)
            first, before = int(carried[0, 3]), int(carried[0, 4])
            # A part that begins inside its item goes on where the last one ended.
            begins = at if first else int(visual[at:].nonzero()[0, 0]) + at - before
            item = begins - first
            start = positions[:, item - 1].max() + 1 if item else 0
            positions[:, begins : begins + len(part)] = carried[:, :3].T + start
            at = begins + len(part)
        delta = int(positions.max()) + 1 - len(ids)
        return rows, positions, delta
