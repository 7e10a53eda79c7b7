"""How sure a number is: seeds, bootstrap over clips or videos, paired comparisons.

Two sources of noise, never mixed: *seeds* (would another training run say the same?)
and *items* (would another test set?). Seeds are few, so they get Student's t; clips
are many, so they get the bootstrap. Everything random takes a `seed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

from mmsa_lib.errors import MetricError, unknown
from mmsa_lib.metrics import SENTIMENT, describe

# ---------------------------------------------------------------- one model


@dataclass(frozen=True)
class Summary:
    """n values: mean, sample standard deviation (n - 1), t interval of the mean."""

    n: int
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def _values(values, what: str = "values") -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise MetricError(f"{what} must be one number a seed, found shape {x.shape}")
    bad = int((~np.isfinite(x)).sum())
    if bad:
        raise MetricError(
            f"{bad} of {len(x)} {what} are NaN or infinite; a failed seed must be "
            "repeated or reported, not averaged away"
        )
    return x


def summarise(values: Sequence[float], confidence: float = 0.95) -> Summary:
    """Mean, sample sd and t interval over seeds; sd and interval are NaN for one."""
    x = _values(values)
    n, mean = len(x), float(x.mean())
    if n == 1:
        return Summary(1, mean, math.nan, math.nan, math.nan)
    sd = float(x.std(ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sd / math.sqrt(n)
    return Summary(n, mean, sd, mean - half, mean + half)


def bootstrap(
    score: str | Callable[..., float],
    truth,
    prediction,
    *,
    clusters: Sequence | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a score over test items, or over clusters of them.

    score: a key of `metrics.SENTIMENT` or any ``score(truth, prediction) -> float``.
    truth, prediction: arrays with n rows. clusters: n labels, such as the video of each
    clip; whole clusters are then drawn, because clips of one speaker resemble another.
    """
    score = _score(score)
    y, p = np.asarray(truth), np.asarray(prediction)

    def statistic(rows):
        return score(y[rows], p[rows])

    return _bootstrap(statistic, _units(len(y), clusters), confidence, resamples, seed)


def _score(score: str | Callable[..., float]) -> Callable[..., float]:
    if callable(score):
        return score
    if score not in SENTIMENT:
        raise unknown("score", score, SENTIMENT)
    return SENTIMENT[score]


def _units(n: int, clusters: Sequence | None) -> list[np.ndarray]:
    """Row numbers of each unit that is drawn as a whole."""
    if clusters is None:
        return list(np.arange(n)[:, None])
    if len(clusters) != n:
        raise MetricError(f"{len(clusters)} cluster labels for {n} items")
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    return [np.flatnonzero(member == k) for k in range(member.max() + 1)]


def _bootstrap(statistic, units, confidence, resamples, seed) -> Interval:
    if len(units) < 2:
        raise MetricError("a bootstrap needs at least 2 items or clusters to draw from")
    result = stats.bootstrap(
        (np.arange(len(units)),),
        lambda drawn: statistic(np.concatenate([units[k] for k in drawn])),
        vectorized=False,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    estimate = statistic(np.concatenate(units))
    return Interval(float(estimate), float(low), float(high))


# ---------------------------------------------------------------- two models


@dataclass(frozen=True)
class Comparison:
    """A minus B on one metric, with interval, p value and a plain verdict.

    `detectable` is the true difference that as many seeds would reveal four times in
    five, given the spread seen here; None where it was not computed. `family` counts
    the comparisons for which p was adjusted (`holm`); the interval is not adjusted.
    """

    a: str
    b: str
    metric: str
    difference: float
    low: float
    high: float
    p: float
    n: int
    unit: str  # what n counts: seeds, items or clusters
    confidence: float = 0.95
    detectable: float | None = None
    family: int = 1

    @property
    def evidence(self) -> bool:
        """The interval excludes zero and the (adjusted) p value is below 1 - level."""
        return not self.low <= 0 <= self.high and self.p < 1 - self.confidence

    @property
    def verdict(self) -> str:
        """One sentence for a page; says so when there is no evidence."""
        label = describe(self.metric)
        digits = 1 if label.unit else 3
        points = " points" if label.unit else ""

        def show(x: float) -> str:
            return f"{x:.{digits}f}".replace("-", "\N{MINUS SIGN}")

        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"
        if self.family > 1:
            p += f" after Holm's correction for {self.family} comparisons"
        facts = (
            f"difference {show(self.difference)}{points} ({100 * self.confidence:g} % "
            f"interval {show(self.low)} to {show(self.high)}, {p}, {self.n} "
            f"{self.unit})"
        )
        if self.evidence:
            a_wins = (self.difference > 0) == label.higher_is_better
            winner, loser = (self.a, self.b) if a_wins else (self.b, self.a)
            return (
                f"{winner} is better than {loser} in {label.name}: {self.a} minus "
                f"{self.b}, {facts}."
            )
        text = f"No evidence of a difference between {self.a} and {self.b} in "
        text += f"{label.name}: {facts}."
        if self.detectable:
            text += (
                f" A true difference below {show(self.detectable)}{points} would often "
                "go unseen here."
            )
        return text


def compare(
    a: Sequence[float],
    b: Sequence[float],
    metric: str,
    *,
    names: tuple[str, str] = ("A", "B"),
    confidence: float = 0.95,
) -> Comparison:
    """A against B over seeds: entry i of both must come from the same seed.

    Paired t interval and test. Needs at least two seeds; with three, only differences
    well above twice the spread can be seen, and the verdict says how large.
    """
    d = _differences(a, b)
    n, s = len(d), summarise(d, confidence)
    tests = paired_tests(a, b)
    # equal differences leave no spread for a t test: only their signs can be tested
    flat = s.sd == 0
    return Comparison(
        *names,
        metric=metric,
        difference=s.mean,
        low=s.low,
        high=s.high,
        p=tests["sign flip" if flat else "t"],
        n=n,
        unit="seeds",
        confidence=confidence,
        detectable=None if flat else detectable(s.sd, n, 1 - confidence),
    )


def _differences(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """a - b per seed, (n,); what is only rounding of equal differences is removed."""
    x, y = _values(a, "values of A"), _values(b, "values of B")
    if len(x) != len(y):
        raise MetricError(
            f"{len(x)} values of A but {len(y)} of B; a paired comparison needs the "
            "same seeds on both sides"
        )
    if len(x) < 2:
        raise MetricError("one seed cannot be compared; run at least 2, better 5")
    d = x - y
    rounding = 1e-12 * max(np.abs(x).max(), np.abs(y).max())
    if np.ptp(d) <= rounding:
        d = np.full(len(d), 0.0 if abs(d[0]) <= rounding else d[0])
    return d


def paired_tests(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Two-sided p values over seeds: keys "t", "wilcoxon", "sign flip".

    The last two do not assume normality, but cannot fall below 2 / 2^n: .25 for three
    seeds, .0625 for five. The t test is NaN where all differences are equal.
    """
    d = _differences(a, b)
    if not d.any():
        return {"t": 1.0, "wilcoxon": 1.0, "sign flip": 1.0}
    return {
        "t": float(stats.ttest_1samp(d, 0).pvalue) if np.ptp(d) else math.nan,
        "wilcoxon": float(stats.wilcoxon(d).pvalue),
        "sign flip": float(
            stats.permutation_test(
                (d,), np.mean, permutation_type="samples", rng=np.random.default_rng(0)
            ).pvalue
        ),
    }


def detectable(sd: float, n: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that n pairs reveal with the given power.

    sd: sample standard deviation of the paired differences. Noncentral t.
    """
    critical = stats.t.ppf(1 - alpha / 2, n - 1)

    def shortfall(effect):
        return stats.nct.sf(critical, n - 1, effect * math.sqrt(n)) - power

    return sd * float(optimize.brentq(shortfall, 0, 50))


def compare_items(
    truth,
    a,
    b,
    metric: str,
    *,
    clusters: Sequence | None = None,
    names: tuple[str, str] = ("A", "B"),
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Predictions `a` against `b` on the same n test items, one model each.

    Percentile bootstrap of the difference; p from swapping the two predictions of
    whole items (or `clusters`) at random. Tells nothing about other training seeds.
    """
    score = _score(metric)
    y, pa, pb = (np.asarray(x) for x in (truth, a, b))
    if not y.shape == pa.shape == pb.shape:
        raise MetricError(
            f"truth {y.shape}, A {pa.shape} and B {pb.shape} must have one shape"
        )
    units = _units(len(y), clusters)
    member = np.empty(len(y), dtype=np.int64)
    for k, rows in enumerate(units):
        member[rows] = k

    def difference(rows):
        return score(y[rows], pa[rows]) - score(y[rows], pb[rows])

    def swapped(first, second):  # per unit 0 = A's prediction, 1 = B's
        both = np.stack([pa, pb])
        items = np.arange(len(y))
        one, two = (both[x[member].astype(int), items] for x in (first, second))
        return score(y, one) - score(y, two)

    interval = _bootstrap(difference, units, confidence, resamples, seed)
    test = stats.permutation_test(
        (np.zeros(len(units)), np.ones(len(units))),
        swapped,
        permutation_type="samples",
        vectorized=False,
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    )
    return Comparison(
        *names,
        metric=metric,
        difference=interval.estimate,
        low=interval.low,
        high=interval.high,
        p=float(test.pvalue),
        n=len(units),
        unit="items" if clusters is None else "clusters",
        confidence=confidence,
    )


# ---------------------------------------------------------------- many comparisons


def holm(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """The same comparisons with p values adjusted for their number (Holm, 1979).

    p of rank i among k, from the smallest, is multiplied by k - i + 1 and never below
    the one before it; the verdicts follow.
    """
    k, floor, adjusted = len(comparisons), 0.0, {}
    ranked = sorted(comparisons, key=lambda name: comparisons[name].p)
    for i, name in enumerate(ranked):
        floor = max(floor, min(1.0, (k - i) * comparisons[name].p))
        adjusted[name] = replace(comparisons[name], p=floor, family=k)
    return {name: adjusted[name] for name in comparisons}
