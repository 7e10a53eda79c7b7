"""Hand-made vectors whose scores can be counted on fingers."""

import subprocess
import sys
import warnings

import numpy as np
import pytest

from mmsa_lib import metrics
from mmsa_lib.errors import MetricError, UnknownNameError

NAMES = ("happy", "sad", "anger", "surprise", "disgust", "fear")

# Sign counts of the MOSI test split: 379 negative, 30 zero, 277 positive.
MOSI_TEST = np.repeat([-1.0, 0.0, 1.0], [379, 30, 277])


# ------------------------------------------------------------- what is compared


def test_column_and_row_shapes_score_the_same():
    y, p = np.array([1.0, -2.0, 0.5]), np.array([0.5, -1.0, 0.5])
    flat = metrics.sentiment_report(y, p)
    assert flat == metrics.sentiment_report(y[:, None], p)
    assert flat == metrics.sentiment_report(y, p[:, None].astype(np.float32))
    assert flat["mae"] == pytest.approx(0.5)


@pytest.mark.parametrize("score", [metrics.mae, metrics.sims_report, metrics.acc7])
def test_broadcasting_shapes_are_refused(score):
    y = np.arange(4.0)
    with pytest.raises(MetricError, match=r"found \(4, 4\)"):
        score(y, np.ones((4, 4)))
    with pytest.raises(MetricError, match=r"found \(1, 4\)"):
        score(y, np.ones((1, 4)))
    with pytest.raises(MetricError, match="4 truths but 1 predictions"):
        score(y, np.ones(1))
    with pytest.raises(MetricError, match="empty"):
        score(np.zeros(0), np.zeros(0))


def test_nan_predictions_are_counted_not_scored():
    p = np.array([0.1, np.nan, np.inf, 0.3])
    with pytest.raises(MetricError, match="prediction holds 2 NaN"):
        metrics.sentiment_report(np.zeros(4), p)
    table = np.full((4, 6), 0.5)
    table[0, :3] = np.nan
    with pytest.raises(MetricError, match="probability holds 3 NaN"):
        metrics.emotion_report(np.zeros((4, 6)), table, NAMES)


def test_metrics_import_without_torch():
    code = "import sys, mmsa_lib.metrics as m; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ------------------------------------------------------------- regression


def test_corr_is_pearson_and_nan_with_a_warning_when_constant():
    y = np.array([1.0, 2.0, 3.0, 4.0])
    assert metrics.corr(y, -3 * y + 7) == pytest.approx(-1)
    assert metrics.corr(y, [1, 3, 2, 4]) == pytest.approx(0.8)
    for a, b in ((y, np.full(4, 0.1)), (np.zeros(4), y)):
        with pytest.warns(RuntimeWarning, match="constant"):
            assert np.isnan(metrics.corr(a, b))


def test_halves_round_to_the_even_neighbour():
    halves = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert metrics.acc7([-2, -2, 0, 0, 2, 2], halves) == 100
    assert metrics.acc7([-3, -1, -1, 1, 1, 3], halves) == 0
    assert metrics.acc7([3.0, -3.0], [9.0, -4.2]) == 100  # clipped, not refused


def test_acc5_clips_to_two():
    y, p = [3.0, -2.6, 1.2, 0.2], [1.6, -1.7, 2.0, 0.4]
    assert metrics.acc5(y, p) == 75
    assert metrics.acc7(y, p) == 25  # rounding alone tells 3 from 2


def test_sdk_binning_table():
    values = [-3, -2.01, -2, -1.01, -1, -0.01, 0, 0.01, 1, 1.01, 2, 2.01, 3]
    bins = [-3, -3, -2, -2, -1, -1, 0, 1, 1, 2, 2, 3, 3]
    assert metrics.sdk_bins(values).tolist() == bins
    # where the two definitions of seven classes part
    assert metrics.acc7([0.4], [0.0]) == 100
    assert metrics.acc7_sdk([0.4], [0.0]) == 0
    assert metrics.acc7([-2.6], [-2.1]) == 0
    assert metrics.acc7_sdk([-2.6], [-2.1]) == 100


# ------------------------------------------------------------- Acc-2 and F1

#                 y: zero  zero  zero   neg   neg   pos   pos   pos
TRUTH = np.array([0.0, 0.0, 0.0, -1.0, -2.0, 1.0, 2.0, 0.4])
GUESS = np.array([0.0, 0.5, -0.5, 0.0, -0.1, 0.0, 1.0, -0.2])


def test_three_conventions_on_zeros_in_truth_and_prediction():
    # has0: pairs (+,+)(+,+)(+,-)(-,+)(-,-)(+,+)(+,+)(+,-) -> 5 of 8
    assert metrics.acc2(TRUTH, GUESS, "has0") == pytest.approx(100 * 5 / 8)
    # non0: last five only, (-,-)(-,-)(+,-)(+,+)(+,-) -> 3 of 5
    assert metrics.acc2(TRUTH, GUESS, "non0") == pytest.approx(100 * 3 / 5)
    # zneg: (-,-)(-,+)(-,-)(-,-)(-,-)(+,-)(+,+)(+,-) -> 5 of 8
    assert metrics.acc2(TRUTH, GUESS, "zneg") == pytest.approx(100 * 5 / 8)
    # F1 of non0: negatives 2/(2+.5*2)=2/3, positives 1/(1+.5*2)=1/2; weights 2/5, 3/5
    assert metrics.f1_weighted(TRUTH, GUESS, "non0") == pytest.approx(
        100 * (2 / 5 * 2 / 3 + 3 / 5 * 1 / 2)
    )
    # the swapped one weighs by predictions: 4 negative, 1 positive
    assert metrics.f1_weighted_swapped(TRUTH, GUESS, "non0") == pytest.approx(
        100 * (4 / 5 * 2 / 3 + 1 / 5 * 1 / 2)
    )
    with pytest.raises(UnknownNameError, match="has0"):
        metrics.acc2(TRUTH, GUESS, "nonzero")


def test_zero_only_truth_has_no_non0_score():
    with pytest.warns(RuntimeWarning, match="exactly zero"):
        assert np.isnan(metrics.acc2(np.zeros(3), np.ones(3), "non0"))


def test_swapped_f1_rises_above_accuracy_on_mosi():
    never = np.full(len(MOSI_TEST), -1.0)
    assert round(metrics.acc2(MOSI_TEST, never, "non0"), 2) == 57.77
    assert round(metrics.f1_weighted(MOSI_TEST, never, "non0"), 2) == 42.31
    assert round(metrics.f1_weighted_swapped(MOSI_TEST, never, "non0"), 2) == 73.24


def test_constant_predictor_table_of_mosi():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = metrics.constant_baselines(MOSI_TEST, train_mean=0.234)
    acc2 = {
        name: [round(report[f"acc2_{r}"], 2) for r in metrics.ACC2_RULES]
        for name, report in rows.items()
    }
    assert acc2["always +1"] == [44.75, 42.23, 40.38]
    assert acc2["always -1"] == [55.25, 57.77, 59.62]
    assert acc2["always 0"] == [44.75, 57.77, 59.62]
    assert rows["training mean"]["mae"] == pytest.approx(
        np.abs(MOSI_TEST - 0.234).mean()
    )
    assert np.isnan(rows["training mean"]["corr"])


def test_sentiment_report_has_stable_keys_and_percent():
    report = metrics.sentiment_report(TRUTH, TRUTH)
    assert list(report) == [
        *("mae", "corr", "acc7", "acc7_sdk", "acc5"),
        *("acc2_has0", "acc2_non0", "acc2_zneg", "f1_has0", "f1_non0", "f1_zneg"),
    ]
    assert report["mae"] == 0
    assert all(v == pytest.approx(100) for k, v in report.items() if k[0] in "af")


# ------------------------------------------------------------- CH-SIMS


def test_sims_clips_first_and_closes_classes_on_the_right():
    y = np.array([2.0, -2.0, 0.5, -0.5])
    clipped = metrics.sims_report(y, np.array([1.0, -1.0, 0.5, -0.5]))
    assert clipped["sims_mae"] == 0
    assert clipped["sims_corr"] == pytest.approx(1)
    # 0 is negative, 0.1 neutral, -0.1 negative of three, 0.7 weakly positive
    report = metrics.sims_report([0.0, 0.1, -0.1, 0.7], [-0.5, 0.05, -0.2, 0.3])
    assert (report["sims_acc2"], report["sims_f1"]) == (100, 100)
    assert report["sims_acc3"] == 75  # -0.5 is negative, 0.0 neutral
    assert report["sims_acc5"] == 75


def test_sims_edges_are_float32():
    above = np.float64(np.float32(0.1))  # slightly above 0.1 in double precision
    assert above > 0.1
    assert metrics.sims_report([0.05, -1], [above, -1])["sims_acc3"] == 100


# ------------------------------------------------------------- emotions


@pytest.fixture(scope="module")
def emotions():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 3, (400, 6)) * (rng.random((400, 6)) < 0.3)
    return truth, rng.random((400, 6))


def test_weighted_accuracy_is_the_published_formula(emotions):
    truth, q = emotions
    report = metrics.emotion_report(truth, q, NAMES)
    for c, name in enumerate(NAMES):
        y, p = truth[:, c] > 0, q[:, c] > 0.5
        positives, negatives = y.sum(), (~y).sum()
        hits = (y & p).sum() * negatives / positives + (~y & ~p).sum()
        assert report[f"wa_{name}"] == pytest.approx(100 * hits / (2 * negatives))
        assert report[f"acc_{name}"] == pytest.approx(100 * (y == p).mean())
    for kind in ("wa", "acc", "f1"):
        six = [report[f"{kind}_{n}"] for n in NAMES]
        assert report[f"{kind}_mean"] == pytest.approx(sum(six) / 6)


def test_weighted_accuracy_is_symmetric_under_relabelling(emotions):
    truth, q = emotions
    flipped = metrics.emotion_report((truth == 0).astype(float), 1 - q, NAMES)
    straight = metrics.emotion_report(truth, q, NAMES)
    assert flipped["wa_mean"] == pytest.approx(straight["wa_mean"])


def test_absent_baseline_looks_good_only_without_balance():
    truth = np.zeros((100, 2))
    truth[:5, 0], truth[:40, 1] = 1.0, 0.33
    report = metrics.absent_baseline(truth, ("fear", "happy"))
    assert (report["acc_fear"], report["acc_happy"]) == (95, 60)
    assert report["wa_fear"] == report["wa_happy"] == report["wa_mean"] == 50
    assert report["f1_fear"] == pytest.approx(95 * 2 * 0.95 / 1.95)


def test_an_emotion_that_never_occurs_leaves_the_mean_undefined():
    truth = np.array([[1.0, 0.0], [0.0, 0.0]])
    with pytest.warns(RuntimeWarning, match="'fear'"):
        report = metrics.emotion_report(truth, truth, ("happy", "fear"))
    assert report["wa_happy"] == 100
    assert np.isnan(report["wa_fear"]) and np.isnan(report["wa_mean"])
    assert report["acc_mean"] == 100
    with pytest.warns(RuntimeWarning, match="'joy'"):  # always present: no negatives
        assert np.isnan(metrics.emotion_report([[2.0]], [[0.9]], ["joy"])["wa_joy"])


def test_emotion_thresholds_and_bad_input(emotions):
    truth, q = emotions
    strict = metrics.emotion_report(truth, q, NAMES, threshold=np.full(6, 1.0))
    absent = metrics.absent_baseline(truth, NAMES)
    assert strict == absent
    # a logit of exactly 0 says absent, as a sentiment of exactly 0 is not positive
    half = metrics.emotion_report(truth, np.full(q.shape, 0.5), NAMES)
    assert half == absent
    with pytest.raises(MetricError, match="sigmoid"):
        metrics.emotion_report(truth, q * 4 - 2, NAMES)
    with pytest.raises(MetricError, match=r"\(n, 5\)"):
        metrics.emotion_report(truth, q, NAMES[:5])
    with pytest.raises(MetricError, match="400 rows of truth but 399"):
        metrics.emotion_report(truth, q[:-1], NAMES)


def test_positive_weight_is_negatives_over_positives():
    truth = np.array([[1.0, 0.0], [0, 3.0], [0, 0.33], [0, 1.0]])
    assert metrics.positive_weight(truth).tolist() == [3, 1 / 3]
    with pytest.raises(MetricError, match="column 1"):
        metrics.positive_weight(truth * [1, 0])


# ------------------------------------------------------------- classes


def test_four_way_and_four_binary_tasks_differ():
    y, p = [0, 0, 0, 1, 2, 3], [0, 0, 1, 1, 2, 2]
    four_way = metrics.classification_report(y, p)
    assert four_way["acc"] == pytest.approx(100 * 4 / 6)
    assert four_way["wa"] == pytest.approx(100 * (2 / 3 + 1 + 1 + 0) / 4)
    # F1 per class: .8, 2/3, 2/3, 0
    assert four_way["f1_macro"] == pytest.approx(100 * (0.8 + 4 / 3) / 4)
    assert four_way["f1"] == pytest.approx(100 * (0.8 * 3 + 4 / 3) / 6)
    binary = metrics.one_against_rest_report(y, p, ("ang", "hap", "neu", "sad"))
    assert binary["acc_ang"] == binary["acc_sad"] == pytest.approx(100 * 5 / 6)
    assert binary["acc_mean"] == pytest.approx(100 * (4 * 5 / 6) / 4)
    with pytest.raises(MetricError, match=r"0\.\.2"):
        metrics.one_against_rest_report(y, p, ("a", "b", "c"))
    with pytest.raises(MetricError, match="argmax"):
        metrics.classification_report(y, np.array(p) + 0.5)


# ------------------------------------------------------------- segmentation


def test_dice_by_hand_and_empty_masks():
    y = np.zeros((3, 4, 4), dtype=bool)
    p = y.copy()
    y[1, 0], p[1, 0, :2] = True, True  # 4 pixels against 2 of them
    p[2, 0, 0] = True  # one false pixel on an empty truth
    per_image = metrics.dice(y, p)
    assert per_image[0] == 1
    assert per_image[1] == pytest.approx(2 * 2.001 / 6.002)
    assert per_image[2] == pytest.approx(0.002 / 1.002)
    with pytest.raises(MetricError, match="boolean"):
        metrics.dice(y.astype(float), p)
    with pytest.raises(MetricError, match="share one shape"):
        metrics.dice(y, p[:, :2])


def test_brats_regions_nest():
    y = np.array([[[0, 1, 2, 3]]])
    p = np.array([[[0, 3, 2, 3]]])  # one core pixel called enhancing
    report = metrics.segmentation_report(y, p)
    assert report["dice_wt"] == report["dice_tc"] == 100
    assert report["dice_et"] == pytest.approx(100 * 2 * 1.001 / 3.002)
    assert report["dice_mean"] == pytest.approx((200 + report["dice_et"]) / 3)
    with pytest.raises(MetricError, match="remap it to 3"):
        metrics.segmentation_report(y, np.where(p == 3, 4, p))


# ------------------------------------------------------------- missing modalities


def test_mean_of_six_leaves_the_complete_case_out():
    modalities = ("text", "audio", "vision")
    patterns = metrics.missing_patterns(modalities)
    assert len(patterns) == 6 and modalities not in patterns
    reports = {p: {"mae": float(i)} for i, p in enumerate(patterns)}
    reports[("vision", "text", "audio")] = {"mae": 1000.0}
    assert metrics.incomplete_mean(reports, modalities) == {"mae": 2.5}
    del reports[("text", "audio")]
    with pytest.raises(MetricError, match=r"absent: audio\+text"):
        metrics.incomplete_mean(reports, modalities)
    with pytest.raises(MetricError, match="not a pattern of these"):
        metrics.incomplete_mean(reports, ("text", "audio"))
    assert metrics.missing_patterns(("text", "audio")) == [("text",), ("audio",)]
    assert len(metrics.missing_patterns(range(7))) == 2**7 - 2


# ------------------------------------------------------------- what a reader is told


def test_every_reported_key_is_described(emotions):
    y = np.array([0, 1, 2, 3])
    reports = [
        metrics.sentiment_report(TRUTH, GUESS),
        metrics.sims_report(TRUTH, GUESS),
        metrics.emotion_report(*emotions, NAMES),
        metrics.classification_report(y, y),
        metrics.one_against_rest_report(y, y, ("ang", "hap", "neu", "sad")),
        metrics.segmentation_report(y[:, None], y[:, None]),
    ]
    for key in set().union(*reports):
        label = metrics.describe(key)
        assert label.sentence.endswith(".") and label.name
        assert label.higher_is_better == (not key.endswith("mae"))
        assert label.unit == ("" if key.endswith(("mae", "corr")) else "%")
    assert metrics.describe("wa_fear").name == "WA (fear)"
    with pytest.raises(UnknownNameError, match="Did you mean 'acc7'"):
        metrics.describe("acc77")
