"""What can be wrong with servers, or with who is at work: each error comes within the stated time,
and names role, shard, address, the epoch once there is one, and what to do.

Other files test what each case must not change.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import SecretStr
from tests.server.asked import ALL, raised
from tests.server.certificates import TOKEN, Files
from tests.server.serving import Servers
from tests.server.shards import make_shard
from tests.soon import TIMEOUT_S, ends_soon
from tests.store_contract import SEED, fetch, make_group, records_of

from bagpipe.server import wire
from bagpipe.server.client import ShardServers
from bagpipe.server.control import ServerControl
from bagpipe.server.credentials import client_credentials, server_credentials
from bagpipe.server.flight import ShardServer
from bagpipe.server.shard import Checkpoint, Shard
from bagpipe.types import Group

NUM_SHARDS = 2
Case = Callable[["Place"], object]


class Place:
    """Two servers in epoch 2 of a run, a trainer of it, and one of epoch 1 that is still there."""

    def __init__(self, folder: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.stack, self.monkeypatch = folder, stack, monkeypatch
        self.servers = self.another()
        (self.zombie,) = self.servers.start()
        (self.trainer,) = self.servers.start()
        self.trainer.stores[0].write(ALL, records_of(ALL))

    def another(self, **options: float) -> Servers:
        """Servers of the same tables."""
        made = Servers([make_group()], SEED, NUM_SHARDS, **options)
        return self.stack.enter_context(closing(made))

    def meet(
        self,
        addresses: list[str] | None = None,
        group: Group | None = None,
        seed: int = SEED,
        start_timeout_s: float = TIMEOUT_S,
    ) -> ServerControl:
        """What a trainer does first: it asks all servers who they are."""
        return self.stack.enter_context(
            closing(
                ServerControl(
                    addresses or self.servers.addresses,
                    [group or make_group()],
                    seed,
                    start_timeout_s=start_timeout_s,
                )
            )
        )


def silent(place: Place) -> object:
    listener = place.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    return place.meet([place.servers.addresses[0], address], start_timeout_s=0.5)


def not_there(place: Place) -> object:
    return place.meet([place.servers.addresses[0], "127.0.0.1:1"])


def one_shard_twice(place: Place) -> object:
    return place.meet([place.servers.addresses[0], place.another().addresses[0]])


def other_order(place: Place) -> object:
    return place.meet(place.servers.addresses[::-1])


def too_few(place: Place) -> object:
    return place.meet(place.servers.addresses[:1])


def other_tables(place: Place) -> object:
    return place.meet(group=make_group(num_rows=1_301))


def other_seed(place: Place) -> object:
    return place.meet(seed=SEED + 1)


def other_version(place: Place) -> object:
    call, newer = ServerControl._call, {"version": wire.VERSION + 1}
    place.monkeypatch.setattr(
        ServerControl, "_call", lambda *of: call(*of).model_copy(update=newer)
    )
    return place.meet()


def other_run(place: Place) -> object:
    servers = place.another()
    servers.control.begin(1, 1, run="this-run")
    control = place.meet(servers.addresses)
    control.check_run("this-run")
    return control.check_run("that-run")


def other_run_at_begin(place: Place) -> object:
    control = place.another().control
    control.begin(1, 1, run="this-run")
    return control.begin(2, 1, run="that-run")


def unseen_folder(place: Place) -> object:
    return place.servers.control.cut(1, place.folder / "nowhere")()


def unwritable_folder(place: Place) -> object:
    (place.folder / "a file").write_text("")
    return place.servers.control.cut(1, place.folder / "a file")()


def unseen_checkpoint(place: Place) -> object:
    ((*files,),) = place.servers.control.cut(1, place.folder)()
    place.trainer.stores[0].write(ALL, records_of(ALL))  # is to be put back
    lost = Checkpoint(name="9.9", folder=place.folder / "elsewhere", files=(tuple(files),))
    return place.servers.control.begin(3, 1, lost)


def wrong_clock(place: Place) -> object:
    files = Files(place.folder)
    files.issue("early", "localhost", early=True)
    config = files.config().model_copy(update={"tls": files.tls("early")})
    own = server_credentials(config, "127.0.0.1")
    server = place.stack.enter_context(closing(ShardServer(make_shard(), credentials=own)))
    address = f"localhost:{server.port}"
    shown = replace(client_credentials(files.config()), token=SecretStr(TOKEN))
    return ServerControl([address], [make_group()], SEED, shown, start_timeout_s=TIMEOUT_S)


def no_memory(place: Place) -> object:
    def fail(*_: object) -> None:
        raise MemoryError("of a test")

    place.monkeypatch.setattr(Shard, "read", fail)
    return fetch(place.trainer.stores[0], ALL)


def older_epoch_reads(place: Place) -> object:
    return fetch(place.zombie.stores[0], ALL)


def older_epoch_writes(place: Place) -> object:
    return place.zombie.stores[0].write(ALL, records_of(ALL))


def late_begin(place: Place) -> object:
    return place.servers.control.begin(1, 1)


def restarted(place: Place) -> object:
    place.servers.control.begin(3, 1)
    lives = ["ab" * 16] * NUM_SHARDS
    late = ShardServers(place.servers.control, place.servers.groups, 3, lives)
    return fetch(place.stack.enter_context(closing(late)).stores[0], ALL)


AGAIN = "start all trainers again"
ONE_CONFIGURATION = "start servers and trainers with one configuration"
CASES: list[tuple[Case, int | None, str, str]] = [
    (silent, None, "it has not answered for 0.5 s, which servers.start_timeout_s allows", AGAIN),
    (not_there, None, "nobody listens there", AGAIN),
    (one_shard_twice, None, "its shard is 0, here it is 1", "addresses in the order of the shards"),
    (other_order, None, "its shard is 1, here it is 0", "addresses in the order of the shards"),
    (too_few, None, "its num_shards is 2, here it is 1", ONE_CONFIGURATION),
    (other_tables, None, "other tables, another optimizer or another seed", ONE_CONFIGURATION),
    (other_seed, None, "other tables, another optimizer or another seed", ONE_CONFIGURATION),
    (other_version, None, "its version is ", ONE_CONFIGURATION),
    (other_run, None, "it holds the tables of run 'this-run', not of 'that-run'", "restart it, or"),
    (other_run_at_begin, 2, "holds the tables of run 'this-run', not of 'th", "restart it, or"),
    (unseen_folder, 2, "can't be written: No such file", "See that its folder is there"),
    (unwritable_folder, 2, "can't be written: Not a directory", "wait for the next checkpoint"),
    (unseen_checkpoint, 3, "can't be read", AGAIN),
    (wrong_clock, None, "its certificate is not valid yet", "set the clocks"),
    (no_memory, 2, "it is out of memory (of a test)", "divide the tables among more servers"),
    (older_epoch_reads, 1, "epoch 1 is not served, epoch 2 is", AGAIN),
    (older_epoch_writes, 1, "epoch 1 is not served, epoch 2 is", AGAIN),
    (late_begin, 1, "epoch 1 can't begin, since epoch 2 has", AGAIN),
    (restarted, 3, "another life of this server, which was restarted", AGAIN),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(tmp_path, stack, monkeypatch)


@pytest.mark.parametrize(
    ("case", "epoch", "fact", "remedy"), CASES, ids=[case[0].__name__ for case in CASES]
)
def test_an_error_names_server_epoch_fact_and_remedy(
    place: Place, case: Case, epoch: int | None, fact: str, remedy: str
) -> None:
    with ends_soon():
        message = raised(lambda: case(place))
    named = re.match(r"shard server (\d) of (\d) at (127\.0\.0\.1|localhost):\d+ failed ", message)
    assert named, message
    if epoch is not None:
        assert re.search(rf"(in|of) epoch {epoch}\b", message), message
    assert fact in message
    assert remedy in message


@pytest.mark.parametrize("num_shards", [1, 3])
def test_one_more_or_one_less_server_than_a_checkpoint_has_resumes(
    place: Place, num_shards: int
) -> None:
    ((*files,),) = place.servers.control.cut(1, place.folder)()
    checkpoint = Checkpoint(name="2.1", folder=place.folder, files=(tuple(files),))
    others = place.stack.enter_context(closing(Servers([make_group()], SEED, num_shards)))
    others.epoch = 3
    instances = others.control.begin(3, 1, checkpoint)
    with closing(ShardServers(others.control, others.groups, 3, instances)) as trainer:
        np.testing.assert_array_equal(fetch(trainer.stores[0], ALL), records_of(ALL))
