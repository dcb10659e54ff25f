"""Whether a process that is started can import the program's main module."""

from __future__ import annotations

import sys
from pathlib import Path

from bagpipe.errors import ConfigError

_GUARD = "__name__"


def check_main_is_guarded(what: str, instead: str) -> None:
    """Refuses a script that a process which is started would run a second time.

    Such a process imports the program's main module. A script that never asks for its own name
    would train there once more.

    Args:
        what: asks for the process.
        instead: what the user may do without it.

    Raises:
        ConfigError: the main module does not contain `__name__`.
    """
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    if path is None:  # a notebook, or `python -c`
        return
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    if _GUARD not in text:
        raise ConfigError(
            f"{what} starts a process that imports {path} and would run all of it once more: put "
            f'what it does behind `if __name__ == "__main__":`, or {instead}'
        )
