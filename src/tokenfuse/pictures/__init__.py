"""Pictures of which tokens were kept, which went, and where to."""

from tokenfuse.pictures.token_map import Step, TokenMap

__all__ = ["Step", "TokenMap"]
