"""Forward hooks that a copy of the model does not inherit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hook:
    """A forward hook that copies and pickles as one that does nothing.

    While one thread removes a hook that takes keyword arguments, PyTorch may call it from another
    thread without them. Such a call does nothing either.
    """

    def __init__(self, call: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        self._call = call
        self._expected = 3 if with_kwargs else 0

    def __call__(self, *args: Any) -> Any:
        return self._call(*args) if len(args) >= self._expected else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _inert, ()


def _inert() -> Callable[..., None]:
    return nothing


def nothing(*args: Any) -> None:
    """A forward hook that does nothing."""
