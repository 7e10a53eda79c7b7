"""How the settings of the readout chapter were chosen: validation error of each.

    python benchmarks/qlora_settings.py            # all rows, a record into results/
    python benchmarks/qlora_settings.py --dry      # print only

Every row is the discriminative readout of the tiny Thinker on the puppets' clips under
the chosen setting or one change of it; the number is the lowest validation MAE of each
run, in label points. The test split stays sealed: nothing here opens it. The seeds are
not those of the chapter.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from mmsa_lib import corpora, runs
from mmsa_lib.methods import readout
from mmsa_lib.nets import omni
from mmsa_lib.training import TrainConfig, fit

PLAN = {
    "group_lr": {"regressor": 1e-3},
    "optimiser": "adamw",
    "weight_decay": 0.01,
    "schedule": "cosine",
    "warmup": 0.05,
    "clip": 1.0,
    "batch_size": 8,
    "eval_batch_size": 16,
    "bucketed": True,
}
CHOSEN = {"lr": 1e-3, "epochs": 6, "rank": 32, "pool": "last", "ln": "hidden"}
CHANGES = (  # one at a time
    {"lr": 2e-4},
    {"lr": 5e-4},
    {"lr": 2e-3},
    {"rank": 8},
    {"pool": "mean"},
    {"ln": "input"},
)


def measure(data, setting: dict, seeds: list[int]) -> dict:
    config = readout.ReadoutConfig(
        rank=setting["rank"],
        alpha=setting["rank"],
        pool=setting["pool"],
        ln=setting["ln"],
    )
    labels = data.train.labels["sentiment"]
    errors, epochs = [], []
    for seed in seeds:
        plan = TrainConfig(
            lr=setting["lr"], epochs=setting["epochs"], seed=seed, **PLAN
        )
        frozen = fit(
            lambda: readout.discriminative(omni.load(), config, labels),
            data,
            plan,
            loss=readout.standardised_loss(labels),
        )
        errors.append(frozen.receipt.value * float(labels.std()))
        epochs.append(frozen.best_epoch)
    row = {
        "what": "readout of the tiny Thinker, validation MAE",
        **setting,
        "valid_mae": round(statistics.fmean(errors), 4),
        "low": round(min(errors), 4),
        "high": round(max(errors), 4),
        "best_epochs": epochs,
    }
    print(*(f"{k} {v}" for k, v in row.items() if k != "what"), sep="  ", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11])
    parser.add_argument("--rows", nargs="+", type=int, help="0 is the chosen setting")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--dry", action="store_true", help="print only, write nothing")
    args = parser.parse_args()
    data = corpora.load("puppet-clips")
    wanted = [CHOSEN | change for change in ({}, *CHANGES)]
    if args.rows is not None:
        wanted = [wanted[k] for k in args.rows]
    rows = [measure(data, setting, args.seeds) for setting in wanted]
    if not args.dry:
        settings = {
            "corpus": "puppet-clips",
            "corpus_sha256": data.fingerprint,
            "seeds": args.seeds,
            **PLAN,
            "selection": "lowest validation MAE over epochs; test split sealed",
        }
        path = runs.save_benchmark(
            "qlora-settings", rows, settings=settings, out=args.out
        )
        print(path)


if __name__ == "__main__":
    main()
