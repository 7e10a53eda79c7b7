"""Run records: what was run, on what, with which result. JSON, never edited.

Numbers reach a page only through a record: `table`, `number` and `say` mark every
printed figure with the record and the field it came from. A gate of the press computes
each of them again from the record's file (`recall`, `verdict_of`, `run_card`) and
compares. Importing this module does not load torch.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
import platform
import re
import resource
import statistics as pystats
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mmsa_lib.errors import MmsaError, unknown
from mmsa_lib.files import ROOT, sha256, sha256_of, write_atomic

SCHEMA = 1
UNDEFINED = "—"  # what a page shows where a record has no value


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
        found = [_walk(entry, path) for entry in self.per_seed]
        return [math.nan if v is None else v for v in found]

    def mean(self, path: str) -> float:
        """Mean over seeds."""
        return pystats.fmean(self.values(path))

    def sd(self, path: str) -> float:
        """Sample standard deviation over seeds (n - 1); NaN for one seed."""
        values = self.values(path)
        return pystats.stdev(values) if len(values) > 1 else math.nan

    @property
    def synthetic(self) -> bool:
        return bool(self.corpus.get("synthetic"))


def _walk(entry: Mapping, path: str):
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
    digest = hashlib.sha256(_canonical(record).encode()).hexdigest()
    return replace(record, id=digest)


def records_folder() -> Path:
    """Where new records go: ``MMSA_RECORDS``, else ``_build/records`` of the book."""
    return Path(os.environ.get("MMSA_RECORDS") or ROOT / "_build" / "records")


def save(record: RunRecord, folder: Path | None = None) -> Path:
    """Write a sealed record atomically; an existing record is never rewritten."""
    folder = Path(folder or records_folder())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(
            f"the records folder {folder} cannot be made: {error}. Set MMSA_RECORDS "
            "to a folder that you can write to."
        ) from error
    record = record if record.id else seal(record)
    path = folder / f"{record.name}-{record.id[:12]}.json"
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
    if hashlib.sha256(_canonical(record).encode()).hexdigest() != record.id:
        raise RecordError(
            f"{path.name} does not match its content address: it was edited or "
            "damaged. Records are never edited; run the chapter again."
        )
    return record


def load_all(folder: Path | None = None) -> list[RunRecord]:
    """Every record of a folder, oldest first."""
    folder = Path(folder or records_folder())
    records = [load(path) for path in sorted(folder.rglob("*.json"))]
    return sorted(records, key=lambda r: r.created)


def find(
    name: str,
    corpus: str | None = None,
    folder: Path | None = None,
    kind: str | None = None,
) -> RunRecord:
    """The newest committed record of that name (and corpus, kind) in ``results/``."""
    records = load_all(folder or ROOT / "results")
    named = [
        r
        for r in records
        if r.name == name
        and corpus in (None, r.corpus.get("name"))
        and kind in (None, r.kind)
    ]
    if not named:
        raise unknown("record", name, {r.name for r in records})
    return named[-1]


def committed(
    chapter: str, corpus: str | None = None, folder: Path | None = None
) -> list[RunRecord]:
    """The newest committed record of each name (and corpus) that a chapter made.

    Oldest first. Raises `UnknownNameError` if ``results/`` has none of that chapter.
    """
    records = load_all(folder or ROOT / "results")
    newest = {
        (r.name, r.corpus.get("name")): r
        for r in records
        if r.chapter == chapter and corpus in (None, r.corpus.get("name"))
    }
    if not newest:
        made = {f"{r.chapter} on {r.corpus.get('name')}" for r in records if r.chapter}
        raise unknown("committed records", f"{chapter} on {corpus or 'any'}", made)
    return sorted(newest.values(), key=lambda r: r.created)


def _new(name: str, kind: str, **fields) -> RunRecord:
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
    record = _new(
        name,
        "benchmark",
        parameters=settings,
        rows=rows,
        resources=peak_memory(),
    )
    return save(record, out)


# ---------------------------------------------------------------- experiments


def experiment(
    name: str,
    train: Callable[[int], object],
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
    record = _new(
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
    record = _new(
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
    record = _new(
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
        record = _new(
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


# ---------------------------------------------------------------- on the page


@dataclass(frozen=True)
class Number:
    """A figure on a page that knows its record and field; renders as HTML."""

    value: float
    record: str
    path: str
    digits: int = 3
    suffix: str = ""

    def __str__(self) -> str:
        if math.isnan(self.value):
            return UNDEFINED
        text = f"{self.value:,.{self.digits}f}{self.suffix}"
        return text.replace("-", "\N{MINUS SIGN}")

    def _repr_html_(self) -> str:
        short, path = self.record[:12], html.escape(self.path)
        title = f"record {short}: {path}"
        if math.isnan(self.value):
            title += " is undefined, so the record holds no value"
        suffix = f' data-suffix="{html.escape(self.suffix)}"' if self.suffix else ""
        return (
            f'<data class="rec" value="{self.value!r}" data-record="{short}"'
            f' data-path="{path}" data-digits="{self.digits}"{suffix}'
            f' title="{title}">{html.escape(str(self))}</data>'
        )


@dataclass(frozen=True)
class Given:
    """A number that no run produced: chosen, defined, or taken from a source."""

    text: str
    source: str

    def _repr_html_(self) -> str:
        return (
            f'<data class="given" value="" title="{html.escape(self.source)}">'
            f"{html.escape(self.text)}</data>"
        )


def given(text: object, source: str) -> Given:
    """A number for `say` and captions that has no record, with where it comes from.

    In prose the same is written ``[0.88]{.given source="where from"}``.
    """
    if not source.strip():
        raise RecordError(f"{text!r} has no record, so say where it comes from")
    return Given(str(text), source)


def number(
    record: RunRecord, path: str, *, of: str = "mean", digits: int = 3, suffix: str = ""
) -> Number:
    """A number of a record.

    of: "mean" or "sd" over seeds, "field" for the field itself, "count" for its length.
    """
    if of in ("field", "count"):
        found = _walk(asdict(record), path)
        found = len(found) if of == "count" else math.nan if found is None else found
    else:
        found = {"mean": record.mean, "sd": record.sd}[of](path)
    return Number(float(found), record.id, f"{of}({path})", digits, suffix)


def recall(record: RunRecord, path: str, digits: int, suffix: str = "") -> Number:
    """The number that a mark on a page names (its ``data-path``), computed anew."""
    of, _, field_ = path.removesuffix(")").partition("(")
    return number(record, field_, of=of, digits=digits, suffix=suffix)


def say(template: str, **numbers: Number | Given):
    """A sentence with record-backed numbers: ``say("MAE {mae}.", mae=number(...))``."""
    from IPython.display import HTML

    parts = {k: v._repr_html_() for k, v in numbers.items()}
    return HTML(f"<p>{template.format(**parts)}</p>")


def value(record: RunRecord, key: str, *, digits: int = 3, suffix: str = "") -> Number:
    """A number of a `measure` or benchmark record's first row."""
    return number(record, f"rows.0.{key}", of="field", digits=digits, suffix=suffix)


def verdict(*records: RunRecord):
    """The verdicts of `compare`, a line each, marked with their records."""
    from IPython.display import HTML

    lines = [
        f'<li class="rec" data-record="{r.id[:12]}" data-path="rows.0.verdict">'
        f"{html.escape(verdict_of(r))}</li>"
        for r in records
    ]
    return HTML(f"<ul>{''.join(lines)}</ul>")


def verdict_of(record: RunRecord) -> str:
    """The sentence of a `compare` record, worded anew from its numbers."""
    from mmsa_lib.statistics import Comparison

    row = record.rows[0] if record.rows else {}
    if row.get("n") == 1:  # of one seed there is nothing to recompute
        return row["verdict"]
    try:
        return Comparison(**{f.name: row[f.name] for f in fields(Comparison)}).verdict
    except KeyError as error:
        raise RecordError(
            f"record {record.name}-{record.id[:12]} is no comparison: it lacks {error}"
        ) from error


def table(
    records: Iterable[RunRecord],
    columns: Mapping[str, str],
    *,
    names: Mapping[str, str] | None = None,
    digits: Mapping[str, int] | None = None,
    caption: str = "",
    sd: Iterable[str] = ("test.mae",),
    **numbers: Number | Given,
):
    """An HTML table, one row a record, one column a field, every number marked.

    columns: heading -> path, such as ``{"MAE": "test.mae"}`` (mean over seeds), or
    ``"field:resources.trainable_parameters"`` for a field of the record itself.
    sd: paths shown as mean +- sample standard deviation.
    caption: may hold ``{n}``, filled from ``n=runs.number(...)``.
    Synthetic and real corpora never share a table: mixing them raises `RecordError`.
    """
    from IPython.display import HTML

    records = list(records)
    if len({r.synthetic for r in records}) > 1:
        raise RecordError(
            "synthetic and real results never share a table; make two tables"
        )
    if len({r.corpus.get("sha256") for r in records}) > 1:
        raise RecordError("records of different corpora never share a table")
    names, digits = names or {}, digits or {}
    head = "".join(f"<th scope='col'>{html.escape(c)}</th>" for c in columns)
    body = []
    for record in records:
        cells = []
        for path in columns.values():
            places = digits.get(path, 3 if path.endswith(("mae", "corr")) else 1)
            cells.append(f"<td>{_cell(record, path, places, path in sd)}</td>")
        title = html.escape(names.get(record.name, record.name))
        body.append(f"<tr><th scope='row'>{title}</th>{''.join(cells)}</tr>")
    rows = "".join(body)
    kind = "synthetic" if records and records[0].synthetic else "real"
    note = html.escape(caption)
    if numbers:
        note = note.format(**{k: n._repr_html_() for k, n in numbers.items()})
    seeds = {len(r.seeds): number(r, "seeds", of="count", digits=0) for r in records}
    counts = " or ".join(n._repr_html_() for _, n in sorted(seeds.items()))
    if set(seeds) != {1}:
        note += f" Mean over {counts} seeds"
        note += ", with sample standard deviation where shown." if sd else "."
    if f">{UNDEFINED}<" in rows:
        note += (
            f" {UNDEFINED} where a value is undefined, such as the correlation of a "
            "constant, or missing."
        )
    note += " Synthetic corpus." if kind == "synthetic" else ""
    return HTML(
        f'<div class="rec-table"><table class="{kind}">'
        f"<caption><span>{note}</span></caption>"
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def reference_table(path: Path | str, columns: Mapping[str, str]):
    """An HTML table of numbers that were measured elsewhere, read from a YAML file.

    The file has `caption`, and `rows` with `model` and the metrics named by `columns`
    (heading -> key); a missing one prints as a dash. Such numbers have no record, so
    the caption must say where they come from.
    """
    import yaml
    from IPython.display import HTML

    body = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not body.get("caption"):
        raise RecordError(f"{Path(path).name} needs a caption with its source")
    head = "".join(f"<th scope='col'>{html.escape(c)}</th>" for c in columns)

    source = Path(path).name

    def mark(path: str) -> str:
        return f'class="ref" data-source="{source}" data-path="{path}"'

    rows = []
    for i, row in enumerate(body["rows"]):
        cells = "".join(
            f"<td><data {mark(f'rows.{i}.{key}')}>"
            f"{html.escape(str(row.get(key, UNDEFINED)))}</data></td>"
            for key in columns.values()
        )
        name = html.escape(row["model"])
        rows.append(f"<tr><th scope='row'>{name}</th>{cells}</tr>")
    return HTML(
        '<div class="rec-table"><table class="reference">'
        f"<caption><span {mark('caption')}>{html.escape(body['caption'])}</span>"
        "</caption>"
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table></div>"
    )


def _cell(record: RunRecord, path: str, digits: int, with_sd: bool) -> str:
    if path.startswith("field:"):
        path = path.removeprefix("field:")
        return number(record, path, of="field", digits=0)._repr_html_()
    text = number(record, path, digits=digits)._repr_html_()
    if with_sd and len(record.seeds) > 1:
        text += " ± " + number(record, path, of="sd", digits=digits)._repr_html_()
    return text


def facts(records: Iterable[RunRecord]) -> dict[str, str]:
    """What runs cost and where they come from, by name: the lines of a run card."""
    records = sorted(records, key=lambda r: r.created)
    if not records:
        raise RecordError("a run card needs at least one record")

    def known(key: str) -> list:
        return [r.resources[key] for r in records if r.resources.get(key) is not None]

    def span(values: Iterable) -> str:
        ends = [min(values), max(values)] if values else []
        return " to ".join(f"{v:,}" for v in dict.fromkeys(ends)) or UNDEFINED

    corpora = {
        f"{r.corpus['name']} ({'synthetic' if r.synthetic else 'real'})"
        for r in records
        if r.corpus
    }
    memory = [f"{max(m):,} MiB" for m in [known("peak_ram_mib")] if m]
    memory += [f"GPU {max(m):,} MiB" for m in [known("peak_gpu_mib")] if m]
    machines = {r.environment.get("gpu") or r.environment.get("cpu") for r in records}
    commits = {  # the last one first
        (r.code.get("commit") or "no commit")[:10]
        + (" (with local changes)" if r.code.get("dirty") else "")
        for r in records
    }
    last = (records[-1].code.get("commit") or "no commit")[:10]
    return {
        "Training time": f"{sum(known('wall_seconds')):,.0f} s in "
        f"{len(records)} record{'s' * (len(records) > 1)}",
        "Peak memory": ", ".join(memory) or UNDEFINED,
        "Trained parameters": span([n for n in known("trainable_parameters") if n]),
        "Corpus": ", ".join(sorted(corpora)) or UNDEFINED,
        "Seeds": ", ".join(map(str, sorted({s for r in records for s in r.seeds})))
        or UNDEFINED,
        "Hardware": ", ".join(sorted(m for m in machines if m)) or UNDEFINED,
        "Commit": ", ".join(sorted(commits, key=lambda c: (not c.startswith(last), c))),
        "Date": records[-1].created[:10],
    }


def run_card(records: Iterable[RunRecord]):
    """The footer of a chapter: time, memory, parameters, corpus, seeds, commit.

    The rendered page adds whether the chapter is fresh, which only the press knows.
    """
    from IPython.display import HTML

    records = list(records)
    cells = "".join(
        f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>"
        for k, v in facts(records).items()
    )
    ids = " ".join(r.id[:12] for r in records)
    return HTML(
        f'<dl class="run-card" aria-label="Run card" data-records="{ids}">{cells}</dl>'
    )
