"""Ids, masks and positions of prompts: pure functions that never see a model."""
