"""`bagpipe serve`, one shard server, until a signal ends it."""

from __future__ import annotations

import logging
import os
import sys
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
        listens = _place("--listen", listen)
        tells = _place("--metrics", metrics)
        from bagpipe.config.load import load_config
        from bagpipe.config.run import RunConfig
        from bagpipe.native.memory import keep_freed_memory
        from bagpipe.server.ending import Ending
        from bagpipe.server.start import running_shard

        keep_freed_memory()  # messages are as large as those before them
        ending = Ending(lives_with)
        config = load_config(RunConfig, file, overrides)
        with running_shard(config, shard, listen=listens, metrics=tells) as running:
            if address_file is not None:
                with replaced(address_file) as temporary:
                    temporary.write_text(f"{running.address}\n", encoding="utf-8")
            typer.echo(running.address)
            sys.stdout.flush()
            if running.metrics_address is not None:
                logging.info("metrics at %s", running.metrics_address)
            logging.info("ends: %s", ending.wait())
    # a client that stays would keep the process, and nothing is left to be saved
    logging.shutdown()
    os._exit(0)


def _place(option: str, text: str | None) -> tuple[str, int] | None:
    if text is None:
        return None
    from bagpipe.config.servers import split_address

    try:
        return split_address(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option}: {error}") from error
