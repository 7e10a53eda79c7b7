"""How the settings of reader and writer were chosen: validation error of each.

    python benchmarks/readout_settings.py                  # the tiny Thinker, puppets
    python benchmarks/readout_settings.py --backbone FOLDER --corpus clips --data-dir D

Both readouts get the same candidates for the learning rate of LoRA, the same epochs and
the same seeds, which are not those of the chapters. Then the reader is changed in one
place at a time, at its best rate. The number is the MAE on the validation clips at the
epoch with the lowest validation loss; for the writer, of what it wrote. The test split
stays sealed.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from mmsa_lib import corpora, runs
from mmsa_lib.methods import generative, readout
from mmsa_lib.nets import omni
from mmsa_lib.training import TrainConfig, fit

PLAN = {"batch_size": 8, "optimiser": "adamw", "weight_decay": 0.01, "clip": 1.0}
PLAN |= {"schedule": "cosine", "warmup": 0.05, "eval_batch_size": 16, "bucketed": True}
CHANGES = {
    "rank 8": {"rank": 8, "alpha": 8},
    "reads the mean token": {"pool": "mean"},
    "reads by attention": {"pool": "attention"},
    "LayerNorm on the input": {"ln": "input"},
    "reads one layer below": {"layer": -2},
    "towers not adapted": {"freeze_towers": True},
}


def train(kind: str, data, lr: float, seed: int, args, change):
    """A frozen reader or writer, chosen by its validation loss."""
    labels, config = data.train.labels["sentiment"], readout.ReadoutConfig(**change)
    build = {"reader": readout.discriminative, "writer": generative.generative}[kind]
    loss = {
        "reader": readout.standardised_loss(labels),
        "writer": generative.token_loss,
    }[kind]
    groups = {"regressor": args.head_lr} if kind == "reader" else {}
    plan = TrainConfig(epochs=args.epochs, lr=lr, seed=seed, group_lr=groups, **PLAN)

    def adapted():
        thinker = omni.load(args.backbone, modalities=args.modalities)
        return build(thinker, config, labels)

    frozen = fit(adapted, data, plan, loss=loss)
    return frozen if kind == "reader" else generative.writing(frozen)


def measure(kind: str, lr: float, data, args, what: str = "") -> dict:
    truth = data.valid.labels["sentiment"]
    errors, epochs = [], []
    for seed in args.seeds:
        frozen = train(kind, data, lr, seed, args, CHANGES.get(what, {}))
        said = frozen.predict(data.valid, "sentiment")
        errors.append(float(np.abs(said - truth).mean()))
        epochs.append(frozen.best_epoch)
    row = {
        "what": f"{kind}, validation MAE",
        "kind": "changed " + kind if what else kind,
        "change": what,
        "lr": lr,
        "valid_mae": round(statistics.fmean(errors), 4),
        "low": round(min(errors), 4),
        "high": round(max(errors), 4),
        "best_epochs": epochs,
    }
    print(*(f"{k} {v}" for k, v in row.items() if k != "what"), sep="  ", flush=True)
    return row


def weights_sha256(backbone: str) -> str | None:
    """Of a backbone that is a folder with one weights file; else None."""
    folder = omni.tiny_folder() if backbone == omni.TINY else Path(backbone)
    file = folder / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", default="puppet-clips", choices=corpora.names())
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--backbone", default=omni.TINY)
    parser.add_argument("--modalities", nargs="+", default=list(omni.MODALITIES))
    parser.add_argument("--kinds", nargs="+", default=["reader", "writer"])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--head-lr", type=float, default=1e-3)
    rates = [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    parser.add_argument("--rates", nargs="+", type=float, default=rates)
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--dry", action="store_true", help="print only, write nothing")
    args = parser.parse_args()
    data = corpora.load(args.corpus, args.data_dir)
    with multiprocessing.Pool(args.jobs) as pool:
        wanted = [(k, lr, data, args) for k in args.kinds for lr in args.rates]
        rows = pool.starmap(measure, wanted, chunksize=1)
        readers = [row for row in rows if row["kind"] == "reader"]
        if readers:
            best = min(readers, key=lambda row: row["valid_mae"])["lr"]
            wanted = [("reader", best, data, args, what) for what in CHANGES]
            rows += pool.starmap(measure, wanted, chunksize=1)
    if not args.dry:
        settings = {
            "corpus": args.corpus,
            "corpus_sha256": data.fingerprint,
            "backbone": args.backbone,
            "weights_sha256": weights_sha256(args.backbone),
            "modalities": args.modalities,
            "epochs": args.epochs,
            "head_lr": args.head_lr,
            "seeds": args.seeds,
            **PLAN,
            "selection": "epoch by validation loss, rate by validation MAE",
        }
        print(
            runs.save_benchmark(
                "readout-settings", rows, settings=settings, out=args.out
            )
        )


if __name__ == "__main__":
    main()
