"""What holds the project together: pins, layers, paths, unsafe loads, the toc."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mmsa_lib.press.chapters import STANDARD_PARAMETERS, open_book

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]

# a layer may import those before it and, unless it stands alone, its own modules
LAYERS = [
    ("errors",),
    ("files",),
    ("corpora",),
    ("metrics", "statistics"),
    ("nets",),
    ("tasks",),
    ("training",),
    ("methods",),
    ("runs",),
    ("figures",),
    ("study",),
    ("predict", "clip_training"),
    ("cli",),
]
PRESS_MAY = {"errors", "files", "press", "runs"}


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(s) for s in lines if s and not s.startswith("#")]
    return {canonicalize_name(r.name): r for r in found}


def tracked() -> list[Path]:
    """Files of the project: those git knows or would take."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if (ROOT / name).is_file()]


def test_conda_environment_equals_pyproject():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = (entry["pip"] for entry in listed if isinstance(entry, dict))
    assert [p for p in pip if p.startswith("-")] == ["-c constraints.txt", "-e ."]
    assert [p for p in pip if not p.startswith("-")] == REQUIREMENTS
    (python,) = (p for p in listed if str(p).startswith("python="))
    version = Version(python.removeprefix("python="))
    assert version in Requirement(f"x{PROJECT['requires-python']}").specifier


def test_constraints_pin_everything_for_every_platform():
    pins = constraints()
    for name, pin in pins.items():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", name
        assert Version(specifier.version).local is None, f"{name}: local version"
        assert pin.marker is None and pin.url is None, name
    for requirement in map(Requirement, REQUIREMENTS):
        pin = pins[canonicalize_name(requirement.name)]
        (specifier,) = pin.specifier
        assert requirement.specifier.contains(specifier.version), requirement
    assert "setuptools" in pins


def test_constraints_are_what_is_installed():
    """The tests speak for the pinned versions only if they ran with them."""
    from importlib.metadata import version

    pins = constraints()
    for name in (canonicalize_name(Requirement(r).name) for r in REQUIREMENTS):
        (specifier,) = pins[name].specifier
        installed = Version(version(name)).public
        assert installed == specifier.version, name


def imports_of(path: Path) -> set[str]:
    """First names below ``mmsa_lib`` that a module imports, at any depth."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names]
        found |= {p[1] for p in parts if p[0] == "mmsa_lib" and len(p) > 1}
    return found


def test_layers_import_only_to_their_left():
    allowed, left = {"press": PRESS_MAY}, set()
    for layer in LAYERS:
        for name in layer:
            allowed[name] = left | set(layer)
        left |= set(layer)
    allowed["cli"] |= {"press"}  # the program has commands of both
    seen = set()
    for path in sorted((ROOT / "mmsa_lib").rglob("*.py")):
        layer = path.relative_to(ROOT / "mmsa_lib").with_suffix("").parts[0]
        if layer == "__init__":
            assert not imports_of(path), "mmsa_lib/__init__.py"
            continue
        assert layer in allowed, f"{path.name}: give this module a layer"
        wrong = imports_of(path) - allowed[layer]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"
        seen.add(layer)
    assert {"errors", "corpora", "runs", "press"} <= seen


def test_no_machine_paths_and_no_unsafe_loads():
    paths = re.compile(r"/(?:work|farm|tmp)/[a-z.]|/(?:home|Users|root)/[a-z.]")
    unsafe = {
        "pickle.load": re.compile(r"\bpickle\.load\("),
        "torch.load": re.compile(r"\btorch\.load\((?!.*weights_only=True)"),
        "weights_only": re.compile(r"weights_only\s*=\s*False"),
        "remote code": re.compile(r"trust_remote_code\s*=\s*True"),
    }
    found = []
    for path in tracked():
        if path.suffix not in {".py", ".md", ".yml", ".toml", ".txt", ".cff", ""}:
            continue
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            where = f"{path.relative_to(ROOT)}:{number}"
            if paths.search(line):
                found.append(f"{where}: machine path")
            if path.suffix == ".py" and path.parent.name != "benchmarks":
                found += [f"{where}: {k}" for k, v in unsafe.items() if v.search(line)]
    assert not found, "\n".join(found)


def test_every_page_and_parameters_cell():
    book = open_book(ROOT)  # raises for a page that is missing or forgotten
    assert next(iter(book.pages)) == "book/index"
    assert {"book/notation", "book/bibliography"} <= set(book.pages)
    for profile in ("quick", "full"):
        book.profile(profile)  # raises for unknown chapters and parameters
    for chapter in book.chapters.values():
        missing = [p for p in STANDARD_PARAMETERS if p not in chapter.parameters]
        assert not missing, f"{chapter.name} lacks the parameters {missing}"


def test_front_page_says_what_is_here():
    """Each page of the toc is linked in a row marked here, and nothing else is."""
    book = open_book(ROOT)
    rows = (ROOT / "book/index.md").read_text().split("## What is here")[1].splitlines()
    here = [row for row in rows if row.startswith("|") and "**here**" in row]
    text = "\n".join(here)
    linked = re.findall(r"\]\((\w[\w-]*)\.md\)", text)
    linked += re.findall(r"\{doc\}`[^`]*<(\w[\w-]*)>`", text)  # chapters
    assert sorted(f"book/{name}" for name in linked) == sorted(
        page for page in book.pages if page != "book/index"
    )
    assert all("](" in row or "{doc}" in row for row in here)


def test_the_book_needs_no_network():
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    sphinx = config["sphinx"]["config"]
    static = ROOT / sphinx["html_static_path"][0]
    assert (static / sphinx["mathjax_path"]).stat().st_size > 2_000_000
    assert (static / "mathjax/LICENSE").is_file()
    assert "sphinx_thebe" not in sphinx["extensions"]
    assert sphinx["nb_ipywidgets_js"] == {}


def test_every_citation_has_an_entry():
    keys = re.findall(r"@\w+\{(\w+),", (ROOT / "book/references.bib").read_text())
    assert len(keys) == len(set(keys))
    for path in (ROOT / "book").glob("*.md"):
        for cited in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", path.read_text()):
            for key in cited.split(","):
                assert key.strip() in keys, f"{path.name} cites {key.strip()}"


def test_the_picture_of_the_layers_is_the_order_that_is_held():
    page = (ROOT / "book" / "architecture.md").read_text(encoding="utf-8")
    drawn = re.findall(r'font-weight="600" fill="currentColor">([^<]+)<', page)
    drawn = [tuple(row.split(" · ")) for row in drawn]
    assert drawn[-1] == ("chapters",)
    top = next(i for i, row in enumerate(drawn) if row[0] == "predict")
    held = [tuple(layer) for layer in LAYERS]
    assert drawn[:top] == held[:top]
    assert set(drawn[top]) == {name for layer in held[top:] for name in layer}


def test_files_are_replaced_in_one_place_only():
    for path in (ROOT / "mmsa_lib").rglob("*.py"):
        if path.name != "files.py" or path.parent.name != "mmsa_lib":
            assert "os.replace(" not in path.read_text(), path.name


def test_actions_are_pinned_by_commit():
    files = [*(ROOT / ".github").rglob("*.yml"), *(ROOT / ".github").rglob("*.yaml")]
    used = [u for f in files for u in re.findall(r"uses:\s*(.+)", f.read_text())]
    assert used
    for one in used:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one), one


def test_pip_refuses_hashes_for_a_package_in_a_folder(tmp_path):
    """Why constraints.txt has none; where pip takes them, they can be written."""
    (tmp_path / "c.txt").write_text(f"PyYAML==6.0.3 --hash=sha256:{'0' * 64}\n")
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\nversion = '1'\n")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "-c", "c.txt", "-e", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode and "cannot be installed when requiring hashes" in done.stderr
    )
