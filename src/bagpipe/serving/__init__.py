"""Answers raw requests from a folder that `bagpipe export` has written.

    model = bagpipe.serving.load("exported")
    model.predict([{"user": 17, "genres": ["Drama", "War"], "age": 31.0}])

It loads neither the trainer nor compiled loops: torch runs the dense part, numpy reads rows from
mapped files.
"""

from bagpipe.serving.model import ServedModel, load

__all__ = ["ServedModel", "load"]
