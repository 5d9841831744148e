"""The command line. Data goes to stdout, progress and errors to stderr.

Each command checks what it was given before it imports transformers or loads a model.
"""

from __future__ import annotations

import enum
import io
import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

import tokenfuse
from tokenfuse.errors import ConfigError, TokenFuseError

if TYPE_CHECKING:
    from tokenfuse.inference.engines import Engine
    from tokenfuse.inference.measure import Say
    from tokenfuse.inference.run import VideoQuestion

    Result = TypeVar("Result", bound=VideoQuestion)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
bench = typer.Typer(help="Measure.", no_args_is_help=True)
app.add_typer(bench, name="bench")
_out = Console(highlight=False)
_err = Console(stderr=True, highlight=False)
for _stream in (sys.stdout, sys.stderr):
    if isinstance(_stream, io.TextIOWrapper):
        # What a terminal cannot show must not end a run whose answers are there.
        _stream.reconfigure(errors="replace")

ENDINGS = (".json", ".md", ".png")
"""Of the files that ``tokenfuse compare --micro --out`` writes."""


class EngineName(enum.StrEnum):
    """What answers a batch."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"
    RAY = "ray"


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def _errors() -> Iterator[None]:
    """Turn an error that tokenfuse raises on purpose into one line and exit status 2.

    So are a file that cannot be read or written, and memory that is not there. What is printed
    meanwhile, such as by a plugin, goes to stderr.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except TokenFuseError as error:
        said = str(error)
    except OSError as error:
        said = f"{error.filename or 'a file'}: {error.strerror or error}; expected room and access"
    except MemoryError:
        said = "there is not enough memory; expected fewer or smaller frames, such as --frames 16"
    else:
        return
    _err.print(f"[bold red]error[/]: {escape(said)}", soft_wrap=True)
    raise typer.Exit(2) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tokenfuse {tokenfuse.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it, exit."),
    ] = False,
) -> None:
    """Fewer visual tokens for video-language models."""


@app.command()
def run(
    video: Annotated[
        str | None, typer.Argument(help="Video file; a short clip of tokenfuse's own if left out.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about it.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; the micro Qwen3-VL if left out.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="Strategy, preset or YAML file.")] = "ttf",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="Option of the strategy: threshold=0.8")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames to sample, evenly in time.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames to sample per second.")] = None,
    compare: Annotated[bool, typer.Option(help="Answer without compression too.")] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timings per median.")] = 3,
    picture: Annotated[
        Path | None, typer.Option(help="Draw what was kept: a .png, .gif, .mp4 or .html.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer a question about a video, with and without compression."""
    with _errors():
        from tokenfuse.config import get_configuration

        if picture:
            from tokenfuse.pictures.token_map import check_path

            check_path(picture)
        chosen = get_configuration(strategy, **_overrides(options or []))
        _quiet()
        from tokenfuse.bench.tables import print_run
        from tokenfuse.inference.run import run as run_once

        with _progress() as say:
            result = run_once(
                *_asked(video, question),
                chosen,
                source=_source(model),
                frames=frames,
                fps=fps,
                compare=compare,
                max_new_tokens=max_new_tokens,
                repeats=repeats,
                picture=picture,
                say=say,
            )
        result = _with_note(result, video)
    if as_json:
        print(result.model_dump_json(indent=2))
    else:
        print_run(_out, result)
        if picture:
            _out.print(f"drawn: {picture}", soft_wrap=True)


@app.command()
def batch(
    questions: Annotated[
        Path, typer.Argument(help="JSON Lines: id, video, question, and options to choose from.")
    ],
    out: Annotated[Path, typer.Argument(help="JSON Lines of answers, added to if it is there.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; the micro Qwen3-VL if left out.")
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="Strategy, preset or YAML file; none for no compression.")
    ] = "ttf",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="Option of the strategy: threshold=0.8")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames to sample, evenly in time.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames to sample per second.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts at once: 1 if left out, 32 in vLLM and Ray.")
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="transformers, vLLM on this machine, or Ray on many.")
    ] = EngineName.TRANSFORMERS,
    engine_options: Annotated[
        list[str] | None,
        typer.Option("--engine-set", help="Option of vLLM's engine: max_model_len=32768"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows to answer, at most.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: every n-th row from the i-th on, such as 1/4.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Answer anew what failed.")] = False,
) -> None:
    """Answer many questions about many videos; a run that was stopped goes on where it was.

    The exit status is 1 where rows failed, whose reasons stand in the output.
    """
    with _errors():
        from tokenfuse.config import get_configuration

        given = _overrides(options or [])
        if strategy == "none" and given:
            raise ConfigError("--strategy none has no options; expected no --set beside it")
        chosen = None if strategy == "none" else get_configuration(strategy, **given)
        set_up = _overrides(engine_options or [], "--engine-set", "max_model_len=32768")
        if set_up and engine is EngineName.TRANSFORMERS:
            raise ConfigError("--engine-set is of vLLM; expected --engine vllm or ray beside it")
        _quiet()
        from tokenfuse.inference.batch import Answers, answer_all, run_key
        from tokenfuse.inference.engines import Reader, Transformers
        from tokenfuse.inference.json_lines import alone
        from tokenfuse.inference.rows import part_of, read_rows

        start: Callable[..., Engine] = Transformers
        # What another engine computes is another run.
        key: dict[str, Any] = {"frames": frames, "fps": fps, "max_new_tokens": max_new_tokens}
        own: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
        if engine is not EngineName.TRANSFORMERS:
            from tokenfuse.integrations.ray_engine import Ray
            from tokenfuse.integrations.vllm_engine import Vllm

            start = Vllm if engine is EngineName.VLLM else Ray
            key |= {"engine": "vllm", "options": set_up}
            own["options"] = set_up
        rows = part_of(read_rows(questions), shard, limit)
        source = _source(model)
        with alone(out), _progress() as say:
            answers, run = Answers(out), run_key(chosen, source, **key)
            if retry:
                answers.forget_failed(run)
            failed = answer_all(
                rows,
                answers,
                partial(start, source, chosen, max_new_tokens=max_new_tokens, **own),
                Reader(questions.parent, frames, fps),
                key=run,
                say=say,
            )
    _err.print(f"{len(rows) - failed} rows answered, {failed} failed: {out}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def show(
    video: Annotated[
        str | None, typer.Argument(help="Video file; a short clip of tokenfuse's own if left out.")
    ] = None,
    out: Annotated[
        list[Path] | None,
        typer.Option(help="A .png, .gif, .mp4 or .html; may be repeated. kept.png if left out."),
    ] = None,
    strategy: Annotated[str, typer.Option(help="Strategy, preset or YAML file.")] = "ttf",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="Option of the strategy: threshold=0.8")
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="What is asked, for strategies that read it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; the micro Qwen3-VL if left out.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames to sample, evenly in time.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames to sample per second.")] = None,
    most: Annotated[
        int, typer.Option(min=1, help="Frames that a picture shows, evenly chosen.")
    ] = 16,
) -> None:
    """Draw which visual tokens of a video a strategy keeps, and where the others go."""
    with _errors():
        from tokenfuse.config import get_configuration
        from tokenfuse.pictures.token_map import check_path

        files = [check_path(path) for path in out or [Path("kept.png")]]
        chosen = get_configuration(strategy, **_overrides(options or []))
        _quiet()
        from tokenfuse.inference.run import prepare, traced

        with _progress() as say:
            path, asked = _asked(video, question)
            ready = prepare(path, asked, _source(model), frames=frames, fps=fps, repeats=1, say=say)
            say("following the tokens")
            maps = traced(ready, chosen)
            for file in files:
                say(f"drawing {file}")
                for number, found in enumerate(maps):
                    name = file if not number else file.with_stem(f"{file.stem}-{number}")
                    found.save(name, most)
    from tokenfuse.pictures._draw import caption

    for found in maps:
        for number in range(len(found.steps)):
            _out.print(escape(caption(found, number)), soft_wrap=True)
    for file in files:
        _out.print(f"drawn: {file}", soft_wrap=True)


@app.command()
def compare(
    video: Annotated[
        str | None, typer.Argument(help="Video file; a short clip of tokenfuse's own if left out.")
    ] = None,
    strategies: Annotated[
        list[str] | None,
        typer.Option(help="Strategies, presets or YAML files, with commas; all if left out."),
    ] = None,
    keep_ratio: Annotated[
        list[str] | None,
        typer.Option(help="Shares of tokens to keep, with commas; 0.33 if left out."),
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about the video.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; the micro Qwen3-VL if left out.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames to sample, evenly in time.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames to sample per second.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer: 64.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timings per median: 3.")] = None,
    micro: Annotated[
        int | None,
        typer.Option(min=1, help="Count right answers instead, to so many questions per task."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="With --micro: name of a .json to resume from, an .md and a .png file."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--plot", help="Draw a curve per strategy into this file.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU.")] = None,
    as_json: Json = False,
) -> None:
    """Compare strategies at equal numbers of tokens, on one video or on the micro model's tasks."""
    with _errors():
        from tokenfuse.bench import plot
        from tokenfuse.bench.candidates import listed, ratios

        for_video = {
            "VIDEO": video,
            "--question": question,
            "--frames": frames,
            "--fps": fps,
            "--max-new-tokens": max_new_tokens,
            "--repeats": repeats,
        }
        _refuse(for_video, {"--out": out}, micro)
        names, shares = listed(strategies or []), ratios(keep_ratio or ["0.33"])
        files = _files(out) if out else {}
        pictures = [path for path in (files.get(".png"), picture) if path]
        for path in pictures:
            plot.check(path)
        _quiet()
        _set_threads(threads)
        from tokenfuse.bench import tables
        from tokenfuse.bench.compare import compare as compare_on_video
        from tokenfuse.bench.micro import benchmark, write
        from tokenfuse.bench.page import page

        if micro is None:
            with _progress() as say:
                compared = compare_on_video(
                    *_asked(video, question),
                    names,
                    shares,
                    source=_source(model),
                    frames=frames,
                    fps=fps,
                    max_new_tokens=max_new_tokens or 64,
                    repeats=repeats or 3,
                    say=say,
                )
            compared = _with_note(compared, video)
            for path in pictures:
                plot.draw(plot.comparison_curves(compared), path)
            text = compared.model_dump_json(indent=2)
            show = partial(tables.print_comparison, _out, compared)
        else:
            with _progress() as say:
                scored = benchmark(
                    micro, names, shares, source=_source(model), keep=files.get(".json"), say=say
                )
            for path in pictures:
                plot.draw(plot.benchmark_curves(scored), path)
            text = scored.model_dump_json(indent=2)
            show = partial(tables.print_benchmark, _out, scored)
        if out and micro is not None:
            used = {
                "--micro": str(micro),
                "--strategies": ",".join(names or ["all"]),
                "--keep-ratio": ",".join(f"{ratio:g}" for ratio in shares),
                "--model": model,
                "--threads": str(threads or ""),
                "--out": out.as_posix(),
            }
            words = [word for name, value in used.items() if value for word in (name, value)]
            command = shlex.join(["tokenfuse", "compare", *words])
            write(files[".md"], page(scored, files[".png"].name, command))
    if as_json:
        print(text)
    else:
        show()


@bench.command()
def retention(
    out: Annotated[Path, typer.Option(help="Folder for answers, page and pictures.")],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of questions and sweeps; a short benchmark if left out."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="plain, robust or none (only write the page); both if left out."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU.")] = None,
    as_json: Json = False,
) -> None:
    """What compression costs in answers, by task and by motion.

    A run that was stopped goes on from the answers in the folder.
    """
    with _errors():
        from tokenfuse.bench.retention.plan import Plan, read_plan
        from tokenfuse.bench.retention.run import costs
        from tokenfuse.bench.retention.run import retention as run_retention
        from tokenfuse.micro import INSTRUMENTS

        names = list(INSTRUMENTS) if model is None else [m for m in model if m != "none"]
        for name in names:
            if name not in INSTRUMENTS:
                raise ConfigError(
                    f"--model {name} is none of {', '.join(INSTRUMENTS)}: only these answer the "
                    "questions; none asks no model"
                )
        _quiet()
        _set_threads(threads)
        options = f" --config {config}" if config else ""
        options += f" --threads {threads}" if threads else ""
        plan = read_plan(config) if config else Plan.model_validate({})
        page = run_retention(
            plan,
            INSTRUMENTS,
            out,
            ask_only=names,
            command=f"tokenfuse bench retention{options} --out {out}",
            err=_err,
        )
        if as_json:
            text = json.dumps(costs(plan, INSTRUMENTS, out), indent=2)
    if as_json:
        print(text)
    else:
        _out.print(str(page), soft_wrap=True)


@bench.command()
def speed(
    strategies: Annotated[
        list[str] | None,
        typer.Option(help="Strategies or presets, commas between; all for every one."),
    ] = None,
    keep_ratio: Annotated[
        list[str] | None, typer.Option(help="Shares of tokens to keep, commas between.")
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="Whose depth and width the model has, with random weights; Qwen3-VL-2B if left "
            "out."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a Qwen3-VL, with its own weights.")
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=0, help="Decoder layers of --like, 4 if left out; 0 for all."),
    ] = None,
    vision_layers: Annotated[
        int | None,
        typer.Option(min=0, help="Vision blocks of --like, 4 if left out; 0 for all."),
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames that the LLM is shown.")] = 16,
    grid: Annotated[str, typer.Option(help="Rows x columns of visual tokens.")] = "16x16",
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    repeats: Annotated[int, typer.Option(help="Timings per median.")] = 3,
    decode_steps: Annotated[int, typer.Option(help="Tokens after the first that are timed.")] = 4,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write PATH.json, PATH.md and PATH.png.")] = None,
    as_json: Json = False,
) -> None:
    """Time the first token of a model of a real size, with and without compression."""
    with _errors():
        from tokenfuse.bench.candidates import listed, ratios

        names = listed(strategies or ["ttf"])
        shares = ratios(keep_ratio or ["0.33"])
        side = _side(grid)
        shape = {"--like": like, "--layers": layers, "--vision-layers": vision_layers}
        given = [name for name, value in shape.items() if value is not None]
        if model is not None and given:
            raise ConfigError(
                f"{given[0]} is for random weights, and --model has its own; expected one of both"
            )
        files = _files(out) if out else {}
        _quiet()
        _set_threads(threads)
        from tokenfuse.bench.micro import write
        from tokenfuse.bench.speed.page import draw, page
        from tokenfuse.bench.speed.run import speed as run_speed

        with _progress() as say:
            result = run_speed(
                names,
                shares,
                like=like or "Qwen/Qwen3-VL-2B-Instruct",
                source=model,
                layers=4 if layers is None else layers or None,
                vision_layers=4 if vision_layers is None else vision_layers or None,
                frames=frames,
                side=side,
                batch=batch,
                dtype=dtype,
                device=device,
                repeats=repeats,
                decode_steps=decode_steps,
                say=say,
            )
        if files:
            write(files[".json"], result.model_dump_json(indent=2) + "\n")
            write(files[".md"], page(result, shlex.join(["tokenfuse", *sys.argv[1:]])))
            draw(result, files[".png"])
    if as_json:
        print(result.model_dump_json(indent=2))
    else:
        from tokenfuse.bench.speed.page import HEAD, about, cells, sentence
        from tokenfuse.bench.tables import print_cells

        _out.print(escape(about(result)), soft_wrap=True)
        print_cells(_out, HEAD, [cells(row) for row in result.rows])
        _out.print(escape(sentence(result)), soft_wrap=True)


@bench.command()
def matching(
    strategies: Annotated[
        list[str] | None,
        typer.Option(help="Strategies or presets, commas between; all for every one."),
    ] = None,
    keep_ratio: Annotated[
        list[str] | None, typer.Option(help="Shares of tokens to keep, commas between.")
    ] = None,
    frames: Annotated[str, typer.Option(help="Frames, commas between.")] = "16",
    grid: Annotated[
        str, typer.Option(help="Rows x columns of visual tokens, commas between.")
    ] = "16x16",
    width: Annotated[str, typer.Option(help="Dimensions of a token, commas between.")] = "2048",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16, commas between.")
    ] = "float32",
    kernel: Annotated[
        str,
        typer.Option(help="Of ttf: auto, tiles, shifts, compiled, triton, commas between."),
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    repeats: Annotated[int, typer.Option(help="Timings per median.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write PATH.json and PATH.md.")] = None,
    as_json: Json = False,
) -> None:
    """Time how strategies choose and fuse, beside one read of the same features."""
    with _errors():
        from tokenfuse.bench.candidates import listed, ratios

        names = listed(strategies or ["ttf"])
        shares = ratios(keep_ratio or ["0.33"])
        files = _files(out, (".json", ".md")) if out else {}
        counts = [_whole("--frames", text) for text in listed([frames])]
        sides = [_side(text) for text in listed([grid])]
        widths = [_whole("--width", text) for text in listed([width])]
        _quiet()
        _set_threads(threads)
        from tokenfuse.bench.micro import write
        from tokenfuse.bench.speed.matching import matching as run_matching
        from tokenfuse.bench.speed.page import MATCHING_HEAD, matching_cells, matching_page

        with _progress() as say:
            result = run_matching(
                names,
                shares,
                frames=counts,
                sides=sides,
                widths=widths,
                dtypes=listed([dtype]),
                kernels=listed([kernel]),
                device=device,
                repeats=repeats,
                say=say,
            )
        if files:
            write(files[".json"], result.model_dump_json(indent=2) + "\n")
            command = shlex.join(["tokenfuse", *sys.argv[1:]])
            write(files[".md"], matching_page(result, [command]))
    if as_json:
        print(result.model_dump_json(indent=2))
    else:
        from tokenfuse.bench.tables import print_cells

        print_cells(_out, MATCHING_HEAD, [matching_cells(row) for row in result.rows])


def _side(text: str) -> tuple[int, int]:
    """Rows and columns of ``16x16``. Raises ConfigError."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ConfigError(f"--grid {text} is not of the form rows x columns, as in 16x16")
    return int(height), int(width)


def _whole(option: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{option} {text} is no whole number; expected such as 8,16")
    return int(text)


@app.command()
def calibrate(
    clips: Annotated[
        list[str] | None,
        typer.Argument(help="Video files; a short clip of tokenfuse's own if left out."),
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="Strategy, preset or YAML file that a threshold decides.")
    ] = "ttf",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="Another option of the strategy: window=5")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; the micro Qwen3-VL if left out.")
    ] = None,
    thresholds: Annotated[
        str | None, typer.Option(help="Thresholds to try, commas between; 0.5 to 0.95.")
    ] = None,
    keep_ratio: Annotated[
        list[str] | None,
        typer.Option(help="Shares of tokens whose threshold is looked for; 0.33 if left out."),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames to sample, evenly in time.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames to sample per second.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw it into this file.")] = None,
    as_json: Json = False,
) -> None:
    """What each threshold removes of your own clips, and which one keeps a wanted share."""
    with _errors():
        from tokenfuse.bench import plot
        from tokenfuse.bench.candidates import listed, ratios
        from tokenfuse.config import get_configuration

        if picture:
            plot.check(picture)
        shares = ratios(keep_ratio or ["0.33"])
        tried = [_number("--thresholds", text) for text in listed([thresholds or ""])]
        chosen = get_configuration(strategy, **_overrides(options or []))
        _quiet()
        from tokenfuse.bench import calibrate as bench_calibrate

        with _progress() as say:
            result = bench_calibrate.calibrate(
                clips or [_asked(None, None)[0]],
                chosen,
                source=_source(model),
                thresholds=tried or bench_calibrate.THRESHOLDS,
                ratios=shares,
                frames=frames,
                fps=fps,
                say=say,
            )
        if picture:
            plot.draw(bench_calibrate.curves(result), picture)
    if as_json:
        print(result.model_dump_json(indent=2))
    else:
        from tokenfuse.bench.tables import print_cells

        rows = [bench_calibrate.cells(row) for row in result.rows]
        print_cells(_out, bench_calibrate.HEAD, rows)
        for wanted in result.wanted:
            _out.print()
            _out.print(escape(bench_calibrate.as_yaml(result, wanted)), soft_wrap=True)


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{option} {text} is no number; expected such as 0.6,0.7") from None


@app.command("app")
def serve_page(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; the micro Qwen3-VL if left out.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; the first free one from 7860 on.")
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames to sample of a clip.")] = 16,
    most_mb: Annotated[int, typer.Option(min=1, help="Largest file that may be uploaded.")] = 100,
    seconds: Annotated[float, typer.Option(min=1, help="Longest clip.")] = 600,
) -> None:
    """Open a page in the browser that compares two strategies on a clip."""
    with _errors():
        from tokenfuse.app import page as app_page
        from tokenfuse.app.upload import Limits

        app_page.gradio()
        app_page.check_address(host, port)
        _quiet()
        from tokenfuse.inference.load import load
        from tokenfuse.micro import NOTE, is_micro

        source = _source(model)
        with _progress() as say:
            say("loading the model")
            loaded, processor = load(source)
        limits = Limits(frames=frames, file_mb=most_mb, length=seconds)
        note = NOTE if is_micro(source) else ""
        page = app_page.build(loaded, processor, about=note, limits=limits)
        app_page.check_address(host, port)
    app_page.launch(page, limits, host=host, port=port)


@app.command()
def strategies(as_json: Json = False) -> None:
    """List the registered strategies."""
    with _errors():
        from tokenfuse.registry import default_registry
        from tokenfuse.strategies._stages import stages

        rows = [
            {
                "name": name,
                "stage": stages(entry.cls),
                "needs": sorted(entry.cls.needs),
                "from": entry.distribution,
                "about": _first_line(entry.cls),
            }
            for name, entry in sorted(default_registry().strategies.items())
        ]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print_rows(rows)


@app.command()
def adapters(as_json: Json = False) -> None:
    """List the registered adapters."""
    with _errors():
        from tokenfuse.registry import default_registry

        rows = [
            {"name": name, "from": entry.distribution, "about": _first_line(entry.cls)}
            for name, entry in sorted(default_registry().adapters.items())
        ]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print_rows(rows)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Folder or hub id.")], as_json: Json = False
) -> None:
    """Say from a model's configuration alone whether it is supported, and which strategies act."""
    with _errors():
        _quiet()
        from tokenfuse.inference.check import check_model

        found = check_model(model)
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    lines = [
        f"{found.model}: {found.architecture} (model_type {found.model_type})",
        f"adapter     {found.adapter}",
        f"shows       {', '.join(found.shows)}",
        f"supplies    {', '.join(found.supplies) or 'features only'}",
        f"strategies  {len(found.strategies)} can act: {', '.join(found.strategies)}",
        *(f"not {name}: {reason}" for name, reason in found.refused.items()),
    ]
    for line in lines:
        _out.print(escape(line), soft_wrap=True)


@app.command()
def env(as_json: Json = False) -> None:
    """Print the versions, the device and the plugins: what a report of a bug should say."""
    with _errors():
        import torch

        from tokenfuse.costs import versions
        from tokenfuse.registry import installed_plugins

        device = f"cpu, {torch.get_num_threads()} threads"
        if torch.cuda.is_available():
            device = f"cuda, {torch.cuda.get_device_name()}"
        dists = [point.dist for point in installed_plugins()]
        plugins = {f"{dist.name} {dist.version}" for dist in dists if dist}
        found = versions() | {name: version(name) for name in ("torchvision", "timm", "av")}
        found |= {"platform": platform.platform(), "device": device}
        found["attention"] = ", ".join(_attention_kernels())
        found["plugins"] = ", ".join(sorted(plugins)) or "none"
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_rows([{"name": name, "value": value} for name, value in found.items()])


def _attention_kernels() -> list[str]:
    """What ``attn_implementation`` of transformers may name here, and Triton if it is there."""
    found = ["eager", "sdpa", "flex_attention"]
    packages = {
        "flash_attn": "flash_attention_2",
        "flash_attn_interface": "flash_attention_3",
        "kernels": "kernels of the hub",
        "triton": "Triton",
    }
    return found + [words for name, words in packages.items() if find_spec(name)]


@app.command()
def schema() -> None:
    """Print the JSON Schema of a configuration, strategies of plugins included."""
    with _errors():
        from tokenfuse.config import json_schema

        found = json_schema()
    print(json.dumps(found, indent=2))


def _overrides(
    options: Sequence[str], flag: str = "--set", example: str = "threshold=0.8"
) -> dict[str, Any]:
    from tokenfuse.config import parse_value

    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{flag} {option} is not of the form key=value, as in {example}")
        try:
            values[key.strip()] = parse_value(value)
        except ConfigError as error:
            raise ConfigError(f"{flag} {key}: {error}") from None
    return values


def _quiet() -> None:
    """Leave the terminal to the report: no progress bars or advice from transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    from tokenfuse.bench.tables import print_list

    print_list(_out, rows)


def _asked(video: str | None, question: str | None) -> tuple[str | Path, str]:
    """The video and the question; of tokenfuse's own clip if no video is given."""
    from tokenfuse.micro import SAMPLE, SAMPLE_QUESTION

    if video is None or _is_sample(video):
        return video or SAMPLE, question or SAMPLE_QUESTION
    return video, question or "What happens in the video?"


def _is_sample(video: str) -> bool:
    from tokenfuse.micro import SAMPLE

    return Path(video).resolve() == SAMPLE.resolve()


def _source(model: str | None) -> str | Path:
    from tokenfuse.micro import CHECKPOINT

    return model or CHECKPOINT


def _with_note(result: Result, video: str | None) -> Result:
    """The result, with a note where the micro model saw a video of the caller's own."""
    from tokenfuse.micro import NOTE, is_micro

    if video is None or _is_sample(video) or not is_micro(result.model):
        return result
    _err.print(f"[yellow]note[/]: {NOTE}", soft_wrap=True)
    return result.model_copy(update={"note": NOTE})


def _files(prefix: Path, endings: Sequence[str] = ENDINGS) -> dict[str, Path]:
    """The files of ``--out`` by their endings. Raises ConfigError where one cannot be written."""
    if prefix.name in ("", ".."):
        raise ConfigError(f"--out {prefix} is a folder; expected a name: {prefix / 'scores'}")
    files = {end: prefix.with_name(prefix.name + end) for end in endings}
    for path in files.values():
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; expected a file: choose another --out")
    return files


def _refuse(
    for_video: Mapping[str, object], for_micro: Mapping[str, object], micro: int | None
) -> None:
    """Raise ConfigError where an option is given that only the other kind of comparison has."""
    others, advice = (
        (for_micro, "goes with --micro: add --micro 50, or leave it out")
        if micro is None
        else (for_video, "does not go with --micro, which asks its own questions: leave it out")
    )
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ConfigError(f"{given[0]} {advice}")


def _set_threads(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


@contextmanager
def _progress() -> Iterator[Say]:
    """Where steps are told: one changing line on a terminal, else a line each."""
    if _err.is_terminal:
        with _err.status("starting") as status:
            yield status.update
    else:
        yield lambda text: _err.print(text, markup=False, soft_wrap=True)
