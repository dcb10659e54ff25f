"""A Criteo-shaped stream made on the fly from a seed and the samples' numbers.

Every value of sample n comes from a counter-based generator keyed by (seed, what, n). So batches of
any size, from any position, on any thread, hold the same samples. Every epoch repeats them in the
same order. Training samples are numbered from 0, validation samples from 2**40, and test samples
from 2**42. So they never overlap, and a longer training split changes no sample of another.

- Ids: the rank is Zipf (`bagpipe.data.zipf`). ``rank * a + b mod n`` with `a` coprime to n spreads
  the frequent ranks over the table, as real ids are spread.
- Bags hold one id. For the features of `bag_lengths` they hold a number of ids drawn uniformly from
  [least, most]; empty bags and repeated ids are possible.
- Dense features are the sum of two uniform numbers in [0, 1): small and not negative, as Criteo's
  are after the log transform.
- Labels are 1 with the probability of a planted logistic model: a hidden effect for each id,
  products of two hidden factors for some pairs of features, and a linear part in the dense
  features. It is scaled once, on samples numbered from 2**41, to a click rate of 0.25 and a spread
  for which the model itself, the best there can be, reaches an AUC of about 0.80.

Memory is one batch. Time is about 16 ms for 16,384 samples of 26 ids on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, gcd, sqrt
from typing import Final

import numpy as np

from bagpipe.data.base import Batch, FeatureSpec, Split, count_batches
from bagpipe.data.hashing import GOLDEN, mix64, stream, unit
from bagpipe.data.zipf import Zipf, draw_rank
from bagpipe.errors import ConfigError
from bagpipe.native.jit import jit
from bagpipe.types import (
    Float32Array,
    Float64Array,
    Int32Array,
    Int64Array,
    Jagged,
    UInt32Array,
    UInt64Array,
)

CLICK_RATE: Final = 0.25
LOGIT_SPREAD: Final = 1.36
NUM_PAIRS: Final = 8

_FIRST_SAMPLE: Final[dict[Split, int]] = {"train": 0, "validation": 1 << 40, "test": 1 << 42}
_FIRST_CALIBRATION_SAMPLE: Final = 1 << 41
_NUM_CALIBRATION_SAMPLES: Final = 8_192
_ROOT_3: Final = sqrt(3.0)
_WORD: Final = np.uint64(32)
_LOW: Final = np.uint64(0xFFFFFFFF)
# from one id of a bag to the next; odd, and not the step between trials
_NEXT_ID: Final = np.uint64(0xD1342543DE82EF95)


@dataclass(frozen=True, kw_only=True)
class _Features:
    """What the generator knows of each feature."""

    bases: UInt64Array  # (F,) keys of the features' streams
    sizes: Int64Array  # (F,) num_embeddings
    ranks: tuple[Zipf, ...]  # F of them
    steps: Int64Array  # (F,) the multiplier of rank -> id, coprime to the size
    shifts: Int64Array  # (F,)
    least: Int64Array  # (F,) bag lengths
    most: Int64Array  # (F,)
    weights: Float64Array  # (F,) of the effects
    # (F,) place among the factors: 2k and 2k + 1 are a pair; -1: in no pair
    factor_places: Int64Array


class SyntheticSource:
    """The stream as a `BatchSource`; features C1, C2, ... each have a table of their own name.

    Args:
        num_embeddings: The sizes of the tables.
        split: Which samples are drawn.
        num_samples: Samples per epoch.
        num_dense: Dense features per sample.
        skew: The exponent of the Zipf distribution.
        bag_lengths: (least, most) ids in a bag of each multi-hot feature, by name.
        seed: What all samples depend on.

    Raises:
        ConfigError: `bag_lengths` names a feature that does not exist.
    """

    def __init__(
        self,
        num_embeddings: Sequence[int],
        *,
        split: Split,
        num_samples: int,
        num_dense: int = 13,
        skew: float = 1.1,
        bag_lengths: Mapping[str, tuple[int, int]] | None = None,
        seed: int = 0,
    ) -> None:
        bag_lengths = bag_lengths or {}
        names = tuple(f"C{i}" for i in range(1, len(num_embeddings) + 1))
        for name in bag_lengths:
            if name not in names:
                raise ConfigError(
                    f"multi_hot names feature {name!r}; the features are {names[0]} to {names[-1]}"
                )
        self.features: tuple[FeatureSpec, ...] = tuple(
            FeatureSpec(
                name=name,
                table=name,
                num_embeddings=size,
                multi_hot=bag_lengths.get(name, (1, 1)) != (1, 1),
            )
            for name, size in zip(names, num_embeddings, strict=True)
        )
        self.num_dense, self.num_samples = num_dense, num_samples
        self.label_names, self.has_weights = ("label",), False
        self._keys, self._skew, self._first = names, float(skew), _FIRST_SAMPLE[split]
        self._random = _feature_parameters(self.features, self._skew, bag_lengths, seed)
        self._dense_base, self._label_base = np.uint64(_key(seed, 1)), np.uint64(_key(seed, 2))
        self._dense_weights = np.random.default_rng([seed, 2]).normal(0.0, 1.0, num_dense)
        self._scale, self._intercept = self._calibrate()

    def batches(
        self, *, batch_size: int, epoch: int = 0, start: int = 0, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Yields the batches from number `start` on; every epoch has the same ones."""
        for read in self.reads(
            batch_size=batch_size, epoch=epoch, start=start, drop_last=drop_last
        ):
            yield read()

    def reads(
        self, *, batch_size: int, epoch: int = 0, start: int = 0, drop_last: bool = False
    ) -> Iterator[Callable[[], Batch]]:
        """See `BatchSource.reads`."""
        for number in range(
            start, count_batches(self.num_samples, batch_size, drop_last=drop_last)
        ):
            first = number * batch_size
            yield partial(
                self._read, self._first + first, min(batch_size, self.num_samples - first)
            )

    def probabilities(self, first: int, count: int) -> Float64Array:
        """The planted probabilities of a click (count,), which a perfect model would predict.

        Args:
            first: Number of the first sample, from 0.
            count: How many samples.
        """
        return self._make(self._first + first, count)[1]

    def _read(self, first: int, count: int) -> Batch:
        return self._make(first, count)[0]

    def _make(self, first: int, count: int) -> tuple[Batch, Float64Array]:
        sparse, dense, scores = self._draw(first, count)
        probabilities, labels = np.empty(count), np.empty(count, np.float32)
        _draw_labels(
            self._label_base, first, self._scale, self._intercept, scores, probabilities, labels
        )
        return Batch(dense=dense, sparse=sparse, labels=labels), probabilities

    def _draw(self, first: int, count: int) -> tuple[Jagged, Float32Array, Float64Array]:
        """Ids, dense features and unscaled logits of samples `first` to `first + count`."""
        random = self._random
        offsets = np.empty(len(self._keys) * count + 1, np.int32)
        _draw_lengths(random.bases, random.least, random.most, first, count, offsets)
        values = np.empty(int(offsets[-1]), np.int32)
        dense = np.empty((count, self.num_dense), np.float32)
        scores = np.zeros(count)
        factors = np.zeros((max(int(random.factor_places.max()) + 1, 2), count))
        for index, ranks in enumerate(random.ranks):
            place = int(random.factor_places[index])
            _draw_ids(
                random.bases[index],
                ranks.thresholds,
                ranks.aliases,
                ranks.tail,
                (random.sizes[index], random.steps[index], random.shifts[index]),
                random.weights[index],
                first,
                offsets[index * count : (index + 1) * count + 1],
                values,
                scores,
                factors[place] if place >= 0 else factors[0, :0],
            )
        for one, other in zip(factors[0::2], factors[1::2], strict=True):
            scores += one * other
        _draw_dense(self._dense_base, first, self._dense_weights, dense, scores)
        ragged = any(feature.multi_hot for feature in self.features)
        sparse = Jagged(
            keys=self._keys, values=values, batch_size=count, offsets=offsets if ragged else None
        )
        return sparse, dense, scores

    def _calibrate(self) -> tuple[float, float]:
        """Scale and intercept of the logits.

        The scale gives them the spread LOGIT_SPREAD. Bisection finds the intercept that makes
        CLICK_RATE the mean probability.
        """
        scores = self._draw(_FIRST_CALIBRATION_SAMPLE, _NUM_CALIBRATION_SAMPLES)[2]
        scale = LOGIT_SPREAD / max(float(scores.std()), 1e-9)
        low, high = -50.0 - scale * float(scores.max()), 50.0 - scale * float(scores.min())
        for _ in range(60):
            middle = (low + high) / 2
            too_many = (1.0 / (1.0 + np.exp(-(scale * scores + middle)))).mean() > CLICK_RATE
            low, high = (low, middle) if too_many else (middle, high)
        return scale, (low + high) / 2


@jit
def _key(seed: int, number: int) -> np.uint64:
    """The key of the seed's stream of that number."""
    return stream(mix64(np.uint64(seed)), np.uint64(number))


def _feature_parameters(
    features: Sequence[FeatureSpec],
    skew: float,
    bag_lengths: Mapping[str, tuple[int, int]],
    seed: int,
) -> _Features:
    sizes = [feature.num_embeddings for feature in features]
    lengths = [bag_lengths.get(feature.name, (1, 1)) for feature in features]
    bases = [int(_key(seed, 16 + index)) for index in range(len(features))]
    random = np.random.default_rng([seed, 1])
    places = np.full(len(features), -1, np.int64)
    num_paired = 2 * min(NUM_PAIRS, len(features) // 2)
    places[random.permutation(len(features))[:num_paired]] = np.arange(num_paired)
    return _Features(
        bases=np.array(bases, np.uint64),
        sizes=np.array(sizes, np.int64),
        ranks=tuple(Zipf.make(size, skew) for size in sizes),
        steps=np.array(
            [_coprime(size, base) for size, base in zip(sizes, bases, strict=True)], np.int64
        ),
        shifts=np.array([base % size for size, base in zip(sizes, bases, strict=True)], np.int64),
        least=np.array([least for least, _ in lengths], np.int64),
        most=np.array([most for _, most in lengths], np.int64),
        weights=random.normal(0.0, 1.0, len(features)),
        factor_places=places,
    )


def _coprime(size: int, base: int) -> int:
    """A step past a third of `size` that makes ``rank * step mod size`` a bijection."""
    step = size // 3 + 1 + (base >> 32) % max(size // 3, 1)
    while gcd(step, size) != 1:
        step += 1
    return step


@jit
def _draw_lengths(
    bases: UInt64Array,
    least: Int64Array,
    most: Int64Array,
    first: int,
    count: int,
    offsets: Int32Array,
) -> None:
    """Fills offsets (F * count + 1,)."""
    offsets[0] = 0
    for f in range(len(bases)):
        base = mix64(bases[f])
        choices = np.uint64(most[f] - least[f] + 1)
        for b in range(count):
            length = least[f]
            if choices > np.uint64(1):
                length += np.int64(stream(base, np.uint64(first + b)) % choices)
            offsets[f * count + b + 1] = offsets[f * count + b] + length


@jit
def _draw_ids(
    base: np.uint64,
    thresholds: UInt32Array,
    aliases: Int32Array,
    tail: Float64Array,
    bijection: tuple[int, int, int],
    weight: float,
    first: int,
    offsets: Int32Array,
    values: Int32Array,
    scores: Float64Array,
    factors: Float64Array,
) -> None:
    """Draws one feature of B samples.

    Args:
        base: The key of the feature's stream.
        thresholds, aliases, tail: The feature's `Zipf`.
        bijection: Size, step and shift of rank to id.
        weight: What the feature's effect is multiplied by.
        first: Number of the first sample.
        offsets: (B + 1,) where bags begin in `values`.
        values: Is filled with ids at these offsets.
        scores: (B,) the bags' mean effects are added to it.
        factors: (B,) is filled with the bags' mean factors; (0,) if the feature is in no pair.
    """
    size, step, shift = np.uint64(bijection[0]), np.uint64(bijection[1]), np.uint64(bijection[2])
    hidden_base = base ^ GOLDEN
    for b in range(len(scores)):
        effect, factor = 0.0, 0.0
        sample = stream(base, np.uint64(first + b))
        for k in range(offsets[b], offsets[b + 1]):
            rank = np.uint64(draw_rank(sample, thresholds, aliases, tail))
            number = np.int64((rank * step + shift) % size)
            values[k] = number
            hidden = stream(hidden_base, np.uint64(number))
            effect += _standard(hidden >> _WORD)
            factor += _standard(hidden & _LOW)
            sample += _NEXT_ID
        length = max(offsets[b + 1] - offsets[b], 1)
        scores[b] += weight * effect / length
        if len(factors):
            factors[b] = factor / length


@jit
def _standard(word: np.uint64) -> float:
    """Makes 32 random bits a uniform number with mean 0 and variance 1."""
    return (float(word) * 2.0**-31 - 1.0) * _ROOT_3


@jit
def _draw_dense(
    base: np.uint64, first: int, weights: Float64Array, dense: Float32Array, scores: Float64Array
) -> None:
    """Fills dense (B, D) and adds its part to scores (B,)."""
    for b in range(dense.shape[0]):
        sample = stream(base, np.uint64(first + b))
        for j in range(dense.shape[1]):
            bits = stream(sample, np.uint64(j))
            value = np.float32((float(bits >> _WORD) + float(bits & _LOW)) * 2.0**-32)
            dense[b, j] = value
            scores[b] += weights[j] * (value - 1.0)


@jit
def _draw_labels(
    base: np.uint64,
    first: int,
    scale: float,
    intercept: float,
    scores: Float64Array,
    probabilities: Float64Array,
    labels: Float32Array,
) -> None:
    """From scores (B,) to probabilities (B,) and labels (B,)."""
    for b in range(len(scores)):
        probabilities[b] = 1.0 / (1.0 + exp(-(scale * scores[b] + intercept)))
        labels[b] = np.float32(unit(stream(base, np.uint64(first + b))) < probabilities[b])
