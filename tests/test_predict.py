"""Scores of video files, from Python and as a command."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import command
from thinkers import MEDIA, environment, score, write_folder

from mmsa_lib.corpora.media import clip_corpus
from mmsa_lib.errors import ConfigError
from mmsa_lib.methods.generative import parse_score
from mmsa_lib.nets import omni
from mmsa_lib.predict import predict


def damaged(folder: Path, good: Path) -> dict[str, Path]:
    """Clips that nothing can be told of, by the word that says why."""
    import av

    (folder / "words.mp4").write_text("not a film")
    body = good.read_bytes()
    (folder / "half.mp4").write_bytes(body[: len(body) // 2])
    made = {"broken": folder / "words.mp4", "half": folder / "half.mp4"}
    made["No such file"] = folder / "absent.mp4"
    for name, loud, frames, seconds in (
        ("silent", 0.0, 10, 1.0),
        ("no video stream", 0.1, 0, 1.0),
        ("longer than", 0.1, 10, 62.0),
    ):
        path = made[name] = folder / f"{name.replace(' ', '-')}.mp4"
        with av.open(str(path), "w") as out:
            if frames:
                film = out.add_stream("h264", rate=10)
                film.width, film.height, film.pix_fmt = 64, 64, "yuv420p"
            sound = out.add_stream("aac", rate=16000)
            for _ in range(frames):
                picture = np.full((64, 64, 3), 90, np.uint8)
                out.mux(film.encode(av.VideoFrame.from_ndarray(picture)))
            if frames:
                out.mux(film.encode(None))
            t = np.arange(int(16000 * seconds))
            wave = (loud * np.sin(t / 9)).astype(np.float32)[None]
            for start in range(0, wave.shape[1], 1024):
                piece = np.ascontiguousarray(wave[:, start : start + 1024])
                frame = av.AudioFrame.from_ndarray(piece, "fltp", "mono")
                frame.rate, frame.pts = 16000, start
                out.mux(sound.encode(frame))
            out.mux(sound.encode(None))
    return made


def test_predict_scores_what_it_can_and_refuses_the_rest(
    saved, overfit, chosen, clip_folder, tmp_path
):
    bad = damaged(tmp_path, chosen[0].path)
    files = [chosen[0].path, *bad.values(), chosen[1].path]
    texts = [chosen[0].text, *[""] * len(bad), chosen[1].text]
    (tmp_path / "empty").mkdir()
    found = predict(
        [*files, clip_folder, tmp_path / "empty"],
        saved,
        texts=texts,
        device="cpu",
        batch_size=1,
    )
    assert len(found) == len(files) + len(chosen) + 1
    assert [p.path for p in found[: len(files)]] == [str(f) for f in files]
    assert all((p.score is None) == (p.refused is not None) for p in found)
    for (word, path), p in zip(bad.items(), found[1:], strict=False):
        if word != "half":
            assert word in p.refused
        assert p.path in p.refused and p.path == str(path)
    assert "no " in found[-1].refused and "label.csv" in found[-1].refused
    # scores are those of the model on the same clips with their words
    corpus = clip_corpus([replace(c, split="valid") for c in chosen], MEDIA)
    expected = score(overfit.module, corpus.valid.batch(range(10))).flatten()
    whole = [p.score for p in found[len(files) : -1]]
    assert whole == pytest.approx(expected.tolist(), abs=1e-4)
    assert found[0].score == pytest.approx(whole[0], abs=1e-4)
    assert found[len(files) - 1].score == pytest.approx(whole[1], abs=1e-4)
    (silent,) = predict([chosen[0].path], saved, device="cpu")
    assert abs(silent.score - whole[0]) > 1e-3  # words matter


def test_predict_names_faulty_rows_of_a_folder(saved, chosen, tmp_path):
    folder = write_folder(tmp_path / "clips", chosen[:2])
    text = (folder / "label.csv").read_text()
    (folder / "label.csv").write_text(text + "v,9,words,0.5,train\n")
    good, _, bad = predict([folder], saved, device="cpu")
    assert good.score is not None
    assert bad.score is None and "there is no file" in bad.refused
    with pytest.raises(ConfigError, match="1 files but 2 transcripts"):
        predict([chosen[0].path, folder], saved, texts=["a", "b"])


def test_predict_without_the_packages_readout_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(omni, "tiny_folder", lambda: tmp_path)
    with pytest.raises(ConfigError, match="lacks the tiny readout"):
        predict(["a.mp4"])
    assert command("predict", "a.mp4") == 2
    assert "lacks the tiny readout" in capsys.readouterr().err


def test_predict_of_a_twin_is_what_it_writes(saved_twin, twin, handful, chosen):
    clip = chosen[0]
    (found,) = predict([clip.path], saved_twin, texts=[clip.text], device="cpu")
    assert found.score == parse_score(twin.module.answer(handful.valid).texts[0])


def test_command_says_that_the_tiny_readout_knows_puppets_only(
    saved, chosen, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(omni, "tiny_folder", lambda: tmp_path)
    shutil.copytree(saved, tmp_path / "readout")
    clip = chosen[0].path
    given = ["predict", clip, "--text", chosen[0].text, "--device", "cpu"]
    assert command(*given) == 0
    out, err = capsys.readouterr()
    assert out.split()[1] == str(clip) and float(out.split()[0])
    assert "knows nothing but puppets" in err
    assert command(*given, "--model", saved) == 0
    again, err = capsys.readouterr()
    assert again == out and not err


def test_command_has_three_exit_states(saved, tmp_path, capsys):
    absent = str(tmp_path / "absent.mp4")
    assert command("predict", absent, "--model", saved, "--device", "cpu") == 1
    out, _ = capsys.readouterr()
    assert "refused" in out and "No such file" in out
    assert command("predict", absent, "--model", tmp_path) == 2
    assert "holds no readout" in capsys.readouterr().err
    two = ["--text", "a", "--text", "b"]
    assert command("predict", absent, *two, "--model", saved) == 2
    assert "1 files but 2 transcripts" in capsys.readouterr().err
    for call in ([], ["--txt", "a", absent], [absent, "--model"]):
        assert command("predict", *call) == 2
        assert "error:" not in capsys.readouterr().err.split("Error")[0]


def test_files_may_be_called_anything(saved, chosen, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["-p", "--text", "-dash.mp4", "a:b.mp4", "http:c.mp4", "concat:d|e.mp4"]
    for name in names:
        shutil.copy(chosen[0].path, name)
    assert command("predict", "--json", "--model", saved, "--", *names) == 0
    found = json.loads(capsys.readouterr().out)
    assert [p["path"] for p in found] == names
    scores = [p["score"] for p in found]
    assert scores == pytest.approx(scores[:1] * len(names), abs=1e-5)


def test_predict_as_readers_call_it(saved, chosen, tmp_path):
    clips = [str(chosen[0].path), str(tmp_path / "absent.mp4")]
    words = ["--text", chosen[0].text, "--text", ""]
    where = ["--model", str(saved), "--device", "cpu"]
    given = ["predict", clips[0], *words, "--json", *where, clips[1]]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mmsa_lib.cli", *given],
        cwd=tmp_path,  # where no book is
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    good, bad = json.loads(done.stdout)
    assert good["path"] == clips[0] and good["refused"] is None
    (expected,) = predict(clips[:1], saved, texts=words[1:2], device="cpu")
    assert good["score"] == pytest.approx(expected.score, abs=1e-5)
    assert bad["score"] is None and "No such file" in bad["refused"]
