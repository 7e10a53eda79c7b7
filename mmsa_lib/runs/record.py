"""Run records: what was run, on what, with which result. JSON, never edited.

A folder of records has one folder for each chapter that made them, and one for what no
chapter made, see `RunRecord.place`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import platform
import re
import resource
import statistics as pystats
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mmsa_lib.errors import MmsaError, unknown
from mmsa_lib.files import ROOT, sha256, sha256_of, write_atomic

SCHEMA = 1


class RecordError(MmsaError, ValueError):
    """A record file is damaged, edited or of an unknown schema."""


@dataclass(frozen=True)
class RunRecord:
    """One training, evaluation or benchmark call with everything needed to place it.

    `per_seed` holds one dict a seed: ``{"seed", "test": {metric: value}, "valid":
    {...}, "epochs", "seconds", ...}``. `id` is the sha256 of the rest.
    """

    name: str
    kind: str  # "training", "measurement", "comparison" or "benchmark"
    created: str
    chapter: str | None = None
    profile: str | None = None
    parameters: dict = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    corpus: dict = field(default_factory=dict)
    code: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    resources: dict = field(default_factory=dict)
    selection: str = ""
    per_seed: list[dict] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)  # what is not per seed
    status: str = "complete"
    schema: int = SCHEMA
    id: str = ""

    def values(self, path: str) -> list[float]:
        """One value a seed, such as ``values("test.mae")``; NaN where undefined."""
        found = [walk(entry, path) for entry in self.per_seed]
        return [math.nan if v is None else v for v in found]

    def mean(self, path: str) -> float:
        """Mean over seeds."""
        return pystats.fmean(self.values(path))

    def sd(self, path: str) -> float:
        """Sample standard deviation over seeds (n - 1); NaN for one seed."""
        values = self.values(path)
        return pystats.stdev(values) if len(values) > 1 else math.nan

    @property
    def place(self) -> Path:
        """Its file inside a folder of records: ``wander/lora-0123456789ab.json``.

        What no chapter made (benchmarks, searches) lies in ``benchmarks/``.
        """
        return place(self.chapter, f"{self.name}-{self.id[:12]}")

    @property
    def synthetic(self) -> bool:
        return bool(self.corpus.get("synthetic"))


def place(chapter: str | None, stem: str) -> Path:
    """Where a folder of records keeps one of a chapter (None: of no chapter).

    Raises `RecordError` for a name that would leave the folder.
    """
    chapter = chapter or "benchmarks"
    for name in (chapter, stem):
        if re.search(r"[/\\\0]", name) or name in (".", ".."):
            raise RecordError(
                f"{name!r} is no name for a record or its chapter: it names a place "
                "elsewhere. Use letters, digits and hyphens"
            )
    return Path(chapter, f"{stem}.json")


def walk(entry: Mapping, path: str):
    """The field of a record (as a dict) that a dotted path names."""
    for key in path.split("."):
        if isinstance(entry, list) and key.isdecimal() and int(key) < len(entry):
            entry = entry[int(key)]
            continue
        if not isinstance(entry, Mapping) or key not in entry:
            known = entry if isinstance(entry, Mapping) else ()
            raise unknown("record field", f"{key} (of {path})", map(str, known))
        entry = entry[key]
    return entry


# ---------------------------------------------------------------- provenance


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


@cache
def package_sha256(root: Path = ROOT) -> str:
    """Hash of every source file of the package: the closure when none was given."""
    digest = hashlib.sha256()
    for path in sorted((root / "mmsa_lib").rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def code_facts() -> dict:
    """Commit, dirty flag, chapter source hash and import-closure hash."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    commit = _git("rev-parse", "HEAD")
    dirty = None if changes is None else bool(changes)
    if sent := os.environ.get("MMSA_COMMIT"):  # a sweep sent the code without its git
        commit, _, mark = sent.partition(" ")
        dirty = mark == "dirty"
    lock = ROOT / "constraints.txt"
    return {
        "commit": commit,
        "dirty": dirty,
        "chapter_sha256": os.environ.get("MMSA_CHAPTER_SHA"),
        "closure_sha256": os.environ.get("MMSA_CLOSURE_SHA") or package_sha256(),
        "lock_sha256": sha256_of(lock) if lock.is_file() else None,
    }


def environment_facts() -> dict:
    """Python, library versions and hardware."""
    facts = {
        "python": platform.python_version(),
        "torch": _package_version("torch"),
        "transformers": _package_version("transformers"),
        "numpy": _package_version("numpy"),
        "system": platform.system(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "ram_gib": None,
        "gpu": None,
        "cuda": None,
    }
    if hasattr(os, "sysconf"):
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        facts["ram_gib"] = round(pages / 2**30, 1)
    torch = _loaded_torch()
    if torch is not None and torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def _loaded_torch():
    import sys

    return sys.modules.get("torch")  # never import it only to ask


def peak_memory() -> dict:
    """Peak resident memory of this process, and of the GPU, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    facts = {"peak_ram_mib": round(peak / unit), "peak_gpu_mib": None}
    torch = _loaded_torch()
    if torch is not None and torch.cuda.is_available():
        facts["peak_gpu_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return facts


def corpus_facts(corpus) -> dict:
    """Name, fingerprint, sizes and the synthetic flag of a `Corpus`."""
    return {
        "name": corpus.name,
        "version": corpus.card.version,
        "sha256": corpus.fingerprint,
        "synthetic": corpus.card.synthetic,
        "options": corpus.card.options,
        "modalities": corpus.dims,
        "sizes": {name: len(split) for name, split in corpus.splits.items()},
    }


# ---------------------------------------------------------------- save and load


def _canonical(record: RunRecord) -> str:
    body = {k: v for k, v in asdict(record).items() if k != "id"}
    return json.dumps(body, sort_keys=True, ensure_ascii=False, allow_nan=False)


def seal(record: RunRecord) -> RunRecord:
    """The same record with its content address filled in."""
    plain = json.loads(_canonical(record))  # tuples become lists, as they will on disk
    record = RunRecord(**plain)
    return replace(record, id=sha256(_canonical(record)))


def records_folder() -> Path:
    """Where new records go: ``MMSA_RECORDS``, else ``_build/records`` of the book."""
    return Path(os.environ.get("MMSA_RECORDS") or ROOT / "_build" / "records")


def save(record: RunRecord, folder: Path | None = None) -> Path:
    """Write a sealed record atomically into its place below `folder`.

    folder: the records folder if there is none. An existing record is never rewritten.
    """
    record = record if record.id else seal(record)
    path = Path(folder or records_folder()) / record.place
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(
            f"the records folder {path.parent} cannot be made: {error}. Set "
            "MMSA_RECORDS to a folder that you can write to."
        ) from error
    if path.exists():
        return path
    body = json.dumps(asdict(record), indent=1, sort_keys=True, ensure_ascii=False)
    try:
        write_atomic(path, body + "\n")
    except OSError as error:
        raise RecordError(
            f"the record {path} could not be written: {error}. Free disk space or set "
            "MMSA_RECORDS to another folder; nothing half-written is left."
        ) from error
    return path


def load(path: Path) -> RunRecord:
    """Read one record and check its content address; `RecordError` if it was edited."""
    path = Path(path)
    try:
        record = RunRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RecordError(f"{path.name} is not a run record: {error}") from error
    if record.schema != SCHEMA:
        raise RecordError(
            f"{path.name} has record schema {record.schema}; this version reads "
            f"{SCHEMA}"
        )
    if sha256(_canonical(record)) != record.id:
        raise RecordError(
            f"{path.name} does not match its content address: it was edited or "
            "damaged. Records are never edited; run the chapter again."
        )
    return record


def load_all(folder: Path | None = None) -> list[RunRecord]:
    """Every record of a folder, oldest first."""
    return _load(Path(folder or records_folder()).rglob("*.json"))


def _load(paths: Iterable[Path]) -> list[RunRecord]:
    records = [load(path) for path in sorted(paths, key=lambda p: p.name)]
    return sorted(records, key=lambda r: r.created)


def named(
    folder: Path, name: str | None = None, chapter: str | None = None
) -> Iterator[Path]:
    """Files of records by what their place says, none of them read; None is any.

    The name is all before the last hyphen and 12 digits: ``wander`` is not
    ``wander-head``.
    """
    name, chapter = ("*" if w is None else glob.escape(w) for w in (name, chapter))
    digits = "[0-9a-f]" * 12
    return Path(folder).glob(f"{chapter}/{name}-{digits}.json")


def find(
    name: str,
    corpus: str | None = None,
    folder: Path | None = None,
    kind: str | None = None,
) -> RunRecord:
    """The newest committed record of that name (and corpus, kind) in ``results/``."""
    folder = folder or ROOT / "results"
    found = [
        r
        for r in _load(named(folder, name))
        if r.name == name
        and corpus in (None, r.corpus.get("name"))
        and kind in (None, r.kind)
    ]
    if not found:
        known = {path.stem.rpartition("-")[0] for path in named(folder)}
        raise unknown("record", _asked(name, corpus, kind), known)
    return found[-1]


def _asked(name: str, corpus: str | None, kind: str | None) -> str:
    """The question in words, so that a known name is not called unknown."""
    return name + f" on {corpus}" * bool(corpus) + f" of kind {kind}" * bool(kind)


def committed(
    chapter: str, corpus: str | None = None, folder: Path | None = None
) -> list[RunRecord]:
    """The newest committed record of each name (and corpus) that a chapter made.

    Oldest first. Raises `UnknownNameError` if ``results/`` has none of that chapter.
    """
    folder = folder or ROOT / "results"
    records = [r for r in _load(named(folder, chapter=chapter)) if r.chapter == chapter]
    newest = {
        (r.name, r.corpus.get("name")): r
        for r in records
        if corpus in (None, r.corpus.get("name"))
    }
    if not newest:
        made = {f"{chapter} on {r.corpus.get('name')}" for r in records}
        made |= {path.parent.name for path in named(folder)} - {chapter}
        raise unknown("committed records", f"{chapter} on {corpus or 'any'}", made)
    return sorted(newest.values(), key=lambda r: r.created)


def new(name: str, kind: str, **fields) -> RunRecord:
    """A record of what happens now: by whom, with which code, on which machine."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise RecordError(
            f"record name {name!r} must be lower-case letters, digits and hyphens"
        )
    return RunRecord(
        name=name,
        kind=kind,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        chapter=os.environ.get("MMSA_CHAPTER"),
        profile=os.environ.get("MMSA_PROFILE"),
        code=code_facts(),
        environment=environment_facts(),
        **fields,
    )
