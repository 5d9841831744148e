"""``python -m tokenfuse``: the command line."""

from tokenfuse.cli import app

if __name__ == "__main__":
    app(prog_name="tokenfuse")
