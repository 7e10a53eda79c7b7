"""Intervals that cover, tests that agree with scipy, verdicts that do not overstate."""

import math

import numpy as np
import pytest
from scipy import stats

from mmsa_lib import metrics, statistics
from mmsa_lib.errors import MetricError, UnknownNameError

# readout's four published seeds: mean .570, sample sd .014
READOUT = [0.551, 0.569, 0.576, 0.584]


def test_summary_uses_the_sample_sd_and_student_t():
    s = statistics.summarise(READOUT)
    assert (s.n, round(s.mean, 3), round(s.sd, 3)) == (4, 0.570, 0.014)
    expected = stats.ttest_1samp(READOUT, 0).confidence_interval(0.95)
    assert (s.low, s.high) == pytest.approx(tuple(expected))
    narrow = statistics.summarise(READOUT, confidence=0.5)
    assert s.low < narrow.low < s.mean < narrow.high < s.high


def test_one_seed_has_a_mean_and_no_spread():
    s = statistics.summarise([0.9])
    assert s.mean == 0.9
    assert math.isnan(s.sd) and math.isnan(s.low) and math.isnan(s.high)


def test_failed_seeds_are_not_averaged_away():
    with pytest.raises(MetricError, match="1 of 3 values are NaN"):
        statistics.summarise([0.9, math.nan, 0.8])
    with pytest.raises(MetricError, match="one number a seed"):
        statistics.summarise([])
    with pytest.raises(MetricError, match="3 values of A but 2 of B"):
        statistics.compare([1, 2, 3], [1, 2], "mae")
    with pytest.raises(MetricError, match="at least 2"):
        statistics.compare([1], [2], "mae")


@pytest.mark.parametrize("seeds", [3, 5])
def test_seed_intervals_cover_the_truth_as_often_as_they_say(seeds):
    rng = np.random.default_rng(1)
    hits = 0
    for values in rng.normal(0.9, 0.02, (600, seeds)):
        s = statistics.summarise(values, confidence=0.9)
        hits += s.low <= 0.9 <= s.high
    # 600 trials: standard error 1.2 points
    assert 0.86 < hits / 600 < 0.94


# ------------------------------------------------------------- bootstrap


def test_bootstrap_of_mae_matches_the_normal_interval():
    rng = np.random.default_rng(2)
    y, p = rng.normal(size=(2, 600))
    errors = np.abs(p - y)
    interval = statistics.bootstrap("mae", y, p, resamples=1500)
    half = 1.96 * errors.std(ddof=1) / math.sqrt(600)
    assert interval.estimate == pytest.approx(errors.mean())
    assert interval.low == pytest.approx(errors.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(errors.mean() + half, abs=0.1 * half)
    assert interval == statistics.bootstrap("mae", y, p, resamples=1500)


def _clustered(rng, videos=25, clips=12, spread=1.0):
    """Errors that clips of one video share."""
    video = np.repeat(np.arange(videos), clips)
    shared = rng.normal(0, spread, videos)[video]
    return shared + rng.normal(0, 0.5, len(video)), video


def test_cluster_bootstrap_covers_where_the_item_bootstrap_does_not():
    rng = np.random.default_rng(3)
    trials, hits = 120, {"items": 0, "clusters": 0}

    def mean_error(truth, prediction):
        return float((prediction - truth).mean())

    for _ in range(trials):
        errors, video = _clustered(rng)
        for name, clusters in (("items", None), ("clusters", video)):
            i = statistics.bootstrap(
                mean_error, 0 * errors, errors, clusters=clusters, resamples=150
            )
            hits[name] += i.low <= 0 <= i.high
    assert hits["clusters"] / trials > 0.85
    assert hits["items"] / trials < 0.65


def test_bootstrap_resamples_whole_clusters():
    y = np.array([0.0, 0, 1, 1, 2, 2])
    seen = set()

    def spy(truth, prediction):
        seen.add(tuple(sorted(truth)))
        return float(truth.mean())

    video = ["b", "b", "a", "a", "c", "c"]
    statistics.bootstrap(spy, y, y, clusters=video, resamples=60)
    assert len(seen) > 5
    assert all(t[::2] == t[1::2] for t in seen)  # clips come in their pairs
    with pytest.raises(MetricError, match="5 cluster labels for 6 items"):
        statistics.bootstrap(spy, y, y, clusters=video[:5])
    with pytest.raises(MetricError, match="at least 2"):
        statistics.bootstrap(spy, y, y, clusters=["a"] * 6)
    with pytest.raises(UnknownNameError, match="acc2_has0"):
        statistics.bootstrap("acc2", y, y)


# ------------------------------------------------------------- paired, over seeds

A = [0.905, 0.897, 0.911, 0.902, 0.899]
B = [0.921, 0.918, 0.925, 0.917, 0.919]


def test_paired_tests_equal_scipy():
    tests = statistics.paired_tests(A, B)
    assert tests["t"] == pytest.approx(stats.ttest_rel(A, B).pvalue)
    assert tests["wilcoxon"] == stats.wilcoxon(A, B).pvalue == 0.0625
    assert tests["sign flip"] == 0.0625  # 2 of 2^5 sign patterns are as extreme
    assert statistics.paired_tests(A[:3], B[:3])["sign flip"] == 0.25


def test_compare_gives_interval_p_and_the_right_winner():
    c = statistics.compare(A, B, "mae", names=("late", "early"))
    test = stats.ttest_rel(A, B)
    assert c.difference == pytest.approx(np.mean(A) - np.mean(B))
    assert (c.low, c.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert c.p == pytest.approx(test.pvalue)
    assert c.evidence and c.high < 0
    # lower is better for MAE, higher for accuracy, whichever side comes first
    assert c.verdict.startswith("late is better than early in MAE")
    assert "5 seeds" in c.verdict and "−0.017" in c.verdict
    swapped = statistics.compare(B, A, "mae", names=("early", "late"))
    assert swapped.verdict.startswith("late is better than early in MAE")
    accuracy = statistics.compare(
        100 * np.array(A), 100 * np.array(B), "acc7", names=("late", "early")
    )
    assert accuracy.verdict.startswith("early is better than late in Acc-7")
    assert "−1.7 points" in accuracy.verdict


def test_three_noisy_seeds_give_no_evidence_and_say_what_they_could_see():
    c = statistics.compare([0.90, 0.93, 0.91], [0.92, 0.92, 0.93], "mae")
    assert c.low < 0 < c.high and not c.evidence
    assert c.verdict.startswith("No evidence of a difference between A and B in MAE")
    assert c.detectable > abs(c.difference)
    assert f"below {c.detectable:.3f}" in c.verdict


def test_verdict_and_interval_never_disagree():
    rng = np.random.default_rng(4)
    said = {True: 0, False: 0}
    for shift in np.linspace(0, 0.06, 60):
        a = rng.normal(0.9, 0.01, 5)
        c = statistics.compare(a, rng.normal(0.9 + shift, 0.01, 5), "mae")
        covers_zero = c.low <= 0 <= c.high
        assert ("No evidence of a difference" in c.verdict) == covers_zero
        said[covers_zero] += 1
    assert min(said.values()) >= 10


def test_evidence_needs_the_interval_and_the_p_value():
    def evidence(low, high, p):
        c = statistics.Comparison("A", "B", "mae", 0.1, low, high, p, 300, "items")
        assert c.evidence == c.verdict.startswith("B is better than A")
        return c.evidence

    assert evidence(0.01, 0.2, 0.001)
    assert not evidence(-0.01, 0.2, 0.001)
    assert not evidence(0.0, 0.2, 0.001)
    assert not evidence(0.01, 0.2, 0.06)


def test_false_alarms_stay_near_five_percent():
    rng = np.random.default_rng(5)
    alarms = sum(
        statistics.compare(*rng.normal(0.9, 0.02, (2, 3)), "mae").evidence
        for _ in range(400)
    )
    assert 4 <= alarms <= 38  # binomial(400, .05): mean 20, sd 4.4


def test_equal_differences_carry_no_evidence_about_seeds():
    same = statistics.compare(A, A, "mae")
    assert (same.difference, same.p, same.evidence) == (0, 1, False)
    # a constant offset, with rounding noise in the floats
    offset = statistics.compare([0.1 + 0.2, 0.5, 0.7], [0.2, 0.4, 0.6], "corr")
    assert offset.low == offset.high == pytest.approx(0.1)
    assert offset.p == 0.25 and not offset.evidence
    assert "No evidence" in offset.verdict


def test_detectable_difference_has_the_power_it_claims():
    d = statistics.detectable(0.02, 5)
    rng = np.random.default_rng(6)
    draws = rng.normal(d, 0.02, (4000, 5))
    power = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
    assert power == pytest.approx(0.8, abs=0.03)
    assert statistics.detectable(0.02, 3) > 1.9 * d
    assert statistics.detectable(0.04, 5) == pytest.approx(2 * d)
    assert math.isfinite(statistics.detectable(0.02, 2))


# ------------------------------------------------------------- paired, over items


@pytest.fixture(scope="module")
def items():
    rng = np.random.default_rng(7)
    y = rng.normal(0, 1.5, 300)
    noise = rng.normal(0, 1, 300)  # shared: the same clips are hard for both
    good = y + noise + rng.normal(0, 0.2, 300)
    bad = y + 1.3 * noise + rng.normal(0, 0.2, 300)
    return y, good, bad


def test_item_comparison_sees_what_pairing_reveals(items):
    y, good, bad = items
    c = statistics.compare_items(
        y, good, bad, "mae", names=("good", "bad"), resamples=400
    )
    assert c.difference == pytest.approx(metrics.mae(y, good) - metrics.mae(y, bad))
    assert c.evidence and c.p < 0.01
    assert c.verdict.startswith("good is better than bad in MAE")
    alone = statistics.bootstrap("mae", y, good, resamples=400)
    assert c.high - c.low < 0.7 * (alone.high - alone.low)


def test_item_permutation_p_equals_a_sign_flip_of_errors(items):
    y, good, bad = (x[:12] for x in items)
    c = statistics.compare_items(y, good, bad, "mae", resamples=5000)
    d = np.abs(good - y) - np.abs(bad - y)
    signs = np.array(np.meshgrid(*[[1, -1]] * 12)).reshape(12, -1)
    exact = (np.abs(d @ signs) >= abs(d.sum()) - 1e-12).mean()
    assert c.p == pytest.approx(exact)


def test_clusters_widen_the_comparison(items):
    y, good, _ = items
    rng = np.random.default_rng(8)
    video = np.repeat(np.arange(15), 20)
    biased = good + np.repeat(rng.normal(0, 1, 15), 20)
    loose, tight = (
        statistics.compare_items(
            y, good, biased, "mae", clusters=clusters, resamples=300
        )
        for clusters in (video, None)
    )
    assert (loose.n, loose.unit, tight.n, tight.unit) == (15, "clusters", 300, "items")
    assert loose.high - loose.low > 1.5 * (tight.high - tight.low)
    with pytest.raises(MetricError, match="one shape"):
        statistics.compare_items(y, good[:, None], biased, "mae")


# ------------------------------------------------------------- many comparisons


def _with_p(p):
    return statistics.Comparison("A", "B", "mae", -0.1, -0.2, -0.05, p, 5, "seeds")


def test_holm_adjusts_p_and_verdict():
    adjusted = statistics.holm(
        {"w": _with_p(0.04), "x": _with_p(0.01), "y": _with_p(0.03), "z": _with_p(0.02)}
    )
    assert list(adjusted) == ["w", "x", "y", "z"]
    p = {k: round(c.p, 10) for k, c in adjusted.items()}
    assert p == {"x": 0.04, "z": 0.06, "y": 0.06, "w": 0.06}
    assert adjusted["x"].evidence and not adjusted["z"].evidence
    assert "No evidence" in adjusted["z"].verdict
    assert "Holm's correction for 4 comparisons" in adjusted["x"].verdict
    assert statistics.holm({"only": _with_p(0.04)})["only"] == _with_p(0.04)
