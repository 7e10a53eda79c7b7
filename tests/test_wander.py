"""Wander: equations, masks, gradients, the copies' defect, what it is attached to."""

import copy
import itertools
import math
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy import toy_corpus

from mmsa_lib.corpora import store
from mmsa_lib.corpora.schema import Batch, Card, Ragged, Split, make_corpus
from mmsa_lib.errors import ConfigError, CorpusError, TrainingError, UnknownNameError
from mmsa_lib.methods import efficient
from mmsa_lib.methods.adapted import encode, longest
from mmsa_lib.methods.wander import (
    OfficialWander,
    Wander,
    WanderConfig,
    attach,
)
from mmsa_lib.nets import FusionConfig, LateFusion, PooledFusion, count_parameters
from mmsa_lib.nets.trained import load, save, trained_parameters
from mmsa_lib.press.chapters import read_chapter
from mmsa_lib.training import TrainConfig, evaluate, fit

NAMES = ("text", "audio", "vision", "pose", "gaze", "hands", "heart")
SMALL = WanderConfig(rank=4, token_rank=3, feature_rank=2, out_tokens=3, max_len=9)


def hidden_states(M=3, B=2, lengths=(4, 6, 5, 3, 7, 4, 5), d=8, seed=0):
    """H_m and full masks, unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    names = NAMES[:M]
    hidden = {
        m: torch.randn(B, T, d, generator=generator)
        for m, T in zip(names, lengths, strict=False)
    }
    return hidden, {m: torch.ones(h.shape[:2]).bool() for m, h in hidden.items()}


def adapter(M=3, d=8, seed=0, **changes):
    torch.manual_seed(seed)
    return Wander(NAMES[:M], d, replace(SMALL, **changes))


def official(M=3, d=8, lengths=(4, 6, 5), rank=4, seed=0):
    torch.manual_seed(seed)
    names = NAMES[:M]
    config = WanderConfig(
        rank=rank,
        out_tokens=rank,
        token_rank=3,
        feature_rank=2,
        max_len=dict(zip(names, lengths, strict=False)),
        mode="official",
    )
    if M == 1:
        return OfficialWander(names, d, config)
    with pytest.warns(UserWarning, match="only the head trains"):
        return OfficialWander(names, d, config)


def batch_of(dims, B=4, lengths=None, seed=0):
    """A padded batch; lengths[m] one a sample, 0 = the sample lacks the modality."""
    generator = torch.Generator().manual_seed(seed)
    features, masks, available = {}, {}, {}
    for i, (m, d) in enumerate(dims.items()):
        n = torch.tensor((lengths or {}).get(m, [4 + i % 3] * B))
        T = max(int(n.max()), 1)
        masks[m] = torch.arange(T) < n[:, None]
        x = torch.randn(B, T, d, generator=generator)
        features[m] = x * masks[m][..., None]
        available[m] = n > 0
    labels = {"sentiment": torch.randn(B, 1, generator=generator)}
    return Batch(features, masks, available, labels, [f"clip{i}" for i in range(B)])


def backbone(M=3, seed=0, layers=2, **changes):
    torch.manual_seed(seed)
    dims = {m: 5 + i for i, m in enumerate(NAMES[:M])}
    settings = {"width": 8, "layers": layers, "heads": 2} | changes
    return LateFusion(FusionConfig(dims, **settings))


def attached(M=3, cached=False, base=None, **changes):
    base = base or backbone(M)
    torch.manual_seed(1)
    return attach(base, replace(SMALL, **changes), cached)


def predict(model, batch):
    model.eval()
    with torch.no_grad():
        return model(batch).predictions["sentiment"]


def padded(batch, extra=4, noise=100.0):
    """The same batch with masked steps of large numbers behind the real ones."""
    features = {
        m: torch.cat([x, noise * torch.randn(len(x), extra, x.shape[2])], 1)
        for m, x in batch.features.items()
    }
    mask = {m: F.pad(k, (0, extra)) for m, k in batch.mask.items()}
    return replace(batch, features=features, mask=mask)


# ---------------------------------------------------------------- equations


def naive(adapter, hidden):
    """Contract the explicit fusion tensor W with the outer product of all Z_m."""
    names, c = adapter.modalities, adapter.config
    Z, U, V = {}, {}, adapter.V
    for m in names:
        mask = torch.ones(hidden[m].shape[:2]).bool()
        Z[m], U[m] = adapter.project(m, hidden[m], mask)
    B, d = len(hidden[names[0]]), adapter.width
    F_ = torch.zeros(B, c.out_tokens, d, dtype=Z[names[0]].dtype)
    if c.cp == "separable":
        terms = list(itertools.product(range(c.token_rank), range(c.feature_rank)))
    else:
        terms = [(k, k) for k in range(c.token_rank)]
    places = [
        [(t, a) for t in range(Z[m].shape[1]) for a in range(Z[m].shape[2])]
        for m in names
    ]
    for s, e in itertools.product(range(c.out_tokens), range(d)):
        for place in itertools.product(*places):
            weight = sum(
                math.prod(
                    (U[m][p, t, s] * V[m][q, a, e]).item()
                    for m, (t, a) in zip(names, place, strict=True)
                )
                for p, q in terms
            )
            outer = torch.ones(B, dtype=F_.dtype)
            for m, (t, a) in zip(names, place, strict=True):
                outer = outer * Z[m][:, t, a]
            F_[:, s, e] += weight * outer
    return F_ / math.sqrt(len(terms))


@pytest.mark.parametrize("append_one", [False, True])
@pytest.mark.parametrize("cp", ["separable", "tied"])
@torch.no_grad()
def test_01_fusion_equals_the_naive_outer_product_contraction(cp, append_one):
    torch.manual_seed(0)
    Rt, Rd = (3, 2) if cp == "separable" else (2, 2)
    lengths = dict(zip(NAMES, (2, 3, 2), strict=False))
    config = WanderConfig(2, Rt, Rd, 3, lengths, cp, append_one)
    model = Wander(NAMES[:3], 4, config).double()
    hidden, masks = hidden_states(lengths=(2, 3, 2), d=4)
    hidden = {m: h.double() for m, h in hidden.items()}
    fast = model.fuse(hidden, masks)
    assert fast.shape == (2, 3, 4)
    assert torch.allclose(fast, naive(model, hidden), atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_02_tied_is_the_diagonal_and_rank_one_is_what_the_copies_compute():
    hidden, masks = hidden_states()
    tied = adapter(token_rank=3, feature_rank=3, cp="tied")
    pairs = []
    for k in range(3):
        one = adapter(token_rank=1, feature_rank=1)
        state = tied.state_dict()
        state = {
            n: x[k : k + 1] if n[0] in "UV" else x for n, x in tied.state_dict().items()
        }
        one.load_state_dict(state)
        pairs.append(one.fuse(hidden, masks))
    assert torch.allclose(tied.fuse(hidden, masks), sum(pairs) / 3**0.5, atol=1e-6)

    def against_copies(Rt, Rd):
        lengths = {m: h.shape[1] for m, h in hidden.items()}
        ours = adapter(
            token_rank=Rt,
            feature_rank=Rd,
            out_tokens=4,
            max_len=lengths,
            normalize=False,
        )
        theirs = official()
        theirs.U.clear()
        theirs.V.clear()
        theirs.U.update(ours.U.items())
        theirs.V.update(ours.V.items())
        theirs.down.load_state_dict(ours.down.state_dict())
        product = theirs(hidden)[0] - torch.cat(list(hidden.values()), 1)[:, :4]
        return ours.fuse(hidden, masks) * math.sqrt(Rt * Rd), product

    ours, theirs = against_copies(1, 1)
    assert torch.allclose(ours, theirs, atol=1e-5)
    ours, theirs = against_copies(3, 2)
    assert (ours - theirs).abs().max() > 0.1  # sum of products, product of sums


def test_03_the_copies_adapter_never_learns():
    hidden, _ = hidden_states()
    model, head = official(), nn.Linear(8, 1)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    parameters = [*model.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.0)
    inputs = {m: h.clone().requires_grad_() for m, h in hidden.items()}
    for _ in range(5):
        optimiser.zero_grad()
        head(model.read(inputs)).square().sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.abs().max() == 0, name
        assert head.weight.grad.abs().max() > 0
        optimiser.step()
    out, _ = model(hidden)
    assert torch.equal(out, hidden["text"][:, :4])
    assert all(torch.equal(p, start[n]) for n, p in model.named_parameters())
    assert inputs["audio"].grad is None or inputs["audio"].grad.abs().max() == 0
    assert inputs["text"].grad[:, 0].abs().max() > 0
    # a single modality has no other factor: there the copies' adapter does learn
    alone = official(M=1)
    alone(hidden_states(1)[0])[0].sum().backward()
    assert alone.U["text"].grad.abs().max() > 0


def gradients(model, batch):
    model.zero_grad()
    model(batch).predictions["sentiment"].sum().backward()
    return {
        n: 0.0 if p.grad is None else p.grad.abs().max().item()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("place", ["head", "layers"])
def test_04_gradients_reach_the_gate_then_everything(place):
    batch = batch_of(backbone().config.dims)
    model = attached(place=place)
    adapter_ = [n for n in trained_parameters(model) if "head" not in n]
    first = gradients(model, batch)
    gates = [n for n in adapter_ if n.endswith("gate")]
    assert len(gates) == (1 if place == "head" else 2)
    assert all(first[n] > 0 for n in gates)
    assert all(first[n] == 0 for n in adapter_ if n not in gates)
    torch.optim.SGD(trained_parameters(model).values(), 0.1).step()
    second = gradients(model, batch)
    assert all(v > 0 for v in second.values()), second

    at_once = gradients(attached(place=place, gate_init=1e-2), batch)
    assert all(v > 0 for v in at_once.values()), at_once


@pytest.mark.parametrize("place", ["head", "layers"])
def test_05_a_closed_gate_gives_the_residual(place):
    base = backbone().eval()
    batch = batch_of(base.config.dims)
    model = attached(base=base, place=place).eval()
    with torch.no_grad():
        output = base(batch, hidden=True)
        pooled = model(batch).pooled
    if place == "layers":  # the backbone itself
        assert torch.allclose(pooled, output.pooled, atol=1e-6)
        return
    residual = output.hidden["text"][:, :3].mean(1)
    assert torch.allclose(pooled, residual.repeat(1, 3), atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"append_one": True},
        {"cp": "tied", "feature_rank": 3},
        {"residual": "mean"},
        {"readout": "first"},
        {"normalize": False},
        {"place": "layers"},
    ],
    ids=str,
)
def test_06_padding_has_no_influence_and_gets_no_gradient(changes):
    lengths = {"text": [5, 2, 1, 4], "audio": [7, 3, 7, 1], "vision": [6, 6, 1, 0]}
    model = attached(gate_init=0.5, **changes)
    batch = batch_of(model.base.config.dims, lengths=lengths)
    expected = predict(model, batch)
    for extra in (2, 20):  # 20: beyond max_len, but only padding is there
        assert torch.allclose(predict(model, padded(batch, extra)), expected, atol=1e-5)
    alone = replace(
        batch,
        features={m: x[1:2, : lengths[m][1]] for m, x in batch.features.items()},
        mask={m: k[1:2, : lengths[m][1]] for m, k in batch.mask.items()},
        available={m: a[1:2] for m, a in batch.available.items()},
        ids=["clip1"],
    )
    assert torch.allclose(predict(model, alone), expected[1:2], atol=1e-5)

    hidden, masks = hidden_states(B=2)
    masks["audio"][1, 3:] = False
    inputs = {m: h.clone().requires_grad_() for m, h in hidden.items()}
    core = adapter(gate_init=0.5, **{k: v for k, v in changes.items() if k != "place"})
    core.read(inputs, masks).sum().backward()
    assert inputs["audio"].grad[1, 3:].abs().max() == 0
    assert inputs["audio"].grad[1, :3].abs().max() > 0
    hidden["audio"][1, 3:] = float("nan")  # whatever stands there
    assert torch.isfinite(core.fuse(hidden, masks)).all()


@torch.no_grad()
def test_07_multilinear_and_independent_of_the_order_of_modalities():
    hidden, masks = hidden_states()
    model = adapter(normalize=False)
    before = model.fuse(hidden, masks)
    model.V["audio"] *= 3.0
    assert torch.allclose(model.fuse(hidden, masks), 3 * before, atol=1e-5)
    turned = Wander(NAMES[2::-1], 8, model.config)
    turned.load_state_dict(model.state_dict())
    assert turned.modalities != model.modalities
    assert torch.allclose(turned.fuse(hidden, masks), 3 * before, atol=1e-5)


@torch.no_grad()
def test_08_append_one_keeps_lower_orders():
    hidden, masks = hidden_states()
    for append_one in (False, True):
        model = adapter(append_one=append_one)
        model.down["audio"].weight.zero_()
        model.down["audio"].bias.zero_()  # GELU(0) = 0, so Z_audio = 0
        F_ = model.fuse(hidden, masks)
        assert (F_.abs().max() > 0) == append_one


class Largest(TorchDispatchMode):
    """The most entries that any tensor had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_no_product_of_modalities_is_ever_built():
    largest = {}
    for M in (2, 7):
        hidden, masks = hidden_states(M, lengths=(6,) * 7)
        with Largest() as seen:
            adapter(M).fuse(hidden, masks).sum().backward()
        largest[M] = seen.numel
    c = SMALL
    factor = 2 * c.token_rank * c.feature_rank * c.out_tokens * 8  # B ... d
    assert largest[2] == largest[7] <= max(factor, c.token_rank * c.max_len * 8)


MOSI = dict.fromkeys(NAMES[:3], 50)
FOOD = {"text": 50, "vision": 197}


@pytest.mark.parametrize(
    ("lengths", "d", "config", "expected"),
    [
        (MOSI, 40, WanderConfig(), 46_128),
        (MOSI, 40, WanderConfig(token_rank=8), 36_528),
        (MOSI, 40, WanderConfig(out_tokens=50), 107_328),
        (FOOD, 768, WanderConfig(64, out_tokens=64), 1_074_560),
    ],
)
def test_09_parameters(lengths, d, config, expected):
    config = replace(config, max_len=lengths)
    model = Wander(lengths, d, config)
    assert count_parameters(model)[0] == expected + 1  # the gate
    one = Wander(lengths, d, replace(config, append_one=True))
    more = len(lengths) * config.feature_rank * d
    assert count_parameters(one)[0] == expected + 1 + more
    if config.out_tokens == config.rank:
        with pytest.warns(UserWarning):
            copies = OfficialWander(lengths, d, replace(config, mode="official"))
        assert count_parameters(copies)[0] == expected


def test_09_trainable_share_of_the_copies_base():
    dims = {"text": 768, "audio": 5, "vision": 20}
    base = LateFusion(FusionConfig(dims, width=40, layers=32, heads=8))
    with pytest.warns(UserWarning):
        model = attach(base, WanderConfig(mode="official"))
    trainable, total = count_parameters(model)
    assert count_parameters(base)[1] == 1_933_361
    assert trainable == 46_128 + 8_161
    assert total == 1_933_361 + 46_128
    assert 100 * trainable / total == pytest.approx(2.74, abs=0.005)


@pytest.mark.parametrize("place", ["head", "layers"])
def test_09_the_backbone_is_bit_identical_after_training(place):
    base = backbone(dropout=None).train()
    before = copy.deepcopy(base.state_dict())
    model = attached(base=base, place=place, gate_init=0.1)
    start = copy.deepcopy(model.state_dict())
    batch = batch_of(base.config.dims)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        model.train()
        gradients(model, batch)
        optimiser.step()
    names = trained_parameters(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]) == (name not in names), name
        if name not in names and name.startswith("base."):
            assert dict(model.named_parameters())[name].grad is None
    assert all(torch.equal(v, before[n]) for n, v in base.state_dict().items())
    assert not any(m.training for m in model.base.encoders.modules())
    assert model.base.head.training


@pytest.mark.parametrize("place", ["head", "layers"])
@pytest.mark.parametrize("M", range(1, 8))
def test_10_one_to_seven_modalities_and_a_batch_of_one(M, place):
    model = attached(M, place=place, gate_init=0.5)
    for B in (1, 3):
        batch = batch_of(model.base.config.dims, B)
        y = predict(model, batch)
        assert y.shape == (B, 1) and torch.isfinite(y).all()
    assert all(v > 0 for v in gradients(model, batch).values())


def test_11_the_copies_read_one_column_of_every_token_factor():
    hidden, masks = hidden_states()
    model = official()
    for U in model.U.values():
        nn.init.normal_(U)
    model.read(hidden).sum().backward()
    for m, U in model.U.items():
        columns = U.grad.abs().amax((0, 1)) > 0
        assert columns.tolist() == [True, False, False, False], m
    ours = adapter(gate_init=1.0)
    ours.read(hidden, masks).sum().backward()
    for U in ours.U.values():
        used = U.grad.abs().amax((0, 1)) > 0
        assert used.all()
    first = adapter(gate_init=1.0, readout="first")
    first.read(hidden, masks).sum().backward()
    assert (first.U["audio"].grad.abs().amax((0, 1)) > 0).tolist() == [
        True,
        *[False] * 2,
    ]


def test_12_a_batch_first_tensor_in_a_time_first_encoder_mixes_samples():
    def crosses(encode):
        x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        # not the plain sum: that of a LayerNorm's output is constant
        (encode(x)[0] * torch.arange(8)).sum().backward()
        assert x.grad[0].abs().max() > 1e-4
        return x.grad[1:].abs().max().item()

    encoder = backbone().encoders["text"].eval()
    assert crosses(lambda x: encoder(x, torch.ones(3, 5).bool())) == 0
    # a time-first encoder takes dimension 0 for time: ours with both swapped
    mask = torch.ones(5, 3).bool()
    assert crosses(lambda x: encoder(x.transpose(0, 1), mask).transpose(0, 1)) > 1e-4


# ---------------------------------------------------------------- what it is fed


def test_a_missing_modality():
    model = attached(gate_init=0.5, append_one=True)
    dims = model.base.config.dims
    whole = batch_of(dims, lengths={"audio": [0, 0, 0, 0]})  # for the whole batch
    assert torch.isfinite(predict(model, whole)).all()
    none = replace(SMALL, gate_init=0.5)
    hidden, masks = hidden_states()
    masks["audio"][:] = False
    core = Wander(NAMES[:3], 8, none)
    assert (core.fuse(hidden, masks) == 0).all()  # a product with an empty factor
    # without text the residual is the next modality's
    hidden, masks = hidden_states()
    masks["text"][0] = False
    out, mask = core.residual(hidden, masks)
    assert torch.equal(out[0], hidden["audio"][0, :3])
    assert torch.equal(out[1], hidden["text"][1, :3])
    assert mask.all()
    lost = batch_of(dims, lengths={m: [3, 0, 3, 3] for m in dims})
    for place in ("head", "layers"):
        with pytest.raises(
            CorpusError, match=r"every modality is missing for 1 .*clip1"
        ):
            predict(attached(place=place), lost)
    with pytest.raises(CorpusError, match=r"every modality is missing for 1 .*clip1"):
        cached = dict.fromkeys(dims, 8)
        lost = batch_of(cached, lengths={m: [3, 0, 3, 3] for m in dims})
        predict(attached(cached=True), lost)


def test_a_residual_of_fewer_steps_than_the_output():
    model = adapter(out_tokens=9, gate_init=1.0)
    hidden, masks = hidden_states()
    _, mask = model(hidden, masks)
    assert mask.sum(1).tolist() == [4, 4]  # text has four steps
    fused = model.fuse(hidden, masks)
    expected = (hidden["text"] + fused[:, :4]).mean(1)
    assert torch.allclose(model.read(hidden, masks), expected, atol=1e-6)
    mean = adapter(residual="mean")
    means = sum(h.mean(1) for h in hidden.values()) / 3
    assert torch.allclose(mean.read(hidden, masks), means, atol=1e-6)


def test_normalised_factors_have_unit_size():
    torch.manual_seed(0)
    hidden, masks = hidden_states(B=64, lengths=(30, 30, 30), d=40)
    raw, ours = (
        Wander(NAMES[:3], 40, WanderConfig(max_len=30, normalize=n)).fuse(hidden, masks)
        for n in (False, True)
    )
    assert 0.8 < ours.square().mean().sqrt() < 1.25
    assert raw.square().mean().sqrt() < 0.2


def test_errors_say_what_to_do():
    with pytest.raises(ConfigError, match=r"at most 9.*max_len"):
        hidden, masks = hidden_states(lengths=(4, 12, 5))
        adapter().fuse(hidden, masks)
    with pytest.raises(UnknownNameError, match=r"prefixx.*Known: mean, prefix"):
        WanderConfig(residual="prefixx")
    with pytest.raises(ConfigError, match="token_rank and feature_rank must be equal"):
        WanderConfig(cp="tied")
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        WanderConfig(rank=0)
    with pytest.raises(ConfigError, match="as many output tokens as the rank"):
        WanderConfig(rank=8, mode="official")
    with pytest.raises(UnknownNameError, match=r"audio.*Known: text"):
        Wander(("text", "audio"), 8, replace(SMALL, max_len={"text": 5}))
    with pytest.raises(ConfigError, match=r"'text' has 4 steps; .*exactly 5"):
        official(lengths=(5, 6, 5))(hidden_states()[0])
    with pytest.raises(
        ConfigError,
        match="MulT, not PooledFusion",
    ):
        attach(PooledFusion(backbone().config), SMALL)
    with pytest.raises(ConfigError, match="cached=False"):
        attached(place="layers", cached=True)
    with pytest.raises(ConfigError, match="once, before the head"):
        attached(mode="official", out_tokens=4, place="layers")
    with pytest.raises(ConfigError, match="at least one modality"):
        Wander((), 8, SMALL)
    batch = batch_of({"text": 5, "audio": 6, "smell": 7})
    for model in (attached(), attached(place="layers")):
        with pytest.raises(UnknownNameError, match="'vision'"):
            predict(model, batch)
        with pytest.raises(CorpusError, match=r"'vision' are .*for .*7"):
            predict(model, batch_of({"text": 5, "audio": 6, "vision": 9}))
    with pytest.raises(CorpusError, match=r"'text' are .*8"):  # raw, not hidden
        predict(attached(cached=True), batch_of({"text": 5, "audio": 6, "vision": 7}))


@pytest.mark.parametrize("place", ["head", "layers"])
def test_bfloat16(place):
    model = attached(gate_init=0.5, place=place)
    batch = batch_of(model.base.config.dims)
    full_ = predict(model, batch)
    half = predict(copy.deepcopy(model).bfloat16(), batch)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), full_, atol=0.1)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(v > 0 for v in gradients(model, batch).values())


# ---------------------------------------------------------------- training and files


def settings(**changes):
    common = {"optimiser": "adamw", "lr": 1e-2, "batch_size": 8, "device": "cpu"}
    return TrainConfig(**(common | {"epochs": 2, "clip": 1.0} | changes))


@pytest.mark.parametrize("place", ["head", "layers"])
def test_overfits_a_handful_in_30_steps(place):
    corpus = toy_corpus((8, 8, 4))
    corpus.splits["valid"] = corpus.train._with(name="valid")
    torch.manual_seed(0)
    base = LateFusion(FusionConfig(corpus.dims, width=8, layers=2, heads=2))
    config = replace(SMALL, place=place, gate_init=0.1)
    start = float((corpus.train.labels["sentiment"] ** 2).mean() ** 0.5)
    frozen = fit(lambda: attach(base, config), corpus, settings(epochs=30))
    assert frozen.history[-1]["valid"] < 0.35 * start


def test_cached_hidden_states_give_the_same_training_and_the_same_predictions():
    corpus = toy_corpus((24, 8, 8))
    torch.manual_seed(0)
    base = LateFusion(FusionConfig(corpus.dims, width=8, layers=2, heads=2)).train()
    hidden = encode(base, corpus)
    assert base.training
    assert hidden.dims == dict.fromkeys(corpus.dims, 8)
    assert hidden.fingerprint == corpus.fingerprint
    assert hidden.test.sealed
    assert longest(hidden) == longest(corpus)
    config = replace(SMALL, max_len=longest(corpus))
    live = fit(lambda: attach(base, config), corpus, settings())
    fast = fit(lambda: attach(base, config, cached=True), hidden, settings())
    a, b = evaluate(live, corpus), evaluate(fast, hidden)
    assert a.ids == b.ids
    np.testing.assert_allclose(a.prediction, b.prediction, atol=1e-4)


@pytest.mark.parametrize("place", ["head", "layers"])
def test_saves_only_what_was_trained_and_loads_it(tmp_path, place):
    base = backbone()
    model = attached(base=base, place=place, gate_init=0.3)
    batch = batch_of(base.config.dims)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    gradients(model, batch)
    optimiser.step()
    path = save(model, tmp_path / "deep" / "wander.safetensors")
    stored = load_file(path)
    assert set(stored) == set(trained_parameters(model))
    assert not any("encoders" in n or "projections" in n for n in stored)
    fresh = attached(base=base, place=place, gate_init=0.3)
    assert not torch.equal(predict(fresh, batch), predict(model, batch))
    assert torch.equal(predict(load(fresh, path), batch), predict(model, batch))
    other = attached(base=base, place=place, rank=5)
    with pytest.raises(ConfigError, match=r"wander.*is \(.*expected \("):
        load(other, path)
    with pytest.raises(ConfigError, match="unexpected"):
        load(efficient.head_only(base), path)


def test_nan_features_are_named():
    corpus = toy_corpus((16, 8, 8))
    features = corpus.train.features["audio"]
    features.values[features.starts[3]] = np.nan
    base = LateFusion(FusionConfig(corpus.dims, width=8, layers=1, heads=2))
    with pytest.raises(TrainingError, match=r"'audio' are not finite in .*train-3"):
        fit(lambda: attach(base, SMALL), corpus, settings())


def test_same_seed_same_adapter():
    batch = batch_of(backbone().config.dims)
    base = backbone()
    one, two = (predict(attached(base=base, gate_init=0.5), batch) for _ in range(2))
    assert torch.equal(one, two)


# ---------------------------------------------------------------- the comparators

BUILDERS = ("lmf", "concat", "bottleneck", "prompts", "lora")


@pytest.fixture(scope="module")
def quiet_peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft  # noqa: F401  slow, and it warns of what we do not use


@pytest.mark.parametrize("M", [1, 2, 7])
@pytest.mark.parametrize("name", BUILDERS)
def test_comparators_at_equal_parameters(name, M, quiet_peft):
    base = backbone(M).eval()
    build = getattr(efficient, name)
    target = count_parameters(attached(base=base, rank=8, max_len=40))[0]
    size = efficient.size_for(build, base, target)
    model = build(base, size)
    trainable, total = count_parameters(model)
    assert abs(trainable - target) <= 0.12 * target, (size, trainable, target)
    assert (
        total - trainable == count_parameters(base)[1] - count_parameters(base.head)[1]
    )
    lengths = {"text": [5, 2, 1, 4]} if M == 1 else {"audio": [3, 0, 2, 6]}
    batch = batch_of(base.config.dims, lengths=lengths)
    y = predict(model, batch)
    assert torch.allclose(predict(model, padded(batch)), y, atol=1e-5)
    if name != "prompts":  # starts as the backbone
        assert torch.allclose(y, predict(base, batch), atol=1e-5)
    first = gradients(model.train(), batch)
    torch.optim.SGD(trained_parameters(model).values(), 0.05).step()
    second = gradients(model, batch)
    assert all(max(first[n], second[n]) > 0 for n in first), first
    assert not torch.equal(predict(model, batch), y)
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert all(p.grad is None for p in frozen.values())


def test_lora_is_w_plus_two_b_a(quiet_peft):
    base = backbone(2).eval()
    model = efficient.lora(base, 3)
    layer = model.base.encoders["text"].layers[0]
    names = [n for n in trained_parameters(model) if "lora" in n]
    assert len(names) == 2 * 2 * 2 * 2  # modalities, layers, qkv and out, A and B
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in names:
                p.normal_()
    A, B = (getattr(layer.qkv, f"lora_{k}")["default"].weight for k in "AB")
    W = base.encoders["text"].layers[0].qkv.weight
    assert torch.allclose(layer.qkv.weight, W + 2 * B @ A, atol=1e-5)
    merged = copy.deepcopy(base)
    for m, encoder in model.base.encoders.items():
        for ours, plain in zip(encoder.layers, merged.encoders[m].layers, strict=True):
            for part in ("qkv", "out"):
                getattr(plain, part).weight.data = getattr(ours, part).weight.data
    batch = batch_of(base.config.dims)
    assert torch.allclose(predict(model, batch), predict(merged, batch), atol=1e-5)
    assert not torch.allclose(predict(model, batch), predict(base, batch), atol=1e-2)


def test_the_two_ends_of_the_scale_and_what_cannot_be_matched():
    base = backbone().eval()
    head = count_parameters(base.head)[1]
    assert count_parameters(efficient.head_only(base))[0] == head
    probe = efficient.linear_probe(base)
    assert count_parameters(probe)[0] == 3 * 8 + 1
    batch = batch_of(base.config.dims)
    with torch.no_grad():
        out = base.head.out.weight.new_zeros(1, 3 * 8).index_fill_(
            1, torch.tensor([2]), 1.0
        )
        probe.base.head.out.weight.copy_(out)
        probe.base.head.out.bias.zero_()
        pooled = base(batch).pooled
    assert torch.allclose(predict(probe, batch), pooled[:, 2:3], atol=1e-6)
    assert all(v > 0 for v in gradients(probe.train(), batch).values())
    everything = efficient.full(base)
    assert count_parameters(everything)[0] == count_parameters(base)[1]
    assert everything.training and everything is not base
    with pytest.raises(ConfigError, match="bottleneck trains at least"):
        efficient.size_for(efficient.bottleneck, base, 10)


def test_lmf_multiplies_and_concat_does_not_need_to():
    """With W_o fixed, LMF of two read-outs is bilinear plus lower orders."""
    base = backbone(2).eval()
    fusion = efficient.LMF(base, 5)
    nn.init.normal_(fusion.out.weight)
    hidden, masks = hidden_states(2)

    def f(text, audio):
        scaled = {"text": text * hidden["text"], "audio": audio * hidden["audio"]}
        z = torch.cat([scaled[m][:, 0] for m in base.modalities], 1)
        return fusion(scaled, masks) - z

    mixed = f(2, 2) - f(2, 1) - f(1, 2) + f(1, 1)
    assert mixed.abs().max() > 0.1
    second = f(3, 1) - 2 * f(2, 1) + f(1, 1)
    assert second.abs().max() < 1e-4 * f(3, 1).abs().max() + 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("place", ["head", "layers"])
def test_on_a_gpu_as_on_the_cpu(place):
    model = attached(gate_init=0.5, place=place)
    lengths = {"text": [5, 2, 1, 4], "audio": [7, 3, 7, 1], "vision": [6, 6, 1, 0]}
    batch = batch_of(model.base.config.dims, lengths=lengths)
    expected = predict(model, batch)
    model, batch = model.cuda(), batch.to("cuda")
    found = predict(model, batch)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)
    assert all(v > 0 for v in gradients(model.train(), batch).values())


def test_the_module_says_that_the_copies_are_second_hand():
    from mmsa_lib.methods import wander

    text = re.sub(r"\s+", " ", wander.__doc__)
    assert "authors' repository was not available" in text
    assert "two public hand copies" in text


# ---------------------------------------------------------------- the chapter


def class_corpus(name, widths, classes, tmp_path):
    """A small made-up corpus with class labels, stored as a downloader would."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, n in (("train", 40), ("valid", 12), ("test", 12)):
        y = np.arange(n) % classes
        features = {
            m: Ragged.from_list(
                [rng.normal(size=(rng.integers(1, 6), d)) + y[i] for i in range(n)]
            )
            for m, d in widths.items()
        }
        ids = [f"{split}-{i}" for i in range(n)]
        splits[split] = Split(split, ids, features, {"class": y})
    card = Card(name, "made up", "tests", "none", synthetic=True)
    return store.write(make_corpus(card, splits), tmp_path / name)


@pytest.mark.parametrize(
    ("name", "widths", "classes"),
    [
        ("food101", {"vision": 12, "text": 16}, 5),
        ("iemocap", {"text": 10, "audio": 6, "vision": 8}, 4),
    ],
)
def test_the_chapter_runs_on_class_labels(
    name, widths, classes, tmp_path, monkeypatch, quiet_peft
):
    """Every cell, with small parameters, on a stored corpus with these modalities."""
    class_corpus(name, widths, classes, tmp_path)
    monkeypatch.setenv("MMSA_RECORDS", str(tmp_path / "records"))
    monkeypatch.setattr("IPython.display.display", lambda *shown, **how: None)
    given = {"corpus": name, "data_dir": str(tmp_path), "seeds": [0], "epochs": 1}
    given |= {"rank": 2, "factors": 2, "out_tokens": 2, "device": "cpu"}
    page = {}
    for cell in read_chapter(ROOT / "book" / "wander.md", "book/wander").cells:
        exec(cell.source, page)
        if "parameters" in cell.tags:
            assert given.keys() <= page.keys()
            page |= given
    study = page["study"]
    assert study.metric == "test.acc"
    assert study.task.outputs == classes
    assert study.corpus.modalities == tuple(widths)
    trained = {r.name: r for r in study.records if r.kind == "training"}
    assert {"backbone", "wander-head", "lora", "wander-layers", "full"} <= set(trained)
    for record in trained.values():
        assert 0 <= record.mean("test.acc") <= 100
        assert len(record.per_seed[0]["predictions"]) == 12
        assert set(record.per_seed[0]["predictions"]) <= set(range(classes))
    assert not any("oracle" in r.name or "-sum-" in r.name for r in study.records)
