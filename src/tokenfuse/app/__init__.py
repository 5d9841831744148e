"""A page in the browser: two strategies side by side on a clip of one's own."""
