"""A small random Thinker and ten clips, for tests of what is built on a Thinker.

`conftest` makes fixtures of them: once a session, because training takes seconds.
"""

import csv
import os
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from conftest import ROOT

from mmsa_lib import training
from mmsa_lib.corpora.clips import Clip, puppet_clips
from mmsa_lib.corpora.media import UNIT, MediaConfig
from mmsa_lib.methods import generative, readout, saving
from mmsa_lib.methods.readout import ReadoutConfig
from mmsa_lib.nets import omni
from mmsa_lib.training import TrainConfig

MEDIA = MediaConfig(frames=4, max_pixels=4 * UNIT * UNIT)
SMALL = ReadoutConfig(rank=8, alpha=8, width=32)
VOCABULARY = 331  # no other axis has this length


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


def write_backbone(folder: Path) -> Path:
    """A folder as Hugging Face's: a small Thinker with random weights."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

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


def ten_clips() -> list[Clip]:
    """Puppet clips of unequal length: six to train on, two each for the rest."""
    by = {s: [c for c in puppet_clips() if c.split == s] for s in ("train", "valid")}
    by["test"] = [c for c in puppet_clips() if c.split == "test"]
    return by["train"][:60:10] + by["valid"][:8:4] + by["test"][:8:4]


def thinker(backbone, **options):
    return omni.load(backbone, device="cpu", **options)


def stirred(model, seed=0):
    """Adapters and head as after some training: nothing is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name or name.endswith("outer.weight"):
            p.data.normal_(0, 0.1, generator=generator)
    return model.eval()


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


def train_readout(backbone, handful):
    labels = handful.train.labels["sentiment"]
    still = replace(SMALL, lora_dropout=0.0, dropout=0.0)
    return training.fit(
        lambda: readout.discriminative(thinker(backbone), still, labels),
        handful,
        config(epochs=40, group_lr={"regressor": 5e-3}),
        loss=readout.standardised_loss(labels),
    )


def train_twin(backbone, handful):
    labels = handful.train.labels["sentiment"]
    still = replace(SMALL, lora_dropout=0.0)
    return training.fit(
        lambda: generative.generative(thinker(backbone), still, labels),
        handful,
        config(epochs=40, lr=2e-2, schedule="cosine"),
        loss=generative.token_loss,
    )


def keep(module, folder: Path, backbone) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of a search on the hub
        return saving.save(module, folder, backbone=str(backbone), media=MEDIA)


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


def environment():
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
