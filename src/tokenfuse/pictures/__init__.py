"""Pictures of which tokens were kept, which went, and where to."""

from tokenfuse.pictures.token_map import Step, TokenMap
from tokenfuse.pictures.trace import trace

__all__ = ["Step", "TokenMap", "trace"]
