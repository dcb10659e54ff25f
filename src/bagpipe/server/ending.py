"""What ends a server's process: a signal, or the end of the process that it lives with."""

from __future__ import annotations

import os
import select
import signal
import threading

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Ending:
    """Waits for a reason to end; a second signal ends the process at once.

    The system may give a signal to any thread, and Python runs its handler in the main one once
    that is awake: so what wakes that is a pipe, to which every thread writes.

    Args:
        lives_with: The number of a process of this host whose end is a reason, too.
    """

    def __init__(self, lives_with: int | None = None) -> None:
        self._gone = f"process {lives_with}, with which this one lives, is gone"
        self._reasons, self._told = os.pipe()
        os.set_blocking(self._told, False)
        signal.set_wakeup_fd(self._told)
        for each in _SIGNALS:
            signal.signal(each, self._on_signal)
        if lives_with is not None:
            threading.Thread(
                target=self._wait_for_process, args=(lives_with,), name="lives with", daemon=True
            ).start()

    def wait(self) -> str:
        """Returns the reason once there is one."""
        number = os.read(self._reasons, 1)[0]
        return signal.Signals(number).name if number else self._gone

    def end(self, reason: str) -> None:
        """Gives a reason."""
        self._gone = reason
        os.write(self._told, b"\0")

    def _on_signal(self, number: int, frame: object) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def _wait_for_process(self, pid: int) -> None:
        try:
            select.select([os.pidfd_open(pid)], [], [])
        except ProcessLookupError:
            pass  # it is gone already
        os.write(self._told, b"\0")
