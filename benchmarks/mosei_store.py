"""A MOSEI-sized store beside the same arrays in one pickle: opening, memory, an epoch.

    python benchmarks/mosei_store.py              # about 10 minutes, 9 GB of disk
    python benchmarks/mosei_store.py --scale .02  # a quick look, no record

The arrays are those of MOSEI's aligned file: 16,326 / 1,871 / 4,659 samples of 50
steps, text 768, audio 74, vision 35, float32, filled with random numbers. The naive
form loads the whole pickle into memory, as the released code does. Both train the same
small model with the same loop; every measurement has a process of its own, and the two
forms take turns. Memory is the peak resident size beyond that of the process with its
libraries loaded and the model built.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from mmsa_lib import runs, training
from mmsa_lib.corpora import store
from mmsa_lib.corpora.schema import Card, Corpus, Ragged, Split, make_corpus

SIZES = {"train": 16_326, "valid": 1_871, "test": 4_659}
WIDTHS = {"text": 768, "audio": 74, "vision": 35}
STEPS, BATCH = 50, 64
POOL = 4096  # rows of random numbers that all samples are cut from


class RandomRows:
    """Rows that exist only while they are read, so that the builder stays small."""

    ndim = 2

    def __init__(self, n: int, width: int):
        self.shape = (n * STEPS, width)
        rng = np.random.default_rng(width)
        self.pool = rng.standard_normal((POOL, width), dtype=np.float32)

    def __getitem__(self, rows: slice) -> np.ndarray:
        start = rows.start * 7919 % (POOL - STEPS)
        return self.pool[start : start + rows.stop - rows.start]


def random_corpus(scale: float) -> Corpus:
    splits = {}
    for name, size in SIZES.items():
        n = round(size * scale)
        features = {
            m: Ragged(RandomRows(n, d), np.arange(n) * STEPS, np.full(n, STEPS))
            for m, d in WIDTHS.items()
        }
        rng = np.random.default_rng(n)
        labels = {"sentiment": rng.uniform(-3, 3, n)}
        ids = [f"{name}$_${i}" for i in range(n)]
        splits[name] = Split(name, ids, features, labels, raw_text=["words"] * n)
    card = Card("mosei-sized", "random numbers", "benchmark", "none", synthetic=True)
    return make_corpus(card, splits)


def as_corpus(arrays: dict) -> Corpus:
    """The naive form behind the same interface: arrays in memory, nothing copied."""
    splits = {}
    for name, part in arrays.items():
        n = len(part["id"])
        features = {
            m: Ragged(
                part[m].reshape(n * STEPS, d), np.arange(n) * STEPS, np.full(n, STEPS)
            )
            for m, d in WIDTHS.items()
        }
        labels = {"sentiment": part["regression_labels"]}
        splits[name] = Split(name, part["id"], features, labels, part["raw_text"])
    card = Card("mosei-sized", "random numbers", "benchmark", "none", synthetic=True)
    return Corpus(card.name, card, splits)


class Probe(nn.Module):
    """Masked mean of a linear map a modality, then one linear layer."""

    def __init__(self):
        super().__init__()
        self.inputs = nn.ModuleDict({m: nn.Linear(d, 32) for m, d in WIDTHS.items()})
        self.regressor = nn.Linear(32 * len(WIDTHS), 1)

    def forward(self, batch):
        parts = []
        for m, layer in self.inputs.items():
            keep = batch.mask[m][..., None].float()
            parts.append((layer(batch.features[m]) * keep).sum(1) / keep.sum(1))
        z = torch.relu(torch.cat(parts, -1))
        return SimpleNamespace(predictions={"sentiment": self.regressor(z)})


# ------------------------------------------------------- roles, one process each


def build(folder: Path, scale: float) -> dict:
    """Write the store, then the pickle; reports what the store's writing took."""
    meter = Meter()
    start = time.perf_counter()
    store.write(random_corpus(scale), folder / "store")
    facts = {"seconds": time.perf_counter() - start, "peak_mib": meter.peak_mib()}
    opened = store.open_store(folder / "store")
    arrays = {}
    for name, split in opened.splits.items():
        n = len(split)
        arrays[name] = {"id": split.ids, "raw_text": split.raw_text}
        arrays[name]["regression_labels"] = split._labels["sentiment"]
        for m, ragged in split.features.items():
            arrays[name][m] = np.asarray(ragged.values).reshape(n, STEPS, -1)
    with (folder / "features.pkl").open("wb") as file:
        pickle.dump(arrays, file, protocol=4)
    size = sum(p.stat().st_size for p in (folder / "store").iterdir())
    return facts | {"store_mib": size / 2**20}


def measure(form: str, folder: Path, epoch: bool) -> dict:
    """Open one form and, if asked for, train one epoch on it."""
    Probe()  # the model and the libraries belong to the baseline
    meter = Meter()
    start = time.perf_counter()
    if form == "store":
        corpus = store.open_store(folder / "store")
    else:
        # The plain unpickler only here: the file was written by this script.
        with (folder / "features.pkl").open("rb") as file:
            corpus = as_corpus(pickle.load(file))
    facts = {"open_seconds": time.perf_counter() - start}
    if epoch:
        config = training.TrainConfig(epochs=1, batch_size=BATCH, device="cpu")
        start = time.perf_counter()
        frozen = training.fit(Probe, corpus, config)
        facts["epoch_seconds"] = time.perf_counter() - start
        facts["valid_mae"] = frozen.receipt.value
    return facts | {"peak_mib": meter.peak_mib()}


class Meter:
    """Peak resident memory beyond what the process held when the meter was made."""

    def __init__(self):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self.before = self._read("VmRSS")

    def peak_mib(self) -> float:
        return (self._read("VmHWM") - self.before) / 1024

    @staticmethod
    def _read(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1])
        raise KeyError(field)


# ------------------------------------------------------------------- the comparison


def run(role: str, folder: Path, **options) -> dict:
    command = [sys.executable, __file__, "--role", role, "--folder", str(folder)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def forget_cached(folder: Path) -> None:
    """Ask the kernel to drop the files from its cache, so that opening is cold."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def median(rows: list[dict], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def compare(folder: Path, scale: float, repeats: int) -> list[dict]:
    built = run("build", folder, scale=scale)
    print("built", built, flush=True)
    opened, cold, trained = {"store": [], "pickle": []}, [], {"store": [], "pickle": []}
    for _ in range(repeats):
        forget_cached(folder / "store")
        cold.append(run("store", folder))
        for form in opened:
            opened[form].append(run(form, folder))
    for _ in range(max(repeats - 2, 1)):
        for form in trained:
            trained[form].append(run(form, folder, epoch=1))
            print(form, trained[form][-1], flush=True)
    rows = []
    for form, what in (("store", "memory-mapped store"), ("pickle", "whole pickle")):
        rows.append(
            {
                "what": what,
                "open_s": round(median(opened[form], "open_seconds"), 4),
                "open_s_all": [round(r["open_seconds"], 4) for r in opened[form]],
                "epoch_s": round(median(trained[form], "epoch_seconds"), 2),
                "epoch_s_all": [round(r["epoch_seconds"], 2) for r in trained[form]],
                "peak_mib_open": round(median(opened[form], "peak_mib")),
                "peak_mib_epoch": round(max(r["peak_mib"] for r in trained[form])),
                "valid_mae": trained[form][0]["valid_mae"],
            }
        )
    rows[0]["open_s_cold"] = round(median(cold, "open_seconds"), 4)
    rows.append(
        {
            "what": "writing the store",
            "seconds": round(built["seconds"], 1),
            "peak_mib": round(built["peak_mib"]),
            "store_mib": round(built["store_mib"]),
        }
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--temporary", type=Path, help="a folder on a disk with 9 GB")
    parser.add_argument("--role", choices=("build", "store", "pickle"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--epoch", type=int, default=0)
    given = parser.parse_args()
    if given.role == "build":
        print(json.dumps(build(given.folder, given.scale)))
        return
    if given.role:
        print(json.dumps(measure(given.role, given.folder, bool(given.epoch))))
        return
    folder = Path(tempfile.mkdtemp(prefix="mosei-sized-", dir=given.temporary))
    try:
        rows = compare(folder, given.scale, given.repeats)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(rows, indent=1))
    if given.scale == 1:
        settings = {
            "sizes": SIZES,
            "widths": WIDTHS,
            "steps": STEPS,
            "batch_size": BATCH,
            "dtype": "float32",
            "repeats": given.repeats,
            "threads": torch.get_num_threads(),
            "compared": "store (64 MiB of mapped pages at a time) and one pickle of "
            "all arrays read into memory; same loop, same model, own processes; peaks "
            "are resident memory beyond libraries and model",
        }
        print(
            runs.save_benchmark("mosei-store", rows, settings=settings, out=given.out)
        )


if __name__ == "__main__":
    main()
