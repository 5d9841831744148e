"""What every session is: one per model, attached and detached, with nothing left behind."""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NoReturn, Self

from torch import nn

from tokenfuse.config import Configuration
from tokenfuse.errors import AttachError, UnsupportedModelError
from tokenfuse.strategies._base import Strategy

MARK = "_tokenfuse_session"
"""Attribute by which a model knows its session."""
STATE = "__getstate__"
REPLICATE = "_replicate_for_data_parallel"
_placing = threading.Lock()
"""Held while any session is attached, detached, entered or left."""


def is_attached(model: Any) -> bool:
    """Whether a session compresses what ``model`` gets, or merges tokens in it."""
    return MARK in vars(model)


class Attached(ABC):
    """An attached model: a handle, and a context manager that detaches it.

    Copies and pickles of the model are models without a session.
    """

    def __init__(self, model: Any, configuration: Configuration) -> None:
        self.model = model
        self.configuration = configuration
        self._undo = ExitStack()
        self._entered = False
        with _placing:
            self._attach()

    @property
    def strategy(self) -> Strategy:
        """The strategy that acts."""
        return self.configuration.strategy

    @property
    def attached(self) -> bool:
        """Whether this session acts at present."""
        return vars(self.model).get(MARK) is self

    def detach(self) -> None:
        """Give the model its own methods back.

        What runs in another thread meanwhile ends as it began.

        Raises AttachError if the session is not attached.
        """
        with _placing:
            self.require_attached("detach")
            self._undo.close()

    def require_attached(self, what: str) -> None:
        """Raise AttachError, which names the method ``what``, unless the session is attached."""
        if not self.attached:
            raise AttachError(
                f"{what} is called on a session that is detached, and its "
                f"{type(self.model).__name__} is as it was; expected session = "
                f"tokenfuse.attach(...), then session.{what}(...)"
            )

    def __enter__(self) -> Self:
        with _placing:
            if self._entered:
                raise AttachError(
                    "this session is in a with-block already; expected one block at a time: leave "
                    "the outer with-block first"
                )
            if not self.attached:
                self._attach()
            self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _placing:
            entered, self._entered = self._entered, False
            if entered and self.attached:
                self._undo.close()

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"{type(self).__name__}({self.strategy.name} on {self._family}, {state})"

    @property
    @abstractmethod
    def _family(self) -> str:
        """The name of the model's family."""

    @abstractmethod
    def _place(self, undo: ExitStack) -> None:
        """Place what acts in the model; ``undo`` takes it away again."""

    def _attach(self) -> None:
        with ExitStack() as undo:
            if is_attached(self.model):
                raise AttachError(
                    f"this {type(self.model).__name__} is already attached; expected one session "
                    "per model at a time: detach the other one, or leave the outer with-block first"
                )
            held = vars(self.model)
            own = {name: held[name] for name in (STATE, REPLICATE) if name in held}
            # First, and taken away last: another thread may copy the model at any time.
            place(self.model, STATE, self._state_of(own), undo)
            place(self.model, REPLICATE, _refuse_replicas, undo)
            place(self.model, MARK, self, undo)
            self._place(undo)
            self._undo = undo.pop_all()

    def _originals(self) -> Mapping[str, Any]:
        """Attributes of the model's own instance that the session has taken the place of."""
        return {}

    def _state_of(self, own: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
        """The state of a copy or a pickle of the model, without the session."""

        def state() -> dict[str, Any]:
            ours = {MARK, STATE, REPLICATE, *self._names}
            # Another thread may attach or detach meanwhile.
            held = dict(vars(self.model))
            kept = {name: value for name, value in held.items() if name not in ours}
            return {**kept, **own, **self._originals()}

        return state

    _names: tuple[str, ...] = ()
    """Attributes of the model's instance that the session places."""


def place(target: Any, name: str, value: Any, undo: ExitStack) -> None:
    """Set an attribute of an instance; ``undo`` brings back what the instance held itself."""
    held = vars(target)
    before = {name: held[name]} if name in held else {}

    def give_back() -> None:
        # Somebody else's wrapper around ours stays.
        if held.get(name) is value:
            del held[name]
            held.update(before)

    # Not setattr, which would sort a module among the children.
    held[name] = value
    undo.callback(give_back)


def _refuse_replicas() -> NoReturn:
    raise AttachError(
        "DataParallel copies an attached model to other devices, where the session would answer "
        "with the first; expected one process per device, as with DistributedDataParallel: detach "
        "the session, wrap the model, and attach in each process"
    )


def refuse_compiled(model: nn.Module, hooked: Sequence[nn.Module], why: str) -> None:
    """Raise UnsupportedModelError where hooks would never run, since a part was compiled before.

    ``hooked``: the modules that get hooks. ``why``: what the hooks are for.
    """
    targets = {id(module) for module in hooked}
    for name, module in model.named_modules():
        if not any(id(part) in targets for part in module.modules()):
            continue
        if _was_compiled(module):
            raise UnsupportedModelError(
                f"{name or 'the model'}, a {type(module).__name__}, was compiled before, so that "
                f"the hooks for {why} would never run; expected attach before compile: call "
                "torch.compiler.reset(), attach, then compile"
            )


def _was_compiled(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    if module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable"):
        return True
    # What torch.compile has made lies with the code of the class; without Dynamo there is none.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    code = getattr(type(module).forward, "__code__", None)
    if dynamo is None or code is None:
        return False
    return bool(dynamo._debug_get_cache_entry_list(code))
