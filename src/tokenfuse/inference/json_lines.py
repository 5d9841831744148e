"""A file that lines are added to, each as a whole or not at all, by one run at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tokenfuse.errors import ConfigError


class JsonLines:
    """The lines of a file, which may not be there yet.

    ``lines``: those that were there as a whole. What a run that was killed has begun of a line does
    not count, and is removed when the next line is added: who only reads the file may do so while
    another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        raw = path.read_bytes() if path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        self.lines = whole.splitlines()
        self._cut: int | None = len(whole) if len(whole) < len(raw) else None

    def add(self, line: str) -> None:
        """Append a line. Raises OSError where there is no room; the line then does not count."""
        with self.path.open("ab") as file:
            if self._cut is not None:
                file.truncate(self._cut)
            self._cut = os.fstat(file.fileno()).st_size
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._cut = None


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other processes that ask for it from writing to ``path`` inside the block.

    Raises ConfigError where one is at it already, or where its folder is not there.
    """
    whole = path.resolve()
    if not whole.parent.is_dir():
        raise ConfigError(f"{path.parent} is no folder; expected one that is there: make it first")
    lock = FileLock(whole.with_name(f".{whole.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another run is adding to {path}: wait for it, or choose another file"
        ) from None
    try:
        yield
    finally:
        lock.release()
