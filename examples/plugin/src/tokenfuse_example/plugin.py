"""What tokenfuse calls when it looks for plug-ins."""

from collections.abc import Callable

from tokenfuse import Adapter, Strategy, hookimpl
from tokenfuse_example.checkerboard import Checkerboard
from tokenfuse_example.lfm2_vl import Lfm2VL


@hookimpl
def tokenfuse_register_strategies(register: Callable[[type[Strategy]], None]) -> None:
    register(Checkerboard)


@hookimpl
def tokenfuse_register_adapters(register: Callable[[type[Adapter]], None]) -> None:
    register(Lfm2VL)
