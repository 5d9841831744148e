"""Batches of questions on many machines: Ray Data LLM over vLLM with the plug-in."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tokenfuse.config import Configuration
from tokenfuse.errors import ConfigError, EngineError, TokenFuseError
from tokenfuse.inference.engines import Reader, Reply, failed
from tokenfuse.inference.inputs import refuse_special_tokens
from tokenfuse.inference.rows import Row
from tokenfuse.integrations.vllm_engine import (
    engine_options,
    load_processor,
    prompt,
    sampling_options,
    uncompressed_length,
    visual_tokens,
)

NUMBER = "tokenfuse_row"
"""The column that says which row it is."""
_OWN_STAGES = ("chat_template", "tokenize", "detokenize", "prepare_multimodal")


class Ray:
    """Answers by vLLM in the actors of a Ray cluster, or of this machine where there is none.

    Videos are decoded where their answers are made, so that every machine has to reach them under
    the same path. ``options``: of vLLM's engine; there are as many engines as GPUs for them.

    Raises ConfigError where Ray or vLLM is not installed, or the strategy cannot be had in vLLM,
    and UnsupportedModelError where the processor cannot be loaded or takes no video.
    """

    def __init__(
        self,
        source: str | Path,
        configuration: Configuration | None,
        *,
        max_new_tokens: int = 64,
        batch_size: int = 32,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        made = engine_options(configuration, options or {})
        try:
            import ray
            from ray.data.llm import vLLMEngineProcessorConfig
        except ImportError as error:
            raise ConfigError(
                f"Ray cannot be imported ({error}); expected it to be installed: "
                'pip install "ray[data,llm]"'
            ) from error
        self.source, self.processor = str(source), load_processor(source)
        if Path(source).exists():
            self.source = str(Path(source).absolute())
        self.compressed = configuration is not None
        self.sampling = sampling_options(source, max_new_tokens)
        ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        each = made.get("tensor_parallel_size", 1) * made.get("pipeline_parallel_size", 1)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self.config = vLLMEngineProcessorConfig(
            model_source=self.source,
            engine_kwargs=made,
            batch_size=batch_size,
            concurrency=max(1, gpus // each),
            # Where no machine has a GPU, engines wait for none.
            placement_group_config=None if gpus else {"bundles": [{"CPU": 1}]},
            should_continue_on_error=True,
            log_engine_metrics=False,  # would need Ray Serve, too
            **{f"{stage}_stage": False for stage in _OWN_STAGES},
        )

    def answers(self, rows: Sequence[Row], reader: Reader) -> Iterator[tuple[Row, Reply]]:
        """Yield each row with what became of it, as the cluster answers them.

        Raises EngineError where an engine cannot be started or ends for good.
        """
        import ray
        from ray.data.llm import build_processor

        ray.data.DataContext.get_current().enable_progress_bars = False
        asked = ray.data.from_items([{NUMBER: number} for number in range(len(rows))])
        # A worker stands in a folder of its own.
        there = replace(reader, folder=reader.folder.absolute())
        make = partial(_asked, rows=rows, reader=there, source=self.source, sampling=self.sampling)
        process = build_processor(
            self.config,
            postprocess=partial(_reply, source=self.source, compressed=self.compressed),
        )
        left = dict(enumerate(rows))
        try:
            for found in process(asked.flat_map(make)).iter_rows():
                values = {name: found.get(name) for name in Reply._fields}
                if error := found.get("__inference_error__"):
                    values = {"error": str(error)}
                yield left.pop(found[NUMBER]), Reply(**values)
        except ray.exceptions.RayError as error:
            why = str(error).strip().splitlines()[-1]
            raise EngineError(
                f"an engine of vLLM has ended in Ray: {why}; what is answered is written: run "
                "again to go on, with a model and options that --engine vllm takes, too"
            ) from error
        # What could not be read was left out where it was, and is here, too.
        for row in left.values():
            try:
                refuse_special_tokens(self.processor, row.text)
                reader.read(row)
            except (TokenFuseError, MemoryError) as error:
                yield row, failed(error)
            else:
                yield row, Reply(error="Ray has lost this row, or only some machines can read it")


_processor = lru_cache(maxsize=1)(load_processor)


def _asked(
    item: dict[str, Any], rows: Sequence[Row], reader: Reader, source: str, sampling: dict[str, Any]
) -> list[dict[str, Any]]:
    """What vLLM is asked for one row, or nothing where it cannot be asked."""
    row, processor = rows[item[NUMBER]], _processor(source)
    try:
        refuse_special_tokens(processor, row.text)
        video = reader.read(row)
    except (TokenFuseError, MemoryError):
        return []
    made = prompt(processor, video, row.text)
    shown = {"frames": len(video.frames), "visual": visual_tokens(processor, video)}
    ready = {"prompt": made["prompt"], "multimodal_data": made["multi_modal_data"]}
    return [item | shown | ready | {"sampling_params": sampling}]


def _reply(item: dict[str, Any], source: str, compressed: bool) -> dict[str, Any]:
    """What an answer says of what vLLM has said."""
    ids = list(item["prompt_token_ids"])
    before = len(ids)
    if compressed:
        before = uncompressed_length(_processor(source), item["visual"], ids)
    return {
        NUMBER: item[NUMBER],
        "answer": item["generated_text"].strip(),
        "frames": item["frames"],
        "prompt_before": before,
        "prompt_after": len(ids),
    }
