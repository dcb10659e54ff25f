"""A script that a process which is started would run a second time is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import bagpipe
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import ConfigError
from bagpipe.native.main_script import check_main_is_guarded
from bagpipe.optimizers import SGD
from bagpipe.types import Jagged, TableConfig


def run_as_main(monkeypatch: pytest.MonkeyPatch, path: Path | None) -> None:
    main = ModuleType("__main__")
    if path is not None:
        main.__file__ = str(path)
    monkeypatch.setitem(sys.modules, "__main__", main)


@pytest.mark.parametrize(
    "text",
    [None, 'if __name__ == "__main__":\n    train()\n', "if '__main__' == __name__: train()"],
)
def test_others_are_taken(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.py"
    if text is not None:
        path.write_text(text)
    for main in (path, None):
        run_as_main(monkeypatch, main)
        check_main_is_guarded("it", "leave it out")


def test_a_script_that_is_not_guarded_is_named_before_a_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.py"
    path.write_text("train()\n")
    table = TableConfig(name="t", num_embeddings=9, embedding_dim=2, feature_names=["a"])
    embeddings = EmbeddingBagCollection([table], optimizer=SGD(lr=0.1))
    batch = Jagged(keys=("a",), values=np.arange(4), batch_size=4)
    run_as_main(monkeypatch, path)
    with pytest.raises(ConfigError, match=r"train\.py .*once more.*`if __name__ == .*\"thread\""):
        bagpipe.lookahead([batch], embeddings, cache=9, oracle="process")
    embeddings.close()
