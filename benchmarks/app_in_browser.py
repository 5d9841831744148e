"""Use the page of ``tokenfuse app`` in a browser, and write down what was seen.

It needs ``pip install ".[app]" playwright`` and a Chromium (``--browser`` says where). A visit,
uploads that are broken, too large, too long and without end, two visitors at once, and the server's
memory after many uploads. Writes docs/results/app.md and docs/assets/app.png.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import av
import numpy as np
from PIL import Image
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Page, sync_playwright

from tokenfuse.micro.tasks import SHAPES

PORT = 7899
MOST_MB = 100
REFUSED = {
    "broken": "broken.mp4 cannot be opened",
    "cut": "cut.mp4 cannot be opened",
    "huge": "exceed the maximum allowed size",
    "long": "lasts 700 s",
    "wide": "5000 x 64 pixels",
    "endless": "was not decoded within 20 s",
}
"""What the page says of files, by a part of it."""
URL = f"http://127.0.0.1:{PORT}"
FOLDER = Path(__file__).parents[1] / "docs"


def write(
    path: Path, color, frames=40, shape=(240, 320), rate=10, codec="mpeg4", kind=None
) -> Path:
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = shape
        stream.pix_fmt = "yuv420p"
        rng = np.random.default_rng(0)
        still = np.clip(rng.normal(color, 12, (*shape, 3)), 0, 255).astype(np.uint8)
        picture = av.VideoFrame.from_ndarray(still, format="rgb24")
        for _ in range(frames):
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def clips(folder: Path) -> dict[str, Path]:
    """Files that visitors upload."""
    made = {
        "red": write(folder / "red.mp4", (200, 30, 30)),
        "blue": write(folder / "blue.mp4", (30, 30, 200)),
        "long": write(folder / "long.mp4", (0, 0, 0), frames=700, shape=(64, 64), rate=1),
        "wide": write(folder / "wide.mp4", (0, 0, 0), frames=3, shape=(64, 5000)),
    }
    made["broken"] = folder / "broken.mp4"
    made["broken"].write_bytes(os.urandom(50_000))
    made["cut"] = folder / "cut.mp4"
    made["cut"].write_bytes(made["red"].read_bytes()[:20_000])
    made["huge"] = folder / "huge.mp4"
    made["huge"].write_bytes(b"\0" * (MOST_MB + 5) * 2**20)
    # A stream that was joined to itself over and over, as a camera's is that never stops.
    part = write(folder / "part.ts", (9, 9, 9), frames=500, shape=(720, 1280), kind="mpegts")
    once = part.read_bytes()
    made["endless"] = folder / "endless.ts"
    made["endless"].write_bytes(once * ((MOST_MB - 1) * 2**20 // len(once)))
    return made


@contextmanager
def served() -> Iterator[int]:
    """The server's process."""
    command = [sys.executable, "-m", "tokenfuse", "app", "--port", str(PORT)]
    process = subprocess.Popen([*command, "--most-mb", str(MOST_MB)], stdout=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait(20)


def memory_mb(pid: int) -> float:
    words = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", words)[1]) / 1024


def visit(browser) -> Page:
    page = browser.new_context(viewport={"width": 1400, "height": 1250}).new_page()
    for _ in range(60):
        try:
            page.goto(URL, wait_until="domcontentloaded")
            break
        except PlaywrightError:
            # Nothing listens yet.
            time.sleep(1)
    page.wait_for_selector("#a-threshold input", timeout=60_000)
    return page


def upload(page: Page, path: Path) -> str:
    """What the page says of an upload."""
    page.evaluate("document.querySelectorAll('.toast-close').forEach(x => x.click())")
    page.wait_for_function("!document.querySelector('.toast-body')")
    said = "document.querySelector('#known .prose').innerText + (toast ? toast.innerText : '')"
    said = f"(toast => {said})(document.querySelector('.toast-body.error'))"
    shown = f"[...document.querySelectorAll('#frames img')].map(x => x.src).join() + {said}"
    before = page.evaluate(shown)
    page.set_input_files("#upload input[type=file]", str(path))
    page.wait_for_function(f"before => {shown} !== before", arg=before, timeout=60_000)
    page.wait_for_timeout(200)
    toast = page.locator(".toast-body.error")
    if toast.count():
        return " ".join(toast.first.inner_text().split())
    return page.inner_text("#known .prose").strip()


def compare(page: Page) -> list[str]:
    """The rows of the table after a press of the button."""
    before = page.inner_html("#table")
    page.click("#compare")
    page.wait_for_function(
        "before => { const t = document.querySelector('#table'); "
        "return t.innerHTML !== before && t.querySelector('table') "
        "&& !document.querySelector('#table .wrap:not(.hide)') }",
        arg=before,
        timeout=120_000,
    )
    page.wait_for_timeout(500)
    return [" | ".join(row.split("\t")) for row in page.inner_text("#table").splitlines()]


def mean_color(html: str) -> list[int]:
    """Of the pictures in a piece of a page."""
    found = re.findall(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)", html)
    means = [
        np.asarray(Image.open(io.BytesIO(b64decode(x))).convert("RGB")).mean((0, 1)) for x in found
    ]
    return np.mean(means, 0).round().astype(int).tolist()


def outlined(page: Page) -> str:
    """The map of the first strategy's tokens."""
    return page.locator("#picture-a iframe").get_attribute("srcdoc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--uploads", type=int, default=50)
    given = parser.parse_args()
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as name, served() as pid, sync_playwright() as playwright:
        files = clips(Path(name))
        browser = playwright.chromium.launch(
            executable_path=given.browser, args=["--no-sandbox", "--disable-gpu"]
        )
        page = visit(browser)

        lines += ["## A visit", "", "The page as it opens, *Compare*:", "", "```text"]
        lines += compare(page)
        first = outlined(page)
        page.mouse.wheel(0, 5000)
        page.wait_for_timeout(1500)
        page.screenshot(path=str(FOLDER / "assets" / "app.png"))
        page.fill("#a-threshold input", "0.99")
        page.press("#a-threshold input", "Tab")
        lines += [
            "```",
            "",
            "With `threshold` at 0.99 for `ttf`:",
            "",
            "```text",
            *compare(page),
            "```",
            "",
        ]
        second = outlined(page)
        assert first.count(' class="gone"') > second.count(' class="gone"') > 0
        page.fill("#question textarea", "What shape is the moving object?")
        asked = compare(page)
        lines += ["Asked *What shape is the moving object?* instead:", "", "```text", *asked]
        assert asked[1].split(" | ")[1] in SHAPES, asked
        page.fill("#a-window input", "4")
        page.press("#a-window input", "Tab")
        page.click("#compare")
        page.wait_for_selector("#note b", timeout=60_000)
        page.wait_for_function("!document.querySelector('#table table')")
        lines += ["```", "", f"With `window` at 4: *{page.inner_text('#note').strip()}*", ""]
        page.fill("#a-window input", "3")
        page.press("#a-window input", "Tab")
        lines += [f"An upload, `red.mp4`: {upload(page, files['red'])}", ""]
        compare(page)
        lines += [f"The note above its table: *{page.inner_text('#note').strip()}*.", ""]

        lines += [
            "## Uploads that are refused",
            "",
            "| file | answer after | what the page says |",
            "| --- | ---: | --- |",
        ]
        for kind, words in REFUSED.items():
            started = time.monotonic()
            said = upload(page, files[kind])
            assert words in said, (kind, said)
            lines.append(f"| {kind} | {time.monotonic() - started:.1f} s | {said} |")
        lines += ["", f"Afterwards a clip is taken again: {upload(page, files['blue'])}", ""]

        lines += ["## Two visitors at once", ""]
        other = visit(browser)
        upload(page, files["red"])
        upload(other, files["blue"])
        pages = {"red": page, "blue": other}
        before = {color: one.inner_html("#table") for color, one in pages.items()}
        for one in pages.values():
            one.click("#compare")
        for color, one in pages.items():
            one.wait_for_function(
                "b => document.querySelector('#table').innerHTML !== b",
                arg=before[color],
                timeout=120_000,
            )
            one.wait_for_timeout(800)
            seen = mean_color(outlined(one))
            lines.append(
                f"- the visitor who uploaded the {color} clip sees pictures of mean colour {seen}"
            )
            assert (seen[0] > seen[2]) == (color == "red")

        lines += ["", f"## Memory after {given.uploads} uploads", ""]
        for _ in range(5):
            upload(page, files["blue"])
            upload(page, files["red"])
        start = memory_mb(pid)
        for number in range(given.uploads):
            upload(page, files["red" if number % 2 else "blue"])
        time.sleep(2)
        end = memory_mb(pid)
        lines.append(
            f"The server's resident memory went from {start:.0f} to {end:.0f} MB over "
            f"{given.uploads} uploads of one visitor, after ten to warm up."
        )
        about = browser.version
        browser.close()
    head = [
        "# The page in a browser",
        "",
        "What `tokenfuse app` showed in Chromium, driven by Playwright: how it is used is in",
        "[Try it in the browser](../how-to/try-in-the-browser.md).",
        "",
    ]
    tail = [
        "",
        "```console",
        "$ python benchmarks/app_in_browser.py",
        "```",
        "",
        f"tokenfuse {version('tokenfuse')}, gradio {version('gradio')}, Chromium {about}, "
        f"playwright {version('playwright')}; {platform.platform()}.",
        "",
    ]
    (FOLDER / "results" / "app.md").write_text("\n".join([*head, *lines, *tail]), "utf-8")


if __name__ == "__main__":
    main()
