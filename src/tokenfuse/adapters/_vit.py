"""What an adapter says about a vision transformer, so that tokens can be merged inside it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenfuse.adapters._base import ModelAdapter


class Branch(NamedTuple):
    """The second half of a block, ``x = x + last(... first(x))``.

    ``first``: the module that reads the residual stream after attention. ``last``: the one whose
    output is added to it. All between works on each token alone.
    """

    first: nn.Module
    last: nn.Module


class VitAdapter(ModelAdapter):
    """Says where tokens can be merged in a vision transformer. The session places hooks there.

    Nothing in the model is replaced, so that what a block does, it goes on doing.
    """

    @abstractmethod
    def refuse(self) -> None:
        """Raise UnsupportedModelError where a part of the model is not as this adapter expects."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks in order; each takes ``(B, N, C)`` first and returns the same."""

    @property
    @abstractmethod
    def protected(self) -> int:
        """How many tokens at the beginning are no patches: class, distillation, registers."""

    @abstractmethod
    def branch(self, block: nn.Module) -> Branch:
        """Where the tokens of a block can become fewer."""

    @abstractmethod
    def watch_keys(
        self, block: nn.Module, tell: Callable[[Float[Tensor, "B N C"]], None]
    ) -> RemovableHandle:
        """A hook that tells the block's raw keys, averaged over heads, at each forward pass."""

    @abstractmethod
    def shorten(
        self,
        arguments: dict[str, Any],
        kept: Int[Tensor, "B M"],
        bias: Float[Tensor, "B 1 1 M"] | None,
    ) -> dict[str, Any]:
        """A block's keyword arguments for the tokens ``kept``, with ``bias`` on its logits."""
