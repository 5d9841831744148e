"""Strategies side by side: on one video, on the micro model's questions, and as a page of docs."""
