"""The end of a sweep: records merged over seeds, and one table of all tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmsa_lib import runs
from mmsa_lib.files import digest, write_atomic
from mmsa_lib.press.sweep import Row

METRICS_SHOWN = 4  # in one cell of the table; all of them are in the JSON


@dataclass(frozen=True)
class Merged:
    """The records over seeds of one chapter and corpus, and what could not be."""

    chapter: str
    corpus: str | None
    seeds: tuple[int, ...]
    records: tuple[runs.RunRecord, ...]
    problems: tuple[str, ...]


def merge_seeds(rows: Iterable[Row]) -> list[Merged]:
    """Merge training records of each chapter and corpus of which every seed is done."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.task.seed is not None:
            groups.setdefault((row.task.chapter, row.task.corpus), []).append(row)
    return [
        _merge_rows(chapter, corpus, found)
        for (chapter, corpus), found in groups.items()
        if all(row.state != "failed" for row in found)
    ]


def _merge_rows(chapter: str, corpus: str | None, rows: list[Row]) -> Merged:
    seeds = tuple(sorted(row.task.seed for row in rows))
    parts: dict[str, list[runs.RunRecord]] = {}
    for record in (r for row in rows for r in row.records if r.kind == "training"):
        parts.setdefault(digest([record.name, record.parameters]), []).append(record)
    records, problems = [], []
    for found in parts.values():
        have = sorted(seed for record in found for seed in record.seeds)
        if have != list(seeds):
            problems.append(
                f"{found[0].name} with equal parameters was recorded for seeds {have}, "
                f"not once for each of {list(seeds)}"
            )
            continue
        try:
            records.append(runs.merge(found))
        except runs.RecordError as error:
            problems.append(str(error))
    return Merged(chapter, corpus, seeds, tuple(records), tuple(problems))


@dataclass(frozen=True)
class Summary:
    """The end of a sweep: lines of its table, where it is kept, what went wrong."""

    lines: list[tuple[str, ...]]
    file: Path
    records: Path
    problems: list[str]


def conclude(rows: Sequence[Row], out: Path, records: Path | None = None) -> Summary:
    """Merge what is complete, save table and merged records in a folder of this sweep.

    records: another folder for the merged records, such as ``results``.
    """
    merged = merge_seeds(rows)
    place = out / digest(sorted(row.task.folder.name for row in rows))[:8]
    records = records or place / "records"
    for record in (r for one in merged for r in one.records):
        runs.save(record, records)
    body = {
        "tasks": [_as_dict(row) for row in rows],
        "merged": [
            {
                "chapter": one.chapter,
                "corpus": one.corpus,
                "seeds": list(one.seeds),
                "records": [_shown(record) for record in one.records],
                "problems": list(one.problems),
            }
            for one in merged
        ],
    }
    file = place / "sweep.json"
    write_atomic(file, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
    problems = [f"{r.task.label}: {r.error}" for r in rows if r.state == "failed"]
    problems += [
        f"{one.chapter} {one.corpus or ''}: {problem}"
        for one in merged
        for problem in one.problems
    ]
    return Summary(_table(rows, merged), file, records, problems)


def _as_dict(row: Row) -> dict:
    return {
        "chapter": row.task.chapter,
        "corpus": row.task.corpus,
        "seed": row.task.seed,
        "state": row.state,
        "attempts": row.attempts,
        "seconds": row.seconds,
        "error": row.error,
        "folder": row.task.folder.name,
        "records": [_shown(record) for record in row.records],
    }


def _table(rows: Iterable[Row], merged: Iterable[Merged]) -> list[tuple[str, ...]]:
    """Every task, then each merge with mean and sample standard deviation."""
    lines = []
    for row in rows:
        state = row.state + " at the 2nd try" * (
            row.state == "done" and row.attempts > 1
        )
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        seed = "" if row.task.seed is None else str(row.task.seed)
        # of an error the first line; the whole is printed below the table
        shown = row.error.strip().partition("\n")[0] or _metrics(row.records)
        corpus = row.task.corpus or ""
        lines.append((row.task.chapter, corpus, seed, state, seconds, shown))
    for one in merged:
        seeds = ", ".join(map(str, one.seeds))
        shown = _metrics(one.records)
        lines.append((one.chapter, one.corpus or "", seeds, "merged", "", shown))
    return lines


def _main_metric(record: runs.RunRecord) -> str | None:
    """MAE where it was measured, else the first metric of the test split."""
    known = [set(entry.get("test") or ()) for entry in record.per_seed]
    common = set.intersection(*known) if known else set()
    return "mae" if "mae" in common else min(common, default=None)


def _shown(record: runs.RunRecord) -> dict:
    """Name, file and main test metric of a record."""
    found = {"name": record.name, "file": record.place.as_posix()}
    metric = _main_metric(record)
    if metric:
        path = f"test.{metric}"
        values = {"mean": record.mean(path), "sd": record.sd(path)}
        values = {k: None if math.isnan(v) else v for k, v in values.items()}
        found |= {"metric": path, **values}
    return found


def _metrics(records: Iterable[runs.RunRecord]) -> str:
    """``late-fusion mae 0.905 ± 0.020``, the first few; the JSON has them all."""
    found = [s for s in map(_shown, records) if "metric" in s]
    texts = []
    for one in found[:METRICS_SHOWN]:
        mean = "–" if one["mean"] is None else f"{one['mean']:.3f}"
        sd = "" if one["sd"] is None else f" ± {one['sd']:.3f}"
        texts.append(f"{one['name']} {one['metric'].removeprefix('test.')} {mean}{sd}")
    more = len(found) - METRICS_SHOWN
    return ", ".join(texts) + (f" and {more} more" if more > 0 else "")
