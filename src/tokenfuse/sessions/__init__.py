"""Compression inside a model's own methods."""
