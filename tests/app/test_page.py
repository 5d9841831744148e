"""What the page answers, and that it can be built and served."""

import json
import urllib.request

import pytest

from tokenfuse.app import page as app_page
from tokenfuse.app.answers import HEAD, answer, rows
from tokenfuse.app.upload import Limits
from tokenfuse.config import get_configuration
from tokenfuse.errors import ConfigError
from tokenfuse.inference.load import load
from tokenfuse.inference.run import run
from tokenfuse.micro import CHECKPOINT, SAMPLE


@pytest.fixture(scope="module")
def micro():
    return load(CHECKPOINT)


def test_answers_are_right_and_counts_are_those_of_run(micro):
    for video, question, right in app_page.examples().values():
        chosen = [get_configuration("ttf", threshold=0.95), get_configuration("fastv")]
        plain, first, second = answer(*micro, video, question, chosen)
        assert plain.text == right
        assert (first.title, second.title) == ("ttf(threshold=0.95)", "fastv")
        for one in (first, second):
            (shown,) = one.maps
            assert int(shown.steps[0].kept.sum()) == one.report.tokens_after
        table = rows([plain, first, second])
        assert all(len(row) == len(HEAD) for row in table)
        assert table[0][2] == str(first.report.tokens_before)
        assert table[1][2].startswith(f"{first.report.tokens_after} of ")


def test_a_configuration_gives_what_the_command_gives(micro):
    video = app_page.read_upload(SAMPLE, Limits(frames=64))
    chosen = get_configuration("ttf", keep_ratio=0.4)
    question = "What color is the moving object?"
    plain, short = answer(*micro, video, question, [chosen])
    result = run(SAMPLE, question, chosen, source=CHECKPOINT, repeats=1)
    assert (plain.text, short.text) == (result.uncompressed.text, result.compressed.text)
    assert short.report.tokens_after == result.report.tokens_after


def test_the_page_is_served_on_this_machine_alone_and_within_bounds(micro):
    pytest.importorskip("gradio")
    limits = Limits(file_mb=1)
    page = app_page.build(*micro, about="", limits=limits)
    try:
        app_page.launch(page, limits, host="127.0.0.1", port=None, block=False)
        with urllib.request.urlopen(f"{page.local_url}config") as answered:
            config = json.load(answered)
    finally:
        page.close()
    assert page.local_url.startswith("http://127.0.0.1:")
    assert page.share_url is None
    assert page.max_file_size == 2**20
    labels = {part["props"].get("label") for part in config["components"]}
    assert {"Clip", "Question", "First strategy", "Second strategy"} <= labels


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(app_page, "import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install \"\.\[app\]\""):
        app_page.gradio()
