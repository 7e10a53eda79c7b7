"""Make records: train over seeds, measure, compare, adjust, time.

Nothing here loads torch before a function is called that needs it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mmsa_lib.files import sha256
from mmsa_lib.runs.record import (
    RecordError,
    RunRecord,
    corpus_facts,
    new,
    peak_memory,
    save,
    seal,
)


def experiment(
    name: str,
    train: Callable[[int], Any],
    corpus,
    seeds: Sequence[int],
    *,
    parameters: Mapping | None = None,
    task=None,
) -> RunRecord:
    """Train once a seed, evaluate the frozen result on the test split, record it all.

    train: ``train(seed) -> Frozen`` (`training.fit` or `training.select`).
    task: the `tasks.Task` that is judged, or several; default: sentiment.
    Returns the saved record; metrics under every convention are in ``per_seed``, as
    ``test.mae``, or ``test.sentiment.mae`` where there are several tasks.
    """
    from mmsa_lib import tasks

    judged = tasks.several(task or tasks.SENTIMENT)
    per_seed, start, frozen = [], time.perf_counter(), None
    for seed in seeds:
        began = time.perf_counter()
        frozen = None  # two large models at once may not fit
        frozen = train(seed)
        entry = {
            "seed": int(seed),
            "seconds": round(time.perf_counter() - began, 2),
            **frozen.facts(),
        }
        found = {t.label: _tested(frozen, corpus, t) for t in judged}
        if len(judged) == 1:
            entry |= found[judged[0].label]
        else:
            for label, facts in found.items():
                for key, value in facts.items():
                    entry.setdefault(key, {})[label] = value
        per_seed.append(entry)
    record = new(
        name,
        "training",
        parameters=dict(parameters or {}),
        seeds=[int(s) for s in seeds],
        corpus=corpus_facts(corpus),
        selection=frozen.selection if frozen is not None else "",
        per_seed=per_seed,
        resources={
            "wall_seconds": round(time.perf_counter() - start, 2),
            **peak_memory(),
            "trainable_parameters": getattr(frozen, "trainable", None),
            "total_parameters": getattr(frozen, "total", None),
        },
    )
    record = seal(record)
    save(record)
    return record


def measure(
    name: str, corpus=None, *, per_seed: Sequence[Mapping] = (), **values: float
) -> RunRecord:
    """Record facts that no training produced: an oracle's error, a parameter count.

    per_seed: instead of values, one dict a seed: ``{"seed": 0, "test": {"mae": 1.2}}``.
    """
    record = new(
        name,
        "measurement",
        seeds=[int(entry["seed"]) for entry in per_seed],
        corpus=corpus_facts(corpus) if corpus is not None else {},
        per_seed=[dict(entry) for entry in per_seed],
        rows=[{k: float(v) for k, v in values.items()}] if values else [],
        resources=peak_memory(),
    )
    record = seal(record)
    save(record)
    return record


def compare(
    a: RunRecord, b: RunRecord, metric: str = "mae", *, names: tuple[str, str]
) -> RunRecord:
    """Paired comparison of two experiments over their common seeds, as a record.

    The row holds every field of `statistics.Comparison` and its verdict in words.
    """
    from mmsa_lib import statistics

    if a.seeds != b.seeds or a.corpus.get("sha256") != b.corpus.get("sha256"):
        raise RecordError(
            f"{a.name} and {b.name} are paired by seed and corpus: run both on the "
            f"same ones (found {a.seeds} and {b.seeds})"
        )
    path = f"test.{metric}"
    if len(a.seeds) == 1:  # one task of a sweep: only all of its seeds can be judged
        verdict = f"{names[0]} against {names[1]}: one seed, no comparison."
        row = {"difference": a.mean(path) - b.mean(path), "n": 1, "verdict": verdict}
    else:
        found = statistics.compare(a.values(path), b.values(path), metric, names=names)
        row = asdict(found) | {"verdict": found.verdict}
    record = new(
        f"{a.name}-against-{b.name}",
        "comparison",
        seeds=a.seeds,
        corpus=a.corpus,
        rows=[{"records": [a.id, b.id]} | row],
    )
    record = seal(record)
    save(record)
    return record


def holm(*records: RunRecord) -> list[RunRecord]:
    """Comparisons with their p values adjusted for how many they are, as new records.

    All that were made for one question belong into one call (`statistics.holm`).
    """
    from mmsa_lib import statistics

    names = [f.name for f in fields(statistics.Comparison)]
    found = {
        r.id: statistics.Comparison(**{k: r.rows[0][k] for k in names}) for r in records
    }
    adjusted = []
    for r in records:
        one = statistics.holm(found)[r.id]
        row = {**r.rows[0], **asdict(one), "verdict": one.verdict, "unadjusted": r.id}
        record = new(
            f"{r.name}-holm", "comparison", seeds=r.seeds, corpus=r.corpus, rows=[row]
        )
        adjusted.append(seal(record))
        save(adjusted[-1])
    return adjusted


def _tested(frozen, corpus, task) -> dict:
    """Metrics of validation and test, and what was answered on the test split."""
    from mmsa_lib import training

    entry = {}
    for split in ("valid", "test"):
        if split not in corpus.splits:  # a target without validation labels
            continue
        found = training.evaluate(frozen, corpus, split, task=task)
        scores = task.scores(found.truth, found.prediction)
        entry[split] = {
            k: None if math.isnan(v) else round(float(v), 6) for k, v in scores.items()
        }
        if split == "test":
            if task.stored:
                entry["predictions"] = _rounded(task.answer(found.prediction))
            entry["test_ids_sha256"] = sha256("\0".join(found.ids))
    return entry


def _rounded(values) -> list:
    """Answers (n,) or (n, k) as plain numbers."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [round(float(v), 4) for v in values]


def save_benchmark(
    name: str,
    rows: list[dict],
    *,
    settings: dict,
    out: Path = Path("results"),
) -> Path:
    """Record what a script in ``benchmarks/`` measured; returns the file's path.

    rows: one dict a measurement, each with at least ``what`` and the measured values.
    settings: sizes, repeats and what is compared, in words.
    """
    record = new(
        name,
        "benchmark",
        parameters=settings,
        rows=rows,
        resources=peak_memory(),
    )
    return save(record, out)
