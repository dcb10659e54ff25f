"""`python -m bagpipe`, for launchers that start modules."""

from bagpipe.cli import app

if __name__ == "__main__":
    app()
