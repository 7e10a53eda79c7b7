"""Our nets in official mode against numbers of the released programs.

Sizes come from the fixtures' index, so that another directory (MMSA_PARITY_DIR) with
other seeds and sizes passes as well.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from mmsa_lib.corpora.schema import Batch
from mmsa_lib.nets import (
    EarlyFusion,
    Encoder,
    FusionConfig,
    LateFusion,
    MiddleFusion,
    MulT,
    from_official,
)
from mmsa_lib.nets.encoder import sinusoids
from mmsa_lib.nets.official import official_positions

MODALITIES = ("text", "audio", "vision")
FORWARD, GRADIENT = 2e-5, 2e-5


class Fixture:
    """One fixture file: tensors, the part of them under a prefix, configuration."""

    def __init__(self, folder, name):
        self.tensors = load_file(folder / f"{name}.safetensors")
        index = json.loads((folder / "index.json").read_text())
        self.config = index["files"][f"{name}.safetensors"]["config"]

    def __getitem__(self, key):
        return self.tensors[key]

    def part(self, prefix):
        return {
            k.removeprefix(prefix): v
            for k, v in self.tensors.items()
            if k.startswith(prefix)
        }

    def fusion_config(self, **changes):
        c = self.config
        settings = {
            "dims": dict(zip(MODALITIES, c["dims"], strict=True)),
            "width": c["proj_dim"],
            "layers": c["layers"],
            "heads": c["heads"],
            "outputs": {"sentiment": c["output_dim"]},
            "mode": "official",
        }
        return FusionConfig(**(settings | changes))


@pytest.fixture(scope="module")
def load(parity_dir):
    def fixture(name):
        if not (parity_dir / f"{name}.safetensors").is_file():
            pytest.skip(f"no {name}.safetensors in the parity folder")
        return Fixture(parity_dir, name)

    return fixture


@pytest.fixture(scope="module")
def encoder_fixture(load):
    return load("encoder")


def close(ours, reference, tolerance=FORWARD):
    assert ours.shape == reference.shape
    error = (ours - reference).abs().max() / reference.abs().max()
    assert error <= tolerance, f"relative error {error:.1e}"


def swap(x):
    """(T, B, D) of the released encoders <-> our (B, T, D)."""
    return x.transpose(0, 1)


def batch_of(features):
    size = len(next(iter(features.values())))
    return Batch(
        features=features,
        mask={m: torch.ones(x.shape[:2]).bool() for m, x in features.items()},
        available={m: torch.ones(size).bool() for m in features},
        labels={},
        ids=[str(i) for i in range(size)],
    )


def official_encoder(fixture, part="enc", causal=False):
    c = fixture.config if part == "enc" else fixture.config[part]
    encoder = Encoder(
        c["embed_dim"], c["layers"], c["heads"], mode="official", causal=causal
    )
    return from_official(encoder, fixture.part(f"w/{part}/")).eval()


def test_parity_positions(encoder_fixture):
    x = swap(encoder_fixture["in/padded/x"])
    assert torch.equal(official_positions(x), encoder_fixture["out/positions/padded"])
    for case in ("padded", "odd"):
        x = swap(encoder_fixture[f"in/{case}/x"])
        table = sinusoids(x.shape[1] + 1, x.shape[2])
        close(table[official_positions(x)], encoder_fixture[f"out/posemb/{case}"])


@pytest.mark.parametrize("case", ["dense", "padded", "odd"])
def test_parity_self_attention(encoder_fixture, case):
    part = "odd" if case == "odd" else "enc"
    x = swap(encoder_fixture[f"in/{case}/x"])
    with torch.no_grad():
        ours = official_encoder(encoder_fixture, part)(x)
    close(swap(ours), encoder_fixture[f"out/self/{case}"])


@pytest.mark.parametrize("case", ["dense", "padded"])
def test_parity_causal(encoder_fixture, case):
    x = swap(encoder_fixture[f"in/{case}/x"])
    with torch.no_grad():
        ours = official_encoder(encoder_fixture, causal=True)(x)
    close(swap(ours), encoder_fixture[f"out/self_causal/{case}"])


@pytest.mark.parametrize("case", ["same", "short", "long"])
@pytest.mark.parametrize("causal", [False, True])
def test_parity_cross_attention(encoder_fixture, case, causal):
    query = swap(encoder_fixture["in/cross/q"])
    context = swap(encoder_fixture[f"in/cross/kv_{case}"])
    with torch.no_grad():
        ours = official_encoder(encoder_fixture, causal=causal)(query, context=context)
    name = "cross_causal" if causal else "cross_nomask"
    close(swap(ours), encoder_fixture[f"out/{name}/{case}"])


@pytest.mark.parametrize("case", ["self", "same", "short", "long"])
def test_parity_blocked(encoder_fixture, case):
    expected = encoder_fixture[f"out/blocked/{case}"].bool()
    Tq, Tk = expected.shape
    encoder = official_encoder(encoder_fixture, causal=True)
    x = torch.ones(1, Tq, encoder_fixture.config["embed_dim"])
    context = None if case == "self" else x.new_ones(1, Tk, x.shape[2])
    keys = encoder._keys(x, None, context, None)
    assert torch.equal(keys.scores[0] < 0, expected)


def test_parity_gradients(encoder_fixture):
    encoder = official_encoder(encoder_fixture)
    x = swap(encoder_fixture["in/dense/x"]).clone().requires_grad_()
    (swap(encoder(x)) * encoder_fixture["in/cot_self"]).sum().backward()
    compare_gradients(encoder, encoder_fixture.part("grad/self/"), {"x": x})


def test_parity_gradients_cross_causal(encoder_fixture):
    encoder = official_encoder(encoder_fixture, causal=True)
    q = swap(encoder_fixture["in/cross/q"]).clone().requires_grad_()
    kv = swap(encoder_fixture["in/cross/kv_long"]).clone().requires_grad_()
    (swap(encoder(q, context=kv)) * encoder_fixture["in/cot_cross"]).sum().backward()
    reference = encoder_fixture.part("grad/cross_causal_long/")
    compare_gradients(encoder, reference, {"q": q, "kv": kv})


def compare_gradients(encoder, reference, inputs):
    for name, x in inputs.items():
        close(swap(x.grad), reference[name], GRADIENT)
    # gradients are mapped like weights: load them into a copy of the encoder
    weights = {
        k.removeprefix("w/"): v for k, v in reference.items() if k.startswith("w/")
    }
    width = encoder.norm.normalized_shape[0]
    copy = Encoder(width, len(encoder.layers), encoder.layers[0].heads)
    expected = dict(from_official(copy, weights).named_parameters())
    assert len(expected) == len(weights)
    for name, parameter in encoder.named_parameters():
        ours, theirs = parameter.grad, expected[name].data
        if name.endswith("qkv.bias"):  # the gradient of the key bias is rounding noise
            ours, theirs = ours.clone(), theirs.clone()
            ours[width : 2 * width] = theirs[width : 2 * width] = 0.0
        close(ours, theirs, GRADIENT)


@pytest.mark.parametrize("name", ["cggm_msa", "cggm_msa_mosi"])
def test_parity_cggm_middle_fusion(load, name):
    fixture = load(name)
    model = from_official(
        MiddleFusion(fixture.fusion_config()), fixture.part("w/model/")
    ).eval()
    inputs = {m: fixture[f"in/fwd/{m}"] for m in MODALITIES}
    before = {m: x.clone() for m, x in inputs.items()}
    with torch.no_grad():
        output = model(batch_of(inputs))
    close(output.predictions["sentiment"], fixture["out/fwd/pred"])
    for i, m in enumerate(MODALITIES):
        close(swap(output.hidden[m]), fixture[f"out/fwd/hs{i}"])
        assert torch.equal(inputs[m], before[m])  # the released program overwrites it


@pytest.mark.parametrize("case", ["full", "zero_text", "zero_audio", "zero_vision"])
@pytest.mark.parametrize("kind", ["late", "early"])
def test_parity_casp(load, kind, case):
    fixture = load("casp")
    build = {"late": LateFusion, "early": EarlyFusion}[kind]
    model = from_official(
        build(fixture.fusion_config()), fixture.part(f"w/{kind}/")
    ).eval()
    inputs = {m: fixture[f"in/{m}"] for m in MODALITIES}
    if case != "full":
        m = case.removeprefix("zero_")
        inputs[m] = torch.zeros_like(inputs[m])
    with torch.no_grad():
        output = model(batch_of(inputs))
        rows = model(batch_of(inputs), hidden=True)
    close(output.predictions["sentiment"], fixture[f"out/{kind}/{case}/pred"])
    close(output.pooled, fixture[f"out/{kind}/{case}/feature"])
    close(rows.pooled, fixture[f"out/{kind}/{case}/feature"])


@pytest.mark.parametrize("case", ["causal", "nomask", "eqdim"])
def test_parity_mult(load, parity_dir, case):
    fixture = load("mplmm")
    names = json.loads((parity_dir / "mplmm.json").read_text())["mult_param_names"]
    weights = {n: fixture[f"w/model/{n}"] for n in names}
    inputs = {m: fixture[f"in/{m}"] for m in MODALITIES}
    if case == "eqdim":  # MULTModel skips a projection of equal width
        inputs["audio"] = fixture["in/audio_eqdim"]
        del weights["proj_a.weight"]
    config = fixture.fusion_config(
        dims={m: x.shape[-1] for m, x in inputs.items()}, causal=case != "nomask"
    )
    model = from_official(MulT(config), weights).eval()
    with torch.no_grad():
        output = model(batch_of(inputs))
    close(output.predictions["sentiment"], fixture[f"out/mult_{case}/pred"])
