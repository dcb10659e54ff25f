"""The model sections, told apart by their `kind`; a section without one is a DLRM's.

The keys of a section are the arguments of its model in `bagpipe.models`, which says what they mean.
A `kind` with a colon names a class of the user's own.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from bagpipe.config.base import Depth, Section, Share, Width

LayerSizes: TypeAlias = Annotated[tuple[Width, ...], Field(min_length=1, max_length=64)]


class _Model(Section):
    table_bound: ClassVar[float | None] = None
    """Tables start uniformly in [-bound, bound) where `embeddings.init` is left out. None: as
    `TableConfig` says."""
    table_lr: ClassVar[float] = 0.02
    """Row-wise Adagrad's learning rate where `embeddings.optimizer` is left out."""
    dense_lr: ClassVar[float] = 0.02
    """Adagrad's learning rate where `train.optimizer` is left out."""

    def check(self, embedding_dim: int) -> None:
        """Checks the sizes of layers, where they are known.

        Raises:
            ValueError: The sizes do not fit together, or do not fit the embedding dimension.
        """

    def check_labels(self, num_labels: int) -> None:
        """Checks that the model makes a logit for each label, where that is known.

        Raises:
            ValueError: It makes another number.
        """


class OwnModelConfig(_Model):
    """A subclass of `bagpipe.models.RankingModel` that can be imported: "package.module:Class".

    It is called with the embeddings, the number of dense features, and `arguments`.
    """

    kind: Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$")]
    arguments: dict[str, Any] = Field(default_factory=dict)


class _LayeredModel(_Model):
    top: LayerSizes
    """Layers over the features that the model makes. The last layer is the logit, of size 1, or
    has one for each of several labels."""
    dropout: Share = 0.0
    """The share of values that each layer but the logit's sets to 0 in training."""
    batch_norm: bool = False
    """Whether each layer but the logit's is normalized over a batch. For one trainer only."""

    def check_labels(self, num_labels: int) -> None:
        """Checks the last size of `top`, as `_Model.check_labels` does."""
        if self.top[-1] != num_labels:
            what = "is the logit" if num_labels == 1 else f"makes the logits of {num_labels} labels"
            raise ValueError(
                f"model.top ends with {self.top[-1]}: its last layer {what}, so it must be "
                f"{num_labels}"
            )


class DLRMConfig(_LayeredModel):
    """`bagpipe.models.DLRM`: pairwise dot products."""

    kind: Literal["dlrm"] = "dlrm"
    bottom: LayerSizes = (512, 256, 64)
    """Layers over dense features. The last layer must have the size `embedding_dim`."""
    top: LayerSizes = (512, 256, 1)

    def check(self, embedding_dim: int) -> None:
        """Checks the sizes of layers, as `_Model.check` does."""
        if self.bottom[-1] != embedding_dim:
            raise ValueError(
                f"model.bottom ends with {self.bottom[-1]} but embeddings.embedding_dim is "
                f"{embedding_dim}: the interaction combines vectors of both, so make them equal"
            )
        super().check(embedding_dim)


class DCNConfig(DLRMConfig):
    """`bagpipe.models.DLRM_DCN`: DCN-v2's low-rank cross network."""

    # Adagrad's first step moves every weight by the rate, and crosses multiply what that does:
    # at 0.02 the loss jumps to thousands. MLPerf trains this model at 0.005, too.
    dense_lr: ClassVar[float] = 0.005

    kind: Literal["dcn"] = "dcn"  # type: ignore[assignment]
    top: LayerSizes = (1024, 1024, 512, 256, 1)
    num_cross_layers: Depth = 3
    cross_rank: Width = 512


class WideDeepConfig(_LayeredModel):
    """`bagpipe.models.WideDeep`; the last column of each table holds the linear weights."""

    # A linear weight has nearly all of its row's gradient. Row-wise Adagrad takes the mean over the
    # row, so it moves that weight by up to sqrt(D) times the rate: too fast at the usual one. Small
    # tables, which would start widest, put more noise into the sum than they learn. The bound has
    # the standard deviation 0.01; a uniform distribution, unlike a normal one, is the same on every
    # machine.
    table_bound: ClassVar[float | None] = 0.0173
    table_lr: ClassVar[float] = 0.005

    kind: Literal["wide_deep"] = "wide_deep"
    top: LayerSizes = (1024, 512, 256, 1)

    def check(self, embedding_dim: int) -> None:
        """Checks the sizes of layers, as `_Model.check` does."""
        if embedding_dim < 2:
            raise ValueError(
                f"embeddings.embedding_dim is {embedding_dim} but model.kind = {self.kind!r} keeps "
                "linear weights in the last column, so it must be at least 2"
            )
        super().check(embedding_dim)


class DeepFMConfig(WideDeepConfig):
    """`bagpipe.models.DeepFM`; the last column of each table holds the first-order weights."""

    # It starts as narrow: the products of all pairs of vectors are added up, so those of small
    # tables would drown the rest. With those products half the usual rate is low enough.
    table_lr: ClassVar[float] = 0.01

    kind: Literal["deepfm"] = "deepfm"  # type: ignore[assignment]
    top: LayerSizes = (400, 400, 400, 1)


def model_kind(section: object) -> object:
    """Which model a section is for: its `kind`, or DLRM where it has none; "own" for a class."""
    kind = (
        section.get("kind", "dlrm")
        if isinstance(section, dict)
        else getattr(section, "kind", "dlrm")
    )
    return "own" if isinstance(kind, str) and ":" in kind else kind


ModelConfig: TypeAlias = Annotated[
    Annotated[DLRMConfig, Tag("dlrm")]
    | Annotated[DCNConfig, Tag("dcn")]
    | Annotated[WideDeepConfig, Tag("wide_deep")]
    | Annotated[DeepFMConfig, Tag("deepfm")]
    | Annotated[OwnModelConfig, Tag("own")],
    Discriminator(model_kind),
]
