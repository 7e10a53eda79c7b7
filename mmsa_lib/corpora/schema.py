"""One schema for every corpus: `Corpus`, `Split`, `Ragged`, `Batch` and the card.

A corpus is a name, a card and splits. A split holds ids, raw text, one ragged feature
sequence per modality and labels by name. A modality that a file lacks is not there;
a modality that one sample lacks has length zero. Nothing here assumes three of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from mmsa_lib.errors import CorpusError, SealedError, unknown

SPLITS = ("train", "valid", "test")
SCORES = ("sentiment", "emotions")  # labels that are never classes
EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")  # MOSEI's order


class Ragged:
    """Sequences of unequal length and equal width, kept in one flat array.

    `values` is (sum of lengths, width) and may be memory-mapped; sample i is
    ``values[starts[i] : starts[i] + lengths[i]]``. Reading a sample gives float32 and
    applies ``(x - shift) / scale`` when a standardisation was attached.
    """

    def __init__(self, values, starts, lengths, shift=None, scale=None):
        self.values = values
        self.starts = np.asarray(starts, dtype=np.int64)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.shift, self.scale = shift, scale
        if values.ndim != 2:
            raise CorpusError(
                f"feature values must be 2-D (steps, width), found shape {values.shape}"
            )
        if len(self.starts) != len(self.lengths):
            raise CorpusError(
                f"{len(self.starts)} starts but {len(self.lengths)} lengths"
            )
        if len(self.starts) and (
            self.starts.min() < 0
            or self.lengths.min() < 0
            or (self.starts + self.lengths).max() > values.shape[0]
        ):
            raise CorpusError(
                "feature offsets point outside the values array: the file is damaged "
                "or its offsets belong to another array"
            )

    @classmethod
    def from_list(cls, sequences: Sequence[np.ndarray], dtype=np.float32) -> Ragged:
        """Stack a list of (T_i, width) arrays. Lengths of zero are allowed."""
        lengths = [len(s) for s in sequences]
        arrays = [np.asarray(s, dtype=dtype) for s in sequences]
        widths = {a.shape[1] for a in arrays if a.ndim == 2}
        if len(widths) != 1 or any(a.ndim != 2 for a in arrays):
            shapes = sorted({str(a.shape[1:]) for a in arrays})
            raise CorpusError(
                "every sequence must be (steps, width) with one width; found trailing "
                f"shapes {', '.join(shapes)}"
            )
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if lengths else []
        return cls(np.concatenate(arrays), starts, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        start = self.starts[i]
        x = np.array(self.values[start : start + self.lengths[i]], dtype=np.float32)
        return x if self.scale is None else (x - self.shift) / self.scale

    @property
    def width(self) -> int:
        return int(self.values.shape[1])

    def select(self, indices) -> Ragged:
        """A view of some samples; the values are shared, not copied."""
        return Ragged(
            self.values,
            self.starts[indices],
            self.lengths[indices],
            self.shift,
            self.scale,
        )

    def without(self, missing: np.ndarray) -> Ragged:
        """A view in which samples with ``missing[i]`` have length zero."""
        lengths = np.where(missing, 0, self.lengths)
        return Ragged(self.values, self.starts, lengths, self.shift, self.scale)

    def standardised(self, shift: np.ndarray, scale: np.ndarray) -> Ragged:
        return Ragged(self.values, self.starts, self.lengths, shift, scale)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation per channel over all real steps, in float64."""
        total = np.zeros(self.width)
        square = np.zeros(self.width)
        for i in range(len(self)):
            x = self[i].astype(np.float64)
            total += x.sum(0)
            square += (x * x).sum(0)
        n = max(int(self.lengths.sum()), 1)
        mean = total / n
        return mean, np.sqrt(np.maximum(square / n - mean**2, 0.0))


@dataclass
class Batch:
    """Padded samples with explicit masks; what every net and method receives.

    features[m]   (B, T_m, d_m) float32, zeros where padded
    mask[m]       (B, T_m) bool, True = real step
    available[m]  (B,) bool, True = the sample has this modality
    labels[name]  (B, k) float32, or (B,) int64 for classes; empty on a sealed split
    ids           B strings
    extras[name]  (B, ...) what a model needs to read a sample beside its sequences,
                  such as the grid of a video's patches
    """

    features: dict[str, Tensor]
    mask: dict[str, Tensor]
    available: dict[str, Tensor]
    labels: dict[str, Tensor]
    ids: list[str]
    raw_text: list[str] | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.features)

    def to(self, device, non_blocking: bool = False) -> Batch:
        """A copy with every tensor on `device`."""

        def move(tensors):
            return {
                k: v.to(device, non_blocking=non_blocking) for k, v in tensors.items()
            }

        return replace(
            self,
            features=move(self.features),
            mask=move(self.mask),
            available=move(self.available),
            labels=move(self.labels),
            extras=move(self.extras),
        )


@dataclass(frozen=True)
class Receipt:
    """Proof that a predictor was frozen before the test; the key to a sealed split.

    metric, value   by which validation chose it; no value where nothing was chosen (the
                    last epoch of a fixed number of them)
    """

    corpus: str  # fingerprint of the corpus it was selected on
    artefact: str  # sha256 of what was frozen
    metric: str
    value: float | None
    candidates: int  # how many checkpoints or settings validation chose among


class Split:
    """One split: ids, raw text, a `Ragged` per modality, labels by name.

    A sealed split gives features but raises `SealedError` when labels are read.
    `truth` holds what only a synthetic corpus knows (latents, flags, masks), `extras`
    what a model needs beside the sequences (`Batch`).
    """

    def __init__(
        self,
        name: str,
        ids: Sequence[str],
        features: Mapping[str, Ragged],
        labels: Mapping[str, np.ndarray],
        raw_text: Sequence[str] | None = None,
        truth: Mapping[str, np.ndarray] | None = None,
        sealed: bool = False,
        extras: Mapping[str, np.ndarray] | None = None,
    ):
        self.name = name
        self.ids = ids
        self.features = dict(features)
        self.raw_text = raw_text
        self.sealed = sealed
        self.extras = dict(extras or {})
        self._truth = dict(truth or {})
        self._labels = {k: _label_array(k, v) for k, v in labels.items()}
        self._check()

    def _check(self) -> None:
        n = len(self.ids)
        if not self.features:
            raise CorpusError(f"split {self.name!r} has no modality")
        parts = {f"features of {m!r}": len(r) for m, r in self.features.items()}
        parts |= {f"label {k!r}": len(v) for k, v in self._labels.items()}
        parts |= {f"extras {k!r}": len(v) for k, v in self.extras.items()}
        if self.raw_text is not None:
            parts["raw text"] = len(self.raw_text)
        for what, length in parts.items():
            if length != n:
                raise CorpusError(
                    f"split {self.name!r} has {n} ids but {length} rows in {what}; "
                    "every part must have one row per id"
                )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.features)

    @property
    def dims(self) -> dict[str, int]:
        return {m: r.width for m, r in self.features.items()}

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, number of steps of each sample over all its modalities."""
        return sum(ragged.lengths for ragged in self.features.values())

    @property
    def labels(self) -> dict[str, np.ndarray]:
        self._refuse_if_sealed("labels")
        return self._labels

    @property
    def truth(self) -> dict[str, np.ndarray]:
        self._refuse_if_sealed("ground truth")
        return self._truth

    def _refuse_if_sealed(self, what: str) -> None:
        if self.sealed:
            raise SealedError(
                f"the {what} of the {self.name!r} split are sealed. Select a predictor "
                "on the validation split first (training.fit or training.select); the "
                "Frozen object they return opens the test split in training.evaluate."
            )

    def unseal(self, receipt: Receipt) -> Split:
        """The same split with readable labels, for a predictor frozen by validation."""
        if not isinstance(receipt, Receipt) or receipt.candidates < 1:
            raise SealedError(
                "a sealed split opens only for a Receipt of a selection made on the "
                "validation split (training.fit or training.select return one)"
            )
        return self._with(sealed=False)

    def _with(self, **changes) -> Split:
        kwargs = {
            "name": self.name,
            "ids": self.ids,
            "features": self.features,
            "labels": self._labels,
            "raw_text": self.raw_text,
            "truth": self._truth,
            "sealed": self.sealed,
            "extras": self.extras,
        }
        return Split(**(kwargs | changes))

    def only(self, modalities: Sequence[str]) -> Split:
        """The same samples with some modalities only, in the order asked for."""
        for m in modalities:
            if m not in self.features:
                raise unknown("modality", m, self.features)
        return self._with(features={m: self.features[m] for m in modalities})

    def select(self, indices) -> Split:
        """Some samples, as views."""
        indices = np.asarray(indices)
        if indices.dtype == bool:
            indices = np.flatnonzero(indices)
        return self._with(
            ids=[self.ids[i] for i in indices],
            features={m: r.select(indices) for m, r in self.features.items()},
            labels={k: v[indices] for k, v in self._labels.items()},
            raw_text=None
            if self.raw_text is None
            else [self.raw_text[i] for i in indices],
            truth={k: v[indices] for k, v in self._truth.items()},
            extras={k: v[indices] for k, v in self.extras.items()},
        )

    def without(self, missing: Mapping[str, np.ndarray]) -> Split:
        """A view where sample i lacks modality m wherever ``missing[m][i]``."""
        features = dict(self.features)
        for m, gone in missing.items():
            if m not in features:
                raise unknown("modality", m, features)
            features[m] = features[m].without(np.asarray(gone, dtype=bool))
        return self._with(features=features)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Pad some samples into one `Batch` of torch tensors on the CPU."""
        features, mask, available = {}, {}, {}
        for m, ragged in self.features.items():
            lengths = ragged.lengths[indices]
            steps = max(int(lengths.max(initial=0)), 1)
            x = np.zeros((len(indices), steps, ragged.width), dtype=np.float32)
            for row, i in enumerate(indices):
                x[row, : lengths[row]] = ragged[i]
            features[m] = torch.from_numpy(x)
            mask[m] = torch.from_numpy(np.arange(steps) < lengths[:, None])
            available[m] = torch.from_numpy(lengths > 0)
        labels = {} if self.sealed else self._labels
        return Batch(
            features=features,
            mask=mask,
            available=available,
            labels={k: torch.from_numpy(v[indices]) for k, v in labels.items()},
            ids=[self.ids[i] for i in indices],
            raw_text=None
            if self.raw_text is None
            else [self.raw_text[i] for i in indices],
            extras={k: torch.from_numpy(v[indices]) for k, v in self.extras.items()},
        )

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All samples in order; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield self.batch(np.arange(start, min(start + batch_size, len(self))))


def _label_array(name: str, values) -> np.ndarray:
    """Floats become (n, k) float32, integers stay (n,) int64 class labels."""
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise CorpusError(
            f"label {name!r} must be numbers, found an array of {values.dtype}"
        )
    if np.issubdtype(values.dtype, np.integer):
        if name in SCORES:
            raise CorpusError(
                f"label {name!r} is a score and came as {values.dtype}, which would "
                "make classes of it: give floats, as by .astype(numpy.float32)"
            )
        if values.ndim != 1:
            raise CorpusError(
                f"class label {name!r} must be (n,), found {values.shape}"
            )
        return values.astype(np.int64)
    values = values.astype(np.float32)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2:
        raise CorpusError(
            f"label {name!r} must be (n,) or (n, k), found {values.shape}"
        )
    if not np.isfinite(values).all():
        raise CorpusError(
            f"label {name!r} holds NaN or infinity in "
            f"{int((~np.isfinite(values)).any(1).sum())} rows; drop these samples first"
        )
    return values


@dataclass
class Card:
    """What a reader must know before trusting a number measured on a corpus."""

    name: str
    description: str
    source: str
    terms: str
    synthetic: bool
    version: str = "1"
    modalities: dict[str, dict] = field(default_factory=dict)
    splits: dict[str, dict] = field(default_factory=dict)
    sha256: str = ""  # fingerprint of ids, features and labels of all splits
    options: dict = field(default_factory=dict)  # what it was generated or built with
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass
class Corpus:
    """A name, a card and splits. `test` is sealed unless the maker says otherwise."""

    name: str
    card: Card
    splits: dict[str, Split]

    def __getitem__(self, split: str) -> Split:
        if split not in self.splits:
            raise unknown("split", split, self.splits)
        return self.splits[split]

    @property
    def train(self) -> Split:
        return self["train"]

    @property
    def valid(self) -> Split:
        return self["valid"]

    @property
    def test(self) -> Split:
        return self["test"]

    @property
    def modalities(self) -> tuple[str, ...]:
        return next(iter(self.splits.values())).modalities

    @property
    def dims(self) -> dict[str, int]:
        return next(iter(self.splits.values())).dims

    @property
    def fingerprint(self) -> str:
        return self.card.sha256

    def only(self, modalities: Sequence[str]) -> Corpus:
        """The same corpus with some of its modalities."""
        return self._map(lambda s: s.only(modalities))

    def with_classes(self, label: str, edges: Sequence[float]) -> Corpus:
        """The same corpus with one label "class": the interval between `edges`, 0 below
        the first, that the first column of `label` falls in. Labels stay sealed.
        """

        def classed(split: Split) -> Split:
            if label not in split._labels:
                raise unknown("label", label, split._labels)
            values = split._labels[label][:, 0]
            return split._with(labels={"class": np.digitize(values, edges)})

        return self._map(classed)

    def standardised(self, modalities: Sequence[str]) -> Corpus:
        """Z-score modalities per channel with statistics of the training split only.

        Channels that never vary in training keep scale 1, so they become zero.
        """
        stats = {}
        for m in modalities:
            mean, std = self.train.only([m]).features[m].moments()
            scale = np.where(std > 1e-8, std, 1.0)
            stats[m] = (mean.astype(np.float32), scale.astype(np.float32))

        def apply(split: Split) -> Split:
            features = {
                m: r.standardised(*stats[m]) if m in stats else r
                for m, r in split.features.items()
            }
            return split._with(features=features)

        return self._map(apply)

    def _map(self, f) -> Corpus:
        return Corpus(self.name, self.card, {k: f(s) for k, s in self.splits.items()})


def make_corpus(card: Card, splits: Mapping[str, Split]) -> Corpus:
    """Check splits against each other, complete the card, seal the test split.

    Raises `UnknownNameError` for a split that is not one of `SPLITS`, and `CorpusError`
    for one without samples, duplicate ids (within or across splits), modalities, widths
    or labels that differ between splits, and NaN or infinite features.
    """
    if not splits:
        raise CorpusError("a corpus needs a split")
    for name, split in splits.items():
        if name not in SPLITS:  # "Test" would lie open
            raise unknown("split", name, SPLITS)
        if not len(split):
            raise CorpusError(f"split {name!r} has no samples: leave it out or fill it")
    seen: dict[str, str] = {}
    first = next(iter(splits.values()))
    for name, split in splits.items():
        for i in split.ids:
            if i in seen:
                raise CorpusError(
                    f"id {i!r} occurs in split {seen[i]!r} and again in {name!r}: a "
                    "sample must belong to one split once. Remove the copy."
                )
            seen[i] = name
        if split.dims != first.dims:
            raise CorpusError(
                f"split {name!r} has modalities {split.dims}, split {first.name!r} has "
                f"{first.dims}; all splits need the same modalities and widths"
            )
        if set(split._labels) != set(first._labels):
            raise CorpusError(
                f"split {name!r} has labels {sorted(split._labels)}, split "
                f"{first.name!r} has {sorted(first._labels)}"
            )
        for m, ragged in split.features.items():
            check_finite(m, ragged, split.ids)
    card = replace(
        card,
        modalities=card.modalities or _modality_facts(splits),
        splits=_split_facts(splits),
        sha256=fingerprint(splits),
    )
    sealed = {k: s._with(sealed=(k == "test")) for k, s in splits.items()}
    return Corpus(card.name, card, sealed)


def check_finite(modality: str, ragged: Ragged, ids: Sequence[str]) -> None:
    """Raise `CorpusError` naming samples that hold NaN or infinity."""
    bad = []
    for i in range(len(ragged)):
        if not np.isfinite(ragged[i]).all():
            bad.append(ids[i])
    if bad:
        shown = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise CorpusError(
            f"modality {modality!r} holds NaN or infinite values in {len(bad)} samples "
            f"({shown}). COVAREP files do this. Replace them before building the "
            'corpus: clean_nonfinite(x) or nonfinite="zero" where a builder offers it.'
        )


def clean_nonfinite(x: np.ndarray) -> tuple[np.ndarray, int]:
    """Set NaN and infinities to 0; returns the cleaned copy and how many there were."""
    bad = ~np.isfinite(x)
    return np.where(bad, 0, x), int(bad.sum())


def fingerprint(splits: Mapping[str, Split]) -> str:
    """sha256 over ids, text, features and labels, however they are stored."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        split = splits[name]
        digest.update(f"split {name}\n".encode())
        for i in split.ids:
            digest.update(i.encode() + b"\0")
        for text in split.raw_text or ():
            digest.update(text.encode() + b"\0")
        for m in sorted(split.features):
            ragged = split.features[m]
            digest.update(f"{m} {ragged.width}\n".encode())
            digest.update(ragged.lengths.tobytes())
            for i in range(len(ragged)):
                digest.update(ragged[i].tobytes())
        for k in sorted(split._labels):
            digest.update(k.encode() + split._labels[k].tobytes())
        for k in sorted(split.extras):
            digest.update(k.encode() + split.extras[k].tobytes())
    return digest.hexdigest()


def _modality_facts(splits: Mapping[str, Split]) -> dict[str, dict]:
    facts = {}
    for m in next(iter(splits.values())).modalities:
        lengths = np.concatenate([s.features[m].lengths for s in splits.values()])
        facts[m] = {
            "width": next(iter(splits.values())).features[m].width,
            "length_min": int(lengths.min()),
            "length_median": float(np.median(lengths)),
            "length_max": int(lengths.max()),
            "missing": int((lengths == 0).sum()),
        }
    return facts


def _split_facts(splits: Mapping[str, Split]) -> dict[str, dict]:
    facts = {}
    for name, split in splits.items():
        facts[name] = {"size": len(split)}
        for k, v in split._labels.items():
            if v.ndim == 1:
                values, counts = np.unique(v, return_counts=True)
                facts[name][k] = {
                    "counts": dict(zip(values.tolist(), counts.tolist(), strict=True))
                }
            else:
                facts[name][k] = {
                    "mean": [round(float(x), 4) for x in v.mean(0)],
                    "sd": [round(float(x), 4) for x in v.std(0)],
                    "min": [round(float(x), 4) for x in v.min(0)],
                    "max": [round(float(x), 4) for x in v.max(0)],
                }
                if k == "sentiment":
                    # 7 bins of MOSI: round half to even after clipping to [-3, 3]
                    bins = np.rint(np.clip(v[:, 0], -3, 3)).astype(int) + 3
                    counts = np.bincount(bins, minlength=7)
                    facts[name][k]["histogram_-3_to_3"] = counts.tolist()
    return facts
