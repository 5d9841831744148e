"""Pure tensor functions for authors of strategies."""
