"""Official mode against the numbers of the public copies of Wander.

Sizes and cases come from the fixtures' index: another directory (MMSA_PARITY_DIR) with
other seeds, sizes or numbers of modalities passes as well.
"""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from mmsa_lib.methods.wander import OfficialWander, WanderConfig, from_copy

FILE = "wander.safetensors"
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def fixture(parity_dir):
    if not (parity_dir / FILE).is_file():
        pytest.skip(f"no {FILE} in the parity folder")
    index = json.loads((parity_dir / "index.json").read_text())
    return index["files"][FILE]["config"], load_file(parity_dir / FILE)


def cases(fixture):
    config, tensors = fixture
    assert config, "the index names no case"
    for case, sizes in config.items():
        yield case, sizes, tensors


def part(tensors, prefix):
    found = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return {k: v for k, v in found.items() if f"{prefix}{k}" in tensors}


def build(sizes):
    names = [f"modality{i}" for i in range(sizes["num_mod"])]
    config = WanderConfig(
        rank=sizes["rank"],
        out_tokens=sizes["rank"],
        token_rank=sizes["trank"],
        feature_rank=sizes["drank"],
        max_len=dict(zip(names, sizes["t_dim"], strict=True)),
        mode="official",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return OfficialWander(names, sizes["dim"], config)


def close(ours, reference, what):
    assert ours.shape == reference.shape, what
    error = (ours - reference).abs().max() / reference.abs().max()
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}"


def run(fixture, case, sizes):
    _, tensors = fixture
    model = from_copy(build(sizes), part(tensors, f"w/{case}/"))
    inputs = {
        m: tensors[f"in/{case}/x{i}"].clone().requires_grad_()
        for i, m in enumerate(model.modalities)
    }
    return model, inputs, model(inputs)[0]


def test_parity_forward(fixture):
    for case, sizes, tensors in cases(fixture):
        _, _, y = run(fixture, case, sizes)
        close(y, tensors[f"out/{case}/y"], case)


def test_parity_gradients(fixture):
    for case, sizes, tensors in cases(fixture):
        model, inputs, y = run(fixture, case, sizes)
        (y * tensors[f"in/{case}/cot"]).sum().backward()
        reference = part(tensors, f"grad/{case}/")
        for i, x in enumerate(inputs.values()):
            close(x.grad, reference.pop(f"x{i}"), f"{case} x{i}")
        expected = from_copy(build(sizes), reference)  # gradients map like weights
        ours = {n: p.grad for n, p in model.named_parameters()}
        for name, value in expected.named_parameters():
            close(ours.pop(name), value.detach(), f"{case} {name}")
        assert not ours
        used = {f"down.{i}.{k}" for i in range(len(inputs)) for k in ("weight", "bias")}
        used |= {
            f"factor_{k}_list.{i}" for i in range(len(inputs)) for k in ("t", "dim")
        }
        assert set(reference) == used, "the fixture has a gradient that nobody compared"


def test_parity_zero_init(fixture, parity_dir):
    """With the copies' initialisation: the residual alone, gradients exactly zero."""
    stated = json.loads((parity_dir / "wander.json").read_text())["zero_init"]
    for case, sizes, tensors in cases(fixture):
        model = build(sizes)
        inputs = [tensors[f"in/{case}/x{i}"] for i in range(sizes["num_mod"])]
        y = model(dict(zip(model.modalities, inputs, strict=True)))[0]
        joined = torch.cat(inputs, 1)[:, : sizes["rank"]]
        assert torch.equal(y, joined) == stated[case]["output_is_first_rank_frames"]
        (y * tensors[f"in/{case}/cot"]).sum().backward()
        most = max(p.grad.abs().max().item() for p in model.parameters())
        assert most == stated[case]["max_abs_grad_any_parameter"]
