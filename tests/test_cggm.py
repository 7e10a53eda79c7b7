"""CGGM: coefficients, closed forms, what the rule changes and what it leaves alone."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn
from toy import ToyModel, toy_corpus

from mmsa_lib import runs
from mmsa_lib.corpora import lesions, store
from mmsa_lib.errors import ConfigError, CorpusError, TrainingError, UnknownNameError
from mmsa_lib.methods.balancing import OGMGE, ModalityDropout
from mmsa_lib.methods.cggm import (
    CGGMConfig,
    Classifiers,
    GradientModulator,
    StackedLinear,
    balance,
    direction_loss,
    flat,
    last_gradient,
    tally,
)
from mmsa_lib.nets import (
    RATES,
    Dropout,
    FusionConfig,
    LateFusion,
    MiddleFusion,
    MulT,
    Output,
    PooledFusion,
    count_parameters,
    modality_modules,
)
from mmsa_lib.nets.segmentation import SegmentationNet
from mmsa_lib.press.chapters import open_book
from mmsa_lib.tasks import SENTIMENT, classes, pixels, sentiment
from mmsa_lib.training import TrainConfig, evaluate, fit

CPU = torch.device("cpu")
WIDTHS = {"text": 6, "audio": 4, "vision": 5, "pose": 3, "gaze": 2, "hands": 4}
WIDTHS["heart"] = 3


def corpus_of(M, n=(32, 12, 12)):
    return toy_corpus(n, widths=dict(list(WIDTHS.items())[:M]))


CORPUS = corpus_of(3)


def middle(corpus=CORPUS, dropout=None, **changes):
    config = {"width": 12, "layers": 3, "heads": 3, "dropout": dropout or Dropout()}
    return MiddleFusion(FusionConfig(corpus.dims, **(config | changes)))


def settings(**changes):
    base = {"epochs": 2, "batch_size": 8, "lr": 0.01, "device": "cpu"}
    return TrainConfig(**(base | changes))


def begin(model, rule):
    torch.manual_seed(5)
    rule.setup(model, CPU)
    return rule


def step(model, rule, batch, loss=None):
    """Forward and backward with a rule; returns gradients before and after it."""
    model.zero_grad()
    output = model(batch)
    rule.loss(output, batch, (loss or SENTIMENT.objective)(output, batch)).backward()
    before = {k: p.grad.clone() for k, p in model.named_parameters()}
    rule.after_backward(model)
    return before, {k: p.grad.clone() for k, p in model.named_parameters()}


# ------------------------------------------------------------- 1, 2: coefficients


@pytest.mark.parametrize("M", [2, 3, 4, 7])
def test_guarded_coefficients_are_bounded(M):
    generator = torch.Generator().manual_seed(M)
    cases = [torch.randn(M, generator=generator).double() for _ in range(200)]
    cases += [torch.zeros(M).double(), -torch.rand(M, generator=generator).double()]
    cases += [1e30 * c for c in cases[:20]] + [torch.eye(M).double()[0]]
    for delta in cases:
        b = balance(delta)
        assert ((b >= 0) & (b <= 1 + 1e-12)).all()
        assert float(b.sum()) == pytest.approx(M - 1)
        assert (1.3 * b <= 1.3 + 1e-9).all()
        if (delta <= 0).all():
            torch.testing.assert_close(b, torch.full_like(b, (M - 1) / M))


def test_raw_coefficients_are_those_of_the_released_program():
    raw = balance(torch.tensor([0.1, -0.2, 0.05]).double(), guard=False)
    torch.testing.assert_close(
        raw, torch.tensor([3.0, -3.0, 2.0]).double(), atol=1e-5, rtol=0
    )
    exploded = balance(torch.tensor([1 / 64, -1 / 64, 0]).double(), guard=False)
    assert exploded.abs().max() > 1e6
    delta = torch.randn(3, generator=torch.Generator().manual_seed(0)).double()
    total = delta.sum() + 1e-8
    torch.testing.assert_close(balance(delta, guard=False), (total - delta) / total)


def test_fast_modalities_are_slowed_and_slow_ones_are_not():
    b = balance(torch.tensor([0.3, 0.0, -0.1]).double())
    assert b[0] < 0.01
    assert b[1] > 0.99
    assert b[1] == b[2]


# ------------------------------------------------------------- 3: closed form


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_closed_form_equals_autograd_in_value_and_derivative(task):
    torch.manual_seed(0)
    kind = SENTIMENT if task == "regression" else classes("class", 4)
    N, D, o = 9, 5, kind.outputs
    z = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    W = torch.randn(o, D, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(o, dtype=torch.float64)
    y = torch.randn(N, 1).double() if o == 1 else torch.randint(o, (N,))
    other = torch.randn(o, D, dtype=torch.float64)

    def cosine(g):
        return nn.functional.cosine_similarity(g.flatten(), other.flatten(), dim=0)

    p = z @ W.T + bias
    ours = last_gradient(kind.slope(p, y) / N, z)
    losses = {"regression": nn.functional.l1_loss}
    loss = losses.get(task, nn.functional.cross_entropy)(p, y)
    torch.testing.assert_close(kind.loss(p, y).mean(), loss)
    (theirs,) = torch.autograd.grad(loss, W, create_graph=True)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    (single,) = torch.autograd.grad(cosine(ours), z, retain_graph=True)
    (double,) = torch.autograd.grad(cosine(theirs), z)
    assert single.abs().max() > 1e-3
    torch.testing.assert_close(single, double, atol=1e-9, rtol=0)


def test_closed_form_of_a_picture_sums_over_samples_and_pixels():
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 4, 1).double()
    x = torch.randn(2, 5, 3, 3).double()
    y = torch.randint(4, (2, 3, 3))
    p = conv(x)
    loss = nn.functional.cross_entropy(p, y)
    (theirs,) = torch.autograd.grad(loss, conv.weight)
    slope = pixels().slope(flat(p), y.flatten()) / y.numel()
    ours = last_gradient(slope, flat(x))
    torch.testing.assert_close(ours, theirs[..., 0, 0], atol=1e-12, rtol=1e-12)


# ------------------------------------------------------------- 4: where direction goes


def direction_gradients(model, rule):
    batch = CORPUS.train.batch(range(12))
    for _ in range(2):  # the released program adds it a batch late
        model.zero_grad()
        output = model(batch)
        added = rule.loss(output, batch, torch.zeros(()))
        if added.requires_grad:
            added.backward()
        rule.after_backward(model)
    return {
        k: 0.0 if p.grad is None else float(p.grad.abs().sum())
        for k, p in model.named_parameters()
    }


def test_direction_reaches_every_encoder_and_fusion_in_paper_mode():
    model = middle()
    found = direction_gradients(model, begin(model, GradientModulator()))
    for part in ("projections", "encoders", "fusion"):
        for k, size in found.items():
            if k.startswith(part) and not k.endswith(("qkv.bias",)):
                assert size > 0, k


def test_direction_reaches_only_the_output_weight_in_official_mode():
    model = middle(mode="official")
    rule = begin(model, GradientModulator(CGGMConfig(mode="official")))
    found = direction_gradients(model, rule)
    assert {k for k, size in found.items() if size > 0} == {"head.out.weight"}


def test_direction_loss_is_bounded_and_zero_when_aligned():
    for M in (2, 3, 5):
        b = balance(torch.randn(M).double())
        for cosine in (2 * torch.rand(M).double() - 1, -torch.ones(M).double()):
            value = direction_loss(b, cosine)
            assert 0 <= value <= 2 * (M - 1) / M + 1e-12
        assert float(direction_loss(b, torch.ones(M).double())) == pytest.approx(0)


# ------------------------------------------------------------- 5: what is scaled


@pytest.mark.parametrize("include", [True, False])
def test_encoder_gradients_are_scaled_and_nothing_else(include):
    model = middle()
    config = CGGMConfig(include_projection=include, trace=True, speed="batch")
    rule = begin(model, GradientModulator(config))
    step(model, rule, CORPUS.train.batch(range(16)))
    before, after = step(model, rule, CORPUS.train.batch(range(16, 32)))
    scale = dict(zip(rule.names, rule.trace[-1]["scale"].float(), strict=True))
    assert len({round(float(c), 6) for c in scale.values()}) > 1
    touched = set()
    for k, g in after.items():
        part, m = ([*k.split("."), ""])[:2]
        if part == "encoders" or (part == "projections" and include):
            torch.testing.assert_close(g, before[k] * scale[m], rtol=1e-5, atol=1e-9)
            touched.add(k)
        else:
            assert torch.equal(g, before[k]), k
    # every parameter of a modality, its projection included
    wanted = {
        k for k in after if k.startswith(("encoders", "projections"))
    } - {k for k in after if not include and k.startswith("projections")}  # fmt: skip
    assert touched == wanted
    norms = rule.trace[-1]
    torch.testing.assert_close(
        norms["scaled_norm"], norms["norm"] * norms["scale"].float().abs()
    )


@pytest.mark.parametrize("kind", [LateFusion, MulT, PooledFusion, MiddleFusion])
def test_groups_of_every_backbone_hold_all_of_a_modality(kind):
    """What is not in a group serves several modalities."""
    layers = {} if kind is PooledFusion else {"layers": 3}
    model = kind(FusionConfig(CORPUS.dims, width=12, heads=3, **layers))
    groups = modality_modules(model)
    grouped = {
        id(p) for parts in groups.values() for part in parts for p in part.parameters()
    }
    rest = {k for k, p in model.named_parameters() if id(p) not in grouped}
    assert {k.split(".")[0] for k in rest} <= {"head", "fusion", "merge"}


def test_modules_are_taken_by_identity_and_checked():
    model = middle()
    own = {m: [model.encoders[m]] for m in CORPUS.modalities}
    begin(model, GradientModulator(groups=own))
    with pytest.raises(ConfigError, match="does not have"):
        begin(copy.deepcopy(model), GradientModulator(groups=own))
    shared = own | {"audio": [model.encoders["audio"], model.encoders["text"]]}
    with pytest.raises(ConfigError, match="'text' and 'audio' share"):
        begin(model, GradientModulator(groups=shared))
    model.encoders["text"].requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        begin(model, GradientModulator(groups=own))


# ------------------------------------------------------------- 6: classifiers


def test_classifiers_change_no_gradient_of_the_model_and_are_not_part_of_it():
    config = CGGMConfig(direction=False, magnitude=False)
    batch = CORPUS.train.batch(range(16))
    model = middle()
    rule = begin(model, GradientModulator(config))
    SENTIMENT.objective(model(batch), batch).backward()
    plain = {k: p.grad.clone() for k, p in model.named_parameters()}
    before, after = step(model, rule, batch)
    for k, g in plain.items():
        assert torch.equal(g, before[k]), k
        assert torch.equal(g, after[k]), k
    with_rule = fit(middle, CORPUS, settings(), rules=[GradientModulator()])
    names = set(with_rule.module.state_dict())
    assert names == set(middle().state_dict())
    # the same weights in a model that never saw a classifier
    fresh = middle()
    fresh.load_state_dict(with_rule.module.state_dict())
    with torch.no_grad():
        a, b = (m.eval()(batch).predictions for m in (fresh, with_rule.module))
    assert torch.equal(a["sentiment"], b["sentiment"])


@pytest.mark.parametrize("width", [12, 10])
def test_every_classifier_parameter_receives_gradient(width):
    """With and without a map to the last layer's width."""
    torch.manual_seed(0)
    widths = {"a": width, "b": 12}
    f = Classifiers(widths, 12, 2, CGGMConfig(classifier_layers=2))
    assert bool(f.maps) == (width != 12)
    hidden = {m: torch.randn(6, 5, d) for m, d in widths.items()}
    p, _ = f(hidden, dict.fromkeys(widths))
    (p**2).sum().backward()
    for k, w in f.named_parameters():
        rows = w.grad[:, :, None] if k.startswith(("inner", "out")) else w.grad[None]
        # a key's bias moves all scores of a row alike, which the softmax cancels
        assert k.endswith("qkv.bias") or all(g.abs().sum() > 0 for g in rows), k
        assert w.grad.abs().sum() > 0, k


def test_classifiers_learn():
    rule = GradientModulator(CGGMConfig(classifier_lr=0.01))
    history = fit(middle, CORPUS, settings(epochs=8), rules=[rule]).history
    first, last = (
        np.mean([row[f"speed_metric_{m}"] for m in CORPUS.modalities])
        for row in (history[0], history[-1])
    )
    assert last > first + 0.1
    assert {f"b_{m}" for m in CORPUS.modalities} < set(history[0])


def test_one_stacked_product_is_a_linear_layer_a_modality():
    torch.manual_seed(0)
    stack = StackedLinear(3, 4, 2)
    x = torch.randn(3, 5, 4)
    rows = [nn.functional.linear(x[i], stack.weight[i], stack.bias[i, 0]) for i in (0, 1, 2)]  # fmt: skip  # noqa: E501
    torch.testing.assert_close(stack(x), torch.stack(rows))


def test_padding_changes_no_classifier():
    torch.manual_seed(0)
    config = CGGMConfig(classifier_layers=2)
    for layers in (0, 1, 2):
        f = Classifiers({"a": 12, "b": 12}, 12, 1, CGGMConfig(classifier_layers=layers))
        h = {m: torch.randn(4, 7, 12) for m in "ab"}
        mask = {m: torch.arange(7).expand(4, 7) < 5 for m in "ab"}
        whole, _ = f(h, mask)
        cut, _ = f({m: x[:, :5] for m, x in h.items()}, dict.fromkeys("ab"))
        noisy = {m: x + 9 * ~mask[m][..., None] for m, x in h.items()}
        torch.testing.assert_close(whole, cut)
        torch.testing.assert_close(whole, f(noisy, mask)[0])
    assert config.classifier_layers == 2


# ------------------------------------------------------------- 7: Adam and SGD


@pytest.mark.parametrize(("kind", "same"), [("adam", True), ("sgd", False)])
def test_a_constant_factor_is_cancelled_by_adam_only(kind, same):
    def train(factor):
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(6, dtype=torch.float64))
        x = torch.randn(50, 6, dtype=torch.float64)
        adam = torch.optim.Adam([w], 0.01, eps=0)
        optimiser = adam if kind == "adam" else torch.optim.SGD([w], 0.01)
        for row in x:
            optimiser.zero_grad()
            ((w @ row - row.sum()) ** 2).backward()
            torch._foreach_mul_([w.grad], torch.tensor(factor))
            optimiser.step()
        return w.detach()

    distance = (train(1.0) - train(0.3)).abs().max()
    assert (distance < 1e-9) if same else (distance > 1e-3)


# ------------------------------------------------------------- 9: sizes, tasks, state


def test_classifiers_have_the_papers_parameters():
    for M, outputs, expected in ((3, 1, 123_603), (3, 4, 123_972), (1, 1, 41_201)):
        widths = {str(i): 40 for i in range(M)}
        config = CGGMConfig(classifier_layers=2)
        assert count_parameters(Classifiers(widths, 40, outputs, config))[1] == expected


@pytest.mark.parametrize("M", [1, 2, 3, 4, 7])
def test_any_number_of_modalities(M):
    corpus = corpus_of(M)
    rule = GradientModulator(CGGMConfig(trace=True))
    frozen = fit(lambda: middle(corpus), corpus, settings(), rules=[rule])
    assert math.isfinite(frozen.history[-1]["valid"])
    if M == 1:
        assert rule.trace == []  # nothing to balance
        plain = fit(lambda: middle(corpus), corpus, settings())
        assert plain.receipt.artefact == frozen.receipt.artefact
    else:
        assert all(s["b"].shape == (M,) for s in rule.trace)
        assert len(rule.trace) == 8


def test_classification():
    corpus = CORPUS.with_classes("sentiment", (-0.3, 0.3))
    task = classes("class", 3)
    rule = GradientModulator(task=task)
    frozen = fit(
        lambda: middle(corpus, outputs={"class": 3}),
        corpus,
        settings(epochs=8),
        loss=task.objective,
        rules=[rule],
    )
    assert rule.classifiers.out.weight.shape == (3, 3, 12)
    assert frozen.history[-1]["train"] < 0.95 * frozen.history[0]["train"]
    assert evaluate(frozen, corpus, task=task).prediction.shape == (12, 3)


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_segmentation(mode):
    corpus = lesions.load(sizes=(24, 8, 8), side=16)
    config = CGGMConfig(
        mode=mode, regions=tuple(lesions.REGIONS.values()), trace=True, masks=True
    )
    rule = GradientModulator(
        config,
        task=pixels(),
        output=lambda model: model.out,
    )
    frozen = fit(
        lambda: SegmentationNet(corpus.modalities, width=6),
        corpus,
        settings(epochs=3),
        loss=pixels().objective,
        rules=[rule],
    )
    assert rule.classifiers.out.weight.shape == (4, 4, 6)
    assert all(torch.isfinite(s["cosine"]).all() for s in rule.trace)
    assert frozen.history[-1]["train"] < frozen.history[0]["train"]


def test_speed_metrics_by_hand():
    p = torch.tensor([[[0.5], [-1.0], [2.0]], [[-0.5], [-1.0], [-2.0]]])
    y = torch.tensor([[1.0], [-2.0], [-1.0]])
    one = torch.ones(2, 3)

    def value(metric, p, y, weight=one, regions=None):
        above, below = tally(metric, p, y, weight, regions)
        return (above / below).mean(1).tolist()

    assert value("sign", p, y) == pytest.approx([2 / 3, 2 / 3])
    assert value("neg_mae", p, y) == pytest.approx([-4.5 / 3, -3.5 / 3])
    only = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    assert value("sign", p, y, only) == pytest.approx([1, 1])
    logits = nn.functional.one_hot(torch.tensor([[1, 1, 0, 2, 2, 3]]), 4).float()
    truth = torch.tensor([1, 0, 1, 2, 3, 3])
    ones = torch.ones(1, 6)
    assert value("accuracy", logits, truth, ones) == pytest.approx([3 / 6])
    # classes 1, 2, 3: 2 TP / (found + real)
    assert value("dice", logits, truth, ones) == pytest.approx(
        [(2 / 4 + 2 / 3 + 2 / 3) / 3]
    )
    whole = ((1, 2, 3),)  # found 5, real 5, both 4
    assert value("dice", logits, truth, ones, whole) == pytest.approx([8 / 10])


def test_speed_is_the_growth_of_the_metric():
    """EMA, batch and epoch, against a loop written out."""
    values = torch.tensor([[0.2, 0.6], [0.5, 0.5], [0.4, 0.9]]).double()
    for speed, momentum in (("ema", 0.9), ("batch", 0.0)):
        rule = begin_pair(speed)
        level = values[0]
        for i, value in enumerate(values):
            b = feed(rule, value)
            new = momentum * level + (1 - momentum) * value
            delta = new - level if i else torch.zeros(2)
            level = new if i else value
            torch.testing.assert_close(b, balance(delta.double()))
    rule = begin_pair("epoch")
    for value in values:
        neutral = feed(rule, value)
        torch.testing.assert_close(neutral, torch.full((2,), 0.5).double())
    rule.epoch_end(None, {})
    torch.testing.assert_close(rule._state["level"], values.mean(0))
    assert feed(rule, values[1]).tolist() == [0.5, 0.5]  # one value has no growth
    rule.epoch_end(None, {})
    torch.testing.assert_close(
        feed(rule, values[2]), balance(values[1] - values.mean(0))
    )


def begin_pair(speed):
    corpus = corpus_of(2)
    model = middle(corpus)
    return begin(model, GradientModulator(CGGMConfig(speed=speed)))


def feed(rule, value, weight=(1.0, 1.0)):
    """A step whose sign accuracies are `value`; returns b."""
    weight = torch.tensor(weight).double()[:, None]
    original, rule._count = rule._count, lambda sums: None
    rule._sums = torch.stack([value[:, None] * weight, weight])
    rule._batches = 1
    rule._decide(torch.zeros(2, 1, 1), torch.zeros(1, 1), torch.ones(2, 1))
    rule._count = original
    rule._commit()
    return rule._b


def test_first_step_of_the_released_program_counts_from_zero():
    corpus = corpus_of(2)
    for first, expected in (("zero", [0.75, 0.25]), ("neutral", [0.5, 0.5])):
        config = CGGMConfig(first=first, speed="batch", eps=1e-9)
        rule = begin(middle(corpus), GradientModulator(config))
        b = feed(rule, torch.tensor([0.2, 0.6]).double())
        assert b.tolist() == pytest.approx(expected, abs=1e-6)


def test_coefficients_can_be_replaced_by_a_rule_of_ones_own():
    class Behind(GradientModulator):
        def coefficients(self, metric, delta):
            self.given = metric, delta
            return balance(metric)

    model = middle()
    rule = begin(model, Behind(CGGMConfig(first="zero", trace=True, rho=2.0)))
    step(model, rule, CORPUS.train.batch(range(16)))
    metric, delta = rule.given
    torch.testing.assert_close(metric, rule.trace[0]["metric"])
    torch.testing.assert_close(delta, 0.1 * metric)  # smoothed, from zero
    torch.testing.assert_close(rule.trace[0]["scale"], 2.0 * balance(metric))


def test_renormalised_coefficients_keep_the_mean():
    for M in (2, 3):
        corpus = corpus_of(M)
        config = CGGMConfig(renormalise=True, trace=True)
        model = middle(corpus)
        rule = begin(model, GradientModulator(config))
        step(model, rule, corpus.train.batch(range(8)))
        scale = rule.trace[0]["scale"]
        torch.testing.assert_close(scale, torch.full_like(scale, 1.3))


def test_state_makes_a_resumed_run_equal_an_uninterrupted_one(tmp_path):
    class Stop(Exception):
        pass

    class Killed(GradientModulator):
        steps, limit = 0, 5

        def after_step(self, model):
            self.steps += 1
            if self.steps == self.limit:
                raise Stop

    def plan(where):
        return settings(
            epochs=2, checkpoint=str(tmp_path / where), checkpoint_steps=1, batch_size=8
        )

    for mode in ("paper", "official"):
        config = CGGMConfig(mode=mode)

        def build():
            return middle(dropout=RATES["cggm"], mode=mode)  # noqa: B023

        whole = fit(build, CORPUS, plan(mode), rules=[GradientModulator(config)])
        with pytest.raises(Stop):
            fit(build, CORPUS, plan(f"{mode}2"), rules=[Killed(config)])
        rule = GradientModulator(config)
        resumed = fit(build, CORPUS, plan(f"{mode}2"), rules=[rule])
        assert resumed.receipt.artefact == whole.receipt.artefact
        for a, b in zip(resumed.history, whole.history, strict=True):
            a.pop("seconds"), b.pop("seconds")
            assert a == pytest.approx(b, abs=1e-12)


def test_state_round_trip_of_the_rule():
    model = middle()
    rule = begin(model, GradientModulator())
    step(model, rule, CORPUS.train.batch(range(16)))
    again = begin(model, GradientModulator())
    again.load_state_dict(rule.state_dict())
    twin = copy.deepcopy(model)
    other = begin(twin, GradientModulator())
    other.load_state_dict(copy.deepcopy(rule.state_dict()))
    batch = CORPUS.train.batch(range(16, 32))
    _, a = step(model, again, batch)
    _, b = step(twin, other, batch)
    assert float(again._state["level"].sum()) != 0
    for k in a:
        assert torch.equal(a[k], b[k]), k
    fresh = begin(copy.deepcopy(twin), GradientModulator())
    model.load_state_dict(twin.state_dict())
    _, c = step(model, begin(model, fresh), batch)
    assert any(not torch.equal(a[k], c[k]) for k in a)


# ------------------------------------------------------------- 10: plain training


def test_equal_speeds_at_the_neutral_scale_are_plain_training():
    config = CGGMConfig(rho=1.5, lam=0.0, speed="epoch")  # neutral in the first epochs
    plan = settings(epochs=1, optimiser="sgd", batch_size=8)
    rates = RATES["cggm"]
    plain = fit(lambda: middle(dropout=rates), CORPUS, plan)
    ruled = fit(
        lambda: middle(dropout=RATES["cggm"]),
        CORPUS,
        plan,
        rules=[GradientModulator(config)],
    )
    for a, b in zip(plain.module.parameters(), ruled.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    off = CGGMConfig(rho=1.3, lam=0.0, speed="epoch")
    other = fit(
        lambda: middle(dropout=RATES["cggm"]),
        CORPUS,
        plan,
        rules=[GradientModulator(off)],
    )
    assert other.receipt.artefact != plain.receipt.artefact


# ------------------------------------------------------------- loops and precision


def test_accumulation_counts_all_batches_of_a_step():
    """Without the direction term (whose cosine belongs to a batch) it is exact."""
    config = CGGMConfig(direction=False, trace=True)
    plan = {"optimiser": "sgd", "clip": None, "epochs": 2}
    # equal halves: a modality is there in all samples of this corpus
    results = []
    for size, parts in ((16, 1), (8, 2)):
        rule = GradientModulator(
            config, optimiser=lambda p: torch.optim.SGD(p, lr=0.05)
        )
        frozen = fit(
            middle,
            CORPUS,
            settings(batch_size=size, accumulate=parts, **plan),
            rules=[rule],
        )
        results.append((frozen, rule))
    (a, one), (b, two) = results
    assert len(one.trace) == len(two.trace) == 4
    for x, y in zip(one.trace, two.trace, strict=True):
        torch.testing.assert_close(x["metric"], y["metric"])
        torch.testing.assert_close(x["scale"], y["scale"])
    for x, y in zip(a.module.parameters(), b.module.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)
    for x, y in zip(
        one.classifiers.parameters(), two.classifiers.parameters(), strict=True
    ):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_accumulation_adds_the_direction_of_each_batch():
    """With the direction term a step in parts is not the step in one: the cosine is of
    a batch, and b of the batches so far. What holds: the gradients are those of the
    batches' own losses, and all are scaled with b of the whole step.
    """
    config = CGGMConfig(lam=0.7, first="zero", speed="batch", trace=True)
    model, twin = middle(), middle()
    twin.load_state_dict(model.state_dict())
    rule = begin(model, GradientModulator(config))
    batches = [CORPUS.train.batch(range(a, a + 8)) for a in (0, 8)]
    for batch in batches:
        output = model(batch)
        rule.loss(output, batch, SENTIMENT.objective(output, batch)).backward()
    f = copy.deepcopy(rule.classifiers)
    rule.after_backward(model)

    right = torch.zeros(3)
    for count, batch in enumerate(batches, 1):
        output, y = twin(batch), batch.labels["sentiment"]
        hidden = {m: h.detach() for m, h in output.hidden.items()}
        p, z = f(hidden, output.mask)
        right = right + ((p > 0) == (y > 0)).float().mean((1, 2))
        b = 1 - (right / count + 1e-3) / (right / count + 1e-3).sum()
        error = nn.functional.l1_loss(output.predictions["sentiment"], y)
        W = twin.head.out.weight
        (g,) = torch.autograd.grad(error, W, create_graph=True)
        term = 0.0
        for m in range(3):
            g_m = (p[m] - y).sign().T @ z[m].detach() / len(y)
            term += b[m] - b[m] * nn.functional.cosine_similarity(g_m, g)[0]
        (error + 0.7 * term / 3).backward()
    assert len(set(rule.trace[0]["b"].tolist())) > 1
    torch.testing.assert_close(rule.trace[0]["b"].float(), b)
    scale = dict(zip(rule.names, 1.3 * b, strict=True))
    for (k, a), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        part, m = ([*k.split("."), ""])[:2]
        c = scale[m] if part in ("encoders", "projections") else 1.0
        torch.testing.assert_close(a.grad, other.grad * c, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_bfloat16(mode):
    rule = GradientModulator(CGGMConfig(mode=mode, trace=True))
    frozen = fit(
        lambda: middle(mode=mode),
        CORPUS,
        settings(precision="bf16", epochs=3),
        rules=[rule],
    )
    assert math.isfinite(frozen.history[-1]["train"])
    assert all(p.dtype == torch.float32 for p in rule.classifiers.parameters())
    assert torch.isfinite(torch.stack([s["b"] for s in rule.trace])).all()


def _process(rank, port, results):
    """Two processes with half a batch each, as `torchrun` would start them."""
    import os

    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = middle()
    rule = begin(model, GradientModulator(CGGMConfig(direction=False, trace=True)))
    for start in (0, 16):
        rows = range(start + 8 * rank, start + 8 * rank + 8)
        batch = CORPUS.train.batch(rows)
        output = model(batch)
        rule.loss(output, batch, SENTIMENT.objective(output, batch)).backward()
        rule.after_backward(model)
    parameters = [p.detach().clone() for p in rule.classifiers.parameters()]
    results[rank] = [s["b"] for s in rule.trace], parameters
    dist.destroy_process_group()


def test_two_processes_scale_as_one_with_both_halves():
    import socket

    from torch import multiprocessing as mp

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_process, (port, results), nprocs=2)
        found = dict(results)
    torch.manual_seed(0)
    model = middle()
    rule = begin(model, GradientModulator(CGGMConfig(direction=False, trace=True)))
    for start in (0, 16):
        step(model, rule, CORPUS.train.batch(range(start, start + 16)))
    for b, parameters in found.values():
        for x, y in zip(b, rule.trace, strict=True):
            torch.testing.assert_close(x, y["b"])
        for x, y in zip(parameters, rule.classifiers.parameters(), strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_on_a_gpu_without_waiting(precision):
    rule = GradientModulator()
    fit(middle, CORPUS, settings(device="cuda", precision=precision), rules=[rule])
    model = middle().cuda()
    rule = GradientModulator()
    rule.setup(model, torch.device("cuda"))
    batch = CORPUS.train.batch(range(8)).to("cuda")
    output = model(batch)
    rule.loss(output, batch, SENTIMENT.objective(output, batch)).backward()
    rule.after_backward(model)
    output = model(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rule.loss(output, batch, SENTIMENT.objective(output, batch)).backward()
        rule.after_backward(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------- other models


class Wrapped(nn.Module):
    """A foreign model: other names, vectors instead of sequences, plain outputs."""

    def __init__(self, dims):
        super().__init__()
        self.left = nn.Linear(dims["text"], 7)
        self.right = nn.Linear(dims["audio"], 5)
        self.top = nn.Linear(12, 1)

    def forward(self, batch):
        rows = [
            torch.relu(layer(batch.features[m].sum(1)))
            for m, layer in (("text", self.left), ("audio", self.right))
        ]
        last = torch.cat(rows, 1)
        return Output({"sentiment": self.top(last)}, last, last)


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_a_foreign_model_with_hooked_features_of_unequal_width(mode):
    corpus = corpus_of(2)
    rule = GradientModulator(
        CGGMConfig(mode=mode, trace=True),
        groups=lambda model, projections: {"text": model.left, "audio": [model.right]},
        features=lambda model: {"text": model.left, "audio": model.right},
        output=lambda model: model.top,
    )
    fit(lambda: Wrapped(corpus.dims), corpus, settings(), rules=[rule])
    assert rule.classifiers.maps["text"].weight.shape == (12, 7)
    assert torch.stack([s["cosine"] for s in rule.trace]).abs().sum() > 0


def test_late_fusion_and_mult_by_hooks_or_hidden():
    for kind, changes in ((LateFusion, {}), (MulT, {"width": 6})):
        shape = {"width": 12, "layers": 2, "heads": 3} | changes
        hooked = {"features": lambda model: model.encoders} if kind is LateFusion else {
            "features": lambda model: model.memory
        }  # fmt: skip
        rule = GradientModulator(CGGMConfig(trace=True), **hooked)
        fit(
            lambda: kind(FusionConfig(CORPUS.dims, **shape)),  # noqa: B023
            CORPUS,
            settings(epochs=1),
            rules=[rule],
        )
        assert torch.isfinite(rule.trace[-1]["b"]).all()


def test_what_a_model_lacks_is_named():
    def run(build, **options):
        fit(build, CORPUS, settings(), rules=[GradientModulator(**options)])

    late = FusionConfig(CORPUS.dims, width=12, layers=2, heads=3)
    with pytest.raises(ConfigError, match=r"no hidden states of text, audio, vision"):
        run(lambda: LateFusion(late))
    with pytest.raises(UnknownNameError, match="prediction 'happy'"):
        run(middle, task=sentiment("happy"))
    with pytest.raises(UnknownNameError, match="modality 'smell'"):
        run(middle, features=lambda model: {"smell": model.encoders["text"]})

    def toy_groups(model, projections):
        return model.inputs

    class NoLast(ToyModel):
        pass

    with pytest.raises(ConfigError, match="no `last`"):
        run(
            lambda: NoLast(CORPUS.dims),
            groups=toy_groups,
            features=lambda model: model.inputs,
        )
    model = middle(outputs={"sentiment": 1, "other": 2})
    rule = begin(model, GradientModulator(CGGMConfig(mode="official")))
    batch = CORPUS.train.batch(range(4))
    with pytest.raises(ConfigError, match="cannot be compared"):
        rule.loss(model(batch), batch, torch.zeros(()))
    with pytest.raises(ConfigError, match="delay"):
        CGGMConfig(delay=True)
    with pytest.raises(UnknownNameError, match="batch, ema, epoch"):
        CGGMConfig(speed="emma")
    with pytest.raises(ConfigError, match="momentum"):
        CGGMConfig(momentum=1.0)
    with pytest.raises(ConfigError, match="eps"):
        CGGMConfig(eps=0.0)


def test_flags_switch_one_by_one():
    paper, official = CGGMConfig(), CGGMConfig(mode="official")
    assert (paper.guard, paper.compare, paper.delay) == (True, "gradients", False)
    assert (official.guard, official.compare, official.delay) == (
        False,
        "weights",
        True,
    )
    mixed = CGGMConfig(guard=False, include_projection=False)
    assert (mixed.guard, mixed.compare, mixed.include_projection) == (
        False, "gradients", False,
    )  # fmt: skip


# ------------------------------------------------------------- awkward batches


def test_batch_of_one_and_padded_tail():
    model = middle()
    rule = begin(model, GradientModulator())
    one = CORPUS.train.batch([3])
    _, short = step(model, rule, one)
    longer = CORPUS.train.batch([3])
    for m, x in longer.features.items():
        longer.features[m] = nn.functional.pad(x, (0, 0, 0, 6), value=7.0)
        longer.mask[m] = nn.functional.pad(longer.mask[m], (0, 6))
    rule = begin(model, GradientModulator())
    _, padded = step(model, rule, longer)
    for k in short:
        torch.testing.assert_close(short[k], padded[k], atol=1e-6, rtol=1e-4)


def test_a_modality_missing_for_a_whole_batch_keeps_its_level():
    model = middle()
    rule = begin(model, GradientModulator(CGGMConfig(trace=True)))
    step(model, rule, CORPUS.train.batch(range(16)))
    level = rule._state["level"].clone()
    part = CORPUS.train.without({"audio": np.ones(32, dtype=bool)})
    _, gradients = step(model, rule, part.batch(range(16)))
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert rule._state["level"][1] == level[1]
    assert rule.trace[-1]["delta"][1] == 0
    assert rule.trace[-1]["cosine"][1] == 0
    # samples without audio do not count: half a batch equals the other half alone
    half = np.arange(32) % 2 == 1
    mixed = CORPUS.train.without({"audio": half})
    both = begin(model, GradientModulator())
    step(model, both, mixed.batch(range(16)))
    alone = begin(model, GradientModulator())
    step(model, alone, CORPUS.train.batch(range(0, 16, 2)))
    assert both._state["level"][1] == alone._state["level"][1]


def test_all_modalities_missing_and_nan_are_errors_that_say_so():
    gone = dict.fromkeys(CORPUS.modalities, np.arange(32) == 2)
    model = middle()
    rule = begin(model, GradientModulator())
    with pytest.raises(CorpusError, match="every modality is missing for 1 samples"):
        step(model, rule, CORPUS.train.without(gone).batch(range(4)))

    class Poisoned(MiddleFusion):
        def forward(self, batch):
            batch.features["audio"] = batch.features["audio"] * float("nan")
            return super().forward(batch)

    config = FusionConfig(CORPUS.dims, width=12, layers=3, heads=3)
    for changes in ({}, {"lam": 0.0, "speed_metric": "neg_mae"}):
        with pytest.raises(TrainingError, match="features of 'audio' are not finite"):
            fit(
                lambda: Poisoned(config),
                CORPUS,
                settings(),
                rules=[GradientModulator(CGGMConfig(**changes))],
            )


def test_overfits_a_handful():
    corpus = toy_corpus((8, 8, 8), widths=dict(list(WIDTHS.items())[:3]))
    history = fit(
        lambda: middle(corpus),
        corpus,
        settings(epochs=40, batch_size=8, lr=0.01),
        rules=[GradientModulator()],
    ).history
    assert history[-1]["train"] < 0.35 * history[0]["train"]


def test_same_seed_same_weights():
    first, again, other = (
        fit(
            lambda: middle(dropout=RATES["cggm"]),
            CORPUS,
            settings(seed=seed),
            rules=[GradientModulator()],
        ).receipt.artefact
        for seed in (0, 0, 1)
    )
    assert first == again != other


# ------------------------------------------------------------- comparators


def test_ogm_ge_slows_the_confident_modality_and_adds_noise():
    corpus = corpus_of(2)
    model = middle(corpus)
    rule = begin(model, OGMGE(alpha=0.5, enhance=False))
    batch = corpus.train.batch(range(16))
    step(model, rule, batch)
    p = torch.tensor([[[0.0], [0.0]], [[2.0], [2.0]]])
    y = torch.zeros(2, 1)
    rule._begin_step()
    rule._decide(p, y, torch.ones(2, 2))
    ratio = 1 / math.exp(-2.0)
    assert rule._b.tolist() == pytest.approx([1 - math.tanh(0.5 * ratio), 1.0])
    rule._begin_step()
    before, after = step(model, rule, batch)
    scale = dict(zip(rule.names, rule._scale.float(), strict=True))
    for k, g in after.items():
        part, m = ([*k.split("."), ""])[:2]
        c = scale[m] if part in ("encoders", "projections") else 1.0
        torch.testing.assert_close(g, before[k] * c, rtol=1e-5, atol=1e-9)
    noisy = begin(model, OGMGE(alpha=0.5))
    before, after = step(model, noisy, batch)
    k = "encoders.text.layers.0.fc1.weight"
    c = float(noisy._scale[0])
    noise = after[k] - before[k] * c
    assert float(noise.std()) == pytest.approx(float(before[k].std()) * c, rel=0.15)
    k = "fusion.layers.0.fc1.weight"
    assert torch.equal(before[k], after[k])
    frozen = fit(lambda: middle(corpus), corpus, settings(), rules=[OGMGE()])
    assert "b_text" in frozen.history[0]


def test_ogm_ge_reads_the_probability_of_the_true_class():
    logits = torch.randn(1, 5, 3)
    y = torch.randint(3, (5,))
    confidence = (-classes("class", 3).loss(logits, y)).exp()
    expected = logits.softmax(-1)[0, torch.arange(5), y]
    torch.testing.assert_close(confidence[0], expected)


def test_modality_dropout_drops_in_training_and_never_everything():
    rule = ModalityDropout(0.4)
    torch.manual_seed(0)
    batch = CORPUS.train.batch(list(range(32)) * 20)
    found = rule.batch(batch, epoch=0)
    there = torch.stack(list(found.available.values()))
    assert there.any(0).all()
    # P(kept) = .6 + .4 * P(all others dropped as well)
    assert float(there.float().mean()) == pytest.approx(0.6 + 0.4**3, abs=0.04)
    for m in CORPUS.modalities:
        kept = found.available[m]
        assert not found.mask[m][~kept].any()
        assert torch.equal(found.mask[m][kept], batch.mask[m][kept])
        assert batch.available[m].all()  # validation and test see the batch as it is
    with pytest.raises(ConfigError, match="probability"):
        ModalityDropout(1.0)


# ------------------------------------------------------------- the chapter


def test_chapter_runs_on_a_corpus_with_class_labels(tmp_path, monkeypatch):
    """As it would on IEMOCAP or Food-101; its exercises' solutions run with it."""
    monkeypatch.setenv("MMSA_RECORDS", str(tmp_path / "records"))
    corpus = corpus_of(2, (40, 20, 20)).with_classes("sentiment", (-0.3, 0.3))
    store.write(corpus, tmp_path / "given")
    cells = open_book(ROOT).chapters["cggm"].cells
    assert sum("assert" in c.source for c in cells) >= 12
    space = {"__name__": "chapter"}
    for cell in cells:
        exec(compile(cell.source, f"book/cggm.md:{cell.line}", "exec"), space)
        if "parameters" in cell.tags:
            space |= {"corpus": "given", "data_dir": str(tmp_path)}
            space |= {"seeds": [0], "epochs": 1, "device": "cpu"}
    made = {r.name: r for r in runs.load_all()}
    assert 0 <= made["modulated"].mean("test.acc") <= 100
    stored = store.open_store(tmp_path / "given").fingerprint
    assert made["modulated"].corpus["sha256"] == stored
    assert {"text-alone", "audio-alone", "joint", "ogm-ge", "official"} < set(made)
