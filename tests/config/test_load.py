"""Loading a run's configuration: overrides, and what a mistake says."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagpipe.config.load import load_config
from bagpipe.config.run import RunConfig
from bagpipe.errors import ConfigError
from bagpipe.optimizers import Adam

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart.toml"

MINIMAL = """
[data]
kind = "synthetic"
[log]
folder = "runs/x"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def mistakes_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, write(folder, text), overrides)
    return str(caught.value)


def test_a_minimal_file_is_enough(tmp_path: Path) -> None:
    config = load_config(RunConfig, write(tmp_path, MINIMAL))
    assert (config.log.folder, config.cache.size, config.embeddings.store.kind) == (
        Path("runs/x"),
        "auto",
        "memory",
    )


@pytest.mark.parametrize("size", ["2%", "0.3%", "4GiB", "4GB", "4 GB", "1.5KB"])
def test_a_value_that_is_not_toml_is_a_string(tmp_path: Path, size: str) -> None:
    folder = "log.folder=/tmp/a run, and (another)"
    config = load_config(RunConfig, write(tmp_path, MINIMAL), [f"cache.size={size}", folder])
    assert (config.cache.size, str(config.log.folder)) == (size, "/tmp/a run, and (another)")


def test_overrides_are_toml_or_one_word(tmp_path: Path) -> None:
    overrides = [
        "train.batch_size=7",
        "cache.size=4GiB",
        "cache.lookahead_memory=2GB",
        "model.bottom=[8, 16]",
        "embeddings.embedding_dim = 16",
        'embeddings.optimizer={kind="adam", lr=0.5}',
        "cache.check=true",
    ]
    config = load_config(RunConfig, write(tmp_path, MINIMAL), overrides)
    assert (
        config.train.batch_size,
        config.cache.size,
        config.model.model_dump()["bottom"],
        config.cache.check,
    ) == (
        7,
        "4GiB",
        (8, 16),
        True,
    )
    assert config.table_optimizer.build() == Adam(lr=0.5)


@pytest.mark.parametrize(
    ("override", "fact"),
    [
        ("train.batch_size", "must be section.key=value"),
        ("=1", "must be section.key=value"),
        ("data.kind.x=1", "data.kind is a value, not a section"),
        ("log.folder=[1", "the value is not TOML"),
        ("log.folder='x", "the value is not TOML"),
        ("log.folder=", "the value is not TOML"),
        ("train.seed=1\ntrain.steps=2", "is more than one key"),
    ],
)
def test_a_broken_override_is_named(tmp_path: Path, override: str, fact: str) -> None:
    message = mistakes_of(tmp_path, MINIMAL, override)
    assert override in message
    assert fact in message


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = mistakes_of(
        tmp_path, MINIMAL + "[train]\nbatch_size = 0\nseed = 'a'\nbatchsize = 3\n[cach]\nsize = 1\n"
    )
    assert "4 mistakes" in message
    assert "train.batch_size = 0: input should be greater than 0" in message
    assert 'train.seed = "a": input should be a valid integer' in message
    assert "train.batchsize: unknown key in [train]; did you mean 'batch_size'?" in message
    assert "[cach]: unknown section; did you mean 'cache'?" in message
    assert "pydantic" not in message


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("data.skeww = 1.0", "data.skeww: unknown key in [data]; did you mean 'skew'?"),
        (
            "embeddings.optimizer = {kind = 'adam', lr = 1.0, beta = 3}",
            "embeddings.optimizer.beta: unknown key in [embeddings.op",
        ),
        (
            "embeddings.optimizer = {kind = 'adamm', lr = 1.0}",
            "embeddings.optimizer.kind = \"adamm\": unknown; did you mean 'adam'?",
        ),
        (
            "embeddings.optimizer = {kind = 'xyz', lr = 1.0}",
            "unknown; there are 'sgd', 'adagrad', 'rowwise_adagrad', 'adam'",
        ),
        ("embeddings.optimizer = {kind = 'adam'}", "embeddings.optimizer.lr: is missing"),
        (
            "embeddings.optimizer = {kind = 'sgd', lr = 1.0, momentum = 0.9}",
            "every row at every step",
        ),
        (
            "embeddings.init = {kind = 'uniform', low = 1.0, high = 0.0}",
            "low must not be above high",
        ),
        (
            "cache.size = '4 gigs'",
            "or input should be a valid integer, or input should be memory such as '4GiB' or "
            "'4GB', or input should be a share such as '2%'",
        ),
        (
            "cache.lookahead_memory = '4 gigs'",
            "cache.lookahead_memory = \"4 gigs\": input should be memory such as '4GiB' or '4GB'",
        ),
        ("train = {epochs = 1, steps = 2}", "epochs = 1 and steps = 2 are both given"),
        ("model.bottom = [8]", "model.bottom ends with 8 but embeddings.embedding_dim is 64"),
        ("model.top = [8]", "model.top ends with 8"),
        (
            "model = {kind = 'dcn', bottom = [8]}",
            "model.bottom ends with 8 but embeddings.embedding_dim is 64",
        ),
        ("model = {kind = 'deepfm', top = [8]}", "model.top ends with 8"),
        ("model = {kind = 'wide_deep'}\nembeddings.embedding_dim = 1", "so it must be at least 2"),
        (
            "model = {kind = 'wide_deep', bottom = [64]}",
            "model.bottom: unknown key in [model]; there are top, dropout, batch_norm, kind",
        ),
        (
            "model = {kind = 'dcn', crossrank = 8}",
            "model.crossrank: unknown key in [model]; did you mean 'cross_rank'?",
        ),
        ("model = {botom = [64]}", "model.botom: unknown key in [model]; did you mean 'bottom'?"),
        ("model = {kind = 'dcm'}", "model.kind = \"dcm\": unknown; did you mean 'dcn'?"),
        (
            "model = {kind = 3}",
            "model.kind = \"3\": unknown; there are 'dlrm', 'dcn', 'wide_deep', 'deepfm'",
        ),
        (
            "model = {kind = 'dcn', cross_rank = 0}",
            "model.cross_rank = 0: input should be greater than 0",
        ),
        ("model = 3", "model = 3: input should be an object"),
        ("train.zzz = 1", "there are batch_size, epochs"),
    ],
)
def test_what_a_mistake_says(tmp_path: Path, text: str, fact: str) -> None:
    data = MINIMAL.replace("[data]\nkind", "data.kind").replace("[log]\nfolder", "log.folder")
    assert fact in mistakes_of(tmp_path, f"{data}\n{text}\n")


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    assert "log: is missing" in mistakes_of(tmp_path, "[data]\nkind = 'synthetic'\n")


@pytest.mark.parametrize(("content", "fact"), [(b"a = ", "is not TOML"), (b"\xff", "is not UTF-8")])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes, fact: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"run.toml: {fact}"):
        load_config(RunConfig, path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml: can't be read: No such file"):
        load_config(RunConfig, tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "kind"),
    [("", "dlrm"), ("[model]\ntop = [1]", "dlrm"), ("[model]\nkind = 'deepfm'", "deepfm")],
)
def test_a_model_without_a_kind_is_a_dlrm(tmp_path: Path, text: str, kind: str) -> None:
    assert load_config(RunConfig, write(tmp_path, MINIMAL + text)).model.kind == kind


def test_the_default_run_takes_another_interaction_by_one_key() -> None:
    model = load_config(RunConfig, EXAMPLE, ["model.kind=dcn"]).model
    assert (model.kind, model.top[-1]) == ("dcn", 1)
