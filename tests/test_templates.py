"""The template of a method passes the suite, its test passes, its chapter runs."""

import importlib.util
import sys

import pytest
import test_methods as suite
import yaml
from conftest import ROOT

from mmsa_lib import methods, study
from mmsa_lib.methods.registry import METHODS, Method
from mmsa_lib.press.chapters import read_chapter

FOLDER = ROOT / "templates"


def loaded(file, name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gated(monkeypatch):
    """The template as if it had been copied into the package and registered."""
    name = "mmsa_lib.methods.gated"
    module = loaded("method.py", name)
    monkeypatch.setattr(methods, "gated", module, raising=False)
    entry = Method("gated", "Gated sum", module.GatedConfig, build=module.build)
    monkeypatch.setitem(METHODS, "gated", entry)
    yield module
    del sys.modules[name]


SUITE = [
    suite.test_a_batch_of_one_is_a_row_of_a_larger_one,
    suite.test_what_stands_in_padding_is_never_read,
    suite.test_a_modality_that_a_whole_batch_lacks,
    suite.test_samples_without_any_modality_are_named,
    suite.test_wrong_inputs_are_explained,
    suite.test_nan_features_are_named,
    suite.test_gradient_reaches_every_trained_parameter,
    suite.test_overfits_a_handful,
    suite.test_a_seed_decides_everything,
    suite.test_nothing_stays_on_a_frozen_model,
    suite.test_bfloat16,
]


@pytest.mark.parametrize("check", SUITE, ids=lambda f: f.__name__)
def test_the_template_keeps_the_contract(gated, check):
    suite.test_the_entry_is_whole("gated")
    check("gated", suite.Case)


def test_the_template_takes_any_corpus_and_is_saved(gated, tmp_path):
    for M in (1, 2, 7):
        suite.test_one_to_seven_modalities("gated", M, suite.Case)
    suite.test_an_absent_modality_says_nothing("gated", "audio", suite.Case)
    suite.test_saves_only_what_was_trained_and_loads_it("gated", suite.Case, tmp_path)
    suite.test_weights_of_another_model_are_refused("gated", suite.Case, tmp_path)


def test_the_template_of_a_test_passes(gated):
    module = loaded("test_method.py", "template_test")
    checks = [f for name, f in vars(module).items() if name.startswith("test_")]
    assert len(checks) >= 2
    for check in checks:
        check()


def test_the_template_of_a_chapter_runs(gated, tmp_path, monkeypatch):
    folder = tmp_path / "book" / "profiles"
    folder.mkdir(parents=True)
    plans = {"gated": {"default": {"epochs": 1, "batch_size": 32, "lr": 3e-3}}}
    (folder / "quick.yml").write_text(yaml.safe_dump({"plans": plans}))
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setenv("MMSA_RECORDS", str(tmp_path / "records"))
    chapter = read_chapter(FOLDER / "chapter.md", "book/gated")
    page = {"__name__": "chapter"}
    for cell in chapter.cells:
        exec(compile(cell.source, f"chapter.md:{cell.line}", "exec"), page)
        if "parameters" in cell.tags:
            page |= {"seeds": [0, 1], "device": "cpu"}
    assert page["study"]["gated"].mean("test.mae") > 0
    names = [r.name for r in page["study"].records]
    assert names.count("gated") == 1 and "gated-against-ridge-holm" in names
