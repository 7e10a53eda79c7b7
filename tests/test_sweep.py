"""Sweeps: planned before they start, resumed, retried once, merged over seeds."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from processes import computes, finish, start, wait_until
from test_press import add_library, chapter, make_project, mmsa_book

from mmsa_lib import runs
from mmsa_lib.errors import BookError, UnknownNameError
from mmsa_lib.press import engines, planning
from mmsa_lib.press.chapters import open_book
from mmsa_lib.press.collect import merge_seeds
from mmsa_lib.press.sweep import sweep

pytestmark = pytest.mark.usefixtures("no_orphans")

CORPORA = """
def names():
    return ["a", "b", "lost"]
"""
PARAMETERS = 'profile = "none"\ncorpus = "a"\nseeds = [0]\nflags_dir = ""\nscale = 1.0'
# what a chapter does with its seed is logged, so that a test can count executions
TRAIN = """\
import os, time
from pathlib import Path

import mmsa_lib
from mmsa_lib import runs
from mmsa_lib.runs.record import new

flags, name = Path(flags_dir), f"{corpus}-{seeds[0]}"
with (flags / "log").open("a") as log:
    _ = log.write(name + "\\n")
if corpus == "lost" and not (flags / "found").exists():
    raise FileNotFoundError("mmsa-book data get lost")
once = flags / f"once-{name}"
began = time.time()
_ = runs.save(new("begun", "measurement"))  # of an attempt that may fail
if once.exists():
    once.unlink()
    raise ValueError("a bad moment")
(flags / f"pid-{name}").write_text(str(os.getpid()))
while (flags / f"hold-{name}").exists():
    time.sleep(0.05)
for kind, offset in (("late", 0.0), ("early", 0.5)):
    per_seed = [
        {
            "seed": seed,
            "test": {"corr": 0.5, "mae": seed + offset},
            "test_ids_sha256": "d",
            "library": mmsa_lib.__file__,
            "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "began": began,
            "ended": time.time(),
        }
        for seed in seeds
    ]
    record = new(
        kind,
        "training",
        parameters={"scale": scale},
        seeds=seeds,
        corpus={"name": corpus, "sha256": corpus * 4},
        per_seed=per_seed,
        resources={"wall_seconds": 1.5, "peak_ram_mib": 100 + seeds[0]},
    )
    _ = runs.save(runs.seal(record))
print("done", corpus, seeds)
"""


def make_book(root: Path, chapters: dict[str, str] | None = None) -> Path:
    """A toy book whose library is our records and three corpora by name."""
    toy = chapter("Toy", TRAIN, parameters=PARAMETERS)
    plain = chapter("Plain", "print(1)")
    make_project(root, chapters or {"toy": toy, "plain": plain})
    add_library(root)
    (root / "mmsa_lib/corpora").mkdir()
    (root / "mmsa_lib/corpora/__init__.py").write_text(CORPORA)
    (root / "flags").mkdir()
    (root / "flags/log").write_text("")
    return root


def plan(root: Path, chapters=("toy",), corpora=(), seeds=(), **given):
    given = {"flags_dir": str(root / "flags")} | given
    return planning.plan(
        open_book(root),
        chapters,
        corpora,
        seeds,
        "quick",
        lambda chapter: chapter.check(given if chapter.name == "toy" else {}),
        root / "_build/runs/sweep/tasks",
    )


def edit_library(root: Path) -> None:
    with (root / "mmsa_lib/errors.py").open("a") as file:
        file.write("# edited\n")


def executed(root: Path) -> list[str]:
    """Tasks in the order they were begun since the last call."""
    log = root / "flags/log"
    found = log.read_text().split()
    log.write_text("")
    return sorted(found)


# ---------------------------------------------------------------- planning


def test_wrong_names_are_errors_before_anything_starts(tmp_path, capsys, monkeypatch):
    root = make_book(tmp_path)
    monkeypatch.chdir(root)
    common = ("--profile", "quick")
    for words, message, expected in [
        (("tou",), "unknown chapter 'tou'. Did you mean 'toy'?", 2),
        (("toy", "--corpora", "a,c"), "unknown corpus 'c'. Known: a, b, lost.", 2),
        (("toy", "-p", "corpus", "x"), "unknown corpus 'x'", 2),
        (("toy", "-p", "scal", "1"), "Did you mean 'scale'?", 2),
        (("toy", "-p", "scale", "big"), "parameter scale of toy is 1.0", 1),
        (("plain", "--seeds", "0,1"), "unknown parameter of plain 'seeds'", 2),
        (("toy", "--seeds", "0,x"), "--seeds 0,x: whole numbers with commas", 1),
        (("toy", "--engine", "dask"), "unknown engine 'dask'. Known: local, ray.", 2),
        (("toy", "--gpus-per-task", "1"), "add --engine ray", 1),
    ]:
        code, printed = mmsa_book(capsys, "sweep", *words, *common)
        assert message in printed
        assert code == expected
    assert executed(root) == []
    assert not (root / "_build").exists()


def test_tasks_are_chapters_times_seeds_times_corpora(tmp_path):
    root = make_book(tmp_path)
    tasks = plan(root, corpora=["b", "a", "b"], seeds=[3, 1])
    found = [(t.corpus, t.seed) for t in tasks]
    assert found == [("b", 3), ("b", 1), ("a", 3), ("a", 1)]
    parameters = tasks[0].state.parameters
    assert (parameters["corpus"], parameters["seeds"]) == ("b", [3])
    assert parameters["profile"] == "quick"
    assert len({t.folder for t in tasks}) == 4
    # what is not given is the profile's, and only chapters that can be swept are
    (root / "book/profiles/quick.yml").write_text("all: {seeds: [5, 6]}\n")
    assert [t.label for t in plan(root, chapters=())] == [
        "toy a seed 5",
        "toy a seed 6",
    ]
    # the plans are those of the profile that the chapter is told
    assert plan(root)[0].state.key["plans"] == {}
    text = "all: {seeds: [5]}\nplans: {toy: {a: {epochs: 9}}}\n"
    (root / "book/profiles/full.yml").write_text(text)
    (task,) = plan(root, seeds=[5], profile="full")
    assert task.state.key["plans"] == {"a.epochs": "9"}
    assert task.state.profile == "full"
    # a chapter without seeds and corpus is one task if it is asked for by name
    assert [t.label for t in plan(root, ["plain"])] == ["plain"]
    # another key, another folder: nothing stale is taken for done
    (before,) = plan(root, seeds=[0])
    edit_library(root)
    (after,) = plan(root, seeds=[0])
    assert before.folder != after.folder


# ---------------------------------------------------------------- running


def test_a_sweep_retries_reports_merges_and_resumes(tmp_path, capsys, monkeypatch):
    root = make_book(tmp_path)
    monkeypatch.chdir(root)
    flags = root / "flags"
    (flags / "once-a-0").touch()

    def command(corpora, seeds, *more):
        words = ["sweep", "toy", "--profile", "quick", "--corpora", corpora]
        words += ["--seeds", seeds, "-p", "flags_dir", "flags", *more]
        code, printed = mmsa_book(capsys, *words)
        file = root / re.search(r"table: +(\S+)", printed)[1]
        table = json.loads(file.read_text())
        tasks = {(t["corpus"], t["seed"]): t for t in table["tasks"]}
        return code, printed, tasks, table["merged"]

    # one task fails once, one corpus cannot be loaded: nothing of the others is lost
    code, printed, tasks, merged = command("a,lost", "0")
    assert code == 1
    assert executed(root) == ["a-0", "a-0", "lost-0", "lost-0"]
    found = {k: (t["state"], t["attempts"]) for k, t in tasks.items()}
    assert found == {("a", 0): ("done", 2), ("lost", 0): ("failed", 2)}
    assert "done at the 2nd try" in printed
    assert "early mae 0.500, late mae 0.000" in printed
    assert "FAILED toy lost seed 0: book/toy.md, code cell 2 of 2" in printed
    assert "FileNotFoundError: mmsa-book data get lost" in printed
    assert "1 problems in a sweep of 2 tasks" in printed
    # records of the attempt that failed do not count
    names = sorted(r["name"] for r in tasks["a", 0]["records"])
    assert names == ["begun", "early", "late"]
    assert [(m["corpus"], m["seeds"]) for m in merged] == [("a", [0])]

    # mended, the same command does only what is missing
    (flags / "found").touch()
    code, printed, tasks, merged = command("a,lost", "0")
    assert code == 0, printed
    assert executed(root) == ["lost-0"]
    found = {k: (t["state"], t["attempts"]) for k, t in tasks.items()}
    assert found == {("a", 0): ("kept", 0), ("lost", 0): ("done", 1)}
    assert [(m["corpus"], m["seeds"]) for m in merged] == [("a", [0]), ("lost", [0])]

    # so does a larger one; its records over seeds go where they are to be kept
    code, printed, tasks, merged = command("a", "1,0", "--records", "results")
    assert code == 0, printed
    assert executed(root) == ["a-1"]
    assert "late mae 0.500 ± 0.707" in printed
    (one,) = merged
    assert (one["seeds"], one["problems"]) == ([0, 1], [])
    kept = {r["name"]: r["file"] for r in one["records"]}
    assert {*kept.values()} == {
        p.relative_to(root / "results").as_posix()
        for p in (root / "results").rglob("*.json")
    }
    assert kept["late"].startswith("toy/late-")
    record = runs.load(root / "results" / kept["late"])
    assert record.seeds == [0, 1]
    assert record.values("test.mae") == [0.0, 1.0]
    assert len(record.rows[0]["merged_from"]) == 2

    # kept there, they do not make the same sweep begin anew, nor are they made twice
    code, printed, tasks, merged = command("a", "1,0", "--records", "results")
    assert {t["state"] for t in tasks.values()} == {"kept"}
    assert executed(root) == []
    assert {*kept.values()} == {
        p.relative_to(root / "results").as_posix()
        for p in (root / "results").rglob("*.json")
    }
    assert kept["late"].startswith("toy/late-")

    # a damaged record is no finished task
    task = plan(root, corpora=["a"], seeds=[1])[0]
    damaged = next((task.folder / "records/toy").glob("late-*.json"))
    assert task.finished()
    damaged.write_text(damaged.read_text().replace('"mae": 1', '"mae": 2'))
    assert task.finished() is None


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_sweep_keeps_what_is_done(tmp_path, how):
    root = make_book(tmp_path)
    flags = root / "flags"
    (flags / "hold-a-1").touch()
    words = ["sweep", "toy", "--profile", "quick", "--seeds", "0,1,2"]
    words += ["--jobs", "1" if how == signal.SIGINT else "2", "-p", "flags_dir"]
    first, second, _ = plan(root, seeds=[0, 1, 2])
    process, held = start(root, *words, str(flags)), flags / "pid-a-1"
    wait_until(lambda: first.finished() and held.exists() and held.read_text(), process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert int(held.read_text()) in {p.pid for p in family}
    process.send_signal(how)
    code, printed = finish(process)
    assert code == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert "FAILED" not in printed
    wait_until(lambda: not any(map(computes, family)))
    assert first.finished()
    assert second.finished() is None
    if how == signal.SIGKILL:
        return
    (flags / "hold-a-1").unlink()
    executed(root)
    rows = sweep(open_book(root), [first, second])
    assert [row.state for row in rows] == ["kept", "done"]
    assert executed(root) == ["a-1"]


def test_a_book_edited_during_a_sweep_is_not_mixed(tmp_path):
    root = make_book(tmp_path)
    book, (task,) = open_book(root), plan(root, seeds=[0])
    edit_library(root)
    (row,) = sweep(book, [task])
    assert row.state == "failed"
    assert "library of toy changed since the sweep began; call it again" in row.error
    assert executed(root) == []


# ---------------------------------------------------------------- Ray


def test_without_ray_the_remedy_is_named(tmp_path, monkeypatch):
    root = make_book(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BookError, match=r"pip install 'mmsa-lib\[ray\]'"):
        sweep(open_book(root), plan(root, seeds=[0]), engine="ray")
    assert executed(root) == []
    with pytest.raises(UnknownNameError, match="unknown engine 'rai'"):
        sweep(open_book(root), plan(root, seeds=[0]), engine="rai")


def start_ray(ray) -> None:
    """Two cores and a GPU that is not there. Ray gives its own agent 15 s to start, on
    any machine (ray-project/ray issue 65983); that a busy one is too slow for that says
    nothing about us, so it is tried several times and then skipped with the reason."""
    for _ in range(4):
        try:
            ray.init(
                address="local",
                num_cpus=2,
                num_gpus=1,
                object_store_memory=100_000_000,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
            return
        except Exception as error:
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise
    pytest.skip("this machine is too busy for Ray: its agent did not start in 15 s")


def test_the_same_tasks_on_a_real_ray(tmp_path, monkeypatch):
    """Two tasks that want one GPU each, on a cluster that (says it) has one."""
    ray = pytest.importorskip("ray")
    root = make_book(tmp_path / "book")
    wrong = tmp_path / "wrong/mmsa_lib/__init__.py"
    wrong.parent.mkdir(parents=True)
    wrong.write_text("raise ImportError('this is not the library of the driver')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "wrong"))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    (root / "flags/once-a-1").touch()
    try:
        start_ray(ray)
        book, tasks = open_book(root), plan(root, seeds=[0, 1])
        with pytest.raises(BookError, match="asks for 2 GPUs and the largest node"):
            sweep(book, tasks, engine="ray", gpus_per_task=2)
        rows = sweep(book, tasks, engine="ray", gpus_per_task=1)
        assert ray.is_initialized()  # a cluster that was there stays
    finally:
        ray.shutdown()
    assert [(row.state, row.attempts) for row in rows] == [("done", 1), ("done", 2)]
    assert executed(root) == ["a-0", "a-1", "a-1"]
    entries = []
    for row in rows:
        (late,) = (r for r in row.records if r.name == "late")
        assert late.code["commit"] == runs.code_facts()["commit"]
        entries += late.per_seed
        # notebook, records and log came back; it ran in a copy of the book
        assert row.task.finished()
        files = {p.name for p in row.task.folder.rglob("*")}
        assert {"toy.ipynb", "toy.key.json", "runner.log", "toy.log"} <= files
        assert not (row.task.folder / "kernel").exists()
        assert not Path(late.per_seed[0]["library"]).exists()
        assert not late.per_seed[0]["library"].startswith(str(tmp_path))
    assert [e["gpu"] for e in entries] == ["0", "0"]
    first, second = sorted(entries, key=lambda e: e["began"])
    assert first["ended"] < second["began"]  # one GPU: one after the other
    (merged,) = merge_seeds(rows)
    assert merged.problems == ()
    assert [r.seeds for r in merged.records] == [[0, 1], [0, 1]]


def test_gpus_reach_the_options_of_the_remote_task():
    options = engines.ray_options(0.5)
    assert (options["num_gpus"], options["max_retries"]) == (0.5, 0)


def test_what_travels_is_book_and_library(tmp_path):
    import io
    import zipfile

    root = make_book(tmp_path)
    (root / "data").mkdir()
    (root / "data/private.bin").write_text("x")
    (root / "mmsa_lib/__pycache__").mkdir()
    (root / "mmsa_lib/__pycache__/a.pyc").write_text("x")
    packed = zipfile.ZipFile(io.BytesIO(engines.pack(open_book(root))))
    names = packed.namelist()
    assert {"book/_toc.yml", "book/book/toy.md", "book/mmsa_lib/used.py"} <= {*names}
    assert not [n for n in names if "private" in n or "pyc" in n or "flags" in n]
    # of this library just what the runner imports
    packed.extractall(tmp_path / "node")
    program = (
        "import sys, mmsa_lib.press.runner\n"
        "print(*(m.__file__ for n, m in sys.modules.items() if n[:8] == 'mmsa_lib'))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "node/press")},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = done.stdout.split()
    assert all(file.startswith(str(tmp_path / "node/press")) for file in loaded)
    assert len(loaded) > 5
    assert not [n for n in names if n.startswith("press/mmsa_lib/training")]
