"""One record over seeds of records that differ in nothing but their seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mmsa_lib.runs.record import RecordError, RunRecord, seal


def merge(records: Iterable[RunRecord]) -> RunRecord:
    """One record over seeds of records that differ in nothing but their seed.

    Raises `RecordError` that names what differs: code, corpus, parameters, versions.
    Wall time is the sum, peak memory the largest; the parts' ids stand in ``rows``.
    """
    parts = sorted(records, key=lambda r: r.seeds)
    if not parts:
        raise RecordError("there are no records to merge")
    if len(parts) == 1:
        return parts[0]
    first, *others = (_common(part) for part in parts)
    differing = {
        name: f"{name} ({_short(first[name])} against {_short(other[name])})"
        for other in others
        for name in first
        if first[name] != other[name]
    }
    if differing:
        raise RecordError(
            f"records of {parts[0].name} cannot be merged, they differ in: "
            + ", ".join(differing.values())
        )
    seeds = [seed for part in parts for seed in part.seeds]
    if len(set(seeds)) < len(seeds):
        raise RecordError(f"{parts[0].name}: a seed occurs twice in {seeds}")
    newest = max(parts, key=lambda r: r.created)
    return seal(
        replace(
            newest,
            seeds=seeds,
            per_seed=[entry for part in parts for entry in part.per_seed],
            code=newest.code | {"dirty": any(p.code.get("dirty") for p in parts)},
            environment={
                k: _joined([p.environment.get(k) for p in parts])
                for k in newest.environment
            },
            resources={
                k: _pooled(k, [p.resources.get(k) for p in parts])
                for k in newest.resources
            },
            rows=[{"merged_from": [part.id for part in parts]}],
            id="",
        )
    )


def _common(record: RunRecord) -> dict:
    """What records of several seeds must have in common."""
    plain = ("name", "kind", "chapter", "profile", "parameters", "corpus", "selection")
    code = ("chapter_sha256", "closure_sha256", "lock_sha256")
    versions = ("python", "torch", "transformers", "numpy")
    counts = ("trainable_parameters", "total_parameters")
    return (
        {k: getattr(record, k) for k in (*plain, "status", "schema")}
        | {f"code.{k}": record.code.get(k) for k in code}
        | {f"environment.{k}": record.environment.get(k) for k in versions}
        | {f"resources.{k}": record.resources.get(k) for k in counts}
        | {
            "test items": sorted(
                {str(e.get("test_ids_sha256")) for e in record.per_seed}
            )
        }
    )


def _joined(values: list):
    """A fact of the hardware: texts that differ are all named, numbers become None."""
    found = [v for i, v in enumerate(values) if v not in values[:i]]
    if len(found) == 1:
        return found[0]
    texts = [v for v in found if isinstance(v, str)]
    return "; ".join(texts) or None


def _pooled(name: str, values: list):
    known = [v for v in values if v is not None]
    if not known:
        return None
    return round(sum(known), 2) if name == "wall_seconds" else max(known)


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
