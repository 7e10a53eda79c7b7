"""How the settings of the baselines chapter were chosen: validation error of each.

    python benchmarks/backbone_settings.py --corpus mosi-text-audio --data-dir data

Every row is one model under the chosen setting or one change of it, trained with
several seeds; the number is the lowest validation MAE of each run. The test split stays
sealed: nothing here opens it. The seeds are not those of the chapter's full runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from mmsa_lib import corpora, runs
from mmsa_lib.nets import EarlyFusion, FusionConfig, LateFusion, MiddleFusion
from mmsa_lib.training import TrainConfig, fit

MODELS = {"late": LateFusion, "early": EarlyFusion, "middle": MiddleFusion}
PLAN = {"optimiser": "adamw", "schedule": "cosine", "warmup": 0.1, "clip": 1.0}
CHOSEN = {"width": 88, "layers": 2, "lr": 2e-3, "readout": "first", "scaling": "none"}
CHANGES = (  # one at a time
    {"width": 40},
    {"layers": 3},
    {"lr": 1e-3},
    {"readout": "mean"},
    {"scaling": "others"},
    {"scaling": "text"},
)
SCALINGS = {
    "none": lambda modalities: [],
    "text": lambda modalities: ["text"],
    "others": lambda modalities: [m for m in modalities if m != "text"],
}


def scale(data, which: str):
    """The corpus with z-scores (of the training split) in place of some features."""
    chosen = SCALINGS[which](data.modalities)
    return data.standardised(chosen) if chosen else data


def measure(data, model: str, setting: dict, args) -> dict:
    scaled = scale(data, setting["scaling"])
    config = FusionConfig(
        data.dims,
        width=setting["width"],
        layers=setting["layers"],
        readout=setting["readout"],
    )
    errors = []
    for seed in args.seeds:
        plan = TrainConfig(
            epochs=args.epochs,
            batch_size=args.batch_size,
            lr=setting["lr"],
            weight_decay=args.weight_decay,
            seed=seed,
            **PLAN,
        )
        frozen = fit(lambda: MODELS[model](config), scaled, plan)
        errors.append(frozen.receipt.value)
    row = {
        "what": f"{model} fusion, validation MAE",
        "model": model,
        **setting,
        "valid_mae": round(statistics.fmean(errors), 4),
        "valid_mae_sd": round(statistics.stdev(errors), 4),
        "per_seed": [round(e, 4) for e in errors],
    }
    print(*(f"{k} {v}" for k, v in row.items() if k != "what"), sep="  ", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", default="mosi-text-audio", choices=corpora.names())
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--dry", action="store_true", help="print only, write nothing")
    args = parser.parse_args()
    data = corpora.load(args.corpus, args.data_dir)
    rows = []
    for model in args.models:
        least = {"layers": 3} if model == "middle" else {}  # layers - 2 are joint
        for change in [{}, *CHANGES]:
            if not change or change != least:
                rows.append(measure(data, model, CHOSEN | least | change, args))
    if not args.dry:
        settings = {
            "corpus": args.corpus,
            "corpus_sha256": data.fingerprint,
            "epochs": args.epochs,
            "batch_size": args.batch_size,
            "weight_decay": args.weight_decay,
            "seeds": args.seeds,
            **PLAN,
            "selection": "lowest validation MAE over epochs; test split sealed",
        }
        name = f"backbone-settings-{args.corpus}"
        print(runs.save_benchmark(name, rows, settings=settings, out=args.out))


if __name__ == "__main__":
    main()
