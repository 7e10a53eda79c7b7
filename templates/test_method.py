"""Gated sum: what is special about it. The contract is tested in test_methods.py."""

import torch
from toy import toy_corpus

from mmsa_lib.methods.gated import GatedConfig, build

CORPUS = toy_corpus()


def test_gates_sum_to_one_over_the_modalities_that_are_there():
    torch.manual_seed(0)
    model = build(CORPUS.dims, config=GatedConfig(width=4))
    batch = CORPUS.train.batch([0, 1, 2])
    batch.available["audio"] = torch.tensor([True, False, True])
    gates = model(batch).extras["gates"]  # (B, M)
    torch.testing.assert_close(gates.sum(1), torch.ones(3))
    assert gates[1].tolist() == [1.0, 0.0]
    assert (gates[0] > 0).all()


def test_the_sum_is_what_the_equation_says():
    torch.manual_seed(0)
    model = build(CORPUS.dims, config=GatedConfig(width=4)).eval()
    batch = CORPUS.train.batch([5])
    h = []
    for m, x in batch.features.items():
        h.append(torch.nn.functional.gelu(model.maps[m](x)).mean(1))
    g = torch.cat([model.gate(v) for v in h], 1).softmax(1)
    z = g[:, :1] * h[0] + g[:, 1:] * h[1]
    torch.testing.assert_close(model(batch).pooled, z)
