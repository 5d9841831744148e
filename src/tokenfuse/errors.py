"""Every error that tokenfuse raises on purpose.

TokenFuseError
├── ConfigError (ValueError)          an option, key or YAML file is wrong
│   └── UnknownNameError (KeyError)   no strategy or adapter of that name
├── PluginError (ValueError)          a plugin registers something that cannot be used
├── TokensError (ValueError)          features, grid or coordinates do not fit together
├── PlanError (ValueError)            a plan is not a valid plan for its tokens
├── PromptError (ValueError)          a prompt does not fit its visual features
├── UnsupportedModelError (TypeError) no adapter matches the model, or the adapter lacks something
├── TooLargeError (MemoryError)       what is asked for does not fit in memory
├── AttachError (RuntimeError)        a model is attached already, or a session is not attached
├── EngineError (RuntimeError)        what answers a batch cannot be started, or has ended
└── VideoError (ValueError)           a file cannot be read as a video

A message names what was given, what was expected and how to mend it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TokenFuseError(Exception):
    """Base of all errors of tokenfuse."""


class ConfigError(TokenFuseError, ValueError):
    """An option, key or YAML file is wrong."""


class UnknownNameError(ConfigError, KeyError):
    """No strategy or adapter of that name is registered."""

    # KeyError would show the message as a quoted repr.
    __str__ = Exception.__str__


class PluginError(TokenFuseError, ValueError):
    """A plugin registers something that cannot be used."""


class TokensError(TokenFuseError, ValueError):
    """Features, grid or coordinates do not fit together, or hold NaN or Inf."""


class PlanError(TokenFuseError, ValueError):
    """A plan is not a valid plan for its tokens."""


class PromptError(TokenFuseError, ValueError):
    """A prompt does not fit its visual features."""


class UnsupportedModelError(TokenFuseError, TypeError):
    """No adapter matches the model, or the adapter lacks what a strategy needs."""


class TooLargeError(TokenFuseError, MemoryError):
    """What is asked for does not fit in the memory that is free."""


class AttachError(TokenFuseError, RuntimeError):
    """A model is attached already, or a session is not attached."""


class EngineError(TokenFuseError, RuntimeError):
    """What answers a batch cannot be started, or has ended; the run can be resumed."""


class VideoError(TokenFuseError, ValueError):
    """A file cannot be read as a video."""


def did_you_mean(given: str, valid: Iterable[str]) -> str:
    """``'did you mean "x"? '`` for the nearest valid name, or nothing, then all valid names."""
    names = sorted(valid)
    near = difflib.get_close_matches(given.lower(), names, n=1)
    hint = f'did you mean "{near[0]}"? ' if near else ""
    return f"{hint}valid: {', '.join(names) or 'none'}"
