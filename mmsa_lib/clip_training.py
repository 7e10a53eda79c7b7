"""Train a readout of an omni-modal model, or its generative twin, on a folder of clips.

    mmsa-book train readout --clips puppets --out FOLDER
    mmsa-book train readout --clips MOSI --backbone Qwen/Qwen2.5-Omni-7B \
        --batch-size 2 --accumulate 4 --gradient-checkpointing --cache DIR --out FOLDER
    torchrun --standalone --nproc_per_node=2 --no-python mmsa-book train readout ...

Clips are a folder in MMSA-FET's layout (label.csv, Raw/<video_id>/<clip_id>.mp4). For
each seed the epoch with the lowest validation loss is kept, evaluated once on the test
split, and saved; a run record says how well it did.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from mmsa_lib import runs, training
from mmsa_lib.corpora import media
from mmsa_lib.corpora.clips import MODES
from mmsa_lib.corpora.media import MediaConfig, clip_corpus
from mmsa_lib.corpora.schema import Corpus
from mmsa_lib.errors import ConfigError, unknown
from mmsa_lib.files import printable
from mmsa_lib.methods import generative, readout, saving
from mmsa_lib.nets import omni
from mmsa_lib.training import Frozen, Rule, TrainConfig


@dataclass(frozen=True)
class Method:
    """One way to learn a score.

    record  name of the run record
    build   puts LoRA, and what else is trained, on a Thinker
    loss    makes the loss for `training.fit` from the training labels
    head    parts that learn at a rate of their own
    writes  whether the score is written as text, so that it may be unreadable
    """

    record: str
    build: Callable
    loss: Callable
    head: tuple[str, ...] = ()
    writes: bool = False


METHODS = {
    "readout": Method(
        "readout", readout.discriminative, readout.standardised_loss, ("regressor",)
    ),
    "generative": Method(
        "readout-twin",
        generative.generative,
        lambda labels: generative.token_loss,
        writes=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What ``mmsa-book train`` was told; its help says what each means.

    Raises `UnknownNameError` for a method that is not one of `METHODS`.
    """

    method: str
    clips: str
    out: Path
    backbone: str
    cache: Path | None
    epochs: int
    seeds: list[int]
    lr: float
    head_lr: float
    batch_size: int
    accumulate: int
    checkpoint: Path | None
    frames: int
    max_pixels: int | None
    modalities: list[str]
    freeze_towers: bool
    precision: str | None
    gradient_checkpointing: bool
    device: str
    skip_unusable: bool

    def __post_init__(self):
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)

    def parameters(self) -> dict:
        """What a run record keeps: everything but places and the record's name."""
        kept = asdict(self) | {
            "generative": METHODS[self.method].writes,
            "backbone": printable(self.backbone.rstrip("/").rpartition("/")[2]),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
        }
        left = ("method", "clips", "out", "cache", "checkpoint", "seeds")
        return {k: v for k, v in kept.items() if k not in left}


def run(given: Settings) -> None:
    """Train once a seed; write models and records to ``given.out``.

    Under torchrun every process takes part in training, and the first one evaluates,
    saves and speaks. Raises `ConfigError` for clips or a backbone that cannot be used.
    """
    where = omni.pick_device(given.device).type
    precision = given.precision or ("bf16" if where == "cuda" else "no")
    given = replace(given, precision=precision)
    given.out.mkdir(parents=True, exist_ok=True)  # not found out after hours
    method = METHODS[given.method]
    corpus, config = read_clips(given)
    sizes = ", ".join(f"{len(s)} {name}" for name, s in corpus.splits.items())
    say(f"{corpus.name}: {sizes} clips")
    rates: dict[int, dict] = {}

    def learn(seed: int) -> Frozen:
        say(f"seed {seed}")
        frozen = train(given, corpus, seed)
        if _first():
            out = given.out / f"seed-{seed}" if len(given.seeds) > 1 else given.out
            saving.save(frozen.module, out, backbone=given.backbone, media=config)
        rates[seed] = {}
        return _answering(frozen, given, rates[seed]) if method.writes else frozen

    if not _first():
        for seed in given.seeds:
            learn(seed)
        return
    os.environ["MMSA_RECORDS"] = str(given.out)
    record = runs.experiment(
        method.record, learn, corpus, given.seeds, parameters=given.parameters()
    )
    _tell(record, corpus)
    if method.writes:
        per_seed = [{"seed": s, **found} for s, found in rates.items()]
        runs.measure(f"{method.record}-answers", corpus, per_seed=per_seed)
        for seed, found in rates.items():
            test = ", ".join(f"{k} {v:.1%}" for k, v in found["test"].items())
            say(f"seed {seed}, written scores of the test split: {test}")
    say(f"\nsaved in {given.out}; record {record.place}")


def read_clips(given: Settings) -> tuple[Corpus, MediaConfig]:
    """The corpus, and how its clips were read.

    Raises `ConfigError` if one of its splits has no usable clip.
    """
    options = {"frames": given.frames}
    if given.max_pixels is not None:
        options["max_pixels"] = given.max_pixels
    if given.clips == "puppets":
        corpus = media.embedded(**options)
        return corpus, MediaConfig(**corpus.card.options)
    config = MediaConfig(**options)
    problems: dict[str, str] | None = {} if given.skip_unusable else None
    corpus = clip_corpus(given.clips, config, cache=given.cache, problems=problems)
    for name, why in (problems or {}).items():
        say(printable(f"left out {name}: {why}"))
    lacking = [split for split in MODES if split not in corpus.splits]
    if lacking:
        raise ConfigError(
            f"{given.clips} has no usable clip in {', '.join(lacking)}: training needs "
            "clips of each mode in label.csv"
        )
    return corpus, config


def train(given: Settings, corpus: Corpus, seed: int) -> Frozen:
    """The model that validation chose."""
    method = METHODS[given.method]
    config = readout.ReadoutConfig(freeze_towers=given.freeze_towers)
    labels = corpus.train.labels["sentiment"]

    def build():
        thinker = omni.load(
            given.backbone,
            device=given.device,
            compute={"no": "float32", "bf16": "bfloat16"}[given.precision],
            checkpointing=given.gradient_checkpointing,
            modalities=given.modalities,
        )
        return method.build(thinker, config, labels)

    checkpoint = given.checkpoint and str(given.checkpoint / f"seed-{seed}")
    loop = TrainConfig(
        epochs=given.epochs,
        batch_size=given.batch_size,
        lr=given.lr,
        group_lr=dict.fromkeys(method.head, given.head_lr),
        weight_decay=0.01,
        optimiser="adamw",
        schedule="cosine",
        warmup=0.05,
        clip=1.0,
        accumulate=given.accumulate,
        eval_batch_size=given.batch_size,
        bucketed=True,
        precision=given.precision,
        device=given.device,
        seed=seed,
        checkpoint=checkpoint,
        checkpoint_steps=50 if checkpoint else None,
    )
    loss = method.loss(labels)
    return training.fit(build, corpus, loop, loss=loss, rules=[Progress()])


def _answering(frozen: Frozen, given: Settings, rates: dict) -> Frozen:
    """The twin predicting by what it writes; enters how often that is no score."""

    def predict(split, label):
        answers = frozen.module.answer(split, given.batch_size)
        rates[split.name] = {
            "unparsable": answers.unparsable,
            "out_of_range": answers.out_of_range,
        }
        return answers.scores(float(frozen.module.scaler.mean))

    return replace(frozen, predict=predict)


class Progress(Rule):
    """One line an epoch, for logs."""

    def epoch_end(self, model, row: dict) -> None:
        losses = ", ".join(f"{part} {row[part]:.6f}" for part in ("train", "valid"))
        say(f"epoch {row['epoch'] + 1}: {losses} ({row['seconds']:.0f} s)")


def _tell(record: runs.RunRecord, corpus: Corpus) -> None:
    """The metrics of each seed, and what a constant would reach."""
    mean = float(corpus.train.labels["sentiment"].mean())
    constant = float(np.abs(corpus.valid.labels["sentiment"] - mean).mean())
    say(f"\nvalidation MAE of always answering the training mean: {constant:.3f}")
    for entry in record.per_seed:
        best = f"epoch {entry['best_epoch'] + 1} of {entry['epochs']}"
        say(f"\nseed {entry['seed']}, {best}; test (validation):")
        for key, value in entry["test"].items():
            shown = [_number(v) for v in (value, entry["valid"][key])]
            say(f"  {key:12}{shown[0]:>8} {shown[1]:>8}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0  # torchrun numbers its processes


def say(text: str) -> None:
    """Print a line at once; of several processes only the first speaks."""
    if _first():
        print(text, flush=True)
