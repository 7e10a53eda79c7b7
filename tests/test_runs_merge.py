"""Merging: one record over seeds, only of what differs in nothing else."""

from dataclasses import replace

import pytest

from mmsa_lib import runs


def record(seed: int, **changes) -> runs.RunRecord:
    made = runs.RunRecord(
        name="late",
        kind="training",
        created=f"2026-01-0{seed + 1}T00:00:00+00:00",
        chapter="toy",
        profile="full",
        parameters={"lr": 0.1},
        seeds=[seed],
        corpus={"name": "a", "sha256": "c"},
        code={
            **{"commit": f"{seed}", "dirty": seed == 1, "chapter_sha256": "s"},
            **{"closure_sha256": "l", "lock_sha256": "k"},
        },
        environment={"python": "3.11", "torch": "2", "gpu": f"G{seed % 2}", "cores": 2},
        resources={
            **{"wall_seconds": 1.25, "peak_ram_mib": 100 + seed, "peak_gpu_mib": None},
            "total_parameters": 7,
        },
        selection="lowest MAE",
        per_seed=[{"seed": seed, "test": {"mae": float(seed)}, "test_ids_sha256": "t"}],
    )
    return runs.seal(replace(made, **changes))


def test_merge_makes_one_record_over_seeds(tmp_path):
    parts = [record(2), record(0), record(1)]
    merged = runs.merge(parts)
    assert merged.seeds == [0, 1, 2]
    assert merged.values("test.mae") == [0.0, 1.0, 2.0]
    assert merged.created == parts[0].created
    assert merged.code["dirty"] is True  # one part was
    assert merged.environment["gpu"] == "G0; G1"
    assert merged.environment["cores"] == 2
    assert merged.resources == {
        "wall_seconds": 3.75,
        "peak_ram_mib": 102,
        "peak_gpu_mib": None,
        "total_parameters": 7,
    }
    assert merged.rows == [{"merged_from": [record(s).id for s in (0, 1, 2)]}]
    assert runs.load(runs.save(merged, tmp_path)) == merged
    assert runs.merge(reversed(parts)) == merged
    assert runs.merge([parts[1]]) == parts[1]


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("name", {"name": "early"}),
        ("corpus", {"corpus": {"name": "a", "sha256": "other"}}),
        ("parameters", {"parameters": {"lr": 0.2}}),
        ("chapter", {"chapter": "other"}),
        ("profile", {"profile": "quick"}),
        ("selection", {"selection": "best of test"}),
        ("code.closure_sha256", {"code": {"closure_sha256": "m"}}),
        ("code.chapter_sha256", {"code": {"chapter_sha256": "m"}}),
        ("code.lock_sha256", {"code": {"lock_sha256": "m"}}),
        ("environment.torch", {"environment": {"torch": "3"}}),
        ("resources.total_parameters", {"resources": {"total_parameters": 8}}),
        ("test items", {"per_seed": [{"seed": 1, "test_ids_sha256": "u"}]}),
    ],
)
def test_merge_says_what_differs(named, changes):
    base = record(1)
    changes = {
        k: getattr(base, k) | v if k in ("code", "environment", "resources") else v
        for k, v in changes.items()
    }
    with pytest.raises(runs.RecordError, match="cannot be merged") as error:
        runs.merge([record(0), record(2), record(1, **changes)])
    differing = str(error.value).partition("differ in: ")[2]
    assert differing.startswith(f"{named} (")
    assert differing.count("against") == 1  # this and nothing else


def test_merge_refuses_a_seed_twice():
    again = record(0, created="2026-02-01T00:00:00+00:00")
    with pytest.raises(runs.RecordError, match=r"a seed occurs twice in \[0, 0\]"):
        runs.merge([record(0), again])
    with pytest.raises(runs.RecordError, match="no records"):
        runs.merge([])


def test_one_seed_is_recorded_without_a_verdict(tmp_path, monkeypatch):
    """A task of a sweep has one seed, and a chapter compares: it must not fail."""
    monkeypatch.setenv("MMSA_RECORDS", str(tmp_path))
    found = runs.compare(record(1), record(1, name="early"), names=("late", "early"))
    assert found.rows[0]["n"] == 1
    assert found.rows[0]["verdict"] == "late against early: one seed, no comparison."
    assert "p" not in found.rows[0]
