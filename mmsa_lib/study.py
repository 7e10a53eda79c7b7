"""What chapters repeat: train arms under one plan, record, judge, tabulate.

A `Study` knows a chapter's corpus, task, plan and seeds, and keeps every record that is
made. What is compared, the *arms*, stays on the page, in sight:

    study = Study("wander", data, task, seeds=seeds, profile=profile, epochs=epochs)
    study.train("late-fusion", lambda: LateFusion(config), title="late fusion")
    study.judge([("late-fusion", "early-fusion")])
    study.table("Test split; epoch chosen by validation.")

Plans, how long and at which rate, live in ``book/profiles/<profile>.yml``.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields

import numpy as np
from torch import nn

from mmsa_lib import metrics, runs, training
from mmsa_lib.corpora.schema import Corpus, Split
from mmsa_lib.errors import ConfigError, unknown
from mmsa_lib.files import ROOT, read_text, read_yaml
from mmsa_lib.runs import Number, RunRecord
from mmsa_lib.tasks import SENTIMENT, Loss, Task, joint, several
from mmsa_lib.training import Frozen, Rule, TrainConfig

# what every plan starts from; a profile may say otherwise
COMMON = {"optimiser": "adamw", "schedule": "cosine", "warmup": 0.1, "clip": 1.0}
TRAINING = {f.name for f in fields(TrainConfig)}
_SENTIMENT = ("mae", "corr", "acc2_has0", "acc2_non0", "acc2_zneg", "f1_non0", "acc7")
_HEADS = {"corr": "r"} | {f"acc2_{k}": f"Acc-2 {k}" for k in ("has0", "non0", "zneg")}
_HEADS |= {"f1_non0": "F1 non0"}


def plan_of(chapter: str, corpus: str, profile: str = "quick", **changes) -> dict:
    """A chapter's plan for a corpus: settings of training, and sizes of its models.

    From ``plans`` of the profile; the entry ``default`` serves corpora that have none.
    changes: what the reader asked for; None leaves the plan as it is. Raises
    `UnknownNameError` where the profile or the chapter's plans are not there.
    """
    folder = ROOT / "book" / "profiles"
    known = {p.stem: p for p in folder.glob("*.yml")}
    if profile not in known:
        raise unknown("profile", profile, known)
    text = read_text(known[profile], f"{profile}.yml")
    content = read_yaml(text, f"{profile}.yml", as_written=True) or {}
    plans = content.get("plans") or {}
    if chapter not in plans:
        raise unknown(f"chapter with plans in {profile}.yml", chapter, plans)
    own = plans[chapter]
    if corpus not in own and "default" not in own:
        raise unknown(f"corpus in the plans of {chapter}", corpus, own)
    chosen = {k: v for k, v in changes.items() if v is not None}
    return dict(own.get(corpus, own.get("default"))) | chosen


class Study:
    """The trainings and comparisons of one chapter on one corpus.

    chapter   its name: whose plans, whose committed records
    corpus    what arms are trained on unless they say otherwise
    tasks     a `tasks.Task`, or several that are trained and judged together
    seeds     one training for each
    profile   whose plan is taken
    titles    record name -> how pages write it; also the order of rows in tables
    changes   of the plan, such as ``epochs=3``; None changes nothing

    records   every record that was made, in order
    frozen    record name -> what each seed's training froze (of `train`)
    ruled     record name -> the rules of each seed's training
    """

    def __init__(
        self,
        chapter: str,
        corpus: Corpus,
        tasks: Task | Sequence[Task] = SENTIMENT,
        *,
        seeds: Sequence[int] = (0, 1, 2),
        profile: str = "quick",
        device: str = "auto",
        titles: Mapping[str, str] | None = None,
        **changes,
    ):
        self.chapter, self.corpus, self.tasks = chapter, corpus, several(tasks)
        self.seeds, self.device = list(seeds), device
        self.plan = plan_of(chapter, corpus.name, profile, **changes)
        self.titles = dict(titles or {})
        self.records: list[RunRecord] = []
        self.frozen: dict[str, list[Frozen]] = {}
        self.ruled: dict[str, list[list[Rule]]] = {}

    def __getitem__(self, name: str) -> RunRecord:
        """The newest record of that name; `UnknownNameError` lists those there are."""
        found = {r.name: r for r in self.records}
        if name not in found:
            raise unknown("record of this page", name, found)
        return found[name]

    @property
    def task(self) -> Task:
        """The first task, which decides where one metric has to."""
        return self.tasks[0]

    @property
    def metric(self) -> str:
        """Path of the deciding metric in a record."""
        own = "" if len(self.tasks) == 1 else f"{self.task.label}."
        return f"test.{own}{self.task.metric}"

    # ------------------------------------------------------------ training

    def settings(self, seed: int, **changes) -> TrainConfig:
        """How one seed is trained; keys of the plan that are sizes are left out."""
        asked = COMMON | self.plan | changes
        asked = {k: v for k, v in asked.items() if k in TRAINING}
        return TrainConfig(**asked | {"device": self.device, "seed": seed})

    def fit(
        self,
        build: Callable[[], nn.Module],
        seed: int,
        *,
        on: Corpus | None = None,
        loss: Loss | None = None,
        rules: Sequence[Rule] = (),
        keep: str = "best",
        **changes,
    ) -> Frozen:
        """One training by the plan; what validation froze, not recorded."""
        loss = loss or _objective(self.tasks)
        config = self.settings(seed, **changes)
        data = self.corpus if on is None else on
        return training.fit(build, data, config, loss=loss, rules=rules, keep=keep)

    def train(
        self,
        name: str,
        build: Callable[[], nn.Module],
        *,
        on: Corpus | None = None,
        seeds: Sequence[int] | None = None,
        rules: Callable[[], Sequence[Rule]] = list,
        loss: Loss | None = None,
        title: str | None = None,
        tasks: Task | Sequence[Task] | None = None,
        parameters: Mapping | None = None,
        **changes,
    ) -> RunRecord:
        """An arm: train `build()` once for each seed, test what was frozen, record it.

        rules        called for fresh rules for each seed
        parameters   what the record says beside the plan
        changes      of the plan, for this arm
        """
        self.frozen[name], self.ruled[name] = [], []
        if tasks is not None and loss is None:
            loss = _objective(several(tasks))

        def one(seed: int) -> Frozen:
            self.ruled[name].append(list(rules()))
            given = {"on": on, "loss": loss, "rules": self.ruled[name][-1]}
            self.frozen[name].append(self.fit(build, seed, **given, **changes))
            return self.frozen[name][-1]

        said = dict(parameters or {}) | changes
        if named := [type(rule).__name__ for rule in rules()]:
            said["rules"] = named
        return self.run(
            name, one, on=on, seeds=seeds, title=title, tasks=tasks, parameters=said
        )

    def pick(
        self,
        name: str,
        candidates: Mapping[str, Callable[[Split], np.ndarray]],
        *,
        on: Corpus | None = None,
        title: str | None = None,
    ) -> RunRecord:
        """An arm without gradients: validation picks one, all seeds share it."""
        data = self.corpus if on is None else on
        chosen = training.select(candidates, data, self.task)
        return self.run(name, chosen, on=on, title=title)

    def run(
        self,
        name: str,
        train: Frozen | Callable[[int], Frozen],
        *,
        on: Corpus | None = None,
        seeds: Sequence[int] | None = None,
        title: str | None = None,
        tasks: Task | Sequence[Task] | None = None,
        parameters: Mapping | None = None,
    ) -> RunRecord:
        """Test and record what ``train(seed)`` freezes, or one `Frozen` for all."""
        if title is not None:
            self.titles[name] = title
        record = runs.experiment(
            name,
            (lambda seed: train) if isinstance(train, Frozen) else train,
            self.corpus if on is None else on,
            self.seeds if seeds is None else seeds,
            parameters=self.plan | dict(parameters or {}),
            task=self.tasks if tasks is None else tasks,
        )
        return self.keep(record)

    def measure(self, name: str, on: Corpus | None = None, **found) -> RunRecord:
        """`runs.measure`, kept with the others."""
        return self.keep(runs.measure(name, on, **found))

    def keep(self, record: RunRecord) -> RunRecord:
        """Keep a record that something else made; returns it."""
        self.records.append(record)
        return record

    # ------------------------------------------------------------ telling

    def history(self, name: str, key: str) -> list[list[float]]:
        """A number of every epoch of an arm, such as "valid": one row per seed."""
        return [[row[key] for row in f.history] for f in self.frozen[name]]

    def judge(
        self,
        pairs: Iterable[tuple[str, ...]],
        *,
        of: Mapping[str, RunRecord] | None = None,
        metric: str | None = None,
    ) -> list[RunRecord]:
        """Paired comparisons of arms by name: one family, p adjusted by Holm's method.

        pairs    (a, b), or (a, b, metric) where a pair has its own
        of       the records, by name; default: this page's
        metric   default: the task's
        """
        found = of if of is not None else {r.name: r for r in self.records}
        metric = metric or self.metric.removeprefix("test.")
        raw = []
        for a, b, *own in pairs:
            for name in (a, b):
                if name not in found:
                    raise unknown("record to compare", name, found)
            names = (self.titles.get(a, a), self.titles.get(b, b))
            key = own[0] if own else metric
            raw.append(runs.compare(found[a], found[b], key, names=names))
        several_seeds = bool(raw) and len(raw[0].seeds) > 1
        judged = runs.holm(*raw) if len(raw) > 1 and several_seeds else raw
        return [self.keep(r) for r in judged]

    def columns(self) -> dict[str, str]:
        """Headings and paths of a results table for this study's task."""
        return columns(self.task) | {"trained": "field:resources.trainable_parameters"}

    def table(
        self,
        caption: str,
        records: Iterable[RunRecord] | None = None,
        columns: Mapping[str, str] | None = None,
        **numbers: Number,
    ):
        """A results table: rows named and ordered by `titles`, others left out."""
        found = {r.name: r for r in (self.records if records is None else records)}
        rows = [found[name] for name in self.titles if name in found]
        if not rows:
            raise ConfigError(
                "no record of this table has a title: give titles to Study, or "
                f"title=... to an arm (found {', '.join(found) or 'no records'})"
            )
        return runs.table(
            rows,
            columns or self.columns(),
            names=self.titles,
            caption=caption,
            sd=(self.metric,),
            **numbers,
        )

    def committed(self, corpus: str | None = None) -> dict[str, RunRecord]:
        """The newest committed run of this chapter on a corpus, by record name.

        Only records of the same text of the chapter: runs of two texts do not mix.
        Raises `UnknownNameError` where there is none.
        """
        found = runs.committed(self.chapter, corpus or self.corpus.name)
        # what a run on another corpus compared of this one is no run of its own
        trained = [r for r in found if r.kind == "training"] or found
        text = trained[-1].code["chapter_sha256"]
        return {r.name: r for r in found if r.code["chapter_sha256"] == text}

    def card(self):
        """The run card of everything that was recorded."""
        return runs.run_card(self.records)


def _objective(tasks: Sequence[Task]) -> Loss:
    return tasks[0].objective if len(tasks) == 1 else joint(tasks)


_KEYS = {  # of a task's report, what a table shows; by what its batches count
    "sign": _SENTIMENT,
    "accuracy": ("acc", "wa", "f1", "f1_macro"),
    "dice": ("dice_wt", "dice_tc", "dice_et", "dice_mean"),
}


def columns(task: Task) -> dict[str, str]:
    """Headings and paths of a task's metrics: {"MAE": "test.mae", ...}."""
    keys = _KEYS[task.progress]
    if task.metric not in keys:  # emotions: the means over them
        keys = ("wa_mean", "acc_mean", "f1_mean")
    return {_HEADS.get(k, metrics.describe(k).name): f"test.{k}" for k in keys}


def quoted(record: RunRecord, **digits: int) -> dict[str, Number]:
    """Numbers of a measurement for `runs.say` and captions, by their names in it.

    digits: name -> decimals, so ``runs.say("{loss} points", **quoted(r, loss=2))``.
    """
    return {key: runs.value(record, key, digits=d) for key, d in digits.items()}


def facts_table(head: Sequence[str], rows: Iterable[Sequence], caption: str):
    """Words and marked numbers as an HTML table; the first cell of a row names it.

    A column is aligned by what its cell in the first row holds: numbers to the right.
    """
    from IPython.display import HTML

    def cell(x) -> str:
        if hasattr(x, "_repr_html_"):
            return f"<td>{x._repr_html_()}</td>"
        style = "text-align:left;white-space:normal"
        return f"<td style='{style}'>{html.escape(str(x))}</td>"

    rows = list(rows)
    if not rows or any(len(row) != len(head) for row in rows):
        raise ConfigError(
            f"a table of {len(head)} columns needs rows of as many cells, "
            f"found {sorted({len(row) for row in rows})}"
        )
    sides = ["right" if hasattr(x, "_repr_html_") else "left" for x in rows[0]]
    top = "".join(
        f"<th scope='col' style='text-align:{side}'>{html.escape(h)}</th>"
        for side, h in zip(sides, head, strict=True)
    )
    body = "".join(
        f"<tr><th scope='row'>{html.escape(str(first))}</th>"
        f"{''.join(map(cell, rest))}</tr>"
        for first, *rest in rows
    )
    return HTML(
        f'<div class="rec-table"><table><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )
