"""`bagpipe serve`, one shard server, until a signal ends it."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from bagpipe.cli.common import File, Overrides, mistakes_told
from bagpipe.native.files import replaced


def serve(
    file: File,
    overrides: Overrides,
    shard: Annotated[
        int, typer.Option(min=0, help="Which of the servers.num_shards shards, from 0 on.")
    ],
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where to listen; port 0: any that is free. By default the shard's address in "
            "servers.addresses, or 127.0.0.1:0.",
        ),
    ] = None,
    address_file: Annotated[
        Path | None, typer.Option(help="Write the address here, too, once it listens.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Answer GET /metrics (Prometheus) and GET /health here."
        ),
    ] = None,
    lives_with: Annotated[
        int | None,
        typer.Option(metavar="PID", min=1, help="End when this process of the host does."),
    ] = None,
) -> None:
    """Hold one part of all tables, for trainers to read and write.

    Prints its address, alone on a line. SIGTERM and SIGINT end it; its rows go with it, but for
    those in the run's checkpoints.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format=f"%(asctime)s shard {shard} %(levelname)s %(message)s",
    )
    with mistakes_told():
        places = {"listen": _place("--listen", listen), "metrics": _place("--metrics", metrics)}
        reasons, told = os.pipe()
        _end_on_signals(told)
        if lives_with is not None:
            _end_with(lives_with, told)
        from bagpipe.config.load import load_config
        from bagpipe.config.run import RunConfig
        from bagpipe.server.start import running_shard

        config = load_config(RunConfig, file, overrides)
        with running_shard(config, shard, **places) as running:
            if address_file is not None:
                with replaced(address_file) as temporary:
                    temporary.write_text(f"{running.address}\n", encoding="utf-8")
            typer.echo(running.address)
            sys.stdout.flush()
            if running.metrics_address is not None:
                logging.info("metrics at %s", running.metrics_address)
            number = os.read(reasons, 1)[0]
            logging.info("ends: %s", _reason(number, lives_with))
    # a client that stays would keep the process, and nothing is left to be saved
    logging.shutdown()
    os._exit(0)


def _end_on_signals(told: int) -> None:
    """Writes SIGTERM's or SIGINT's number to a pipe; a second one ends the process at once.

    The system may give a signal to any thread, and Python runs its handler in the main one once
    that is awake: so what wakes that is a pipe, to which every thread writes.
    """
    ends = (signal.SIGTERM, signal.SIGINT)

    def on_signal(number: int, _frame: object) -> None:
        for each in ends:
            signal.signal(each, signal.SIG_DFL)

    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)
    for each in ends:
        signal.signal(each, on_signal)


def _end_with(pid: int, told: int) -> None:
    """Writes 0 to a pipe when a process of this host has ended."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        os.write(told, b"\0")
        return

    def wait() -> None:
        select.select([process], [], [])
        os.write(told, b"\0")

    threading.Thread(target=wait, name="lives with", daemon=True).start()


def _reason(number: int, lives_with: int | None) -> str:
    if number:
        return signal.Signals(number).name
    return f"process {lives_with}, with which this one lives, is gone"


def _place(option: str, text: str | None) -> tuple[str, int] | None:
    if text is None:
        return None
    from bagpipe.config.servers import split_address

    try:
        return split_address(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option}: {error}") from error
