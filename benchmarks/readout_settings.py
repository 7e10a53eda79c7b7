"""How the learning rates of reader and writer were chosen: validation error of each.

    python benchmarks/readout_settings.py                  # the tiny Thinker, puppets
    python benchmarks/readout_settings.py --backbone FOLDER --corpus clips --data-dir D

Both readouts of the chapter "Generative against discriminative" get the same candidates
for the learning rate of LoRA, the same epochs and the same seeds, which are not those
of the chapter. The number is the MAE on the validation clips at the epoch with the
lowest validation loss; for the writer, of what it wrote. The test split stays sealed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from mmsa_lib import corpora, runs
from mmsa_lib.methods import readout
from mmsa_lib.nets import omni
from mmsa_lib.training import TrainConfig, fit

PLAN = {"batch_size": 8, "optimiser": "adamw", "weight_decay": 0.01, "clip": 1.0}
PLAN |= {"schedule": "cosine", "warmup": 0.05, "eval_batch_size": 16, "bucketed": True}


def train(kind: str, data, lr: float, seed: int, args):
    """A frozen reader or writer, chosen by its validation loss."""
    labels, config = data.train.labels["sentiment"], readout.ReadoutConfig()
    build = {"reader": readout.discriminative, "writer": readout.generative}[kind]
    loss = {
        "reader": readout.standardised_loss(labels),
        "writer": readout.token_loss,
    }[kind]
    groups = {"regressor": args.head_lr} if kind == "reader" else {}
    plan = TrainConfig(epochs=args.epochs, lr=lr, seed=seed, group_lr=groups, **PLAN)

    def adapted():
        thinker = omni.load(args.backbone, modalities=args.modalities)
        return build(thinker, config, labels)

    frozen = fit(adapted, data, plan, loss=loss)
    return frozen if kind == "reader" else readout.writing(frozen)


def measure(kind: str, lr: float, data, args) -> dict:
    truth = data.valid.labels["sentiment"]
    errors, epochs = [], []
    for seed in args.seeds:
        frozen = train(kind, data, lr, seed, args)
        said = frozen.predict(data.valid, "sentiment")
        errors.append(float(np.abs(said - truth).mean()))
        epochs.append(frozen.best_epoch)
    row = {
        "what": f"{kind}, validation MAE",
        "kind": kind,
        "lr": lr,
        "valid_mae": round(statistics.fmean(errors), 4),
        "per_seed": [round(e, 4) for e in errors],
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
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--head-lr", type=float, default=1e-3)
    rates = [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    parser.add_argument("--rates", nargs="+", type=float, default=rates)
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--dry", action="store_true", help="print only, write nothing")
    args = parser.parse_args()
    data = corpora.load(args.corpus, args.data_dir)
    rows = [measure(kind, lr, data, args) for kind in args.kinds for lr in args.rates]
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
