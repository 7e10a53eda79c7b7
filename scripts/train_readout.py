"""Train a readout of an omni-modal model, or its generative twin, on clips.

    python scripts/train_readout.py --clips puppets --out FOLDER
    python scripts/train_readout.py --clips MOSI --backbone Qwen/Qwen2.5-Omni-7B \
        --batch-size 2 --accumulate 4 --gradient-checkpointing --cache DIR --out FOLDER
    torchrun --standalone --nproc_per_node=2 scripts/train_readout.py ...

Clips are a folder in MMSA-FET's layout (label.csv, Raw/<video_id>/<clip_id>.mp4). The
epoch with the lowest validation loss is kept, evaluated once on the test split, and
saved in --out: a PEFT adapter, the regressor, and a run record. `mmsa-book predict
--model FOLDER` scores other clips with it.

Samples a step are --batch-size x --accumulate x processes; the defaults give 8 on one.
Rates are for MOSI; halve both on MOSEI. The tiny Thinker learns better at ten times
the rate of the adapter. With --checkpoint, the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmsa_lib import runs, training
from mmsa_lib.corpora import media
from mmsa_lib.corpora.clips import MODES
from mmsa_lib.corpora.media import MediaConfig, clip_corpus
from mmsa_lib.corpora.schema import Corpus
from mmsa_lib.errors import ConfigError, MmsaError
from mmsa_lib.methods import readout
from mmsa_lib.nets import omni
from mmsa_lib.training import Frozen, Rule, TrainConfig

MAIN = int(os.environ.get("RANK", "0")) == 0  # torchrun numbers its processes


def say(text: str) -> None:
    if MAIN:
        print(text, flush=True)


class Progress(Rule):
    """One line an epoch, for logs."""

    def epoch_end(self, row: dict) -> None:
        losses = ", ".join(f"{part} {row[part]:.6f}" for part in ("train", "valid"))
        say(f"epoch {row['epoch'] + 1}: {losses} ({row['seconds']:.0f} s)")


def parser() -> argparse.ArgumentParser:
    about = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    add = made.add_argument
    add("--backbone", default=omni.TINY, help="tiny, a folder, or a name on the hub")
    add("--clips", required=True, help="puppets, or a folder in MMSA-FET's layout")
    add("--out", type=Path, required=True, help="folder for what is learned")
    add("--cache", type=Path, help="folder for preprocessed clips; default: memory")
    add("--generative", action="store_true", help="the twin, that writes the score")
    add("--epochs", type=int, default=4)
    add("--seeds", "--seed", default="0", help="such as 0,1,2; each has its folder")
    add("--lr", type=float, default=2e-4, help="of the adapter (2e-4)")
    add("--head-lr", type=float, default=1e-3, help="of the regressor (1e-3)")
    add("--batch-size", type=int, default=8, help="clips a batch and process")
    add("--accumulate", type=int, default=1, help="batches a step")
    add("--checkpoint", type=Path, help="folder for the state; goes on from it")
    add("--frames", type=int, default=16, help="of a clip, at most; even")
    add("--max-pixels", type=int, help="of a frame; default 100352, puppets 7056")
    add("--modalities", default=",".join(omni.MODALITIES), help="such as text,audio")
    add("--freeze-towers", action="store_true", help="adapt the language model only")
    add("--precision", choices=("no", "bf16"), help="default: bf16 on a GPU")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--skip-unusable", action="store_true", help="leave unusable clips out")
    return made


def read_clips(given: argparse.Namespace) -> tuple[Corpus, MediaConfig]:
    """The corpus, and how its clips were read."""
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
        say(f"left out {name}: {why}")
    lacking = [split for split in MODES if split not in corpus.splits]
    if lacking:
        raise ConfigError(
            f"{given.clips} has no usable clip in {', '.join(lacking)}: training needs "
            "clips of each mode in label.csv"
        )
    return corpus, config


def settings(given: argparse.Namespace) -> dict:
    """What a run record keeps of the command: everything but places."""
    kept = vars(given) | {
        "backbone": given.backbone.rstrip("/").rpartition("/")[2],
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    places = ("clips", "out", "cache", "checkpoint", "seeds")
    return {k: v for k, v in kept.items() if k not in places}


def train(given: argparse.Namespace, corpus: Corpus, seed: int) -> Frozen:
    """The readout or twin that validation chose."""
    config = readout.ReadoutConfig(freeze_towers=given.freeze_towers)
    labels = corpus.train.labels["sentiment"]
    kind = readout.generative if given.generative else readout.discriminative

    def build():
        thinker = omni.load(
            given.backbone,
            device=given.device,
            compute={"no": "float32", "bf16": "bfloat16"}[given.precision],
            checkpointing=given.gradient_checkpointing,
            modalities=given.modalities,
        )
        return kind(thinker, config, labels)

    checkpoint = given.checkpoint and str(given.checkpoint / f"seed-{seed}")
    loop = TrainConfig(
        epochs=given.epochs,
        batch_size=given.batch_size,
        lr=given.lr,
        group_lr={} if given.generative else {"regressor": given.head_lr},
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
    loss = readout.standardised_loss(labels)
    loss = readout.token_loss if given.generative else loss
    return training.fit(build, corpus, loop, loss=loss, rules=[Progress()])


def answering(frozen: Frozen, given: argparse.Namespace, rates: dict) -> Frozen:
    """The twin predicting by what it writes; enters how often that is no score."""

    def predict(split, label):
        answers = frozen.module.answer(split, given.batch_size)
        rates[split.name] = {
            "unparsable": answers.unparsable,
            "out_of_range": answers.out_of_range,
        }
        return answers.scores(float(frozen.module.scaler.mean))

    return replace(frozen, predict=predict)


def run(given: argparse.Namespace) -> None:
    corpus, config = read_clips(given)
    sizes = ", ".join(f"{len(s)} {name}" for name, s in corpus.splits.items())
    say(f"{corpus.name}: {sizes} clips")
    rates = {}

    def learn(seed: int) -> Frozen:
        say(f"seed {seed}")
        frozen = train(given, corpus, seed)
        if MAIN:
            out = given.out / f"seed-{seed}" if len(given.seeds) > 1 else given.out
            readout.save(frozen.module, out, backbone=given.backbone, media=config)
        rates[seed] = {}
        return answering(frozen, given, rates[seed]) if given.generative else frozen

    if not MAIN:  # takes part in training; the first process evaluates
        for seed in given.seeds:
            learn(seed)
        return
    name = "readout-twin" if given.generative else "readout"
    os.environ["MMSA_RECORDS"] = str(given.out)
    record = runs.experiment(
        name, learn, corpus, given.seeds, parameters=settings(given)
    )
    mean = float(corpus.train.labels["sentiment"].mean())
    valid = corpus.valid.labels["sentiment"]
    constant = float(np.abs(valid - mean).mean())
    say(f"\nvalidation MAE of always answering the training mean: {constant:.3f}")
    for entry in record.per_seed:
        best = f"epoch {entry['best_epoch'] + 1} of {entry['epochs']}"
        say(f"\nseed {entry['seed']}, {best}; test (validation):")
        for key, value in entry["test"].items():
            shown = [_number(v) for v in (value, entry["valid"][key])]
            say(f"  {key:12}{shown[0]:>8} {shown[1]:>8}")
    if given.generative:
        per_seed = [{"seed": s, **found} for s, found in rates.items()]
        runs.measure(f"{name}-answers", corpus, per_seed=per_seed)
        for seed, found in rates.items():
            test = ", ".join(f"{k} {v:.1%}" for k, v in found["test"].items())
            say(f"seed {seed}, written scores of the test split: {test}")
    say(f"\nsaved in {given.out}; record {record.place}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 1 with the error on stderr, 2 for a wrong call."""
    made = parser()
    given = made.parse_args(arguments)
    try:
        given.seeds = [int(s) for s in given.seeds.split(",")]
    except ValueError:
        made.error(f"--seeds {given.seeds}: expected whole numbers, such as 0,1,2")
    given.modalities = [m for m in given.modalities.split(",") if m]
    for name in ("lr", "head_lr"):
        if not getattr(given, name) > 0:
            made.error(f"--{name.replace('_', '-')} must be positive")
    try:
        where = omni.pick_device(given.device).type
        given.precision = given.precision or ("bf16" if where == "cuda" else "no")
        given.out.mkdir(parents=True, exist_ok=True)  # not found out after hours
        run(given)
    except (MmsaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
