"""Qwen3-VL of vLLM with a strategy between its vision tower and its LLM.

Written for vLLM 0.32. How many rows an item has is known from its grid, so that the prompt is laid
out before the tower has run; which rows stay, and where they stood, is known only afterwards. vLLM
keeps what the encoder returns as one tensor, in the model's dtype, and gives parts of it to
``recompute_mrope_positions``. So every row carries its position, and which row it is, in channels
of its own behind the features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.models import qwen3_vl as upstream
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptUpdate

from tokenfuse.integrations._vllm_rows import CARRIED, DIGITS, from_digits, to_digits, with_frames
from tokenfuse.integrations.vllm import choose, num_kept, strategy_of
from tokenfuse.tokens import Grid


class _Item(NamedTuple):
    """An item as the uncompressed prompt has it: its token ids, and where each stands from 0 on."""

    ids: list[int]
    positions: Tensor


def _grid(data: Any, merge: int) -> Grid:
    """Of the tokens behind the merger, from that of the patches."""
    t, h, w = map(int, data.tolist() if isinstance(data, Tensor) else data)
    return t, h // merge, w // merge


class Processor(upstream.Qwen3VLMultiModalProcessor):
    """Lays out as many tokens for an item as the strategy will leave of it."""

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        updates: Sequence[PromptUpdate] = super()._get_prompt_updates(
            mm_items, hf_processor_mm_kwargs, out_mm_kwargs
        )
        config = self.info.get_hf_config()
        strategy = strategy_of(config)
        if strategy is None:
            return updates
        merge = config.vision_config.spatial_merge_size

        def image(number: int) -> list[int]:
            grid = _grid(out_mm_kwargs["image"][number]["image_grid_thw"].data, merge)
            return [config.image_token_id] * num_kept(strategy, "image", grid)

        def video(number: int) -> Any:
            item = out_mm_kwargs["video"][number]
            grid = _grid(item["video_grid_thw"].data, merge)
            left = [num_kept(strategy, "video", grid)] + [0] * (grid[0] - 1)
            return _layout(config, self.info.get_tokenizer(), item["timestamps"].data, left)

        made = {"image": image, "video": video}
        return [replace(update, replacement=made[update.modality]) for update in updates]


def _layout(config: Any, tokenizer: Any, timestamps: Any, per_frame: list[int]) -> Any:
    return upstream.Qwen3VLMultiModalProcessor.get_video_repl(
        tokens_per_frame=per_frame,
        timestamps=[float(x) for x in timestamps],
        tokenizer=tokenizer,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        video_token_id=config.video_token_id,
        select_token_id=False,
    )


@MULTIMODAL_REGISTRY.register_processor(
    Processor,
    info=upstream.Qwen3VLProcessingInfo,
    dummy_inputs=upstream.Qwen3VLDummyInputsBuilder,
)
class Qwen3VL(upstream.Qwen3VLForConditionalGeneration):
    """vLLM's model, unchanged unless its configuration names a strategy."""

    def __init__(self, *, vllm_config: Any, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.tokenfuse = strategy_of(self.config)
        if self.tokenfuse is not None:
            self.is_multimodal_pruning_enabled = True

    def _postprocess_image_embeds_evs(self, embeds: Any, inputs: Any) -> tuple[Tensor, ...]:
        if self.tokenfuse is None:
            found: tuple[Tensor, ...] = super()._postprocess_image_embeds_evs(embeds, inputs)
            return found
        made = []
        for rows, size in zip(embeds, inputs["image_grid_thw"], strict=True):
            grid = self._merged(size)
            chosen = choose(self.tokenfuse, "image", rows, grid, self.visual_dim)
            index = chosen.plan.survivors
            _, high, wide = grid
            at = torch.stack([index * 0, index // wide % high, index % wide], dim=-1)
            made.append(self._carrying(chosen.rows, at, 0))
        return tuple(made)

    def _postprocess_video_embeds_evs(self, embeds: Any, inputs: Any) -> tuple[Tensor, ...]:
        if self.tokenfuse is None:
            found: tuple[Tensor, ...] = super()._postprocess_video_embeds_evs(embeds, inputs)
            return found
        made = []
        sizes, times = inputs["video_grid_thw"], inputs["timestamps"]
        for rows, size, timestamps in zip(embeds, sizes, times, strict=True):
            made.append(self._video(rows, self._merged(size), timestamps))
        return tuple(made)

    def _video(self, embeds: Tensor, grid: Grid, timestamps: Any) -> Tensor:
        """The rows of one video in the order of the prompt, markers and time stamps among them."""
        assert self.tokenfuse is not None
        chosen = choose(self.tokenfuse, "video", embeds, grid, self.visual_dim)
        survivors, device = chosen.plan.survivors, embeds.device
        whole = self._uncompressed(grid, timestamps)
        ids = torch.tensor(whole.ids, device=device)
        visual = ids == self.config.video_token_id
        # A marker ends each frame; what stands between two ends is of one frame.
        frame = torch.cumsum(ids == self.config.vision_end_token_id, 0)
        frame = torch.where(ids == self.config.vision_end_token_id, frame - 1, frame)
        kept = torch.zeros(len(embeds), dtype=torch.bool, device=device)
        kept[survivors] = True
        stays = visual.logical_not()
        stays[visual] = kept
        order = chosen.plan.frame_order
        place = torch.arange(grid[0], device=device)
        if order is not None:
            place = order.argsort()
        rows = stays.nonzero()[:, 0]
        rows = rows[place[frame[rows]].argsort(stable=True)]
        # The features in the same order.
        source = torch.cumsum(visual, 0) - 1
        number = torch.full_like(kept, -1, dtype=torch.long)
        number[survivors] = torch.arange(len(survivors), device=device)
        of_row = visual[rows]
        features = chosen.rows[number[source[rows[of_row]]]]
        text = self.get_language_model().embed_input_ids(ids[rows])
        full = torch.cat([text, text.new_zeros(len(text), embeds.shape[1] - text.shape[1])], dim=-1)
        full[of_row] = features.to(full.dtype)
        before = (ids == self.config.vision_start_token_id).nonzero()[0, 0] + 1
        return self._carrying(full, whole.positions.to(device)[rows], int(before))

    def _carrying(self, rows: Tensor, positions: Tensor, before: int) -> Tensor:
        numbers = torch.arange(len(rows), device=rows.device)[:, None]
        first = torch.full_like(numbers, before)
        digits = to_digits(torch.cat([positions.long(), numbers, first], dim=-1))
        return torch.cat([rows, digits.to(rows.dtype)], dim=-1)

    def _merged(self, size: Any) -> Grid:
        return _grid(size, self.visual.spatial_merge_size)

    def _uncompressed(self, grid: Grid, timestamps: Any) -> _Item:
        """A video of the uncompressed prompt."""
        t, h, w = grid
        ids = list(_layout(self.config, self._tokenizer, timestamps, [h * w] * t).full)
        positions, start = [], 0
        for token in ids:
            if token != self.config.video_token_id:
                positions.append((start, start, start))
                start += 1
            else:
                positions.append((-1, -1, -1))
        return _Item(ids, with_frames(torch.tensor(positions), grid))

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Any
    ) -> tuple[Tensor, int]:
        """Positions of the prompt: right for all text; of what is visual, the item's start."""
        if self.tokenfuse is None:
            found: tuple[Tensor, int] = super().get_mrope_input_positions(input_tokens, mm_features)
            return found
        positions = torch.zeros(3, len(input_tokens), dtype=torch.long)
        at = start = 0
        for offset, length, span in self._items(mm_features):
            text = offset - at
            positions[:, at:offset] = start + torch.arange(text)
            start += text
            positions[:, offset : offset + length] = start
            at, start = offset + length, start + span
        left = len(input_tokens) - at
        positions[:, at:] = start + torch.arange(left)
        return positions, start + left - len(input_tokens)

    def _items(self, features: Any) -> Iterator[tuple[int, int, int]]:
        """Where each item begins, how many rows it has, and how far the next text is from it."""
        for feature in sorted(features, key=lambda x: x.mm_position.offset):
            data, place = feature.data, feature.mm_position
            if feature.modality == "image":
                _, h, w = self._merged(data["image_grid_thw"].data)
                span = max(h, w)
            else:
                grid = self._merged(data["video_grid_thw"].data)
                whole = self._uncompressed(grid, data["timestamps"].data)
                span = int(whole.positions.max()) + 1
            yield place.offset, place.length, span

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Positions with those of the rows that are about to be read."""
        if self.tokenfuse is None:
            found: tuple[Sequence[Tensor], Tensor, int] = super().recompute_mrope_positions(
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
