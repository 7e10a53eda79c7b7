"""`mmsa-book train`: training on a folder of clips, killed, parallel, over seeds."""

import inspect
import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from conftest import command
from films import patched_samples
from safetensors.torch import load_file
from thinkers import MEDIA, environment, score, write_folder

from mmsa_lib import cli, clip_training
from mmsa_lib.errors import UnknownNameError
from mmsa_lib.methods import saving
from mmsa_lib.methods.generative import Generative
from mmsa_lib.methods.readout import ReadoutConfig
from mmsa_lib.nets import omni
from mmsa_lib.runs import load as load_record


@pytest.fixture(scope="module")
def options(backbone, clip_folder):
    """What all runs share: three epochs of six clips, three a batch."""
    given = {
        "backbone": backbone,
        "clips": clip_folder,
        "epochs": 3,
        "batch-size": 3,
        "lr": 5e-3,
        "frames": MEDIA.frames,
        "max-pixels": MEDIA.max_pixels,
        "device": "cpu",
        "seed": 3,
    }
    return [f"--{k}={v}" for k, v in given.items()]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The run that killed and parallel ones are compared with."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMSA_RECORDS", "")  # so that it is put back
        given = [*options, "--accumulate=2", f"--out={out}"]
        assert command("train", "readout", *given) == 0
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    parts = load_file(out / "adapter_model.safetensors")
    return parts | load_file(out / "regressor.safetensors")


def record_of(out: Path):
    (path,) = out.glob("benchmarks/readout-*.json")
    return load_record(path)


def curves(out: Path) -> list[float]:
    (entry,) = record_of(out).per_seed
    return entry["train_curve"] + entry["valid_curve"]


def test_train_learns_evaluates_and_saves(whole, clip_folder, corpus):
    record = record_of(whole)
    (entry,) = record.per_seed
    assert record.seeds == [3] and len(entry["predictions"]) == 2
    assert record.corpus["sizes"] == {"train": 6, "valid": 2, "test": 2}
    assert {"mae", "corr", "acc2_has0", "acc2_non0"} <= set(entry["test"])
    assert (
        record.parameters["accumulate"] == 2 and record.parameters["precision"] == "no"
    )
    assert str(clip_folder.parent) not in json.dumps(record.parameters)
    loaded, media = saving.load(whole, device="cpu")
    assert media == MEDIA and loaded.config == ReadoutConfig()
    found = score(loaded, corpus.test.batch([0, 1])).flatten().tolist()
    assert entry["predictions"] == pytest.approx(found, abs=1e-3)


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_training_gives_the_same_adapter(whole, options, tmp_path):
    more = ["--accumulate=2", f"--checkpoint={tmp_path / 'state'}"]
    more += [f"--out={tmp_path / 'out'}"]
    process = start("mmsa_lib.cli", "train", "readout", *options, *more)
    for line in process.stdout:
        if line.startswith("epoch 2:"):  # said before its state is written
            process.send_signal(signal.SIGKILL)
            break
    process.wait(60)
    assert process.returncode == -signal.SIGKILL, process.stderr.read()
    assert not (tmp_path / "out" / "readout.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMSA_RECORDS", "")
        seen = []
        patch.setattr(clip_training, "say", lambda text: seen.append(text))
        assert command("train", "readout", *options, *more) == 0
    epochs = [s.split(":")[0] for s in seen if s.startswith("epoch")]
    assert epochs in (["epoch 2", "epoch 3"], ["epoch 3"])  # it went on
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, weights(whole)[name]), name
    assert curves(tmp_path / "out") == curves(whole)


def test_two_processes_equal_one_with_twice_the_accumulation(whole, options, tmp_path):
    program = tmp_path / "mmsa-book"  # as pip writes it for an entry point
    program.write_text(f"#!{sys.executable}\nfrom mmsa_lib.cli import main\n\nmain()\n")
    program.chmod(0o755)
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += ["--no-python", str(program), "train", "readout"]
    process = start(*launch, *options, f"--out={tmp_path}")
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    assert out.count("epoch 3:") == 1  # one of the two speaks
    assert record_of(tmp_path).parameters["processes"] == 2
    np.testing.assert_allclose(curves(tmp_path), curves(whole), atol=1.1e-5, rtol=0)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, weights(whole)[name], rtol=0, atol=1e-5)


def test_train_teaches_the_twin_over_seeds(options, tmp_path, monkeypatch):
    monkeypatch.setenv("MMSA_RECORDS", "")
    given = [o for o in options if not o.startswith(("--seed", "--epochs"))]
    given += ["--seeds=0,1", "--epochs=1", "--modalities=text"]
    given += ["--freeze-towers", "--gradient-checkpointing"]
    given += [f"--cache={tmp_path / 'cache'}", f"--out={tmp_path / 'out'}"]
    assert command("train", "generative", *given) == 0
    for seed in (0, 1):
        loaded, _ = saving.load(tmp_path / "out" / f"seed-{seed}", device="cpu")
        assert isinstance(loaded, Generative)
        assert loaded.body.modalities == ("text",) and loaded.config.freeze_towers
    records = {
        path.name.rpartition("-")[0]: path
        for path in (tmp_path / "out" / "benchmarks").iterdir()
    }
    assert set(records) == {"readout-twin", "readout-twin-answers"}
    assert load_record(records["readout-twin"]).seeds == [0, 1]
    for entry in load_record(records["readout-twin-answers"]).per_seed:
        for split in ("valid", "test"):
            assert set(entry[split]) == {"unparsable", "out_of_range"}
            assert 0 <= entry[split]["unparsable"] <= 1
    assert len(list((tmp_path / "cache").iterdir())) == 10


def test_defaults_and_methods_are_those_of_the_library():
    """The command cannot read them there: it would have to load torch."""
    given = inspect.signature(cli.train).parameters
    assert given["backbone"].default == omni.TINY
    assert given["modalities"].default == ",".join(omni.MODALITIES)
    assert {f.name for f in fields(clip_training.Settings)} == set(given)
    known = get_type_hints(cli.train)["method"]
    assert set(get_args(known)) == set(clip_training.METHODS)


def test_the_record_keeps_what_it_always_kept(whole):
    kept = record_of(whole).parameters
    assert set(kept) == {
        *("accumulate", "backbone", "batch_size", "device", "epochs", "frames"),
        *("freeze_towers", "generative", "gradient_checkpointing", "head_lr", "lr"),
        *("max_pixels", "modalities", "precision", "processes", "skip_unusable"),
    }
    assert kept["generative"] is False and kept["modalities"] == list(omni.MODALITIES)


def told(capsys) -> str:
    """What was said of an error, without the frame that it may stand in."""
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_train_says_what_is_wrong(options, chosen, tmp_path, capsys):
    out = f"--out={tmp_path / 'out'}"
    for call, words in (
        ([], "Missing argument 'METHOD'"),
        (["readout"], "Missing option '--clips'"),
        (["oracle", "--clips=puppets", out], "not one of 'readout', 'generative'"),
        (["readout", "--clips=puppets", out, "--seeds=a"], "expected whole numbers"),
        (["readout", "--clips=puppets", out, "--lr=0"], "--lr: 0.0: must be positive"),
        (["readout", "--clips=puppets", out, "--head-lr=nan"], "must be positive"),
        (["readout", "--clips=puppets", out, "--precision=int8"], "'no', 'bf16'"),
        (["readout", "--clips=puppets", out, "--epochs=many"], "valid integer"),
    ):
        assert command("train", *call) == 2, call
        assert words in told(capsys), words
    only = write_folder(tmp_path / "only", [c for c in chosen if c.split == "train"])
    shaky = write_folder(tmp_path / "shaky", chosen)
    (first, *_) = [c for c in chosen if c.split == "train"]
    broken = shaky / "Raw" / first.video_id / f"{first.clip_id}.mp4"
    broken.write_text("not a film")
    (tmp_path / "file").write_text("")
    for changes, words in (
        ([f"--clips={tmp_path / 'none'}"], "label.csv"),
        ([f"--clips={only}"], "no usable clip in valid, test"),
        ([f"--clips={shaky}"], f"{first.id}: {broken}: broken"),
        ([f"--backbone={tmp_path / 'none'}"], "no omni-modal model could be loaded"),
        (["--modalities=text,smell"], "unknown modality 'smell'"),
        (["--frames=5"], "frames must be even"),
        (["--max-pixels=5"], "max_pixels"),
        (["--epochs=0"], "epochs must be at least 1"),
        ([f"--out={tmp_path / 'file'}"], "File exists"),
    ):
        unknown = words.startswith("unknown")  # a name is a matter of the call
        assert command("train", "readout", *options, out, *changes) == 1 + unknown
        said = told(capsys)
        assert said.startswith("error: ") and words in said, said
    given = [f"--clips={shaky}", out, "--skip-unusable", "--epochs=0"]
    assert command("train", "readout", *options, *given) == 1
    said = capsys.readouterr().out
    assert f"left out {first.id}" in said and "5 train" in said


def test_a_method_that_nobody_knows(tmp_path):
    unset = dict.fromkeys(f.name for f in fields(clip_training.Settings))
    with pytest.raises(UnknownNameError, match=r"'oracle'.*generative, readout"):
        clip_training.Settings(**unset | {"method": "oracle"})


def test_training_leaves_out_what_cannot_be_used_and_goes_on(
    options, chosen, tmp_path, capsys, monkeypatch
):
    """A pipe, a playlist and sound that is no number, in a folder of an odd name."""
    monkeypatch.setenv("MMSA_RECORDS", "")
    folder = write_folder(tmp_path / os.fsdecode(b"caf\xe9"), chosen)
    train = [c for c in chosen if c.split == "train"]
    pipe, playlist, infinite = (
        folder / "Raw" / c.video_id / f"{c.clip_id}.mp4" for c in train[:3]
    )
    pipe.unlink()
    os.mkfifo(pipe)
    playlist.write_text("ffconcat version 1.0\nfile good.mp4\n")
    patched_samples(tmp_path / "inf.mov", {9: np.inf}).replace(infinite)
    out = tmp_path / os.fsdecode(b"out\xff")
    given = [f"--clips={folder}", f"--out={out}", "--skip-unusable", "--epochs=1"]
    assert command("train", "readout", *options, *given) == 0
    said = capsys.readouterr().out
    assert "3 train" in said and said.count("left out") == 3
    for why in ("no regular file", "not a video container", "NaN or infinite"):
        assert why in said
