"""Scores of video files, from Python and as a command."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command
from films import displayed, film, patched_samples, tone
from test_clips import write
from thinkers import MEDIA, environment, score, write_folder

from mmsa_lib.corpora.media import clip_corpus
from mmsa_lib.errors import ConfigError
from mmsa_lib.methods import readout
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


# --- no clip costs another its score --------------------------------------------------


class Odd(BaseException):
    """As Rust's panics: no `Exception`."""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("fault"),
        MemoryError(),
        ConfigError("no"),
        GeneratorExit(),
        Odd("x"),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("kind", ["readout", "twin"])
def test_whatever_one_clip_does_to_the_model(
    saved, saved_twin, chosen, monkeypatch, error, kind
):
    files, texts = [c.path for c in chosen[:5]], [c.text for c in chosen[:5]]
    model = saved if kind == "readout" else saved_twin
    before = predict(files, model, texts=texts, device="cpu")
    assert [p.refused for p in before] == [None] * 5
    texts[2] = "trap"
    original = omni.Thinker.prompts

    def prompts(self, batch, *rest):
        if "trap" in batch.raw_text:
            raise error
        return original(self, batch, *rest)

    monkeypatch.setattr(omni.Thinker, "prompts", prompts)
    found = predict(files, model, texts=texts, device="cpu")
    assert [p.score is None for p in found] == [False, False, True, False, False]
    assert str(files[2]) in found[2].refused
    for old, new in zip(before, found, strict=True):
        if new.score is not None:
            assert new.score == pytest.approx(old.score, abs=1e-4)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_stops_a_scoring_stops_it(saved, chosen, monkeypatch, error):
    def stop(*_):
        raise error

    monkeypatch.setattr(omni.Thinker, "prompts", stop)
    with pytest.raises(error):
        predict([chosen[0].path], saved, device="cpu")


@pytest.mark.parametrize(
    ("value", "expected"),
    [(9.0, 3.0), (-4.5, -3.0), (math.nan, None), (math.inf, None), (1.5, 1.5)],
)
def test_scores_stay_in_their_range(saved, chosen, monkeypatch, value, expected):
    original = readout.Readout.forward

    def forward(self, batch):
        output = original(self, batch)
        output.predictions["sentiment"] = torch.full((len(batch), 1), value)
        return output

    monkeypatch.setattr(readout.Readout, "forward", forward)
    for found in predict([c.path for c in chosen[:2]], saved, device="cpu"):
        assert found.score == expected
        assert (found.refused is None) == (expected is not None)


def test_one_bad_film_among_good_ones(saved, chosen, tmp_path):
    """Sound that changes, sound that is no number, a pipe, a playlist."""
    good = chosen[0].path
    changing = tmp_path / "changing.ts"
    parts = [
        film(tmp_path / f"{k}.ts", tone(channels=k), layouts=(layout,), start=2 * k)
        for k, layout in ((1, "mono"), (2, "stereo"))
    ]
    changing.write_bytes(b"".join(p.read_bytes() for p in parts))
    infinite = patched_samples(tmp_path / "inf.mov", {900: math.inf})
    loud = patched_samples(tmp_path / "loud.mov", {900: 1e30})
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {good.name}\n")
    shutil.copy(good, tmp_path)
    files = [good, changing, infinite, loud, tmp_path / "pipe.mp4"]
    files += [tmp_path / "list.mp4", good]
    found = predict(files, saved, device="cpu")
    scored = [p.score is not None for p in found]
    assert scored == [True, True, False, True, False, False, True]
    for k, why in ((2, "NaN or infinite"), (4, "not a regular"), (5, "container")):
        assert why in found[k].refused and found[k].path in found[k].refused
    assert found[0].score == pytest.approx(found[-1].score, abs=1e-4)


def test_a_film_scores_the_same_however_it_is_laid(saved, tmp_path):
    """Stored turned or mirrored, with the matrix that undoes it."""
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:32, :48], picture[40:, 60:] = (250, 30, 30), (40, 240, 90)
    stored = {
        (1, 0, 0, 1): picture,
        (0, 1, -1, 0): np.rot90(picture, 1),
        (-1, 0, 0, -1): np.rot90(picture, 2),
        (0, -1, 1, 0): np.rot90(picture, 3),
        (-1, 0, 0, 1): picture[:, ::-1],
        (1, 0, 0, -1): picture[::-1],
    }
    files = [
        displayed(
            write(tmp_path / f"{k}.mp4", n=4, picture=np.ascontiguousarray(shown)),
            *matrix,
        )
        for k, (matrix, shown) in enumerate(stored.items())
    ]
    scores = [p.score for p in predict(files, saved, device="cpu")]
    assert scores == pytest.approx([scores[0]] * len(scores), abs=0.02)


def test_rotated_phone_video_scores_as_upright(shared_dir):
    folder = shared_dir / "cases" / "rotated-phone-video"
    if not folder.is_dir():
        pytest.skip(f"no case at {folder}")
    files = [folder / "upright.mp4", folder / "rotated.mp4"]
    upright, rotated = predict(files, device="cpu")
    assert rotated.score == pytest.approx(upright.score, abs=0.1)


# --- tables and names -----------------------------------------------------------------


def test_predict_needs_neither_labels_nor_modes(saved, chosen, tmp_path):
    folder = write_folder(tmp_path / "clips", chosen[:2])
    labelled = predict([folder], saved, device="cpu")
    for columns, rest in (
        ("video_id,clip_id,text", ""),
        ("video_id,clip_id,text,label,mode", ",,"),
        ("video_id,clip_id,text,label,mode", ",good,dev"),
    ):
        rows = [f'{c.video_id},{c.clip_id},"{c.text}"{rest}' for c in chosen[:2]]
        (folder / "label.csv").write_text("\n".join([columns, *rows]))
        found = predict([folder], saved, device="cpu")
        assert [p.score for p in found] == pytest.approx(
            [p.score for p in labelled], abs=1e-4
        )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("video_id,clip_id,text\n", "holds no clip"),
        ("", "an empty file"),
        ('video_id,clip_id,text\nv,1,"oh no\n', "line 2"),
        ("video_id,clip_id,text\nv,1\n", "line 2 has 2 fields, the header 3"),
        ("video_id,clip_id,text\n../..,1,a\n", "line 2 has the video_id"),
    ],
)
def test_tables_that_hold_no_clip_are_refused(
    saved, chosen, tmp_path, text, why, capsys
):
    (tmp_path / "label.csv").write_text(text)
    given = ("predict", tmp_path, chosen[0].path, "--model", saved, "--device", "cpu")
    assert command(*given) == 1
    out, _ = capsys.readouterr()
    assert "refused" in out and why in out and str(chosen[0].path) in out


NAMES = [
    *(b"caf\xe9.mp4", "übung.mp4".encode(), b"two\nlines.mp4", b"tab\t.mp4"),
    *(b"-p", b"--text", b"a:b.mp4", b"http:c.mp4", b"quo\"te'.mp4", b"\xff\xfe"),
    *(
        "\u65e5\u672c.mp4".encode(),
        b"bell\x07\x1b[31m.mp4",
        b"%s{0}[bold].mp4",
        b"a b .mp4",
    ),
]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252", "utf-16"])
def test_names_are_printed_on_any_terminal(
    saved, chosen, tmp_path, monkeypatch, encoding
):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        try:
            shutil.copy(chosen[0].path, os.path.join(os.fsencode(tmp_path), name))
        except OSError:
            pytest.skip("this file system holds UTF-8 names only")
    absent = b"g\xe9one.mp4"
    files = [os.fsdecode(name) for name in (*NAMES, absent)]
    given = ["--model", str(saved), "--device", "cpu", "--", *files]
    for more in ([], ["--json"]):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        assert command("predict", *more, *given) == 1
        sys.stdout.flush()
        out = raw.getvalue().decode(encoding)
        if more:
            found = json.loads(out)
            assert [os.fsencode(p["path"]) for p in found] == [*NAMES, absent]
            assert all(p["score"] is not None for p in found[:-1])
        else:
            lines = out.splitlines()
            assert len(lines) == len(NAMES) + 2  # one has a reason
            assert all(float(line.split()[0]) for line in lines[: len(NAMES)])
            assert "refused" in lines[-2] and "no such file" in lines[-1].lower()
            assert "\x1b" not in out and r"caf\udce9.mp4" in out
