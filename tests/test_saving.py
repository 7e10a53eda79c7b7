"""Readout and twin kept in a folder, and loaded again."""

import json
import shutil
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from thinkers import MEDIA, score, thinker

from mmsa_lib import corpora
from mmsa_lib.errors import ConfigError, UnknownNameError
from mmsa_lib.files import sha256_of
from mmsa_lib.methods import saving
from mmsa_lib.methods.generative import Generative
from mmsa_lib.nets import omni
from mmsa_lib.nets.trained import trained_state


@pytest.fixture(scope="module")
def batch(corpus):
    return corpus.train.batch(range(4))


def test_saved_and_loaded_scores_are_equal(saved, overfit, batch):
    names = {p.name for p in saved.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "regressor.safetensors",
        "readout.json",
    }
    loaded, media = saving.load(saved, device="cpu")
    assert media == MEDIA and loaded.config == overfit.module.config
    assert not loaded.training
    expected = score(overfit.module, batch)
    torch.testing.assert_close(score(loaded, batch), expected, rtol=0, atol=0)
    trained = trained_state(overfit.module)
    parts = load_file(saved / "adapter_model.safetensors")
    parts |= load_file(saved / "regressor.safetensors")
    # what was trained, and none of the base weights
    count = sum(t.numel() for n, t in trained.items() if "quant" not in n)
    base = {n for n in trained if "lora_" not in n and n.startswith("body.")}
    count -= sum(trained[n].numel() for n in base)
    assert sum(t.numel() for t in parts.values()) == count


def test_the_adapter_loads_with_peft_alone(saved, overfit, backbone, batch):
    from peft import PeftModel

    fresh = thinker(backbone)
    fresh.model = PeftModel.from_pretrained(fresh.model, str(saved)).eval()
    with torch.inference_mode():
        found, mask = fresh(batch)
        expected, _ = overfit.module.eval().body(batch)
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=0)


def test_a_saved_twin_writes_the_same(saved_twin, twin, handful):
    loaded, _ = saving.load(saved_twin, device="cpu")
    assert isinstance(loaded, Generative)
    expected = twin.module.answer(handful.valid)
    assert loaded.answer(handful.valid).texts == expected.texts
    assert loaded.scaler.mean == twin.module.scaler.mean


@pytest.mark.parametrize(
    ("part", "harm", "error"),
    [
        ("readout.json", "missing", "readout.json missing"),
        ("regressor.safetensors", "missing", "regressor.safetensors missing"),
        ("adapter_config.json", "missing", "adapter_config.json missing"),
        ("adapter_model.safetensors", "missing", "adapter_model.safetensors missing"),
        ("readout.json", "cut", "readout.json is damaged"),
        ("regressor.safetensors", "cut", "regressor.safetensors in .*damaged"),
        ("adapter_model.safetensors", "flipped", "adapter_model.safetensors in"),
        ("readout.json", {"kind": "oracle"}, "readout.json is damaged .*oracle"),
        ("readout.json", {"media": {"frames": 3}}, "frames must be even"),
        ("readout.json", {"readout": {"suffixes": [], "depth": 1}}, "depth"),
        ("readout.json", {"modalities": ["smell"]}, "smell"),
    ],
)
def test_a_readout_that_is_not_whole_is_refused(saved, tmp_path, part, harm, error):
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / part
    body = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(body[:-20])
    elif harm == "flipped":
        path.write_bytes(body[:-9] + bytes([body[-9] ^ 1]) + body[-8:])
    else:
        path.write_text(json.dumps(json.loads(body) | harm))
    with pytest.raises((ConfigError, UnknownNameError), match=error):
        saving.load(folder, device="cpu")


def test_a_readout_of_another_backbone_is_refused(saved, backbone, tmp_path):
    other = shutil.copytree(backbone, tmp_path / "other")
    told = json.loads((other / "config.json").read_text())
    told["text_config"]["num_hidden_layers"] = 1
    told["text_config"]["layer_types"] = told["text_config"]["layer_types"][:1]
    (other / "config.json").write_text(json.dumps(told))
    weights = load_file(other / "model.safetensors")
    kept = {n: t for n, t in weights.items() if ".layers.1." not in n or "tower" in n}
    save_file(kept, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="not made for the backbone"):
        saving.load(saved, backbone=other, device="cpu")
    same_shapes = shutil.copytree(backbone, tmp_path / "again")
    name = next(n for n in weights if n.endswith("input_layernorm.weight"))
    weights[name] = weights[name] + 0.1
    save_file(weights, same_shapes / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="weights there are not those"):
        saving.load(saved, backbone=same_shapes, device="cpu")
    with pytest.raises(ConfigError, match="no omni-modal model could be loaded"):
        saving.load(saved, backbone=tmp_path / "nowhere", device="cpu")


def test_the_fingerprint_is_of_the_backbone_alone(backbone, overfit):
    """Neither adapters nor the precision of the other weights change it."""
    plain = thinker(backbone, quantise=False)
    assert omni.fingerprint(plain) == omni.fingerprint(overfit.module.body)
    again = omni.load(backbone, device="cpu", quantise=False, compute="bfloat16")
    assert omni.fingerprint(plain) == omni.fingerprint(again)


def test_the_shipped_readout_fits_its_backbone_and_has_learned():
    """On validation clips, whose labels chose its epoch: better than a constant."""
    place = omni.tiny_folder()
    size = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
    assert size <= 6_000_000
    model, media = saving.load(place / "readout", device="cpu")
    data = corpora.load("puppet-clips")
    assert asdict(media) == data.card.options
    truth = data.valid.labels["sentiment"]
    with torch.inference_mode():
        said = [model(b).predictions["sentiment"] for b in data.valid.batches(8)]
    error = np.abs(torch.cat(said).numpy() - truth).mean()
    middle = np.median(data.train.labels["sentiment"])
    assert error < 0.8 * np.abs(truth - middle).mean()


def test_the_adapters_configuration_names_no_code_and_no_other_base(saved, tmp_path):
    """Its sha256 is made to fit, as by somebody who sends a whole folder."""

    def folder_with(**changes):
        folder = shutil.copytree(saved, tmp_path / str(len(list(tmp_path.iterdir()))))
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        settings = json.loads((folder / "readout.json").read_text())
        settings["sha256"][path.name] = sha256_of(path)
        (folder / "readout.json").write_text(json.dumps(settings))
        return folder

    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        code = {"base_model_class": "Planted", "parent_library": "planted"}
        for change in (
            {"megatron_config": {"a": 1}, "megatron_core": "planted"},
            {"auto_mapping": code},
            {"auto_mapping": code, "peft_type": None, "task_type": None},
        ):
            saving.load(folder_with(**change), device="cpu")
        assert "planted" not in sys.modules
    with pytest.raises(ConfigError, match="names the base 'another/model'"):
        saving.load(folder_with(base_model_name_or_path="another/model"), device="cpu")


def test_an_adapter_of_other_layers_or_shapes_is_refused(saved, tmp_path):
    def folder_with(name, change):
        folder = shutil.copytree(saved, tmp_path / name)
        path = folder / "adapter_model.safetensors"
        weights = load_file(path)
        first = next(iter(weights))
        save_file(change(weights, first), path)
        settings = json.loads((folder / "readout.json").read_text())
        settings["sha256"][path.name] = sha256_of(path)
        (folder / "readout.json").write_text(json.dumps(settings))
        return folder

    for name, change in {
        "one less": lambda w, k: {n: t for n, t in w.items() if n != k},
        "one more": lambda w, k: w | {k.replace("lora_A", "lora_C"): w[k].clone()},
        "wider": lambda w, k: w | {k: torch.cat([w[k], w[k]])},
    }.items():
        with pytest.raises(ConfigError, match="was not made for the backbone"):
            saving.load(folder_with(name, change), device="cpu")
