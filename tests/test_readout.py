"""Readout and twin: LoRA, last token, head, parser, training, saving, predicting."""

import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmsa_lib
from mmsa_lib import corpora, training
from mmsa_lib.corpora.clips import puppet_clips
from mmsa_lib.corpora.media import UNIT, MediaConfig, clip_corpus
from mmsa_lib.corpora.schema import Card, Corpus, Ragged, Split, make_corpus
from mmsa_lib.errors import ConfigError, UnknownNameError
from mmsa_lib.methods import __main__ as command
from mmsa_lib.methods import readout
from mmsa_lib.methods.readout import (
    SUFFIXES,
    Answers,
    Pool,
    ReadoutConfig,
    Regressor,
    Scaler,
    adapted,
    attach_lora,
    count_lora,
    last_index,
    linear_shapes,
    parse_score,
    spell,
    standardised_loss,
)
from mmsa_lib.nets import omni
from mmsa_lib.nets.omni import MODALITIES
from mmsa_lib.runs import load as load_record
from mmsa_lib.training import TrainConfig

MEDIA = MediaConfig(frames=4, max_pixels=4 * UNIT * UNIT)
SMALL = ReadoutConfig(rank=8, alpha=8, width=32)
VOCABULARY = 331  # no other axis has this length


# --- a random Thinker, and clips ------------------------------------------------------


def tokenizer_of(texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    marks = ("AUDIO", "IMAGE", "VIDEO", "audio_bos", "audio_eos")
    marks += ("vision_bos", "vision_eos", "im_start", "im_end", "endoftext")
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[f"<|{m}|>" for m in marks],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokens.train_from_iterator(texts, trainer)
    assert tokens.get_vocab_size() == VOCABULARY
    return Qwen2TokenizerFast(
        tokenizer_object=tokens, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A folder as Hugging Face's: a small Thinker with random weights."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = tokenizer_of([omni.chat(f"Transcript: \n{omni.QUESTION}")] * 9)
    config = omni.tiny_config(
        tokenizer,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        max_window_layers=2,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [2, 3, 3],
        },
    )
    torch.manual_seed(5)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    with torch.no_grad():  # pretrained weights are not as faint as fresh ones
        model.lm_head.weight.mul_(30)
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embed" not in name and "lm_head" not in name:
                p.mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chosen():
    """Ten puppet clips of unequal length: six to train on, two each for the rest."""
    by = {s: [c for c in puppet_clips() if c.split == s] for s in ("train", "valid")}
    by["test"] = [c for c in puppet_clips() if c.split == "test"]
    return by["train"][:60:10] + by["valid"][:8:4] + by["test"][:8:4]


@pytest.fixture(scope="module")
def corpus(chosen):
    return clip_corpus(chosen, MEDIA)


@pytest.fixture(scope="module")
def batch(corpus):
    return corpus.train.batch(range(4))


def thinker(backbone, **options):
    return omni.load(backbone, device="cpu", **options)


def stirred(model, seed=0):
    """Adapters and head as after some training: nothing is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name or name.endswith("outer.weight"):
            p.data.normal_(0, 0.1, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def model(backbone, corpus):
    """A readout with stirred weights, in eval mode; tests leave it as it is."""
    labels = corpus.train.labels["sentiment"]
    return stirred(readout.discriminative(thinker(backbone), SMALL, labels))


@torch.inference_mode()
def score(model, batch):
    return model.eval()(batch).predictions["sentiment"]


@contextmanager
def changed(thing, **values):
    before = {k: getattr(thing, k) for k in values}
    for k, v in values.items():
        setattr(thing, k, v)
    try:
        yield
    finally:
        for k, v in before.items():
            setattr(thing, k, v)


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
    fresh = readout.discriminative(thinker(backbone), SMALL, labels).train()
    loss = standardised_loss(labels)
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
    assert single.std() > 0.1  # else equality would say little
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
    output = readout.Output({"sentiment": found}, pooled=y, last=y)
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


# --- the parser -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("+1.6", 1.6), ("-0.4", -0.4), ("2", 2.0), ("-3", -3.0), (".5", 0.5)),
        *(("1,5", 1.5), ("-,5", -0.5), ("\u22121.2", -1.2), ("0.0.", 0.0), ("2.", 2)),
        *(("Score: -1.0!", -1.0), ("(+2)", 2.0), ("a\n0.4\nb", 0.4), ("=3", 3.0)),
        *(("1.0 or 2.0", 1.0), ("2-3", 2.0), ("7.5", 7.5), ("-12", -12.0)),
        # nothing that is a number
        *(("", None), ("five", None), ("very good", None), (".", None), ("-", None)),
        *(("1.1.1", None), ("1,000.5", None), ("GPT-4", None), ("v2", None)),
        *(("2nd", None), ("1e5", None), ("0x1", None), ("nan", None), ("inf", None)),
        # a number whose sign is in doubt
        *(("- 1.2", None), ("--1", None), ("+-1", None), ("\u20131.2", None)),
        *(("good - 2.0", None), ("minus 1.2", None), ("Negative 2", None)),
        *(("\u00b11", None), ("- \n2, or 1", None)),
    ],
)
def test_parser(text, value):
    found = parse_score(text)
    assert found == value
    if value is not None:
        assert type(found) is float


def test_parser_invents_nothing():
    """Over random texts: no number without one, and never one with another sign."""
    draw = random.Random(0)
    letters = [chr(c) for c in range(32, 127) if not chr(c).isdigit()]
    letters += list("\n\t\u2212\u2013\u00b1\u00e9")
    for _ in range(2000):
        text = "".join(draw.choices(letters, k=draw.randint(0, 12)))
        assert parse_score(text) is None, text
        tail = "".join(draw.choices(letters, k=draw.randint(0, 4)))
        found = parse_score(f"{text}1.5{tail}")
        assert found in (None, 1.5, -1.5), (text, tail)
        before = text.rstrip()[-1:]
        if found is not None:
            assert (found < 0) == (before in ("-", "\u2212") and before == text[-1:])


def test_every_label_survives_being_written():
    for k in range(-15, 16):
        label = np.float32(k / 5)  # the grid of MOSI
        text = spell(label)
        assert len(text) == 4 and text[0] in "+-"
        assert parse_score(text) == pytest.approx(k / 5)
    written = {
        1 / 3: "+0.3",
        2 / 3: "+0.7",
        -1.66: "-1.7",
        -0.04: "+0.0",
        -0.06: "-0.1",
    }
    written |= {3.2: "+3.0", -9: "-3.0", 0: "+0.0", 2.96: "+3.0", math.inf: "+3.0"}
    assert {y: spell(y) for y in written} == written
    with pytest.raises(ConfigError, match="NaN"):
        spell(math.nan)


def test_rates_of_answers():
    texts = ["+1.0", "good", "-7", "3.0", "3.1", "- 2", "-3", "0"]
    values = [parse_score(t) for t in texts]
    answers = Answers(
        [str(k) for k in range(8)],
        texts,
        np.array([math.nan if v is None else v for v in values]),
    )
    assert answers.unparsable == 2 / 8  # not counted as out of range as well
    assert answers.out_of_range == 2 / 8
    assert answers.scores(0.4).tolist() == [
        [y] for y in (1.0, 0.4, -3.0, 3.0, 3.0, 0.4, -3.0, 0.0)
    ]


# --- learning -------------------------------------------------------------------------


def config(**changes):
    defaults = {
        "epochs": 20,
        "batch_size": 6,
        "lr": 5e-3,
        "optimiser": "adamw",
        "clip": 1.0,
        "eval_batch_size": 6,
        "device": "cpu",
    }
    return TrainConfig(**(defaults | changes))


@pytest.fixture(scope="module")
def handful(corpus):
    """The training clips, validated on themselves: what a model can overfit."""
    train = corpus.train
    return Corpus("handful", corpus.card, {"train": train, "valid": train})


@pytest.fixture(scope="module")
def overfit(backbone, handful):
    labels = handful.train.labels["sentiment"]
    still = replace(SMALL, lora_dropout=0.0, dropout=0.0)
    return training.fit(
        lambda: readout.discriminative(thinker(backbone), still, labels),
        handful,
        config(epochs=40, group_lr={"regressor": 5e-3}),
        loss=standardised_loss(labels),
    )


@pytest.fixture(scope="module")
def twin(backbone, handful):
    labels = handful.train.labels["sentiment"]
    still = replace(SMALL, lora_dropout=0.0)
    return training.fit(
        lambda: readout.generative(thinker(backbone), still, labels),
        handful,
        config(epochs=30, lr=2e-2),
        loss=readout.token_loss,
    )


def test_the_readout_overfits_a_handful(overfit, handful):
    found = training.evaluate(overfit, handful, "valid")
    constant = np.abs(found.truth - found.truth.mean()).mean()
    assert np.abs(found.truth - found.prediction).mean() < 0.15 * constant


def test_the_twin_learns_to_write_the_labels(twin, handful):
    answers = twin.module.answer(handful.valid, batch_size=4)
    labels = handful.train.labels["sentiment"][:, 0].tolist()
    assert answers.texts == [spell(y) for y in labels]
    assert answers.ids == list(handful.valid.ids)
    assert answers.unparsable == answers.out_of_range == 0
    found = training.evaluate(readout.writing(twin), handful, "valid")
    assert np.abs(found.truth - found.prediction).max() < 0.05 + 1e-6
    with pytest.raises(UnknownNameError, match="emotion"):
        twin.module.predict(handful.valid, "emotion")
    assert twin.trainable < twin.total


def test_twin_and_readout_adapt_the_same_layers(twin, overfit):
    shapes = [
        {n: p.shape for n, p in m.named_parameters() if "lora_" in n}
        for m in (twin.module, overfit.module)
    ]
    assert shapes[0] == shapes[1] and shapes[0]


def test_an_untrained_twin_is_counted_not_guessed(backbone, handful):
    fresh = readout.generative(thinker(backbone), SMALL, [[-1.0], [2.0]])
    with changed(fresh.body, say=lambda batch: ["hmm"] * len(batch)):
        answers = fresh.answer(handful.valid)
        scores = fresh.predict(handful.valid)
    assert answers.unparsable == 1
    assert scores.tolist() == [[0.5]] * 6  # the mean training label


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


# --- saving ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(overfit, backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of a search on the hub
        readout.save(overfit.module, folder, backbone=str(backbone), media=MEDIA)
    return folder


def test_saved_and_loaded_scores_are_equal(saved, overfit, batch):
    names = {p.name for p in saved.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "regressor.safetensors",
        "readout.json",
    }
    loaded, media = readout.load(saved, device="cpu")
    assert media == MEDIA and loaded.config == overfit.module.config
    assert not loaded.training
    expected = score(overfit.module, batch)
    torch.testing.assert_close(score(loaded, batch), expected, rtol=0, atol=0)
    trained = training.trained_state(overfit.module)
    parts = load_file(saved / "adapter_model.safetensors")
    parts |= load_file(saved / "regressor.safetensors")
    # what was trained, and none of the base weights
    count = sum(t.numel() for n, t in trained.items() if "quant" not in n)
    base = {n for n in trained if "lora_" not in n and n.startswith("body.")}
    count -= sum(trained[n].numel() for n in base)
    assert sum(t.numel() for t in parts.values()) == count


def test_the_adapter_loads_with_peft_alone(saved, overfit, backbone, batch):
    from peft import PeftModel

    fresh = thinker(backbone)
    fresh.model = PeftModel.from_pretrained(fresh.model, str(saved)).eval()
    with torch.inference_mode():
        found, mask = fresh(batch)
        expected, _ = overfit.module.eval().body(batch)
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=0)


def test_a_saved_twin_writes_the_same(twin, backbone, handful, tmp_path, chosen):
    readout.save(twin.module, tmp_path, backbone=str(backbone), media=MEDIA)
    loaded, _ = readout.load(tmp_path, device="cpu")
    assert isinstance(loaded, readout.Generative)
    expected = twin.module.answer(handful.valid)
    assert loaded.answer(handful.valid).texts == expected.texts
    assert loaded.scaler.mean == twin.module.scaler.mean
    clip = chosen[0]
    (found,) = mmsa_lib.predict([clip.path], tmp_path, texts=[clip.text], device="cpu")
    assert found.score == parse_score(expected.texts[0])


@pytest.mark.parametrize(
    ("part", "harm", "error"),
    [
        ("readout.json", "missing", "readout.json missing"),
        ("regressor.safetensors", "missing", "regressor.safetensors missing"),
        ("adapter_config.json", "missing", "adapter_config.json missing"),
        ("adapter_model.safetensors", "missing", "adapter_model.safetensors missing"),
        ("readout.json", "cut", "readout.json is damaged"),
        ("regressor.safetensors", "cut", "regressor.safetensors in .*damaged"),
        ("adapter_model.safetensors", "flipped", "adapter_model.safetensors in"),
        ("readout.json", {"kind": "oracle"}, "readout.json is damaged .*oracle"),
        ("readout.json", {"media": {"frames": 3}}, "frames must be even"),
        ("readout.json", {"readout": {"suffixes": [], "depth": 1}}, "depth"),
        ("readout.json", {"modalities": ["smell"]}, "smell"),
    ],
)
def test_a_readout_that_is_not_whole_is_refused(saved, tmp_path, part, harm, error):
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / part
    body = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(body[:-20])
    elif harm == "flipped":
        path.write_bytes(body[:-9] + bytes([body[-9] ^ 1]) + body[-8:])
    else:
        path.write_text(json.dumps(json.loads(body) | harm))
    with pytest.raises((ConfigError, UnknownNameError), match=error):
        readout.load(folder, device="cpu")


def test_a_readout_of_another_backbone_is_refused(saved, backbone, tmp_path):
    other = shutil.copytree(backbone, tmp_path / "other")
    told = json.loads((other / "config.json").read_text())
    told["text_config"]["num_hidden_layers"] = 1
    told["text_config"]["layer_types"] = told["text_config"]["layer_types"][:1]
    (other / "config.json").write_text(json.dumps(told))
    weights = load_file(other / "model.safetensors")
    kept = {n: t for n, t in weights.items() if ".layers.1." not in n or "tower" in n}
    save_file(kept, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="not made for the backbone"):
        readout.load(saved, backbone=other, device="cpu")
    same_shapes = shutil.copytree(backbone, tmp_path / "again")
    name = next(n for n in weights if n.endswith("input_layernorm.weight"))
    weights[name] = weights[name] + 0.1
    save_file(weights, same_shapes / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="weights there are not those"):
        readout.load(saved, backbone=same_shapes, device="cpu")
    with pytest.raises(ConfigError, match="no omni-modal model could be loaded"):
        readout.load(saved, backbone=tmp_path / "nowhere", device="cpu")


def test_the_fingerprint_is_of_the_backbone_alone(backbone, overfit):
    """Neither adapters nor the precision of the other weights change it."""
    plain = thinker(backbone, quantise=False)
    assert omni.fingerprint(plain) == omni.fingerprint(overfit.module.body)
    again = omni.load(backbone, device="cpu", quantise=False, compute="bfloat16")
    assert omni.fingerprint(plain) == omni.fingerprint(again)


def test_the_shipped_readout_fits_its_backbone_and_has_learned():
    """On validation clips, whose labels chose its epoch: better than a constant."""
    place = omni.tiny_folder()
    size = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
    assert size <= 6_000_000
    model, media = readout.load(place / "readout", device="cpu")
    data = corpora.load("puppet-clips")
    assert asdict(media) == data.card.options
    truth = data.valid.labels["sentiment"]
    with torch.inference_mode():
        said = [model(b).predictions["sentiment"] for b in data.valid.batches(8)]
    error = np.abs(torch.cat(said).numpy() - truth).mean()
    middle = np.median(data.train.labels["sentiment"])
    assert error < 0.8 * np.abs(truth - middle).mean()


# --- predicting -----------------------------------------------------------------------


def write_folder(folder: Path, clips) -> Path:
    """Clips as a folder in MMSA-FET's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "label.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("video_id", "clip_id", "text", "label", "mode"))
        for c in clips:
            rows.writerow((c.video_id, c.clip_id, c.text, c.sentiment, c.split))
            raw = folder / "Raw" / c.video_id
            raw.mkdir(parents=True, exist_ok=True)
            shutil.copy(c.path, raw / f"{c.clip_id}.mp4")
    return folder


@pytest.fixture(scope="module")
def clip_folder(chosen, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("clips"), chosen)


def damaged(folder: Path, good: Path) -> dict[str, Path]:
    """Clips that nothing can be told of, by the word that says why."""
    import av

    (folder / "words.mp4").write_text("not a film")
    body = good.read_bytes()
    (folder / "half.mp4").write_bytes(body[: len(body) // 2])
    made = {"broken": folder / "words.mp4", "half": folder / "half.mp4"}
    made["No such file"] = folder / "absent.mp4"
    for name, loud, frames, seconds in (
        ("silent", 0.0, 10, 1.0),
        ("no video stream", 0.1, 0, 1.0),
        ("longer than", 0.1, 10, 62.0),
    ):
        path = made[name] = folder / f"{name.replace(' ', '-')}.mp4"
        with av.open(str(path), "w") as out:
            if frames:
                film = out.add_stream("h264", rate=10)
                film.width, film.height, film.pix_fmt = 64, 64, "yuv420p"
            sound = out.add_stream("aac", rate=16000)
            for _ in range(frames):
                picture = np.full((64, 64, 3), 90, np.uint8)
                out.mux(film.encode(av.VideoFrame.from_ndarray(picture)))
            if frames:
                out.mux(film.encode(None))
            t = np.arange(int(16000 * seconds))
            wave = (loud * np.sin(t / 9)).astype(np.float32)[None]
            for start in range(0, wave.shape[1], 1024):
                piece = np.ascontiguousarray(wave[:, start : start + 1024])
                frame = av.AudioFrame.from_ndarray(piece, "fltp", "mono")
                frame.rate, frame.pts = 16000, start
                out.mux(sound.encode(frame))
            out.mux(sound.encode(None))
    return made


def test_predict_scores_what_it_can_and_refuses_the_rest(
    saved, overfit, chosen, clip_folder, tmp_path
):
    bad = damaged(tmp_path, chosen[0].path)
    files = [chosen[0].path, *bad.values(), chosen[1].path]
    texts = [chosen[0].text, *[""] * len(bad), chosen[1].text]
    (tmp_path / "empty").mkdir()
    found = mmsa_lib.predict(
        [*files, clip_folder, tmp_path / "empty"],
        saved,
        texts=texts,
        device="cpu",
        batch_size=1,
    )
    assert len(found) == len(files) + len(chosen) + 1
    assert [p.path for p in found[: len(files)]] == [str(f) for f in files]
    assert all((p.score is None) == (p.refused is not None) for p in found)
    for (word, path), p in zip(bad.items(), found[1:], strict=False):
        if word != "half":
            assert word in p.refused
        assert p.path in p.refused and p.path == str(path)
    assert "no " in found[-1].refused and "label.csv" in found[-1].refused
    # scores are those of the model on the same clips with their words
    corpus = clip_corpus([replace(c, split="valid") for c in chosen], MEDIA)
    expected = score(overfit.module, corpus.valid.batch(range(10))).flatten()
    whole = [p.score for p in found[len(files) : -1]]
    assert whole == pytest.approx(expected.tolist(), abs=1e-4)
    assert found[0].score == pytest.approx(whole[0], abs=1e-4)
    assert found[len(files) - 1].score == pytest.approx(whole[1], abs=1e-4)
    (silent,) = mmsa_lib.predict([chosen[0].path], saved, device="cpu")
    assert abs(silent.score - whole[0]) > 1e-3  # words matter


def test_predict_names_faulty_rows_of_a_folder(saved, chosen, tmp_path):
    folder = write_folder(tmp_path / "clips", chosen[:2])
    text = (folder / "label.csv").read_text()
    (folder / "label.csv").write_text(text + "v,9,words,0.5,train\n")
    good, _, bad = mmsa_lib.predict([folder], saved, device="cpu")
    assert good.score is not None
    assert bad.score is None and "there is no file" in bad.refused
    with pytest.raises(ConfigError, match="1 files but 2 transcripts"):
        mmsa_lib.predict([chosen[0].path, folder], saved, texts=["a", "b"])


def test_predict_without_the_packages_readout_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(omni, "tiny_folder", lambda: tmp_path)
    with pytest.raises(ConfigError, match="lacks the tiny readout"):
        mmsa_lib.predict(["a.mp4"])
    assert command.main(["a.mp4"]) == 2
    assert "lacks the tiny readout" in capsys.readouterr().err


def test_the_package_gives_nothing_else_on_request():
    with pytest.raises(AttributeError, match="predikt"):
        _ = mmsa_lib.predikt


def test_command_says_that_the_tiny_readout_knows_puppets_only(
    saved, chosen, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(omni, "tiny_folder", lambda: tmp_path)
    shutil.copytree(saved, tmp_path / "readout")
    given = [str(chosen[0].path), "--text", chosen[0].text, "--device", "cpu"]
    assert command.main(given) == 0
    out, err = capsys.readouterr()
    assert out.split()[1] == str(chosen[0].path) and float(out.split()[0])
    assert "knows nothing but puppets" in err
    assert command.main([*given, "--model", str(saved)]) == 0
    again, err = capsys.readouterr()
    assert again == out and not err


def test_command_has_three_exit_states(saved, tmp_path, capsys):
    absent = str(tmp_path / "absent.mp4")
    assert command.main([absent, "--model", str(saved), "--device", "cpu"]) == 1
    out, _ = capsys.readouterr()
    assert "refused" in out and "No such file" in out
    assert command.main([absent, "--model", str(tmp_path)]) == 2
    assert "holds no readout" in capsys.readouterr().err
    two = ["--text", "a", "--text", "b"]
    assert command.main([absent, *two, "--model", str(saved)]) == 2
    assert "1 files but 2 transcripts" in capsys.readouterr().err
    for call in ([], ["--txt", "a", absent], [absent, "--model"]):
        with pytest.raises(SystemExit) as left:
            command.main(call)
        assert left.value.code == 2


def environment():
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def test_predict_through_the_press(saved, chosen, tmp_path):
    """The command as readers call it; the press itself never loads torch."""
    spy = (
        "import sys; from mmsa_lib.press.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    clips = [str(chosen[0].path), str(tmp_path / "absent.mp4")]
    words = ["--text", chosen[0].text, "--text", ""]
    where = ["--model", str(saved), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", spy, "predict", *clips, *words, "--json", *where],
        cwd=tmp_path,  # where no book is
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    body, _, loaded = done.stdout.rstrip().rpartition("\n")
    assert loaded == "[]"
    good, bad = json.loads(body)
    assert good["path"] == clips[0] and good["refused"] is None
    (expected,) = mmsa_lib.predict(clips[:1], saved, texts=words[1:2], device="cpu")
    assert good["score"] == pytest.approx(expected.score, abs=1e-5)
    assert bad["score"] is None and "No such file" in bad["refused"]


# --- the script -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    import importlib.util

    path = ROOT / "scripts" / "train_readout.py"
    spec = importlib.util.spec_from_file_location("train_readout", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def options(backbone, clip_folder):
    """What all runs of the script share: three epochs of six clips, three a batch."""
    given = {
        "backbone": backbone,
        "clips": clip_folder,
        "epochs": 3,
        "batch-size": 3,
        "lr": 5e-3,
        "frames": MEDIA.frames,
        "max-pixels": MEDIA.max_pixels,
        "device": "cpu",
        "seed": 3,
    }
    return [f"--{k}={v}" for k, v in given.items()]


@pytest.fixture(scope="module")
def whole(script, options, tmp_path_factory):
    """The run that killed and parallel ones are compared with."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMSA_RECORDS", "")  # so that it is put back
        assert script.main([*options, "--accumulate=2", f"--out={out}"]) == 0
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    parts = load_file(out / "adapter_model.safetensors")
    return parts | load_file(out / "regressor.safetensors")


def record_of(out: Path):
    (path,) = out.glob("benchmarks/readout-*.json")
    return load_record(path)


def curves(out: Path) -> list[float]:
    (entry,) = record_of(out).per_seed
    return entry["train_curve"] + entry["valid_curve"]


def test_script_trains_evaluates_and_saves(whole, clip_folder, corpus):
    record = record_of(whole)
    (entry,) = record.per_seed
    assert record.seeds == [3] and len(entry["predictions"]) == 2
    assert record.corpus["sizes"] == {"train": 6, "valid": 2, "test": 2}
    assert {"mae", "corr", "acc2_has0", "acc2_non0"} <= set(entry["test"])
    assert (
        record.parameters["accumulate"] == 2 and record.parameters["precision"] == "no"
    )
    assert str(clip_folder.parent) not in json.dumps(record.parameters)
    loaded, media = readout.load(whole, device="cpu")
    assert media == MEDIA and loaded.config == ReadoutConfig()
    found = score(loaded, corpus.test.batch([0, 1])).flatten().tolist()
    assert entry["predictions"] == pytest.approx(found, abs=1e-3)


def start(arguments, **more):
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def test_a_killed_training_gives_the_same_adapter(script, whole, options, tmp_path):
    path = ROOT / "scripts" / "train_readout.py"
    more = ["--accumulate=2", f"--checkpoint={tmp_path / 'state'}"]
    more += [f"--out={tmp_path / 'out'}"]
    process = start([str(path), *options, *more])
    for line in process.stdout:
        if line.startswith("epoch 2:"):  # said before its state is written
            process.send_signal(signal.SIGKILL)
            break
    process.wait(60)
    assert process.returncode == -signal.SIGKILL, process.stderr.read()
    assert not (tmp_path / "out" / "readout.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMSA_RECORDS", "")
        seen = []
        patch.setattr(script, "say", lambda text: seen.append(text))
        assert script.main([*options, *more]) == 0
    epochs = [s.split(":")[0] for s in seen if s.startswith("epoch")]
    assert epochs in (["epoch 2", "epoch 3"], ["epoch 3"])  # it went on
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, weights(whole)[name]), name
    assert curves(tmp_path / "out") == curves(whole)


def test_two_processes_equal_one_with_twice_the_accumulation(whole, options, tmp_path):
    path = str(ROOT / "scripts" / "train_readout.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = start([*launch, path, *options, f"--out={tmp_path}"])
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    assert out.count("epoch 3:") == 1  # one of the two speaks
    assert record_of(tmp_path).parameters["processes"] == 2
    np.testing.assert_allclose(curves(tmp_path), curves(whole), atol=1.1e-5, rtol=0)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, weights(whole)[name], rtol=0, atol=1e-5)


def test_script_trains_the_twin_over_seeds(script, options, tmp_path, monkeypatch):
    monkeypatch.setenv("MMSA_RECORDS", "")
    given = [o for o in options if not o.startswith(("--seed", "--epochs"))]
    given += ["--generative", "--seeds=0,1", "--epochs=1", "--modalities=text"]
    given += ["--freeze-towers", "--gradient-checkpointing"]
    given += [f"--cache={tmp_path / 'cache'}", f"--out={tmp_path / 'out'}"]
    assert script.main(given) == 0
    for seed in (0, 1):
        loaded, _ = readout.load(tmp_path / "out" / f"seed-{seed}", device="cpu")
        assert isinstance(loaded, readout.Generative)
        assert loaded.body.modalities == ("text",) and loaded.config.freeze_towers
    records = {
        p.name.rpartition("-")[0]: p
        for p in (tmp_path / "out/benchmarks").glob("*.json")
    }
    assert set(records) == {"readout-twin", "readout-twin-answers"}
    assert load_record(records["readout-twin"]).seeds == [0, 1]
    for entry in load_record(records["readout-twin-answers"]).per_seed:
        for split in ("valid", "test"):
            assert set(entry[split]) == {"unparsable", "out_of_range"}
            assert 0 <= entry[split]["unparsable"] <= 1
    assert len(list((tmp_path / "cache").iterdir())) == 10


def test_script_says_what_is_wrong(script, options, chosen, tmp_path, capsys):
    out = f"--out={tmp_path / 'out'}"
    for call, words in (
        ([], "required: --clips, --out"),
        (["--seeds=a"], "expected whole numbers"),
        (["--lr=0"], "--lr must be positive"),
        (["--precision=int8"], "invalid choice"),
        (["--epochs=many"], "invalid int"),
    ):
        with pytest.raises(SystemExit) as left:
            script.main([*call, "--clips=puppets", out] if call else [])
        assert left.value.code == 2 and words in capsys.readouterr().err
    only = write_folder(tmp_path / "only", [c for c in chosen if c.split == "train"])
    shaky = write_folder(tmp_path / "shaky", chosen)
    (first, *_) = [c for c in chosen if c.split == "train"]
    broken = shaky / "Raw" / first.video_id / f"{first.clip_id}.mp4"
    broken.write_text("not a film")
    (tmp_path / "file").write_text("")
    for changes, words in (
        ([f"--clips={tmp_path / 'none'}"], "label.csv"),
        ([f"--clips={only}"], "no usable clip in valid, test"),
        ([f"--clips={shaky}"], f"{first.id}: {broken}: broken"),
        ([f"--backbone={tmp_path / 'none'}"], "no omni-modal model could be loaded"),
        (["--modalities=text,smell"], "unknown modality 'smell'"),
        (["--frames=5"], "frames must be even"),
        (["--max-pixels=5"], "max_pixels"),
        (["--epochs=0"], "epochs must be at least 1"),
        ([f"--out={tmp_path / 'file'}"], "File exists"),
    ):
        assert script.main([*options, out, *changes]) == 1, changes
        told = capsys.readouterr().err
        assert told.startswith("error: ") and words in told, told
    given = script.parser().parse_args(
        [f"--clips={shaky}", out, "--skip-unusable", "--frames=2", "--max-pixels=3136"]
    )
    left, _ = script.read_clips(given)
    assert len(left.train) == 5
    assert f"left out {first.id}" in capsys.readouterr().out
