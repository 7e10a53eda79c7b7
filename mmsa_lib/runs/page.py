"""Records on a page: every figure is marked with the record and field it came from.

A gate of the press computes each of them again from the record's file (`recall`,
`verdict_of`, `run_card`) and compares.
"""

from __future__ import annotations

import html
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mmsa_lib.errors import MmsaError
from mmsa_lib.files import read_text, read_yaml
from mmsa_lib.runs.record import RecordError, RunRecord, walk

TAGS = ("strong", "em", "code", "sub", "sup")  # what a sentence may hold of HTML
UNDEFINED = "—"  # what a page shows where a record has no value


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

    def __str__(self) -> str:
        return self.text

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
        found = walk(asdict(record), path)
        found = len(found) if of == "count" else math.nan if found is None else found
    else:
        found = {"mean": record.mean, "sd": record.sd}[of](path)
    return Number(float(found), record.id, f"{of}({path})", digits, suffix)


def recall(record: RunRecord, path: str, digits: int, suffix: str = "") -> Number:
    """The number that a mark on a page names (its ``data-path``), computed anew."""
    of, _, field_ = path.removesuffix(")").partition("(")
    return number(record, field_, of=of, digits=digits, suffix=suffix)


def say(template: str, **numbers: Number | Given):
    """A sentence with record-backed numbers: ``say("MAE {mae}.", mae=number(...))``.

    Of HTML it may hold `TAGS`, without attributes; all else is shown as it is written.
    """
    from IPython.display import HTML

    parts = {k: v._repr_html_() for k, v in numbers.items()}
    return HTML(f"<p>{_escaped(template).format(**parts)}</p>")


def _escaped(template: str) -> str:
    tags = re.compile(rf"&lt;(/?(?:{'|'.join(TAGS)}))&gt;")
    return tags.sub(r"<\1>", html.escape(template, quote=False))


class ClaimError(MmsaError):
    """A page claims something that its run does not show."""


def claim(holds: bool, template: str, **numbers: Number | Given):
    """A sentence, as `say` shows it, that is true of this run if `holds`.

    Example: ``claim(a.value < b.value, "{a} is below {b}.", a=a, b=b)``. Where it does
    not hold, a marked box says so; under ``MMSA_STRICT=1`` (a quick build sets it)
    `ClaimError` stops the page instead, because its text was written for that run.
    """
    from IPython.display import HTML

    sentence = say(template, **numbers)
    if holds:
        return sentence
    if os.environ.get("MMSA_STRICT") == "1":
        plain = template.format(**{k: str(v) for k, v in numbers.items()})
        raise ClaimError(
            f"this page claims {plain!r}, which is not true of this run. Find out what "
            "changed; reword the sentence only if the new numbers are right."
        )
    return HTML(
        '<div class="claim-failed"><p><strong>This run does not show it:</strong></p>'
        f"{sentence.data}</div>"
    )


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
    sd: Sequence[str] = ("test.mae",),
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
    from IPython.display import HTML

    body = read_yaml(read_text(path, Path(path).name), Path(path).name) or {}
    if not body.get("caption"):
        raise RecordError(f"{Path(path).name} needs a caption with its source")
    head = "".join(f"<th scope='col'>{html.escape(c)}</th>" for c in columns)

    source = html.escape(Path(path).name)

    def mark(path: str) -> str:
        return f'class="ref" data-source="{source}" data-path="{html.escape(path)}"'

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

    def span(values: list) -> str:
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
