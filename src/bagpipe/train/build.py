"""From a configuration to the parts of a run.

Everything that the loop only uses is made here, or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bagpipe.checkpoint.checkpoints import State
from bagpipe.config.model import ModelConfig, OwnModelConfig
from bagpipe.config.rates import PlateauRate
from bagpipe.config.run import DenseOptimizerConfig, EmbeddingsConfig, RunConfig, TrainConfig
from bagpipe.config.tables import make_tables
from bagpipe.data import has_split, open_source
from bagpipe.data.base import BatchSource
from bagpipe.data.notes import run_notes
from bagpipe.distributed.alone import ALONE, Peers
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.embeddings.quick_start import without_compiler
from bagpipe.errors import ConfigError
from bagpipe.models import DLRM, DLRM_DCN, DeepFM, RankingModel, WideDeep
from bagpipe.store import FileStore
from bagpipe.store.base import EmbeddingStore
from bagpipe.train.best import Best
from bagpipe.train.dense_step import DenseStep, Precision
from bagpipe.train.evaluate import check_groups
from bagpipe.train.first_weights import share_first_weights
from bagpipe.train.noise import Noise, check_batch_norm
from bagpipe.train.objective import Objective
from bagpipe.train.own_model import make_own_model
from bagpipe.train.rates import Rates
from bagpipe.train.schedule import Schedule, make_schedule
from bagpipe.train.servers import Join, Joined
from bagpipe.train.settings import describe_run
from bagpipe.types import Group, group_tables

_MODELS: Mapping[str, Callable[..., RankingModel]] = {
    "dlrm": DLRM,
    "dcn": DLRM_DCN,
    "wide_deep": WideDeep,
    "deepfm": DeepFM,
}
_DENSE_OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": without_compiler(torch.optim.SGD),
    "adagrad": without_compiler(torch.optim.Adagrad),
    "adam": without_compiler(torch.optim.Adam),
    "adamw": without_compiler(torch.optim.AdamW),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run."""

    config: RunConfig
    settings: Mapping[str, Any]
    """What a checkpoint remembers: the configuration and the identity of the data, as JSON."""
    device: torch.device
    source: BatchSource
    validation: BatchSource | None
    test: BatchSource | None
    schedule: Schedule
    model: RankingModel
    optimizer: torch.optim.Optimizer
    embeddings: EmbeddingBagCollection
    dense_step: DenseStep
    rates: Rates
    best: Best
    noise: Noise
    servers: Joined | None = None
    """The shard servers that have the records, if there are any."""

    @property
    def state(self) -> State:
        """What training changes."""
        return State(
            model=self.model,
            optimizer=self.optimizer,
            embeddings=self.embeddings,
            others=({"rates": self.rates} if self.rates.change else {})
            | ({"best": self.best} if self.best.is_kept else {}),
        )


@contextmanager
def build_run(
    config: RunConfig,
    *,
    peers: Peers = ALONE,
    join: Join | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Run]:
    """Opens the data, makes the model and its tables, and closes them at the end.

    Args:
        config: the run.
        peers: the other trainers; by default none.
        join: finds the shard servers that have the tables, if the run has any.
        say: told, a sentence each, what to know of the data, and what a machine can't do that
            another way is found for.

    Raises:
        ConfigError: settings that only the data or the machine can refuse.
        DataError: the data can't be read.
        StoreError: a store can't be made.
    """
    device = choose_device(config.train.device, peers)
    source, validation, test = _open_data(config, say)
    labels = source.label_names
    schedule = make_schedule(config.train, source.num_samples)
    torch.manual_seed(config.train.seed)
    tables, optimizer = make_tables(source.features, config), config.table_optimizer.build()
    with ExitStack() as stack:
        servers = (
            None if join is None else stack.enter_context(join(group_tables(tables, optimizer)))
        )
        embeddings = EmbeddingBagCollection(
            tables,
            optimizer=optimizer,
            device=device,
            seed=config.train.seed,
            store=_store_maker(config.embeddings, servers),
            communicator=peers,
        )
        stack.callback(embeddings.close)
        model = make_model(config.model, embeddings, source.num_dense, len(labels)).to(device)
        check_batch_norm(model, schedule, source.num_samples, peers.num_trainers)
        share_first_weights(model, peers)
        dense_optimizer = make_dense_optimizer(model, config.dense_optimizer, device)
        rates = Rates(
            [
                (dense_optimizer, config.train.lr_schedule),
                (embeddings.fused_optimizer, config.table_lr_schedule),
            ],
            schedule.num_steps,
            labels,
        )
        with matrix_products(config.train.precision, device):
            yield Run(
                config=config,
                settings=describe_run(config),
                device=device,
                source=source,
                validation=validation,
                test=test,
                schedule=schedule,
                model=model,
                optimizer=dense_optimizer,
                embeddings=embeddings,
                servers=servers,
                rates=rates,
                best=Best(config.train.best, labels),
                noise=Noise(config, peers, device),
                dense_step=make_dense_step(
                    config.train,
                    model,
                    dense_optimizer,
                    embeddings,
                    device,
                    Objective(labels, config.train.label_weights, device),
                    say,
                ),
            )


def _open_data(
    config: RunConfig, say: Callable[[str], None]
) -> tuple[BatchSource, BatchSource | None, BatchSource | None]:
    """Opens what to train, validate and test on; refuses what the run can't do with it."""
    source = open_source(config.data, "train")
    validation, test = (
        open_source(config.data, split) if has_split(config.data, split) else None
        for split in ("validation", "test")
    )
    for note in run_notes(config.data):
        say(note)
    check_labels(config, source.label_names)
    if validation is None:
        _check_without_validation(config)
    if config.train.group_by is not None:
        check_groups(source, config.train.group_by)
    return source, validation, test


def make_model(
    config: ModelConfig, embeddings: torch.nn.Module, num_dense: int, num_labels: int
) -> RankingModel:
    """The model that a section describes: its keys are the model's arguments.

    A model of the user's own says itself for how many labels it makes logits.

    Raises:
        ConfigError: the data do not fit it.
    """
    if isinstance(config, OwnModelConfig):
        return make_own_model(config, embeddings, num_dense)
    arguments = config.model_dump(exclude={"kind"})
    return _MODELS[config.kind](embeddings, num_dense, num_labels=num_labels, **arguments)


def make_dense_optimizer(
    model: torch.nn.Module, config: DenseOptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The torch optimizer of the dense part; embeddings have no parameters that it could see."""
    # With `capturable` Adam counts its steps on the device, which a CUDA graph needs. The others
    # count nothing.
    capturable = (
        {"capturable": True} if device.type == "cuda" and config.kind in ("adam", "adamw") else {}
    )
    return _DENSE_OPTIMIZERS[config.kind](
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, **capturable
    )


def make_dense_step(
    config: TrainConfig,
    model: RankingModel,
    optimizer: torch.optim.Optimizer,
    embeddings: EmbeddingBagCollection,
    device: torch.device,
    objective: Objective,
    say: Callable[[str], None],
) -> DenseStep:
    """The dense part in the form that a configuration asks for.

    Raises:
        ConfigError: the device or the size of the batch does not allow it.
    """
    if device.type == "cpu" and config.dense in ("graph", "compile"):
        raise ConfigError(
            f"train.dense = {config.dense!r} needs a CUDA device: use 'eager' or 'auto' on a CPU"
        )
    peers = embeddings.peers
    num_trainers = peers.num_trainers
    if config.dense in ("graph", "compile") and config.batch_size % num_trainers:
        raise ConfigError(
            f"train.dense = {config.dense!r} wants shares of one size, and train.batch_size = "
            f"{config.batch_size:,} is no multiple "
            f"of {num_trainers} trainers: use "
            f"{max(1, config.batch_size // num_trainers) * num_trainers:,}, or 'eager'"
        )
    if peers.has_others:
        _check_types(model)
    graph = has_graph(config, device, num_trainers)
    return DenseStep(
        model.dense_part,
        optimizer,
        groups=[(len(group.features), group.embedding_dim) for group in embeddings.groups],
        device=device,
        batch_size=config.batch_size // num_trainers,
        precision=config.precision,
        graph=graph,
        compile_part=config.dense == "compile",
        average=peers.average if peers.has_others else None,
        rate_changes=config.lr_schedule is not None,
        max_grad_norm=config.max_grad_norm,
        buffers=list(model.buffers()),
        objective=objective,
        say=say,
    )


def _check_types(model: RankingModel) -> None:
    """Refuses what several trainers can't average in one tensor."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ConfigError(
                f"{type(model).__name__}: its parameter {name!r} is {parameter.dtype}, and several "
                "trainers average gradients of float32: make it float32, or use one trainer"
            )


def has_graph(config: TrainConfig, device: torch.device, num_trainers: int) -> bool:
    """Whether the dense part is to be a CUDA graph.

    It is where asked for, and with "auto" on a GPU with shares of one size.
    """
    if config.dense == "auto":
        return device.type == "cuda" and config.batch_size % num_trainers == 0
    return config.dense in ("graph", "compile")


@contextmanager
def matrix_products(precision: Precision, device: torch.device) -> Iterator[None]:
    """Lets float32 matrix products of the process read TF32, and puts the setting back."""
    if precision != "tf32":
        yield
        return
    if device.type == "cpu":
        raise ConfigError(
            "train.precision = 'tf32' needs a CUDA device: use 'fp32' or 'bf16' on a CPU"
        )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_labels(config: RunConfig, labels: Sequence[str]) -> None:
    """Refuses a configuration that does not fit the labels of its data.

    Raises:
        ConfigError: the model makes another number of logits, or a key names another label.
    """
    try:
        config.model.check_labels(len(labels))
    except ValueError as error:
        raise ConfigError(
            f"{error}: the data have {', '.join(labels)}, and data.labels chooses among them"
        ) from error
    named = {f"train.label_weights.{label}": label for label in config.train.label_weights}
    for key, watching in (
        ("train.best", config.train.best),
        ("train.lr_schedule", config.train.lr_schedule),
        ("embeddings.lr_schedule", config.embeddings.lr_schedule),
    ):
        label = getattr(watching, "label", None)
        if label is not None:
            named[f"{key}.label"] = label
    for key, label in named.items():
        if label not in labels:
            raise ConfigError(
                f"{key}: the run learns no label {label!r}; there are {', '.join(labels)}"
            )


def _check_without_validation(config: RunConfig) -> None:
    """Refuses what goes by scores where there is no split to score on."""
    if config.train.best is not None:
        raise ConfigError(
            "train.best goes by evaluations, and the data have no validation split: prepare them "
            "with prepare.split.validation_share above 0"
        )
    for schedule in (config.train.lr_schedule, config.table_lr_schedule):
        if isinstance(schedule, PlateauRate):
            raise ConfigError(
                "lr_schedule.kind = 'plateau' goes by evaluations, and the data have no validation "
                "split: prepare them with prepare.split.validation_share above 0"
            )


def choose_device(name: str, peers: Peers) -> torch.device:
    """The device that a configuration names; what computes there is told to be deterministic.

    Raises:
        ConfigError: there is no such device.
    """
    num_devices, num_needed = torch.cuda.device_count(), len(peers.hosts.own_ranks)
    has_cuda = num_devices >= num_needed
    if name == "cuda" and not has_cuda:
        raise ConfigError(
            f"train.device = 'cuda': torch sees {num_devices} CUDA devices for the {num_needed} "
            "trainers of this host: use 'cpu' "
            "or 'auto'"
        )
    if name == "cpu" or not has_cuda:
        return torch.device("cpu")
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor with NaN would cost a pass over it and guards nothing of ours.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return torch.device("cuda", torch.cuda.current_device())


def _store_maker(
    config: EmbeddingsConfig, servers: Joined | None
) -> Callable[[Group, int], EmbeddingStore] | None:
    """None is memory."""
    if servers is not None:
        return lambda group, seed: servers.stores[group.index]
    store = config.store
    if store.kind == "memory":
        return None
    return lambda group, seed: FileStore(
        group, seed, store.folder / f"group-{group.index}", existing="overwrite"
    )
