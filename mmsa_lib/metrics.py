"""Every convention by which sentiment, emotions, classes and lesions are scored.

Plain arrays in, plain floats out; nothing here needs torch. Accuracies, F1 and Dice
are in percent. Every truth comes first, every prediction second. The chapter
*measuring sentiment without fooling yourself* shows why one number is not enough.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
from scipy import stats
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from mmsa_lib.errors import MetricError, unknown

ACC2_RULES = ("has0", "non0", "zneg")


# ---------------------------------------------------------------- what is compared


def _column(values, what: str) -> np.ndarray:
    """(n,) float64 from (n,) or (n, 1); NaN and infinity are errors that count them."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim == 2 and x.shape[1] == 1:
        x = x[:, 0]
    if x.ndim != 1:
        raise MetricError(
            f"{what} must be (n,) or (n, 1), found {np.shape(values)}. Scoring it "
            "would broadcast and give a number without meaning."
        )
    if not len(x):
        raise MetricError(f"{what} is empty: there is nothing to score")
    _refuse_nonfinite(x, what)
    return x


def _refuse_nonfinite(x: np.ndarray, what: str) -> None:
    bad = int((~np.isfinite(x)).sum())
    if bad:
        raise MetricError(
            f"{what} holds {bad} NaN or infinite values of {x.size}. The model "
            "diverged or its input was not clean; a score would hide that."
        )


def _pair(truth, prediction) -> tuple[np.ndarray, np.ndarray]:
    y, p = _column(truth, "truth"), _column(prediction, "prediction")
    if len(y) != len(p):
        raise MetricError(f"{len(y)} truths but {len(p)} predictions")
    return y, p


def _undefined(why: str) -> float:
    warnings.warn(why, RuntimeWarning, stacklevel=3)
    return float("nan")


# ---------------------------------------------------------------- regression, A.1


def mae(truth, prediction) -> float:
    """Mean absolute error, (1/N) sum |p - y|, in label units."""
    y, p = _pair(truth, prediction)
    return float(np.abs(p - y).mean())


def corr(truth, prediction) -> float:
    """Pearson correlation; NaN and a warning if either side is constant."""
    y, p = _pair(truth, prediction)
    if np.ptp(y) == 0 or np.ptp(p) == 0:
        return _undefined("correlation is undefined: truth or prediction is constant")
    return float(stats.pearsonr(y, p).statistic)


def rounded_accuracy(truth, prediction, limit: int) -> float:
    """Share of equal integers after clipping to [-limit, limit], in percent.

    Halves go to the even neighbour (2.5 to 2, -0.5 to 0), as NumPy and PyTorch round.
    """
    y, p = (np.rint(np.clip(x, -limit, limit)) for x in _pair(truth, prediction))
    return 100 * float((y == p).mean())


def acc7(truth, prediction) -> float:
    """Seven classes, rounded and clipped to [-3, 3]; in percent."""
    return rounded_accuracy(truth, prediction, 3)


def acc5(truth, prediction) -> float:
    """Five classes, rounded and clipped to [-2, 2]; in percent."""
    return rounded_accuracy(truth, prediction, 2)


def sdk_bins(values) -> np.ndarray:
    """The seven bins of the CMU SDK, (n,) integers -3..3.

    Only an exact 0 is class 0; (0, 1] is 1, (1, 2] is 2, above 2 is 3, and the
    negative side mirrors it: [-1, 0) is -1, [-2, -1) is -2, below -2 is -3.
    """
    x = _column(values, "values")
    return (np.sign(x) * np.minimum(np.ceil(np.abs(x)), 3)).astype(np.int64)


def acc7_sdk(truth, prediction) -> float:
    """Seven classes by the bins of the CMU SDK (not by rounding); in percent."""
    y, p = _pair(truth, prediction)
    return 100 * float((sdk_bins(y) == sdk_bins(p)).mean())


# ---------------------------------------------------------------- Acc-2 and F1, A.2-3


def _signs(truth, prediction, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Who counts and who is positive: boolean truth and prediction under one rule."""
    y, p = _pair(truth, prediction)
    if rule == "has0":
        return y >= 0, p >= 0
    if rule == "non0":
        return y[y != 0] > 0, p[y != 0] > 0
    if rule == "zneg":
        return y > 0, p > 0
    raise unknown("Acc-2 rule", rule, ACC2_RULES)


def acc2(truth, prediction, rule: str) -> float:
    """Accuracy of the sign in percent, under one of three rules.

    `has0`: all samples, positive is >= 0. `non0`: samples with a non-zero truth,
    positive is > 0. `zneg`: all samples, positive is > 0, so zero counts as negative.
    """
    y, p = _signs(truth, prediction, rule)
    return 100 * float((y == p).mean()) if len(y) else _undefined(_ALL_ZERO)


def f1_weighted(truth, prediction, rule: str) -> float:
    """F1 per class weighted by how often the class is *true*; `rule` as in `acc2`."""
    y, p = _signs(truth, prediction, rule)
    return _weighted_f1(y, p) if len(y) else _undefined(_ALL_ZERO)


def f1_weighted_swapped(truth, prediction, rule: str) -> float:
    """The F1 of code that passes predictions first: weights by *predicted* counts.

    Only for comparison with published tables (official mode); it can exceed accuracy
    by far: 73.24 where accuracy is 57.77, for "always negative" on MOSI's test split.
    """
    y, p = _signs(truth, prediction, rule)
    return _weighted_f1(p, y) if len(y) else _undefined(_ALL_ZERO)


_ALL_ZERO = "non0 scores are undefined: every truth is exactly zero"


def _weighted_f1(truth: np.ndarray, prediction: np.ndarray) -> float:
    return 100 * float(f1_score(truth, prediction, average="weighted", zero_division=0))


SENTIMENT: dict[str, Callable[..., float]] = {
    "mae": mae,
    "corr": corr,
    "acc7": acc7,
    "acc7_sdk": acc7_sdk,
    "acc5": acc5,
    **{f"acc2_{rule}": partial(acc2, rule=rule) for rule in ACC2_RULES},
    **{f"f1_{rule}": partial(f1_weighted, rule=rule) for rule in ACC2_RULES},
}


def sentiment_report(truth, prediction) -> dict[str, float]:
    """Every convention for one set of sentiment predictions in [-3, 3].

    Keys: mae, corr, acc7, acc7_sdk, acc5, and acc2_ and f1_ with has0, non0, zneg.
    """
    return {key: score(truth, prediction) for key, score in SENTIMENT.items()}


def constant_baselines(
    truth, train_mean: float | None = None
) -> dict[str, dict[str, float]]:
    """Reports of predictors that never look: always +1, -1, 0 and the training mean.

    Print them beside every Acc-2. Their correlation is NaN by definition.
    """
    values = {"always +1": 1.0, "always -1": -1.0, "always 0": 0.0}
    if train_mean is not None:
        values["training mean"] = float(train_mean)
    y = _column(truth, "truth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return {k: sentiment_report(y, np.full(len(y), v)) for k, v in values.items()}


_SIMS_EDGES = {2: (0.0,), 3: (-0.1, 0.1), 5: (-0.7, -0.1, 0.1, 0.7)}


def sims_report(truth, prediction) -> dict[str, float]:
    """CH-SIMS as MMSA scores it: both sides clipped to [-1, 1] before anything else.

    Keys: sims_mae, sims_corr, sims_acc2, sims_acc3, sims_acc5, sims_f1. Classes are
    right-closed and compared in float32, in which labels and edges are stored: a value
    of float32(0.1) belongs to the lower class.
    """
    y, p = (np.clip(x, -1, 1) for x in _pair(truth, prediction))
    report = {"sims_mae": mae(y, p), "sims_corr": corr(y, p)}
    for classes, edges in _SIMS_EDGES.items():
        by, bp = (
            np.digitize(x.astype(np.float32), np.float32(edges), right=True)
            for x in (y, p)
        )
        report[f"sims_acc{classes}"] = 100 * float((by == bp).mean())
        if classes == 2:
            report["sims_f1"] = _weighted_f1(by, bp)
    return report


# ---------------------------------------------------------------- emotions, A.4


def emotion_report(
    truth, probability, names: Sequence[str], threshold=0.5
) -> dict[str, float]:
    """Per emotion: balanced accuracy (WA), accuracy and weighted F1, and their means.

    truth (n, k): intensities, present where > 0. probability (n, k) in [0, 1], present
    where > threshold (one number, or k of them tuned on validation: say so). `names`
    are the k column names. Keys: wa_<name>, acc_<name>, f1_<name>, and wa_mean,
    acc_mean, f1_mean. WA = (TPR + TNR) / 2, chance 50; NaN (and so the mean) where an
    emotion is never or always present.
    """
    y = _table(truth, names, "truth")
    q = _table(probability, names, "probability")
    if q.min() < 0 or q.max() > 1:
        raise MetricError(
            f"probabilities run from {q.min():.3g} to {q.max():.3g}, not 0 to 1; "
            "if these are logits, apply the sigmoid first"
        )
    if len(y) != len(q):
        raise MetricError(f"{len(y)} rows of truth but {len(q)} of probabilities")
    return _binary_report(y > 0, q > threshold, names)


def absent_baseline(truth, names: Sequence[str]) -> dict[str, float]:
    """`emotion_report` of a predictor that says no emotion is ever present."""
    y = _table(truth, names, "truth")
    return _binary_report(y > 0, np.zeros(y.shape, dtype=bool), names)


def positive_weight(truth) -> np.ndarray:
    """N-/P per emotion, (k,), the `pos_weight` of BCE; from the training split only."""
    present = np.asarray(truth) > 0
    positives = present.sum(0)
    if (positives == 0).any():
        columns = ", ".join(map(str, np.flatnonzero(positives == 0)))
        raise MetricError(f"emotion column {columns} has no positive sample to weigh")
    return (len(present) - positives) / positives


def _table(values, names: Sequence[str], what: str) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != len(names) or not len(x):
        raise MetricError(
            f"{what} must be (n, {len(names)}), one column for each of "
            f"{', '.join(names)}; found {x.shape}"
        )
    _refuse_nonfinite(x, what)
    return x


def _binary_report(truth, prediction, names: Sequence[str]) -> dict[str, float]:
    report = {}
    for name, y, p in zip(names, truth.T, prediction.T, strict=True):
        report[f"wa_{name}"] = (
            100 * float(balanced_accuracy_score(y, p))
            if y.any() and not y.all()
            else _undefined(f"WA of {name!r} is undefined: all truths are equal")
        )
        report[f"acc_{name}"] = 100 * float((y == p).mean())
        report[f"f1_{name}"] = _weighted_f1(y, p)
    for kind in ("wa", "acc", "f1"):
        report[f"{kind}_mean"] = float(np.mean([report[f"{kind}_{n}"] for n in names]))
    return report


# ---------------------------------------------------------------- classes


def _classes(truth, prediction) -> tuple[np.ndarray, np.ndarray]:
    y, p = _pair(truth, prediction)
    if (y % 1).any() or (p % 1).any():
        raise MetricError("classes must be whole numbers; take the argmax of scores")
    return y.astype(np.int64), p.astype(np.int64)


def classification_report(truth, prediction) -> dict[str, float]:
    """One label of many (IEMOCAP 4-way, Food-101): acc, wa, f1, f1_macro in percent.

    truth and prediction are (n,) class numbers. `wa` is the mean recall of the classes
    that occur in the truth.
    """
    y, p = _classes(truth, prediction)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="y_pred contains classes")
        wa = 100 * float(balanced_accuracy_score(y, p))
    return {
        "acc": 100 * float(accuracy_score(y, p)),
        "wa": wa,
        "f1": _weighted_f1(y, p),
        "f1_macro": 100 * float(f1_score(y, p, average="macro", zero_division=0)),
    }


def one_against_rest_report(
    truth, prediction, names: Sequence[str]
) -> dict[str, float]:
    """IEMOCAP as binary tasks: each of the k classes against all others.

    truth and prediction are (n,) class numbers 0..k-1; keys as in `emotion_report`.
    Not comparable with the k-way accuracy of `classification_report`.
    """
    y, p = _classes(truth, prediction)
    k = len(names)
    if min(y.min(), p.min()) < 0 or max(y.max(), p.max()) >= k:
        raise MetricError(f"classes must be 0..{k - 1} for the names {list(names)}")
    classes = np.arange(k)
    return _binary_report(y[:, None] == classes, p[:, None] == classes, names)


# ---------------------------------------------------------------- segmentation, A.5

REGIONS = {"wt": (1, 2, 3), "tc": (1, 3), "et": (3,)}  # whole, core, enhancing tumour


def dice(truth, prediction, epsilon: float = 1e-3) -> np.ndarray:
    """Hard Dice per image, (n,) in [0, 1], of boolean masks (n, ...).

    2 (sum pq + e) / (sum p + sum q + 2e): two empty masks agree, so they score 1.
    """
    y, p = np.asarray(truth), np.asarray(prediction)
    if y.shape != p.shape or y.ndim < 2 or not len(y):
        raise MetricError(
            f"masks must share one shape (n, ...), found {y.shape} and {p.shape}"
        )
    if y.dtype != bool or p.dtype != bool:
        raise MetricError(
            f"hard Dice takes boolean masks, found {y.dtype} and {p.dtype}; "
            "threshold the probabilities first"
        )
    y, p = y.reshape(len(y), -1), p.reshape(len(p), -1)
    both = (y & p).sum(1)
    return 2 * (both + epsilon) / (y.sum(1) + p.sum(1) + 2 * epsilon)


def segmentation_report(truth, prediction) -> dict[str, float]:
    """Mean hard Dice in percent over images of BraTS labels 0..3, (n, ...) integers.

    Keys: dice_wt, dice_tc, dice_et and their mean dice_mean.
    """
    y, p = np.asarray(truth), np.asarray(prediction)
    found = np.union1d(y, p)
    if not np.isin(found, (0, 1, 2, 3)).all():
        raise MetricError(
            f"labels must be 0, 1, 2, 3, found {found[:8].tolist()}; BraTS files call "
            "enhancing tumour 4: remap it to 3 when loading"
        )
    report = {
        f"dice_{region}": 100 * float(dice(np.isin(y, v), np.isin(p, v)).mean())
        for region, v in REGIONS.items()
    }
    return report | {"dice_mean": float(np.mean(list(report.values())))}


# ---------------------------------------------------------------- missing modalities


def missing_patterns(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Incomplete patterns by what is *available*: six of them for three modalities."""
    return [
        p for size in range(1, len(modalities)) for p in combinations(modalities, size)
    ]


def incomplete_mean(
    reports: Mapping[Iterable[str], Mapping[str, float]], modalities: Sequence[str]
) -> dict[str, float]:
    """Mean of every metric over all incomplete patterns; the complete one stays out.

    `reports` maps a pattern, a tuple of available modalities in any order, to its
    report. A pattern that is absent is an error: a mean of five is not the mean of six.
    """
    given = {frozenset(p): r for p, r in reports.items()}
    complete = frozenset(modalities)
    wanted = [frozenset(p) for p in missing_patterns(modalities)]
    absent = [p for p in wanted if p not in given]
    strange = [p for p in given if p not in wanted and p != complete]
    if absent or strange:
        raise MetricError(
            f"need one report for each pattern of {tuple(modalities)}; absent: "
            f"{_patterns(absent)}; not a pattern of these: {_patterns(strange)}"
        )
    metrics = given[wanted[0]].keys()
    return {k: float(np.mean([given[p][k] for p in wanted])) for k in metrics}


def _patterns(patterns) -> str:
    return ", ".join("+".join(sorted(p)) or "(nothing)" for p in patterns) or "none"


# ---------------------------------------------------------------- what a reader is told


@dataclass(frozen=True)
class Metric:
    """How a metric is written: column head, unit, direction, one plain sentence."""

    name: str
    unit: str
    higher_is_better: bool
    sentence: str

    @property
    def better(self) -> str:
        return "higher" if self.higher_is_better else "lower"


_P = "%"
_RULES = {
    "has0": "all clips, zero counted as positive on both sides",
    "non0": "clips with a non-zero label only, positive means above zero",
    "zneg": "all clips, zero counted as negative on both sides",
}
_BINARY = {
    "wa": ("WA", "mean of the hit rates on present and absent; chance is 50"),
    "acc": ("Acc", "share of correct yes/no answers; high for rare labels by itself"),
    "f1": ("F1", "F1 of present and absent, weighted by how often each is true"),
}
LABELS = {
    "mae": Metric("MAE", "", False, "Mean absolute error in label units."),
    "corr": Metric("Corr", "", True, "Pearson correlation of label and prediction."),
    "acc7": Metric("Acc-7", _P, True, "Equal after rounding and clipping to -3..3."),
    "acc7_sdk": Metric("Acc-7 (SDK)", _P, True, "Equal in the seven bins of the SDK."),
    "acc5": Metric("Acc-5", _P, True, "Equal after rounding and clipping to -2..2."),
    **{
        f"acc2_{r}": Metric(f"Acc-2 ({r})", _P, True, f"Right sign: {text}.")
        for r, text in _RULES.items()
    },
    **{
        f"f1_{r}": Metric(f"F1 ({r})", _P, True, f"Weighted F1 of the sign: {text}.")
        for r, text in _RULES.items()
    },
    "sims_mae": Metric("MAE", "", False, "Mean absolute error after clipping to ±1."),
    "sims_corr": Metric("Corr", "", True, "Pearson correlation after clipping to ±1."),
    **{
        f"sims_acc{k}": Metric(
            f"Acc-{k} (SIMS)", _P, True, f"Equal among the {k} classes of CH-SIMS."
        )
        for k in _SIMS_EDGES
    },
    "sims_f1": Metric("F1 (SIMS)", _P, True, "Weighted F1 of the two CH-SIMS classes."),
    "acc": Metric("Acc", _P, True, "Share of correct classes."),
    "wa": Metric("WA", _P, True, "Mean recall over the classes."),
    "f1": Metric("F1", _P, True, "F1 per class weighted by its true share."),
    "f1_macro": Metric("F1 (macro)", _P, True, "Unweighted mean of F1 over classes."),
    "dice_wt": Metric("Dice WT", _P, True, "Overlap on the whole tumour."),
    "dice_tc": Metric("Dice TC", _P, True, "Overlap on the tumour core."),
    "dice_et": Metric("Dice ET", _P, True, "Overlap on the enhancing tumour."),
    "dice_mean": Metric("Dice", _P, True, "Mean of the three overlaps."),
}


def describe(metric: str) -> Metric:
    """Name, unit, direction and sentence for a key of any report above."""
    if metric in LABELS:
        return LABELS[metric]
    kind, _, label = metric.partition("_")
    if kind in _BINARY and label:
        name, sentence = _BINARY[kind]
        of = "mean over labels" if label == "mean" else label
        return Metric(f"{name} ({of})", _P, True, f"{of.capitalize()}: {sentence}.")
    raise unknown("metric", metric, LABELS)
