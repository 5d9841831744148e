"""What compression costs in answers, by task and by motion: ``tokenfuse bench retention``."""
