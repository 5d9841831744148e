"""From a video file to an answer."""
