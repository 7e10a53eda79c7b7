"""One corruption protocol for all methods: missing modalities, frames, noise, shift.

Every random decision belongs to a sample: it depends on the protocol's version, the
seed, the kind of corruption, the modality and the sample's id, and on nothing else,
neither on the order of the samples nor on which others are there. What was decided
comes back as arrays (`masks`) that `save_masks` writes, `load_masks` reads and `apply`
puts on again, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np

from mmsa_lib.corpora.pickles import load_npz
from mmsa_lib.corpora.schema import Ragged, Split
from mmsa_lib.errors import CorpusError, unknown
from mmsa_lib.files import replacing

CORRUPTION_VERSION = "1"
COMPLETE = "complete"


def patterns(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """All incomplete patterns as tuples of *available* modalities.

    2**M - 2 of them, few modalities first. For text, audio, vision these are the six
    that leave one or two modalities; the complete case is not among them.
    """
    modalities = tuple(modalities)
    return [
        kept
        for size in range(1, len(modalities))
        for kept in combinations(modalities, size)
    ]


def missing_modality_masks(
    ids: Sequence[str],
    modalities: Sequence[str],
    *,
    rate: float,
    patterns: Iterable[Sequence[str]] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Which sample lacks which modality: {modality: (n,) bool, True = missing}.

    With probability `rate` a sample gets one of `patterns` (sets of modalities that
    stay; default: all incomplete ones), drawn uniformly; else it stays complete. One
    pattern and rate 1 is a fixed pattern of the evaluation protocol. Every sample
    keeps at least one modality.
    """
    modalities = tuple(modalities)
    _check_rate("rate", rate)
    chosen = _check_patterns(modalities, patterns)
    missing = {m: np.zeros(len(ids), dtype=bool) for m in modalities}
    for row, sample in enumerate(ids):
        struck, pick = _uniforms(seed, "modality", sample, 2)
        if struck < rate:
            kept = chosen[int(pick * len(chosen))]
            for m in modalities:
                missing[m][row] = m not in kept
    return missing


def missing_modalities(
    split: Split,
    *,
    rate: float,
    patterns: Iterable[Sequence[str]] | None = None,
    seed: int = 0,
) -> tuple[Split, dict[str, np.ndarray]]:
    """A split whose samples lack modalities (length zero), and its masks.

    Masks: ``missing_modality/<m>`` (n,) bool, True = taken away. A sample that lacked
    a modality from the start loses nothing if that would leave it with none.
    """
    gone = missing_modality_masks(
        split.ids, split.modalities, rate=rate, patterns=patterns, seed=seed
    )
    left = np.zeros(len(split), dtype=bool)
    for m, ragged in split.features.items():
        left |= (ragged.lengths > 0) & ~gone[m]
    masks = {f"missing_modality/{m}": g & left for m, g in gone.items()}
    return apply(split, masks), masks


def fixed_pattern(
    split: Split, available: Sequence[str]
) -> tuple[Split, dict[str, np.ndarray]]:
    """Every sample keeps exactly `available`; all modalities = the complete case."""
    if set(available) == set(split.modalities):
        return split, {
            f"missing_modality/{m}": np.zeros(len(split), dtype=bool)
            for m in split.modalities
        }
    return missing_modalities(split, rate=1.0, patterns=[tuple(available)])


def missing_frames(
    split: Split,
    *,
    rate: float,
    modalities: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[Split, dict[str, np.ndarray]]:
    """A split in which single steps are dropped out (set to zero), and its masks.

    Each step of `modalities` (default: all) is lost with probability `rate`; the
    sequence keeps its length, as a recorder that lost frames does. At least one step
    of a sample's modality stays. Masks: ``missing_frame/<m>`` (total steps,) bool.
    """
    _check_rate("rate", rate)
    masks = {}
    for m in _chosen(split, modalities):
        lost = []
        for sample, steps in zip(split.ids, split.features[m].lengths, strict=True):
            if not steps:
                continue
            u = _uniforms(seed, f"frame/{m}", sample, int(steps))
            gone = u < rate
            gone[u.argmax()] = False  # the step that would be lost last stays
            lost.append(gone)
        masks[f"missing_frame/{m}"] = _join(lost, bool)
    return apply(split, masks), masks


def noise(
    split: Split,
    *,
    scale: float,
    modalities: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[Split, dict[str, np.ndarray]]:
    """A split with Gaussian noise added to features, and its masks.

    `scale` is in units of the feature values (standardise first to make it relative).
    Masks: ``noise/<m>`` (total steps, width) float32, what was added.
    """
    if not scale >= 0:
        raise CorpusError(f"scale must be >= 0, found {scale}")
    masks = {}
    for m in _chosen(split, modalities):
        ragged = split.features[m]
        added = [
            _normals(seed, f"noise/{m}", sample, int(steps), ragged.width)
            for sample, steps in zip(split.ids, ragged.lengths, strict=True)
        ]
        added = np.concatenate(added) if added else np.zeros((0, ragged.width))
        masks[f"noise/{m}"] = (scale * added).astype(np.float32)
    return apply(split, masks), masks


def shift(
    split: Split,
    *,
    gain: float = 0.0,
    offset: float = 0.0,
    modalities: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[Split, dict[str, np.ndarray]]:
    """A covariate shift that touches no label: x -> x * (1 + g) + o per channel.

    g and o are Gaussian with standard deviations `gain` and `offset`, drawn once per
    channel of each modality and the same for all samples. Masks:
    ``shift_gain/<m>`` and ``shift_offset/<m>``, (width,) float32.
    """
    masks = {}
    for m in _chosen(split, modalities):
        g, o = _normals(seed, f"shift/{m}", "", 2, split.features[m].width)
        masks[f"shift_gain/{m}"] = (1 + gain * g).astype(np.float32)
        masks[f"shift_offset/{m}"] = (offset * o).astype(np.float32)
    return apply(split, masks), masks


def apply(split: Split, masks: Mapping[str, np.ndarray]) -> Split:
    """Put recorded masks on a split, bit for bit what made them.

    Order: shift, noise, missing frames, missing modalities. Raises `CorpusError` for
    masks of another split or modality.
    """
    features = dict(split.features)
    by_modality: dict[str, dict[str, np.ndarray]] = {}
    for key, mask in masks.items():
        kind, _, m = key.partition("/")
        if kind not in KINDS:
            raise unknown("corruption", kind, KINDS)
        if m not in features:
            raise unknown("modality", m, features)
        by_modality.setdefault(m, {})[kind] = mask
    for m, parts in by_modality.items():
        features[m] = _corrupt(split, m, features[m], parts)
    return split._with(features=features)


KINDS = ("shift_gain", "shift_offset", "noise", "missing_frame", "missing_modality")


def _corrupt(split: Split, m: str, ragged: Ragged, parts: Mapping) -> Ragged:
    steps, width, n = int(ragged.lengths.sum()), ragged.width, len(split)
    shapes = {
        "shift_gain": (width,),
        "shift_offset": (width,),
        "noise": (steps, width),
        "missing_frame": (steps,),
        "missing_modality": (n,),
    }
    for kind, mask in parts.items():
        if np.shape(mask) != shapes[kind]:
            raise CorpusError(
                f"mask {kind}/{m} has shape {np.shape(mask)}, but split {split.name!r} "
                f"needs {shapes[kind]}: it was made for another split"
            )
    if set(parts) - {"missing_modality"}:
        x = np.concatenate([ragged[i] for i in range(n)] or [np.zeros((0, width))])
        x = x.astype(np.float32)
        if "shift_gain" in parts:
            x = x * parts["shift_gain"]
        if "shift_offset" in parts:
            x = x + parts["shift_offset"]
        if "noise" in parts:
            x = x + parts["noise"]
        if "missing_frame" in parts:
            x = np.where(parts["missing_frame"][:, None], np.float32(0), x)
        starts = np.cumsum(ragged.lengths) - ragged.lengths
        ragged = Ragged(x.astype(np.float32), starts, ragged.lengths)
    if "missing_modality" in parts:
        ragged = ragged.without(parts["missing_modality"])
    return ragged


def save_masks(path, ids: Sequence[str], masks: Mapping[str, np.ndarray]) -> None:
    """Write masks with the ids they belong to as one .npz, all of it or nothing."""
    with replacing(path) as part, open(part, "wb") as f:
        np.savez_compressed(
            f, __version__=np.array(CORRUPTION_VERSION), __ids__=np.array(ids), **masks
        )


def load_masks(path, ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Read masks for exactly these ids in this order; no pickles are opened.

    Raises `CorpusError` for a damaged file and for masks of other samples.
    """
    masks = load_npz(path, None, "what save_masks has written")
    version = str(masks.pop("__version__", "none"))
    if version != CORRUPTION_VERSION:
        raise CorpusError(
            f"{path}: masks of protocol version {version}, this library has "
            f"{CORRUPTION_VERSION}; make them again"
        )
    if masks.pop("__ids__", np.array(0)).tolist() != list(ids):
        raise CorpusError(
            f"{path}: these masks belong to other samples, or to another order of them"
        )
    return masks


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate <= 1:
        raise CorpusError(f"{name} is a probability, found {rate}")


def _check_patterns(modalities, chosen) -> list[tuple[str, ...]]:
    known = patterns(modalities)
    if chosen is None:
        if not known:
            raise CorpusError(
                f"one modality ({', '.join(modalities)}) has no incomplete pattern: "
                "every sample must keep at least one"
            )
        return known
    out = []
    for kept in chosen:
        for m in kept:
            if m not in modalities:
                raise unknown("modality", m, modalities)
        if not kept:
            raise CorpusError(
                "a pattern names the modalities that stay; an empty one would leave "
                "a sample with none"
            )
        out.append(tuple(kept))
    if not out:
        raise CorpusError("no pattern given; leave `patterns` out to use all")
    return out


def _chosen(split: Split, modalities: Sequence[str] | None) -> tuple[str, ...]:
    for m in modalities or ():
        if m not in split.features:
            raise unknown("modality", m, split.features)
    return split.modalities if modalities is None else tuple(modalities)


def _join(parts: list[np.ndarray], dtype) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def _raw(seed: int, purpose: str, sample: str, count: int) -> np.ndarray:
    """`count` 64-bit integers that belong to one sample and purpose."""
    key = f"{CORRUPTION_VERSION}|{seed}|{purpose}|{sample}".encode()
    words = np.frombuffer(hashlib.sha256(key).digest(), dtype="<u4")
    return np.random.PCG64(np.random.SeedSequence(words.tolist())).random_raw(count)


def _uniforms(seed: int, purpose: str, sample: str, count: int) -> np.ndarray:
    return (_raw(seed, purpose, sample, count) >> np.uint64(11)) * 2.0**-53


def _normals(seed, purpose, sample, steps: int, width: int) -> np.ndarray:
    """Nearly normal values of sd 1, (steps, width): sums of twelve 16-bit uniforms.

    Twelve uniforms have variance 1 together; integer arithmetic keeps the bytes equal
    on every machine.
    """
    raw = _raw(seed, purpose, sample, 3 * steps * width).reshape(3, steps, width)
    total = np.zeros((steps, width), dtype=np.int64)
    for part in raw:
        for bits in (48, 32, 16, 0):
            total += ((part >> np.uint64(bits)) & np.uint64(0xFFFF)).astype(np.int64)
    return (total - 6 * 65535) / 65536
