"""A run on a Ray cluster of several nodes goes on when a node dies, and ends with the same bits.

Needs Ray, root and network namespaces: `pytest tests/launch/test_ray_nodes.py -m soak`.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.launch.ray_nodes import Node, ray_nodes
from tests.launch.test_ray import once_saved
from tests.train.test_servers import assert_same

from benchmarks.links import why_not

_RUN = """
import sys
from pathlib import Path
from tests.launch.test_ray import Listener, Roles, config_of, train_on_ray
listener = Listener()
roles = Roles(num_trainers=2, num_servers=2)
train_on_ray(config_of(Path(sys.argv[1])), roles, reporter=listener, address="auto")
sys.stdout.write("\\n".join(listener.said))
"""


def started_on(node: Node, folder: Path) -> subprocess.Popen[str]:
    return node.start(sys.executable, "-W", "ignore", "-c", _RUN, str(folder))


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_node_dies_and_the_run_ends_as_undisturbed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    if reason := why_not():
        pytest.skip(reason)
    with ray_nodes(3, tmp_path) as nodes:
        first = started_on(nodes[0], tmp_path / "undisturbed")
        told = first.communicate()[0]
        assert first.returncode == 0, told
        killing = threading.Thread(target=once_saved, args=(tmp_path / "disturbed", nodes[2].kill))
        killing.start()
        second = started_on(nodes[0], tmp_path / "disturbed")
        told = second.communicate()[0]
        killing.join()
        assert second.returncode == 0, told
    assert "all trainers start again" in told
    assert "resumed from step" in told
    assert_same(tmp_path / "disturbed", tmp_path / "undisturbed")
