"""Encoders and fusion models: counts, masks, read-outs, gradients, clear errors."""

import math
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from mmsa_lib.corpora.schema import Batch
from mmsa_lib.errors import ConfigError, CorpusError, UnknownNameError
from mmsa_lib.nets import (
    RATES,
    Dropout,
    EarlyFusion,
    Encoder,
    EncoderLayer,
    FusionConfig,
    LateFusion,
    MiddleFusion,
    MulT,
    PooledFusion,
    count_parameters,
    from_official,
    modality_modules,
    ops,
)
from mmsa_lib.nets.encoder import sinusoids
from mmsa_lib.nets.official import official_positions

NO_DROPOUT = Dropout()
MODELS = {
    "late": LateFusion,
    "early": EarlyFusion,
    "middle": MiddleFusion,
    "mult": MulT,
    "pooled": PooledFusion,
}
TRANSFORMERS = [k for k in MODELS if k != "pooled"]
DIMS = {"text": 12, "audio": 7, "vision": 5}
EXTRA = {"pose": 4, "gaze": 3, "hands": 6, "heart": 1}


def make_batch(dims=DIMS, lengths=None, size=4, seed=0):
    """Random padded samples; lengths[m] one a sample, 0 = modality missing."""
    generator = torch.Generator().manual_seed(seed)
    features, mask, available = {}, {}, {}
    for i, (m, d) in enumerate(dims.items()):
        n = torch.tensor((lengths or {}).get(m, [5 + i] * size))
        T = max(int(n.max()), 1)
        mask[m] = torch.arange(T) < n[:, None]
        x = torch.randn(size, T, d, generator=generator)
        features[m] = x * mask[m][..., None]
        available[m] = n > 0
    ids = [f"clip{i}" for i in range(size)]
    labels = {"sentiment": torch.randn(size, 1, generator=generator)}
    return Batch(features, mask, available, labels, ids)


def build(kind, dims=DIMS, seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"width": 8, "layers": 3, "heads": 2} | settings
    settings.setdefault("dropout", NO_DROPOUT)
    return MODELS[kind](FusionConfig(dims, **settings))


def predict(model, batch, **options):
    model.eval()
    with torch.no_grad():
        return model(batch, **options).predictions["sentiment"]


def pad(batch, extra):
    """The same batch with `extra` masked steps of large numbers at each end."""
    features, mask = {}, {}
    for m, x in batch.features.items():
        noise = 100 * torch.randn(len(x), extra, x.shape[2])
        features[m] = torch.cat([x, noise], 1)
        mask[m] = F.pad(batch.mask[m], (0, extra))
    return replace(batch, features=features, mask=mask)


# ---------------------------------------------------------------- parameter counts


def p_encoder(D, L):
    return L * (12 * D * D + 13 * D) + 2 * D


def p_head(D, o):
    return 2 * (D * D + D) + o * D + o


@pytest.mark.parametrize(
    ("D", "L", "expected"),
    [
        (30, 5, 56_010),
        (40, 2, 39_520),
        (40, 3, 59_240),
        (40, 4, 78_960),
        (40, 5, 98_680),
        (40, 32, 631_120),
        (60, 5, 220_020),
    ],
)
def test_encoder_parameters(D, L, expected):
    encoder = Encoder(D, L, 5)
    assert count_parameters(encoder) == (expected, expected)
    assert p_encoder(D, L) == expected


def test_layer_norm_subset():
    layers = [x for x in Encoder(40, 5, 8).modules() if isinstance(x, EncoderLayer)]
    norms = [y for x in layers for y in x.children() if isinstance(y, nn.LayerNorm)]
    assert sum(count_parameters(x)[0] for x in norms) == 4 * 40 * 5 == 800


@pytest.mark.parametrize(
    ("kind", "dims", "D", "L", "heads", "o", "expected"),
    [
        ("late", (768, 5, 20), 40, 5, 8, 1, 336_041),
        ("early", (768, 5, 20), 40, 5, 8, 1, 133_841),
        ("late", (768, 5, 20), 40, 32, 8, 1, 1_933_361),
        ("middle", (300, 74, 47), 40, 5, 5, 1, 375_561),
        ("middle", (300, 5, 20), 40, 5, 5, 1, 371_721),
        ("middle", (768, 5, 20), 40, 5, 5, 1, 390_441),
        ("middle", (1024, 130, 342), 40, 4, 5, 4, 339_804),
        ("mult", (300, 74, 35), 30, 5, 5, 1, 1_073_731),
        ("mult", (300, 5, 20), 30, 5, 5, 1, 1_071_211),
        ("mult", (768, 5, 20), 30, 5, 5, 1, 1_085_251),
        ("mult", (768, 33, 709), 30, 5, 5, 1, 1_106_761),
        ("mult", (1024, 130, 342), 30, 5, 5, 4, 1_106_884),
    ],
)
def test_worked_parameter_counts(kind, dims, D, L, heads, o, expected):
    named = dict(zip(DIMS, dims, strict=True))
    model = build(kind, named, width=D, layers=L, heads=heads, outputs={"y": o})
    formulas = {
        "late": lambda: 3 * D + 3 * p_encoder(D, L) + 3 * D * D + D + p_head(D, o),
        "early": lambda: 3 * D + p_encoder(D, L) + p_head(D, o),
        "middle": lambda: (
            3 * D + 3 * p_encoder(D, L) + p_encoder(D, L - 2) + p_head(D, o)
        ),
        "mult": lambda: (
            6 * p_encoder(D, L) + 3 * p_encoder(2 * D, max(L, 3)) + p_head(6 * D, o)
        ),
    }
    assert count_parameters(model)[1] == expected
    assert sum(dims) * D + formulas[kind]() == expected


def test_count_parameters_of_a_partly_frozen_model():
    model = build("late")
    model.encoders.requires_grad_(False)
    frozen = count_parameters(model.encoders)[1]
    trainable, total = count_parameters(model)
    assert frozen == 3 * p_encoder(8, 3)
    assert total - trainable == frozen


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("width", [8, 40, 15])
def test_position_table(width):
    table = sinusoids(12, width)
    half = width // 2
    assert torch.equal(table[0], torch.zeros(width))
    omega = 10000 ** (-1 / (half - 1))
    assert table[1, 0].item() == pytest.approx(math.sin(1), abs=1e-6)
    assert table[1, 1].item() == pytest.approx(math.sin(omega), abs=1e-6)
    assert table[3, half + 1].item() == pytest.approx(math.cos(3 * omega), abs=1e-6)
    if width % 2:
        assert torch.equal(table[:, -1], torch.zeros(12))


def test_first_channel_rule():
    x = torch.ones(1, 6, 4)
    x[0, :, 0] = torch.tensor([0.3, 0, -1, 2, 0, 0])
    assert official_positions(x).tolist() == [[1, 0, 3, 4, 0, 0]]


def test_positions_beyond_the_cached_table():
    encoder = Encoder(8, 1, 2).eval()
    x = torch.randn(1, 700, 8)
    rows = len(encoder.positions)
    assert rows < 700
    long = encoder(x)
    assert len(encoder.positions) > 700
    assert torch.allclose(encoder.positions[:rows], sinusoids(rows, 8))
    assert torch.isfinite(long).all()
    assert "positions" not in encoder.state_dict()


# ---------------------------------------------------------------- operations


def test_dropout_rate_scale_and_seed():
    x = torch.ones(400, 501)
    for p in (0.1, 0.25, 0.5):
        torch.manual_seed(3)
        y = ops.dropout(x, p, training=True)
        kept = y[y != 0]
        # 200,400 draws: five standard deviations of the share are below 0.006
        assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.006)
        assert kept.min() == kept.max()
        assert kept[0].item() == pytest.approx(1 / (1 - p), rel=1e-4)
        torch.manual_seed(3)
        assert torch.equal(y, ops.dropout(x, p, training=True))
    assert ops.dropout(x, 0.5, training=False) is x
    assert ops.dropout(x, 0.0, training=True) is x


def test_dropout_neighbours_are_independent():
    torch.manual_seed(0)
    gone = (ops.dropout(torch.ones(400_000), 0.3, True) == 0).float()
    for lag in (1, 2, 3, 4, 8):
        both = (gone[lag:] * gone[:-lag]).mean().item()
        assert both == pytest.approx(0.09, abs=0.004), lag


def test_dropout_gradient_follows_the_mask():
    x = torch.randn(50, 40, requires_grad=True)
    y = ops.dropout(x, 0.3, training=True)
    y.sum().backward()
    assert torch.allclose(x.grad, (y / x).detach(), atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 50, 40, 160), (3, 2, 7, 5), (64, 1, 40, 40)])
@pytest.mark.parametrize("gradients", [True, False])
def test_linear_equals_torch(shape, gradients):
    B, T, d_in, d_out = shape
    torch.manual_seed(0)
    x, w, b = torch.randn(B, T, d_in), torch.randn(d_out, d_in), torch.randn(d_out)
    part = torch.randn(B, T, 2 * d_in).chunk(2, dim=-1)[1]  # not contiguous
    with torch.set_grad_enabled(gradients):
        for a, bias, relu in product((x, part), (b, None), (False, True)):
            expected = F.linear(a, w, bias)
            expected = F.relu(expected) if relu else expected
            y = ops.linear(a, w, bias, relu)
            assert torch.allclose(y, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("masked", ["nothing", "keys", "pairs"])
@pytest.mark.parametrize(
    "size", [(3, 2, 7, 11, 5), (24, 4, 40, 60, 5), (2, 2, 1, 9, 4)]
)
@pytest.mark.parametrize("spread", [1.0, 40.0])  # 40: beyond the range of plain 2^s
def test_attention_equals_torch(size, masked, spread):
    B, h, Tq, Tk, d = size
    torch.manual_seed(0)
    inputs = [torch.randn(B, h, T, d) for T in (Tq, Tk, Tk)]
    inputs[0] *= spread
    bias = None
    if masked != "nothing":
        shape = (B, 1, 1, Tk) if masked == "keys" else (1, 1, Tq, Tk)
        blocked = torch.rand(shape) < 0.3
        blocked[..., 0] = False
        bias = blocked * (torch.finfo(torch.float32).min / 4)
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    weight = torch.randn(B, h, Tq, d)
    y = ops.attend(*ours, bias)
    reference = F.scaled_dot_product_attention(
        *exact, attn_mask=None if bias is None else bias.double()
    )
    (y * weight).sum().backward()
    (reference * weight).sum().backward()
    assert torch.allclose(y, reference.float(), atol=2e-5)
    for a, b in zip(ours, exact, strict=True):
        # saturated weights have tiny gradients made of terms of size one
        size = max(1.0, b.grad.abs().max().item())
        assert torch.allclose(a.grad, b.grad.float(), atol=2e-5 * size)
    with torch.no_grad():
        assert torch.equal(ops.attend(*inputs, bias), y)


def test_attention_dropout_gradient_and_mean():
    torch.manual_seed(1)
    q, k, v, weight = (torch.randn(2, 2, 6, 5) for _ in range(4))

    def value(*inputs):
        torch.manual_seed(7)
        return (ops.attend(*inputs, None, 0.3) * weight).sum()

    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    value(*inputs).backward()
    for i in range(3):
        step = 1e-2 * torch.randn(2, 2, 6, 5)
        ahead, behind = [q, k, v], [q, k, v]
        ahead[i], behind[i] = ahead[i] + step, behind[i] - step
        numeric = (value(*ahead) - value(*behind)).item() / 2
        assert numeric == pytest.approx((inputs[i].grad * step).sum().item(), rel=2e-3)
    big = [x.repeat(1000, 1, 1, 1) for x in (q, k, v)]
    mean = ops.attend(*big, None, 0.3).view(1000, 2, 2, 6, 5).mean(0)
    assert (mean - ops.attend(q, k, v)).abs().max() < 0.1


# ---------------------------------------------------------------- encoder


class ReferenceEncoder:
    """Section 1 of the specification, typed once more with loops over heads."""

    def __init__(self, encoder):
        self.w = encoder.state_dict()
        self.layers = len(encoder.layers)
        self.heads = encoder.layers[0].heads

    def norm(self, x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        x = (x - mean) / (var + 1e-5).sqrt()
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def embed(self, x):
        D = x.shape[-1]
        return math.sqrt(D) * x + sinusoids(x.shape[1] + 1, D)[1:]

    def __call__(self, x, context=None):
        """x (B, T, D), context (B, Tk, D) without padding."""
        D = x.shape[-1]
        x = self.embed(x)
        if context is not None:
            context = self.embed(context)
        for i in range(self.layers):
            p = f"layers.{i}"
            n = self.norm(x, f"{p}.norm_attention")
            other = n
            if context is not None:
                other = self.norm(context, f"{p}.norm_attention")
            W, b = self.w[f"{p}.qkv.weight"], self.w[f"{p}.qkv.bias"]
            heads, d = [], D // self.heads
            for h in range(self.heads):
                rows = [slice(j * D + h * d, j * D + (h + 1) * d) for j in range(3)]
                sources = zip((n, other, other), rows, strict=True)
                q, k, v = (y @ W[r].T + b[r] for y, r in sources)
                weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(d), -1)
                heads.append(weights @ v)
            y = torch.cat(heads, -1) @ self.w[f"{p}.out.weight"].T
            x = x + y + self.w[f"{p}.out.bias"]
            n = self.norm(x, f"{p}.norm_ffn")
            y = (n @ self.w[f"{p}.fc1.weight"].T + self.w[f"{p}.fc1.bias"]).clamp(min=0)
            x = x + y @ self.w[f"{p}.fc2.weight"].T + self.w[f"{p}.fc2.bias"]
        return self.norm(x, "norm")


def random_encoder(width=12, layers=3, heads=3, seed=0, **settings):
    """Every parameter random, so that no bias or norm hides a mistake."""
    torch.manual_seed(seed)
    encoder = Encoder(width, layers, heads, **settings)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_encoder_equals_a_plain_reference(mode):
    encoder = random_encoder(mode=mode)
    x, reference = torch.randn(5, 9, 12), ReferenceEncoder(encoder)
    with torch.no_grad():
        for context in (None, torch.randn(5, 7, 12)):
            difference = encoder(x, context=context) - reference(x, context)
            assert difference.abs().max() < 1e-5


def test_batched_blocks_equal_single_samples():
    encoder = random_encoder(width=16, heads=4)
    x = torch.randn(70, 64, 16)  # several blocks of attention, oneDNN's linear
    with torch.no_grad():
        whole = encoder(x)
        single = torch.cat([encoder(row[None]) for row in x[::10]])
    assert (whole[::10] - single).abs().max() < 1e-5


def test_no_leak_between_samples():
    encoder = random_encoder()
    x = torch.randn(3, 5, 12, requires_grad=True)
    encoder(x)[0].sum().backward()
    assert x.grad[0].abs().sum() > 0
    assert x.grad[1:].abs().sum() == 0


@pytest.mark.parametrize("read", ["first", "last"])
@pytest.mark.parametrize("mode", ["paper", "official"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_reading_one_row_is_exact(read, mode, causal, cross):
    encoder = random_encoder(mode=mode, causal=causal)
    x = torch.randn(4, 6, 12)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 0], [0] * 6]) > 0
    other = (torch.randn(4, 8, 12), torch.rand(4, 8) > 0.3) if cross else (None, None)
    with torch.no_grad():
        rows = encoder(x, mask, *other)
        one = encoder(x, mask, *other, read=read)
    if mode == "official":
        expected = rows[:, 0 if read == "first" else -1]
    else:
        where = {"first": [0, 0, 1, 0], "last": [5, 2, 4, 0]}[read]
        expected = rows[range(4), where]
        assert torch.equal(expected[3], torch.zeros(12))
    assert one.shape == (4, 12)
    assert (one - expected).abs().max() < 1e-6


def test_row_gradients_equal_full_gradients():
    encoder = random_encoder()
    x, mask = torch.randn(4, 6, 12), torch.rand(4, 6) > 0.3
    mask[:, 0] = True
    gradients = []
    for run in (lambda: encoder(x, mask)[:, 0], lambda: encoder(x, mask, read="first")):
        encoder.zero_grad()
        run().square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * max(1.0, a.abs().max().item()))


@pytest.mark.parametrize("causal", [False, True])
def test_encoder_padding_invariance(causal):
    encoder = random_encoder(causal=causal)
    x, mask = (
        torch.randn(3, 5, 12),
        torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [0] * 5]) > 0,
    )
    context, context_mask = torch.randn(3, 7, 12), torch.rand(3, 7) > 0.4
    longer = torch.cat([x, 50 * torch.randn(3, 4, 12)], 1)
    with torch.no_grad():
        for other in ((None, None), (context, context_mask)):
            a = encoder(x, mask, *other)
            b = encoder(longer, F.pad(mask, (0, 4)), *other)
            assert (a - b[:, :5]).abs().max() < 1e-6
            assert b[:, 5:].abs().max() == 0
        junk = torch.cat([context, 50 * torch.randn(3, 4, 12)], 1)
        c = encoder(x, mask, junk, F.pad(context_mask, (0, 4)))
        assert (a - c).abs().max() < 1e-6


def test_official_mode_does_attend_padding():
    encoder = random_encoder(mode="official")
    x, mask = torch.randn(3, 5, 12), torch.ones(3, 5).bool()
    with torch.no_grad():
        a = encoder(x, mask)
        b = encoder(F.pad(x, (0, 0, 0, 4)), F.pad(mask, (0, 4)))
    assert (a - b[:, :5]).abs().max() > 1e-3


def test_sorting_by_length_changes_nothing(monkeypatch):
    encoder = random_encoder()
    lengths = torch.randint(0, 30, (48,))
    x, mask = torch.randn(48, 30, 12), torch.arange(30) < lengths[:, None]
    context, context_mask = torch.randn(48, 9, 12), torch.rand(48, 9) > 0.3
    assert encoder_module()._ragged(mask)
    arguments = [
        (x, mask),
        (x, mask, context, context_mask),
        (x, mask, None, None, "last"),
    ]
    with torch.no_grad():
        fast = [encoder(*a) for a in arguments]
        monkeypatch.setattr(encoder_module(), "_ragged", lambda mask: False)
        plain = [encoder(*a) for a in arguments]
    for a, b in zip(fast, plain, strict=True):
        assert (a - b).abs().max() < 1e-6


def encoder_module():
    import mmsa_lib.nets.encoder as module

    return module


@pytest.mark.parametrize(
    ("Tq", "Tk", "blocked"),
    [
        (4, 4, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
        (3, 5, [(0, 3), (0, 4), (1, 4)]),
        (5, 3, []),
        (7, 5, [(0, 3), (0, 4), (1, 4)]),
    ],
)
@pytest.mark.parametrize("mode", ["paper", "official"])
def test_causal_shift(Tq, Tk, blocked, mode):
    """-inf on triu(ones(Tq, Tk), 1 + |Tk - Tq|), read off the gradients."""
    encoder = random_encoder(layers=1, mode=mode, causal=True)
    x, c = torch.randn(1, Tq, 12), torch.randn(1, Tk, 12, requires_grad=True)
    y = encoder(x, context=c)
    for i in range(Tq):
        (grad,) = torch.autograd.grad(y[0, i].square().sum(), c, retain_graph=True)
        unseen = [j for j in range(Tk) if grad[0, j].abs().sum() == 0]
        assert unseen == [j for k, j in blocked if k == i]


def test_cross_attention_of_a_stream_with_itself():
    x = torch.randn(3, 6, 12)
    one, three = random_encoder(layers=1), random_encoder(layers=3)
    with torch.no_grad():
        assert (one(x, context=x) - one(x)).abs().max() < 1e-6
        assert (three(x, context=x) - three(x)).abs().max() > 1e-3


def test_empty_samples_are_zero_and_have_no_nan_gradients():
    encoder = random_encoder(dropout=Dropout(0.1, 0.1, 0.1, 0.1)).train()
    x = torch.randn(3, 6, 12, requires_grad=True)
    mask = torch.ones(3, 6).bool()
    mask[1] = False
    context, context_mask = torch.randn(3, 4, 12, requires_grad=True), mask[:, :4]
    for other in ((None, None), (context, context_mask)):
        for read in ("all", "first", "last"):
            encoder.zero_grad()
            y = encoder(x, mask, *other, read=read)
            assert torch.equal(y[1], torch.zeros_like(y[1]))
            y.square().sum().backward()
            assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())
            assert x.grad[1].abs().sum() == 0
    assert context.grad[1].abs().sum() == 0
    # a query stream without anything to attend to keeps its own content
    y = encoder(x, None, context, context_mask)
    assert torch.isfinite(y).all()
    assert y[1].abs().sum() > 0


def test_appended_steps_take_the_next_positions():
    """Prompts behind a padded stream: what MPLMM's memory encoders receive."""
    encoder = random_encoder()
    x, prompts = torch.randn(2, 5, 12), torch.randn(2, 2, 12)
    mask = torch.arange(5) < torch.tensor([5, 3])[:, None]
    real = F.pad(mask, (0, 2), value=True)
    with torch.no_grad():
        y = encoder(torch.cat([x, prompts], 1), real, read="last")
        short = encoder(torch.cat([x[1:, :3], prompts[1:]], 1), read="last")
    assert (y[1:] - short).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_inputs_are_not_changed_and_calls_repeat(mode):
    encoder = random_encoder(mode=mode)
    x, mask = torch.randn(3, 5, 12), torch.rand(3, 5) > 0.2
    before = x.clone()
    with torch.no_grad():
        first = encoder(x, mask)
        assert torch.equal(first, encoder(x, mask))
        encoder.train()  # all rates are zero
        assert torch.equal(first, encoder(x, mask))
    assert torch.equal(x, before)


def test_encoder_errors():
    with pytest.raises(ConfigError, match="3 heads do not divide width 8"):
        Encoder(8, 1, 3)
    with pytest.raises(ConfigError, match="at least one layer"):
        Encoder(8, 0, 2)
    with pytest.raises(ConfigError, match="width of at least 4"):
        Encoder(3, 1, 1)
    with pytest.raises(UnknownNameError, match=r"'oficial'.*Did you mean 'official'"):
        Encoder(8, 1, 2, mode="oficial")
    with pytest.raises(UnknownNameError, match="read 'middle'"):
        Encoder(8, 1, 2)(torch.zeros(1, 2, 8), read="middle")
    with pytest.raises(ConfigError, match=r"relu=1\.5"):
        Dropout(relu=1.5)


# ---------------------------------------------------------------- fusion


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("modalities", [1, 2, 3, 7])
def test_shapes(kind, modalities):
    dims = dict(list((DIMS | EXTRA).items())[:modalities])
    if kind == "mult" and modalities == 1:
        with pytest.raises(ConfigError, match="at least two modalities"):
            build(kind, dims)
        return
    outputs = {"sentiment": 1, "emotions": 6}
    model = build(kind, dims, outputs=outputs)
    for size in (1, 4):  # a batch of one too
        batch = make_batch(dims, size=size)
        output = model(batch)
        shapes = {k: tuple(v.shape) for k, v in output.predictions.items()}
        assert shapes == {"sentiment": (size, 1), "emotions": (size, 6)}
        pairs = modalities * (modalities - 1)
        width = {"late": modalities, "mult": pairs}
        assert output.pooled.shape == (size, 8 * width.get(kind, 1))
        together = model.head.out(output.last)
        assert torch.equal(together[:, :1], output.predictions["sentiment"])
        assert torch.equal(together[:, 1:], output.predictions["emotions"])
        assert set(output.mask) == set(dims)


@pytest.mark.parametrize("kind", ["late", "early", "mult"])
def test_hidden_sequences_on_request(kind):
    lengths = {"text": [5, 2, 1, 3], "audio": [4, 4, 0, 2], "vision": [1, 2, 3, 0]}
    batch, model = make_batch(lengths=lengths), build(kind).eval()
    with torch.no_grad():
        short, full = model(batch), model(batch, hidden=True)
    assert short.hidden == {}
    width = 16 if kind == "mult" else 8
    for m, h in full.hidden.items():
        assert h.shape == (*batch.mask[m].shape, width)
        assert h[~batch.mask[m]].abs().sum() == 0
        assert h[batch.mask[m]].abs().sum() > 0
    difference = short.predictions["sentiment"] - full.predictions["sentiment"]
    assert difference.abs().max() < 1e-6


def test_middle_fusion_hidden_can_be_fused_again():
    batch, model = make_batch(), build("middle").eval()
    with torch.no_grad():
        output = model(batch)
        z = model.pool(output.hidden, output.mask)
    assert torch.equal(z, output.pooled)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("readout", [None, "first", "last", "mean"])
def test_padding_never_changes_a_result(kind, readout):
    if kind == "pooled" and readout:
        return
    model = build(kind, readout=readout, causal=kind == "mult" and readout == "last")
    lengths = {"text": [5, 2, 1, 3], "audio": [4, 4, 0, 2], "vision": [1, 2, 3, 0]}
    batch = make_batch(lengths=lengths)
    expected = predict(model, batch)
    assert (predict(model, pad(batch, 6)) - expected).abs().max() < 1e-6
    for i in range(4):  # nor does the company of longer samples
        alone = make_batch(lengths={m: [n[i]] for m, n in lengths.items()}, size=1)
        for m, x in alone.features.items():
            x[0] = batch.features[m][i, : x.shape[1]]
        assert (predict(model, alone) - expected[i]).abs().max() < 1e-6


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_official_mode_sees_padding(kind):
    model, batch = build(kind, mode="official"), make_batch()
    longer = {m: F.pad(x, (0, 0, 0, 30)) for m, x in batch.features.items()}
    masks = {m: F.pad(x, (0, 30)) for m, x in batch.mask.items()}
    padded = replace(batch, features=longer, mask=masks)
    assert (predict(model, batch) - predict(model, padded)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", MODELS)
def test_an_unavailable_modality_contributes_nothing(kind):
    model, batch = build(kind), make_batch()
    batch.available["audio"][1] = False  # its steps are still there
    expected = predict(model, batch)
    batch.features["audio"][1] += torch.randn(6, 7)
    assert torch.equal(predict(model, batch), expected)
    batch.features["audio"][0] += torch.randn(6, 7)
    assert (predict(model, batch)[0] - expected[0]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", MODELS)
def test_a_modality_missing_for_the_whole_batch(kind):
    batch = make_batch(lengths={"vision": [0, 0, 0, 0]})
    model = build(kind).train()
    output = model(batch)
    output.predictions["sentiment"].sum().backward()
    assert torch.isfinite(output.predictions["sentiment"]).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    assert model.projections["vision"].weight.grad.abs().sum() == 0
    assert model.projections["text"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["early", "middle"])
def test_early_tokens_follow_the_last_real_step(kind):
    """A text of two steps, padded or not, is followed by audio at position three."""
    model = build(kind).eval()
    lengths = {"text": [9, 2], "audio": [3, 4], "vision": [2, 2]}
    batch = make_batch(lengths=lengths, size=2)
    with torch.no_grad():
        both = model(batch).predictions["sentiment"][1]
        cut = make_batch(lengths={m: [n[1]] for m, n in lengths.items()}, size=1)
        for m, x in cut.features.items():
            x[0] = batch.features[m][1, : x.shape[1]]
        alone = model(cut).predictions["sentiment"][0]
    assert (both - alone).abs().max() < 1e-6


@pytest.mark.parametrize("kind", MODELS)
def test_gradient_reaches_every_parameter(kind):
    torch.manual_seed(0)
    model = build(kind, width=16).train()
    batch = make_batch(size=16)
    output = model(batch)
    (output.predictions["sentiment"] - batch.labels["sentiment"]).abs().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("qkv.bias"):  # softmax ignores the key bias
            D = len(parameter) // 3
            assert parameter.grad[:D].abs().sum() > 0, name
            assert parameter.grad[2 * D :].abs().sum() > 0, name
        elif ".scores." not in f".{name}" or name.endswith("weight"):
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", MODELS)
def test_training_fits_a_handful_of_samples(kind):
    model, batch = build(kind, width=16, heads=4).train(), make_batch(size=8)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        error = model(batch).predictions["sentiment"] - batch.labels["sentiment"]
        error.abs().mean().backward()
        optimiser.step()
        losses.append(error.abs().mean().item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", MODELS)
def test_dropout_is_seeded_and_off_in_eval(kind):
    model, batch = build(kind, dropout=RATES["cggm"]), make_batch()
    assert torch.equal(predict(model, batch), predict(model, batch))
    model.train()
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(model(batch).predictions["sentiment"].detach())
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize("kind", MODELS)
def test_paper_rates_are_the_default(kind):
    model = MODELS[kind](FusionConfig(DIMS, width=8, layers=3, heads=2))
    expected = {"late": RATES["casp"], "early": RATES["casp"], "middle": RATES["cggm"]}
    if kind in expected:
        assert model.rates == expected[kind]
    encoders = [x for x in model.modules() if isinstance(x, Encoder)]
    assert all(x.rates == model.rates for x in encoders)
    assert model.head.p == model.rates.output


@pytest.mark.parametrize("kind", MODELS)
def test_bfloat16(kind):
    model = build(kind)
    batch = make_batch(lengths={"text": [5, 2, 1, 3], "audio": [4, 4, 0, 2]})
    expected = predict(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = predict(model, batch)
    half = predict(model.bfloat16(), batch)
    assert half.dtype == torch.bfloat16
    for ours in (mixed, half):
        assert (ours.float() - expected).abs().max() < 0.05 * (1 + expected.abs().max())


@pytest.mark.parametrize("kind", MODELS)
def test_double_precision_agrees(kind):
    model, batch = build(kind), make_batch(lengths={"audio": [4, 0, 2, 1]})
    expected = predict(model, batch)
    assert (predict(model.double(), batch) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_save_and_load(kind, tmp_path):
    model, batch = build(kind), make_batch()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = build(kind, seed=1)
    assert not torch.equal(predict(model, batch), predict(other, batch))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(predict(model, batch), predict(other, batch))


def test_config_survives_a_record():
    config = FusionConfig(DIMS, dropout=RATES["casp"], readout="mean")
    assert FusionConfig(**asdict(config)) == config


@pytest.mark.parametrize("kind", MODELS)
def test_modality_modules_are_disjoint_and_complete(kind):
    model = build(kind)
    groups = modality_modules(model)
    owned = [id(p) for g in groups.values() for x in g for p in x.parameters()]
    assert len(owned) == len(set(owned))
    assert set(groups) == set(DIMS)
    encoders = modality_modules(model, projections=False)
    for m in DIMS:
        assert model.projections[m] in groups[m]
        assert model.projections[m] not in encoders[m]
    if kind in ("late", "middle"):
        assert encoders["audio"] == [model.encoders["audio"]]
    if kind == "mult":
        assert encoders["audio"] == [model.cross["audio"], model.memory["audio"]]


def test_mult_pairs_and_stages():
    model, batch = build("mult").eval(), make_batch()
    pairs = {m: list(others) for m, others in model.cross.items()}
    assert pairs == {
        "text": ["audio", "vision"],
        "audio": ["text", "vision"],
        "vision": ["text", "audio"],
    }
    with torch.no_grad():
        embedded, masks = model.embed(batch)
        crossed = model.attend(embedded, masks)
        z, _ = model.remember(crossed, masks)
        predictions, _ = model.head(z)
        whole = model(batch)
    assert torch.equal(predictions["sentiment"], whole.predictions["sentiment"])
    alone = model.cross["audio"]["vision"](
        embedded["audio"], masks["audio"], embedded["vision"], masks["vision"]
    )
    assert torch.equal(crossed["audio"][..., 8:], alone)


def test_pooled_size_matches_its_reference():
    """The row "masked mean + attention pooling" of the reference table has 67 k."""
    model = PooledFusion(FusionConfig({"text": 384}, width=88))
    d, D = 384, 88
    per_step = 2 * d + d * D + D + D + 1
    head = 2 * D * D + D + 2 * (D * D + D) + D + 1
    assert count_parameters(model)[1] == per_step + head == 66_066


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("kind", MODELS)
def test_every_modality_missing_names_the_samples(kind):
    batch = make_batch()
    for available in batch.available.values():
        available[[0, 2]] = False
    with pytest.raises(CorpusError, match=r"missing for 2 samples \(clip0, clip2\)"):
        build(kind)(batch)


def test_wrong_batches_are_explained():
    model, batch = build("late"), make_batch()
    with pytest.raises(
        UnknownNameError, match=r"modality 'vision'.*Did you mean 'visio"
    ):
        features = {"visions" if m == "vision" else m: x for m, x in DIMS.items()}
        model(make_batch(features))
    with pytest.raises(CorpusError, match="holds pose, which the model was not built"):
        model(make_batch(DIMS | {"pose": 4}))
    with pytest.raises(CorpusError, match=r"'audio' are \(4, 6, 9\).*steps, 7\)"):
        model(make_batch(DIMS | {"audio": 9}))
    batch.mask["text"] = batch.mask["text"][:, :-1]
    with pytest.raises(CorpusError, match=r"mask of 'text' is \(4, 4\)"):
        model(batch)


def test_wrong_configurations_are_explained():
    with pytest.raises(UnknownNameError, match="readout 'frist'"):
        FusionConfig(DIMS, readout="frist")
    with pytest.raises(UnknownNameError, match="mode 'papers'"):
        FusionConfig(DIMS, mode="papers")
    with pytest.raises(ConfigError, match="dims"):
        FusionConfig({})
    with pytest.raises(ConfigError, match="outputs"):
        FusionConfig(DIMS, outputs={"sentiment": 0})
    with pytest.raises(ConfigError, match="layers - 2 joint layers"):
        MiddleFusion(FusionConfig(DIMS, layers=2))
    with pytest.raises(ConfigError, match="no official mode"):
        PooledFusion(FusionConfig(DIMS, mode="official"))


def test_foreign_weights_are_refused():
    model = build("late")
    with pytest.raises(ConfigError, match=r"do not fit LateFusion .*missing"):
        from_official(model, {"proj.0.weight": torch.zeros(8, 12, 1)})
    encoder = Encoder(8, 1, 2)
    wrong = {"layers.0.fc1.weight": torch.zeros(3, 3)}
    with pytest.raises(ConfigError, match="missing"):
        from_official(encoder, wrong)
