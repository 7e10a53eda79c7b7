"""The readout: LoRA, last token, head, training."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from thinkers import SMALL, VOCABULARY, changed, config, score, stirred, thinker
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmsa_lib import training
from mmsa_lib.corpora.schema import Card, Ragged, Split, make_corpus
from mmsa_lib.errors import ConfigError, UnknownNameError
from mmsa_lib.methods import readout
from mmsa_lib.methods.readout import (
    SUFFIXES,
    Pool,
    ReadoutConfig,
    Regressor,
    Scaler,
    adapted,
    attach_lora,
    count_lora,
    last_index,
    linear_shapes,
    standardised_loss,
)
from mmsa_lib.nets import omni
from mmsa_lib.nets.omni import MODALITIES
from mmsa_lib.nets.output import Output


@pytest.fixture(scope="module")
def batch(corpus):
    return corpus.train.batch(range(4))


@pytest.fixture(scope="module")
def model(backbone, corpus):
    """A readout with stirred weights, in eval mode; tests leave it as it is."""
    labels = corpus.train.labels["sentiment"]
    return stirred(readout.discriminative(thinker(backbone), SMALL, labels))


# --- LoRA arithmetic ------------------------------------------------------------------

TABLE = {  # readout of the specification: targets, and parameters at ranks 8 to 64
    "LLM q,v": [2_523_136, 5_046_272, 10_092_544, 20_185_088],
    "LLM q,k,v,o": [5_046_272, 10_092_544, 20_185_088, 40_370_176],
    "LLM all 7": [20_185_088, 40_370_176, 80_740_352, 161_480_704],
    "7 suffixes": [25_760_768, 51_521_536, 103_043_072, 206_086_144],
    # "all 7 + every vision Linear" there: of the LLM, and of the blocks without merger
    "LLM all 7 + vision": [26_416_128, 52_832_256, 105_664_512, 211_329_024],
    "every Linear": [32_504_832, 65_009_664, 130_019_328, 260_038_656],
}
PERCENT = {  # as printed there
    "LLM q,v": [0.028, 0.056, 0.113, 0.225],
    "LLM q,k,v,o": [0.056, 0.113, 0.225, 0.450],
    "LLM all 7": [0.225, 0.450, 0.896, 1.776],
    "7 suffixes": [0.288, 0.574, 1.1405, 2.255],
    "LLM all 7 + vision": [0.295, 0.588, 1.169, 2.311],
    "every Linear": [0.363, 0.723, 1.435, 2.829],
}
WHOLE = 8_931_813_888


@pytest.fixture(scope="module")
def full():
    """The published 7B Thinker, shapes only."""
    return omni.meta_thinker(omni.full_config())


def test_lora_of_the_7b_by_arithmetic(full):
    shapes = linear_shapes(full)
    language = {n: s for n, s in shapes.items() if n.startswith("model.language")}
    rest = {n: s for n, s in shapes.items() if n != "lm_head"}
    every = tuple({n.rpartition(".")[2] for n in rest})
    targets = {
        "LLM q,v": (language, ("q_proj", "v_proj")),
        "LLM q,k,v,o": (language, SUFFIXES[:4]),
        "LLM all 7": (language, SUFFIXES),
        "7 suffixes": (shapes, SUFFIXES),
        "LLM all 7 + vision": (
            {n: s for n, s in rest.items() if ".visual.blocks." in n}
            | {n: language[n] for n in adapted(language)},
            every,
        ),
        "every Linear": (rest, every),
    }
    for row, (table, suffixes) in targets.items():
        for k, rank in enumerate((8, 16, 32, 64)):
            count = count_lora(table, suffixes, rank)
            assert count == TABLE[row][k], (row, rank)
            percent = 100 * count / (WHOLE + count)
            digits = 4 if percent == pytest.approx(1.1405, abs=1e-3) else 3
            assert round(percent, digits) == PERCENT[row][k], (row, rank)
    assert sum(p.numel() for p in full.parameters()) == WHOLE


@pytest.mark.parametrize(
    ("freeze_towers", "count", "percent"),
    [(False, 103_043_072, 1.1405), (True, 80_740_352, 0.8959)],
)
def test_peft_counts_the_same_on_the_7b(freeze_towers, count, percent):
    fresh = omni.meta_thinker(omni.full_config())
    fresh.requires_grad_(False)
    with torch.device("meta"):
        wrapped = attach_lora(fresh, ReadoutConfig(freeze_towers=freeze_towers))
    trained, total = wrapped.get_nb_trainable_parameters()
    assert (trained, total) == (count, WHOLE + count)
    assert round(100 * trained / total, 4) == percent


def test_head_of_the_7b():
    def size(ln):
        head = Regressor(3584, ReadoutConfig(ln=ln))
        return sum(p.numel() for p in head.parameters()), head

    (hidden, a), (before, b) = size("hidden"), size("input")
    assert hidden == 918_529 and before == 925_185 and before - hidden == 6_656
    assert hidden - sum(p.numel() for p in a.after.parameters()) == 918_017
    assert before - sum(p.numel() for p in b.before.parameters()) == 918_017


def test_suffixes_reach_into_the_towers_as_far_as_names_go(backbone):
    """The pattern that the paper's 1.14 % implies."""
    for freeze_towers in (False, True):
        loaded = thinker(backbone).model
        names = set(linear_shapes(loaded))
        wrapped = attach_lora(loaded, replace(SMALL, freeze_towers=freeze_towers))
        found = {
            n.removeprefix("base_model.model.").rpartition(".lora_A")[0]
            for n, _ in wrapped.named_parameters()
            if "lora_A" in n
        }
        language = {n for n in found if n.startswith("model.language_model.")}
        assert {n.rpartition(".")[2] for n in language} == set(SUFFIXES)
        assert len(language) == 2 * 7
        towers = found - language
        if freeze_towers:
            assert not towers
            continue
        assert found == set(adapted(names))
        audio = {n for n in towers if ".audio_tower." in n}
        assert {n.rpartition(".")[2] for n in audio} == {"q_proj", "k_proj", "v_proj"}
        vision = {n.rpartition(".")[2] for n in towers - audio}
        assert vision == {"gate_proj", "up_proj", "down_proj"}
        left = {n.rpartition(".")[2] for n in names - found}
        assert left >= {"out_proj", "fc1", "fc2", "lm_head", "q", "k", "v", "proj"}
    with pytest.raises(ConfigError, match="LoRA would adapt nothing"):
        attach_lora(nn.Sequential(nn.Linear(2, 2)), SMALL)


# --- LoRA at work ---------------------------------------------------------------------


def test_lora_starts_as_nothing_and_merges_exactly(backbone, batch):
    body = thinker(backbone, quantise=False)
    with torch.inference_mode():
        plain, mask = body(batch)
        body.model = attach_lora(body.model, SMALL).eval()
        torch.testing.assert_close(body(batch)[0], plain, rtol=0, atol=0)
        stirred(body)
        adapted_now = body(batch)[0]
        body.model.merge_adapter()
        merged = body(batch)[0]
        body.model.unmerge_adapter()
    assert (adapted_now - plain)[mask].abs().mean() > 1e-2
    torch.testing.assert_close(merged[mask], adapted_now[mask], rtol=0, atol=1e-4)


def test_gradients_of_the_first_two_steps(backbone, batch, corpus):
    labels = corpus.train.labels["sentiment"]
    torch.manual_seed(0)
    fresh = readout.discriminative(thinker(backbone), SMALL, labels).train()
    loss = standardised_loss(labels, "mse")  # L1's signs can cancel in a bias
    before = {n: t.clone() for n, t in fresh.state_dict().items() if "lora_" not in n}
    parameters = [p for p in fresh.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=0.5)
    for step in (1, 2):
        optimiser.zero_grad()
        loss(fresh(batch), batch).backward()
        for name, p in fresh.named_parameters():
            if not p.requires_grad:
                assert name.startswith("body.") and "lora_" not in name
                assert p.grad is None, name
            elif "lora_A" in name and step == 1:
                assert not p.grad.any(), name
            else:  # every adapter and the whole head
                assert p.grad.any(), (step, name)
        optimiser.step()
    moved = {n for n, t in before.items() if not torch.equal(t, fresh.state_dict()[n])}
    assert moved and all(n.startswith("regressor.") for n in moved)
    assert any("weight.quant_state" in n or "absmax" in n for n in before)  # 4-bit


# --- the last token -------------------------------------------------------------------


def test_last_index_whichever_side_is_padded():
    rows = {"00111": 4, "11100": 2, "01101": 4, "11111": 4, "00010": 3, "10000": 0}
    mask = torch.tensor([[int(c) for c in row] for row in rows])
    for kind in (torch.bool, torch.long, torch.float32):
        assert last_index(mask.to(kind)).tolist() == list(rows.values())
    wrong = mask.sum(1) - 1  # as the paper has it
    right = (wrong == last_index(mask)).tolist()
    assert right == [False, True, False, True, False, True]
    mask[1] = 0
    with pytest.raises(ConfigError, match=r"rows \[1\]"):
        last_index(mask)


def test_padding_never_changes_a_score(model, corpus):
    batch = corpus.train.batch(range(len(corpus.train)))
    lengths = model.body.inputs(batch)["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) == len(batch)
    single = torch.cat(
        [score(model, corpus.train.batch([i])) for i in range(len(batch))]
    )
    assert single.std() > 0.03  # else equality would say little
    for side in ("left", "right"):
        with changed(model.body, padding_side=side):
            padded = score(model, batch)
        torch.testing.assert_close(padded, single, rtol=0, atol=1e-5)


def test_the_papers_index_fails_under_left_padding(model, batch, monkeypatch):
    good = score(model, batch)
    monkeypatch.setattr(readout, "last_index", lambda mask: mask.sum(1) - 1)
    off = (score(model, batch) - good).abs().flatten()
    longest = int(model.body.inputs(batch)["attention_mask"].sum(1).argmax())
    assert off[longest] < 1e-6  # nothing is padded there
    others = [i for i in range(len(batch)) if i != longest]
    assert off[others].min() > 1e-3
    with changed(model.body, padding_side="right"):
        torch.testing.assert_close(score(model, batch), good, rtol=0, atol=1e-5)


# --- no vocabulary --------------------------------------------------------------------


class Wide(TorchDispatchMode):
    """Notes the operations that make a tensor with a vocabulary-sized last axis."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.ndim and t.shape[-1] == VOCABULARY:
                self.seen.append(str(function))
        return out


class Never(nn.Module):
    def forward(self, *args):
        raise AssertionError("the LM head was called")


def test_no_vocabulary_logits_in_the_discriminative_path(model, batch, corpus):
    labels = corpus.train.labels["sentiment"]
    base, loss, calls = model.body.base, standardised_loss(labels), []
    hook = base.lm_head.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    with Wide() as wide:
        loss(model(batch), batch).backward()
        score(model, batch)
    model.zero_grad()
    assert not calls and not wide.seen
    # that both would have been noticed: the same model asked for logits
    with Wide() as wide, torch.inference_mode():
        base(**model.body.inputs(batch))
    hook.remove()
    assert calls == [1] and wide.seen
    expected = score(model, batch)
    with changed(base, lm_head=Never()):
        torch.testing.assert_close(score(model, batch), expected, rtol=0, atol=0)
        with pytest.raises(AssertionError, match="LM head"):
            base(**model.body.inputs(batch))


# --- head, pooling, scaler ------------------------------------------------------------


def test_head_is_the_equation():
    torch.manual_seed(0)
    z = torch.randn(3, 10)
    for ln in ("hidden", "input"):
        head = Regressor(10, ReadoutConfig(width=6, ln=ln)).eval()
        for p in head.parameters():
            p.data.normal_()
        w1, b1 = head.inner.weight, head.inner.bias
        norm = nn.functional.layer_norm
        if ln == "hidden":
            inner = norm(z @ w1.T + b1, (6,), head.after.weight, head.after.bias)
        else:
            inner = norm(z, (10,), head.before.weight, head.before.bias) @ w1.T + b1
        expected = inner.relu() @ head.outer.weight.T + head.outer.bias
        torch.testing.assert_close(head(z), expected)
    with pytest.raises(UnknownNameError, match="hidden, input"):
        ReadoutConfig(ln="both")
    with pytest.raises(UnknownNameError, match="attention, last, mean"):
        ReadoutConfig(pool="first")
    with pytest.raises(ConfigError, match="at least 1"):
        ReadoutConfig(rank=0)


def test_pools_look_at_real_tokens_only():
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 4)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    real = [hidden[0, 2:], hidden[1, :4]]
    attention = Pool("attention", 4)
    weights = [(h @ attention.query.weight[0]).softmax(0) for h in real]
    expected = {
        "last": [h[-1] for h in real],
        "mean": [h.mean(0) for h in real],
        "attention": [w @ h for w, h in zip(weights, real, strict=True)],
    }
    for how, rows in expected.items():
        pool = attention if how == "attention" else Pool(how, 4)
        torch.testing.assert_close(pool(hidden, mask), torch.stack(rows))
        noise = torch.where(mask[..., None], hidden, 1e3)
        torch.testing.assert_close(pool(noise, mask), torch.stack(rows))
        assert pool(hidden.bfloat16(), mask).dtype == torch.float32


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_pools_and_padding_in_the_whole_model(model, corpus, pool):
    batch = corpus.train.batch(range(3))
    torch.manual_seed(1)
    with changed(model, pool=Pool(pool, 64)):
        single = torch.cat([score(model, corpus.train.batch([i])) for i in range(3)])
        torch.testing.assert_close(score(model, batch), single, rtol=0, atol=1e-5)


def test_layers_are_those_of_the_library(model, batch):
    inputs = model.body.inputs(batch)
    with torch.inference_mode():
        out = model.body.base.model(**inputs, output_hidden_states=True)
        last, mask = model.hidden(batch)
        torch.testing.assert_close(last, out.last_hidden_state)
        assert mask.equal(inputs["attention_mask"].bool())
        for layer, expected in ((0, out.hidden_states[1]), (-2, out.hidden_states[1])):
            with changed(model, config=replace(SMALL, layer=layer)):
                found, _ = model.hidden(batch)
            torch.testing.assert_close(found, expected)
        hooks = [
            (m, dict(m._forward_hooks))
            for m in model.body.base.model.language_model.layers
        ]
        # -1 is the last layer after its norm, 1 is the same layer before it
        with changed(model, config=replace(SMALL, layer=1)):
            before, _ = model.hidden(batch)
        norm = model.body.base.model.language_model.norm
        torch.testing.assert_close(norm(before), last)
    assert all(m._forward_hooks == before for m, before in hooks)  # none is left
    with pytest.raises(ConfigError, match="layer 2 of a language model with 2 layers"):
        readout.Readout(model.body, replace(SMALL, layer=2))


def test_scaler_and_losses():
    labels = np.array([[-2.0], [0.5], [3.0], [1.1]])
    scaler = Scaler(labels)
    y = torch.tensor(labels, dtype=torch.float32)
    u = scaler.scale(y)
    assert u.mean().item() == pytest.approx(0, abs=1e-6)
    assert u.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(scaler.unscale(u), y)
    assert not list(scaler.parameters()) and set(scaler.state_dict()) == {"mean", "sd"}
    with pytest.raises(ConfigError, match="all equal"):
        Scaler(np.ones((3, 1)))

    class Sample:
        labels = {"sentiment": y}

    found = torch.tensor([[1.0], [0.5], [0.0], [-4.0]])
    output = Output({"sentiment": found}, pooled=y, last=y)
    sd = labels.std()
    l1 = standardised_loss(labels)(output, Sample)
    assert l1.item() * sd == pytest.approx((found - y).abs().mean().item(), rel=1e-6)
    mse = standardised_loss(labels, "mse")(output, Sample)
    assert mse.item() * sd**2 == pytest.approx(((found - y) ** 2).mean().item())
    assert standardised_loss(labels, "huber")(output, Sample) < mse
    with pytest.raises(UnknownNameError, match="huber, l1, mse"):
        standardised_loss(labels, "l2")


def test_the_scaler_is_of_the_training_split(model, corpus):
    labels = corpus.train.labels["sentiment"]
    assert model.scaler.mean.item() == pytest.approx(labels.mean())
    assert model.scaler.sd.item() == pytest.approx(labels.std())


def test_clipping_is_for_evaluation_only(model, batch):
    with torch.no_grad():
        model.regressor.outer.bias.add_(50)
    try:
        assert score(model, batch).min() > 3
        with changed(model, config=replace(SMALL, clip=True)):
            assert score(model, batch).eq(3).all()
            with torch.no_grad():
                assert model.train()(batch).predictions["sentiment"].min() > 3
    finally:
        with torch.no_grad():
            model.regressor.outer.bias.sub_(50)


# --- what a batch may lack ------------------------------------------------------------


def test_batches_of_one_and_without_a_modality(model, corpus):
    scores = {}
    for kept in (MODALITIES, ("audio",), ("vision",), ("text", "audio")):
        heard = [m for m in kept if m != "text"]
        batch = corpus.only(heard).train.batch([1])
        if "text" not in kept:
            batch.raw_text = None
        scores[kept] = score(model, batch).item()
        assert math.isfinite(scores[kept])
    assert len(set(scores.values())) == len(scores)
    # absent from the batch, and of length zero in all of its samples, are the same
    gone = {"vision": np.ones(len(corpus.train), bool)}
    empty = corpus.train.without(gone).batch([0, 1])
    absent = corpus.only(["audio"]).train.batch([0, 1])
    torch.testing.assert_close(score(model, empty), score(model, absent))
    # one of two lacks its sound: the other's score does not notice
    gone = {"audio": np.arange(len(corpus.train)) == 0}
    mixed = score(model, corpus.train.without(gone).batch([0, 1]))
    whole = score(model, corpus.train.batch([0, 1]))
    torch.testing.assert_close(mixed[1], whole[1], rtol=0, atol=1e-5)
    assert abs(mixed[0] - whole[0]) > 1e-4


def test_what_cannot_be_read_is_refused_by_name(model, corpus):
    batch = corpus.train.batch([0, 1, 2])
    batch.features["audio"][1, 3, 5] = math.nan
    with pytest.raises(ConfigError, match="audio holds NaN") as error:
        score(model, batch)
    assert batch.ids[1] in str(error.value) and batch.ids[0] not in str(error.value)
    with (
        changed(model.body, modalities=("vision",)),
        pytest.raises(ConfigError, match="nothing of vision is there"),
    ):
        score(model, corpus.only(["audio"]).train.batch([0]))
    with pytest.raises(ConfigError, match="empty"):
        score(model, corpus.train.batch([]))


# --- learning -------------------------------------------------------------------------


def test_the_readout_overfits_a_handful(overfit, handful):
    found = training.evaluate(overfit, handful, "valid")
    constant = np.abs(found.truth - found.truth.mean()).mean()
    assert np.abs(found.truth - found.prediction).mean() < 0.15 * constant


def worded(n, rng):
    """Sentences whose sentiment is a sum over their words."""
    value = {"good": 1.0, "fine": 0.5, "so": 0.0, "dull": -0.5, "bad": -1.0}
    rows = [rng.choice(list(value), 3) for _ in range(n)]
    texts = [" ".join(row) for row in rows]
    return texts, np.array([[sum(value[w] for w in row)] for row in rows])


def test_tiny_end_to_end_beats_the_training_mean(backbone):
    rng = np.random.default_rng(0)
    splits = {}
    for name, n in (("train", 64), ("valid", 32), ("test", 64)):
        texts, y = worded(n, rng)
        silence = Ragged.from_list([np.zeros((1, 128))] * n)
        ids = [f"{name}-{i}" for i in range(n)]
        split = Split(name, ids, {"audio": silence}, {"sentiment": y}, raw_text=texts)
        splits[name] = split
    made = make_corpus(Card("words", "sums", "tests", "none", synthetic=True), splits)
    labels = made.train.labels["sentiment"]
    frozen = training.fit(
        lambda: readout.discriminative(
            thinker(backbone, modalities=["text"]), SMALL, labels
        ),
        made,
        config(epochs=12, batch_size=16, eval_batch_size=64, schedule="cosine"),
        loss=standardised_loss(labels),
    )
    found = training.evaluate(frozen, made)
    mae = np.abs(found.truth - found.prediction).mean()
    assert mae < 0.6 * np.abs(found.truth - labels.mean()).mean()
