"""The page itself, in Gradio."""

from __future__ import annotations

import io
import socket
from base64 import b64encode
from collections.abc import Callable, Sequence
from html import escape
from importlib import import_module  # gradio by name: type checkers run without it
from typing import Any

import numpy as np
from PIL import Image

from tokenfuse.app.answers import HEAD, Answered, answer, rows
from tokenfuse.app.form import Field, configured, fields, offered
from tokenfuse.app.upload import MB, Limits, read_upload
from tokenfuse.config import Configuration, get_configuration
from tokenfuse.errors import ConfigError, PromptError, TokenFuseError
from tokenfuse.inference.video import Video
from tokenfuse.micro.tasks import held_out

WAITING = 16
"""Questions that wait for the model, at most; the next one is told to come back later."""
SESSIONS = 32
"""Visitors whose clips are held at once; of more, the one seen longest ago loses his."""
HELD = 900
"""Seconds that a visitor's clip is held after it was last used."""
FORGET = (30, 300)
"""Every so many seconds, uploaded files of at least such an age are removed.

Not each as soon as it was read: those who upload the same file share it.
"""
SHOWN = 8
"""Frames of a clip that are shown before it is asked about."""

ABOUT = """\
# tokenfuse

Which visual tokens of a video does a strategy keep, what does the model answer with them, and how
long does it take? Choose a clip, a question and two strategies.
"""


def examples() -> dict[str, tuple[Video, str, str]]:
    """Clips that the micro model knows how to read, each with a question and the right answer."""
    found = {}
    for task in ("color", "direction", "order", "count", "flash"):
        clip, asked = held_out(task, 1)[0]
        found[f"{task}: {asked.text}"] = (clip.video, asked.text, asked.answer)
    return found


def build(model: Any, processor: Any, *, about: str, limits: Limits) -> Any:
    """The page, a ``gradio.Blocks`` that is ready to be launched.

    ``about``: what visitors should know of the model before they believe its answer to a clip of
    their own, if anything.
    """
    gr = gradio()
    clips = examples()
    chosen = next(iter(clips))

    def show_example(name: str) -> tuple[None, str, str, str]:
        video, question, right = clips[name]
        return None, _strip(video), question, f"The right answer is *{right}*."

    def take(path: str | None) -> tuple[Any, None, Any, Any]:
        try:
            video = read_upload(path or "no file", limits)
        except TokenFuseError as error:
            # An error raised would leave the file in the box, where no other could be put.
            return gr.skip(), None, gr.skip(), f"**Not taken:** {escape(str(error))}"
        count, whole = len(video.frames), video.total_frames
        said = f"Your clip: {count} of {whole} frames, {video.duration:.1f} s."
        return video, None, _strip(video), said

    def compare(
        video: Video | None,
        example: str,
        question: str,
        configurations: Sequence[Configuration],
        progress: Callable[..., Any],
    ) -> tuple[str, ...]:
        shown = clips[example][0] if video is None else video
        if not question.strip():
            raise PromptError("the question is empty; expected one in plain words")

        def say(words: str) -> None:
            progress(None, desc=words)

        found = answer(model, processor, shown, question, configurations, say=say)
        note = ""
        if video is not None and about:
            note = f"<p>{escape(about)}</p>"
        return note, _table(found), *(_framed(one) for one in found[1:])

    with gr.Blocks(title="tokenfuse", analytics_enabled=False, delete_cache=FORGET) as page:
        gr.Markdown(ABOUT)
        clip = gr.State(None, time_to_live=HELD)
        run = gr.Button("Compare", variant="primary", render=False, elem_id="compare")
        note = gr.HTML(render=False, elem_id="note")
        table = gr.HTML(render=False, elem_id="table")
        pictures = [gr.HTML(render=False, elem_id=f"picture-{side}") for side in "ab"]
        with gr.Row():
            with gr.Column():
                example = gr.Dropdown(list(clips), value=chosen, label="Clip", elem_id="example")
                upload = gr.File(
                    label="or one of yours",
                    type="filepath",
                    height=140,
                    interactive=True,
                    elem_id="upload",
                )
                gr.Markdown(
                    f"Up to {limits.file_mb} MB, {limits.length / 60:g} minutes and "
                    f"{limits.side} pixels; {limits.frames} frames are sampled."
                )
            with gr.Column():
                frames = gr.HTML(_strip(clips[chosen][0]), elem_id="frames")
                known = gr.Markdown(f"The right answer is *{clips[chosen][2]}*.", elem_id="known")
                question = gr.Textbox(
                    clips[chosen][1], label="Question", interactive=True, elem_id="question"
                )
        with gr.Row():
            sides = [
                gr.Dropdown(offered(), value=name, label=label, elem_id=f"strategy-{side}")
                for side, name, label in (
                    ("a", "ttf", "First strategy"),
                    ("b", "uniform", "Second strategy"),
                )
            ]

        def forms(*strategies: str) -> None:
            asked: list[tuple[str, list[Field]]] = []
            boxes: list[Any] = []
            with gr.Row():
                for side, strategy in zip("ab", strategies, strict=True):
                    with gr.Column():
                        gr.Markdown(f"**{strategy}**: an empty box leaves an option unset.")
                        form = fields(strategy)
                        asked.append((strategy, form))
                        # In two columns of their own.
                        with gr.Row():
                            boxes += [_box(gr, side, strategy, field) for field in form]

            def go(
                video: Video | None,
                name: str,
                text: str,
                *values: Any,
                progress: Any = gr.Progress(),  # noqa: B008 # how Gradio finds it
            ) -> tuple[str, ...]:
                left = iter(values)
                filled = [{field.name: next(left) for field in form} for _, form in asked]
                try:
                    chosen = [
                        get_configuration(configured(strategy, entered))
                        for (strategy, _), entered in zip(asked, filled, strict=True)
                    ]
                    return compare(video, name, text, chosen, progress)
                except TokenFuseError as error:
                    # What stood there belongs to another question or other strategies.
                    return f"<p><b>Not answered:</b> {escape(str(error))}</p>", "", "", ""

            run.click(
                go,
                [clip, example, question, *boxes],
                [note, table, *pictures],
                concurrency_id="model",
                api_visibility="private",
            )

        gr.render(inputs=sides)(forms)
        run.render()
        note.render()
        table.render()
        with gr.Row():
            for picture in pictures:
                with gr.Column():
                    picture.render()
        example.input(
            show_example, example, [clip, frames, question, known], api_visibility="private"
        )
        upload.upload(
            take,
            upload,
            [clip, upload, frames, known],
            concurrency_limit=2,
            api_visibility="private",
        )
    page.queue(max_size=WAITING, default_concurrency_limit=1)
    return page


def launch(page: Any, limits: Limits, *, host: str, port: int | None, block: bool = True) -> Any:
    """Serve the page; by default until the process is stopped."""
    return page.launch(
        server_name=host,
        server_port=port,
        max_file_size=limits.file_mb * MB,
        state_session_capacity=SESSIONS,
        share=False,
        show_error=True,
        prevent_thread_lock=not block,
    )


def check_address(host: str, port: int | None) -> None:
    """Raise ConfigError where nothing can listen at an address. ``port``: None for any."""
    try:
        kind, *_, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        where = host if port is None else f"{host}:{port}"
        raise ConfigError(
            f"the page cannot listen at {where}: {error.strerror or error}; expected an address of "
            "this machine and a port that is free: leave --port out for the next free one"
        ) from error


def gradio() -> Any:
    """The package. Raises ConfigError where it is not installed."""
    try:
        return import_module("gradio")
    except ImportError as error:
        raise ConfigError(
            'tokenfuse app needs Gradio; expected it to be installed: pip install ".[app]" in a '
            "checkout of tokenfuse"
        ) from error


def _box(gr: Any, side: str, strategy: str, field: Field) -> Any:
    # By its key a box keeps what was entered when the other strategy changes.
    name = f"{side}-{strategy}-{field.name}"
    common = {
        "label": field.name,
        "info": field.about,
        "key": name,
        "elem_id": f"{side}-{field.name}",
        "min_width": 240,
        "interactive": True,
    }
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), value=field.default, **common)
    if field.kind == "flag":
        # A check box cuts the name of an option off in so narrow a column.
        return gr.Dropdown([("yes", True), ("no", False)], value=field.default, **common)
    if field.kind == "number":
        step = 1 if field.whole else 0.05
        # Bounds are the strategy's to tell: its errors name the option, and Gradio's do not.
        return gr.Number(value=field.default, step=step, **common)
    return gr.Textbox(value=field.shown, **common)


def _table(answered: Sequence[Answered]) -> str:
    head = "".join(f"<th>{escape(word)}</th>" for word in HEAD)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows(answered)
    )
    # An answer of one long word is broken; on a narrow screen the table scrolls as a whole.
    style = "width:100%;min-width:760px;overflow-wrap:anywhere"
    table = f'<table style="{style}"><tr>{head}</tr>{body}</table>'
    return f'<div style="overflow-x:auto">{table}</div>'


def _framed(one: Answered) -> str:
    """The map of the tokens in a frame of its own, where its script may run and nothing else."""
    parts = []
    for found in one.maps:
        page = escape(found.page(), quote=True)
        parts.append(
            f'<iframe sandbox="allow-scripts" style="width:100%;height:720px;border:0" '
            f'title="{escape(one.title, quote=True)}" srcdoc="{page}"></iframe>'
        )
    return "".join(parts)


def _strip(video: Video) -> str:
    """Some frames beside each other."""
    places = np.linspace(0, len(video.frames) - 1, min(SHOWN, len(video.frames))).round()
    pictures = []
    for place in places.astype(int):
        picture = Image.fromarray(video.frames[place])
        picture.thumbnail((160, 160))
        held = io.BytesIO()
        picture.save(held, "jpeg", quality=85)
        source = b64encode(held.getvalue()).decode()
        when = f"{video.timestamps[place]:.1f} s"
        pictures.append(
            f'<img alt="the clip at {when}" title="{when}" style="width:12%" '
            f'src="data:image/jpeg;base64,{source}">'
        )
    return f'<div style="display:flex;gap:4px">{"".join(pictures)}</div>'
