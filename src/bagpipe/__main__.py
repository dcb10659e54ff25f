"""`python -m bagpipe`, for launchers that start modules."""

from bagpipe.cli.app import app

if __name__ == "__main__":
    app()
