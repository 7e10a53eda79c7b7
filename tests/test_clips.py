"""Puppet clips carry their scripts; any clip folder is read, decoded and refused."""

import csv
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import av
import numpy as np
import pytest
from conftest import ROOT
from scipy import ndimage, signal, stats

from mmsa_lib.corpora import clips, puppets
from mmsa_lib.corpora.clips import check, decode, puppet_clips, read_folder
from mmsa_lib.corpora.puppets import PuppetConfig, Scripts
from mmsa_lib.errors import ClipError, CorpusError

RATE = 16000


@pytest.fixture(scope="module")
def maker():
    """The script that makes the clips, as a module."""
    path = ROOT / "scripts" / "make_puppet_clips.py"
    spec = importlib.util.spec_from_file_location("make_puppet_clips", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shipped():
    return puppet_clips()


@pytest.fixture(scope="module")
def takes(maker):
    return {take.script.id: take for take in maker.choose()}


@pytest.fixture(scope="module")
def media(shipped):
    return [decode(clip.path) for clip in shipped]


def take_of(takes, clip):
    return takes[f"{clip.video_id}_{clip.clip_id}"]


# --- what is shipped ------------------------------------------------------------------


def test_card_and_budget():
    folder, card = clips.puppet_folder(), clips.puppet_card()
    files = {p for p in folder.rglob("*") if p.is_file()}
    assert sum(p.stat().st_size for p in files) <= 5_000_000
    names = {p.relative_to(folder).as_posix() for p in files} - {"card.json"}
    assert names == set(card["sha256"])
    for name, expected in card["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected
    assert card["synthetic"] and card["terms"].startswith("CC BY 4.0")
    assert {"espeak-ng", "pyav", "pillow"} <= set(card["made_with"])


def test_labels_are_balanced_and_speakers_stay_in_their_split(shipped):
    card = clips.puppet_card()
    assert len(shipped) == card["clips"] == 112
    homes = {}
    for split, facts in card["splits"].items():
        mine = [c for c in shipped if c.split == split]
        counts = np.bincount([round(c.sentiment) + 3 for c in mine], minlength=7)
        assert counts.tolist() == facts["histogram_-3_to_3"]
        assert len(set(counts.tolist())) == 1, f"{split} is not balanced"
        assert {c.truth["domain"] for c in mine} == {"A", "B"}
        sarcastic = sum(c.truth["sincerity"] < 0 for c in mine)
        assert sarcastic == facts["sarcastic"] and sarcastic > 0
        for c in mine:
            assert homes.setdefault(c.video_id, split) == split
    assert len(homes) == 32


def test_every_clip_is_what_its_script_says(shipped):
    """Against the world generated anew, not against the maker's own notes."""
    worlds = [PuppetConfig(**w) for w in clips.puppet_card()["worlds"]]
    known = {}
    for world in worlds:
        for split in clips.MODES:
            table = Scripts(world, split)
            labels = table.labels()["sentiment"][:, 0]
            known |= {i: (split, table, k, labels[k]) for k, i in enumerate(table.ids)}
    for clip in shipped:
        split, table, k, label = known[f"{clip.video_id}_{clip.clip_id}"]
        script = table[k]
        assert clip.split == split
        assert clip.text == script.text
        assert clip.sentiment == pytest.approx(label, abs=1e-6)
        expected = (script.literal, script.voice, script.face)
        expected = np.clip(expected, -3, 3).tolist()
        assert list(clip.labels) == ["text", "audio", "vision"]
        assert list(clip.labels.values()) == expected
        assert clip.truth["sentiment"] == script.sentiment
        assert clip.truth["sincerity"] == script.sincerity
        assert tuple(w for w, _, _ in clip.words) == script.tokens
        sign = "Negative" if label < 0 else "Positive" if label > 0 else "Neutral"
        assert clip.annotation == sign


def test_words_and_tracks_lie_on_one_time_axis(shipped, media):
    for clip, m in zip(shipped, media, strict=True):
        times = np.array([t for _, *span in clip.words for t in span])
        assert (np.diff(times) >= 0).all() and times[-1] < m.seconds
        assert clip.times == pytest.approx(np.arange(len(clip.times)) / 10)
        assert set(clip.tracks) == {"text", "audio", "vision"}
        for values in (*clip.tracks.values(), *clip.cues.values()):
            assert values.shape == clip.times.shape
        assert 0 <= m.seconds - len(clip.times) / 10 < 0.15
        assert 2 <= m.seconds < 5.15
        # text begins at nothing and ends at the valence of the whole sentence
        assert clip.tracks["text"][0] == 0
        assert clip.tracks["text"][-1] == pytest.approx(clip.truth["literal"], abs=1e-3)
        for m_, latent in (("audio", "voice"), ("vision", "face")):
            peak = clip.tracks[m_][np.abs(clip.tracks[m_]).argmax()]
            whole = clip.truth[latent]
            assert abs(peak) <= abs(whole) + 1e-3
            assert abs(peak) >= 0.75 * abs(whole) and peak * whole >= 0


def test_running_valence_hears_the_turn(maker):
    table = Scripts(maker.WORLDS[0], "train")
    form = np.array(list(puppets.FORMS))[table.columns["form"]]
    for i in np.flatnonzero(form == "but")[:20].tolist():
        running, turn = maker._running_valence(table, i), table.words(i).index("but")
        assert running[turn] == pytest.approx(running[turn - 1] / 2, abs=1 / 16)
        assert set(running[turn:-1]) == {running[turn]}
        assert running[-1] == table[i].literal
    first = table.words(i).index("the") + 1
    assert set(running[:first]) == {0.0}


# --- face and voice carry the script --------------------------------------------------


def corners_up(frame: np.ndarray) -> float:
    """How far the mouth's corners lie above its middle, pixels; NaN if not found."""
    dark = frame[94:124, 56:112] @ np.array([0.299, 0.587, 0.114]) < 90
    parts, n = ndimage.label(dark)
    edge = {*parts[-1], *parts[:, 0], *parts[:, -1]}  # chin and hair
    sizes = {k: (parts == k).sum() for k in range(1, n + 1) if k not in edge}
    if not sizes:
        return np.nan  # an open mouth that touches the chin
    ys, xs = np.nonzero(parts == max(sizes, key=sizes.get))
    if np.ptp(xs) < 15:
        return np.nan
    at = (xs - xs.min()) / np.ptp(xs)
    ends = ys[at < 0.2].mean() + ys[at > 0.8].mean()
    return float(ys[np.abs(at - 0.5) < 0.15].mean() - ends / 2)


def test_the_mouth_shows_the_vision_track(shipped, media):
    seen, track, smile = [], [], []
    for clip, m in zip(shipped, media, strict=True):
        for frame, t in zip(m.frames[::3], m.frame_times[::3], strict=True):
            k = min(round(t * 10), len(clip.times) - 1)
            seen.append(corners_up(frame))
            track.append(clip.tracks["vision"][k])
            smile.append(clip.cues["smile"][k])
    seen, track, smile = map(np.array, (seen, track, smile))
    found = ~np.isnan(seen)
    assert found.mean() > 0.95
    seen, track, smile = seen[found], track[found], smile[found]
    calm = smile < 0.05
    assert calm.sum() > 200
    assert np.corrcoef(seen[calm], track[calm])[0, 1] > 0.85
    # the smile lifts the corners beyond what the track explains
    fit = np.polyfit(track[calm], seen[calm], 1)
    assert (seen - np.polyval(fit, track))[smile > 0.8].mean() > 2


def test_a_late_smile_comes_late(shipped):
    for clip in shipped:
        names = {e["track"] for e in clip.truth["events"]}
        peak = clip.times[clip.cues["smile"].argmax()]
        spoken = clip.words[0][1], clip.words[-1][2]
        share = (peak - spoken[0]) / (spoken[1] - spoken[0])
        assert (share > 0.5) == ("late smile" in names)
        if clip.truth["sincerity"] < 0:
            assert "late smile" in names and clip.cues["lift"].max() > 0.8


def pitch(x: np.ndarray) -> float:
    """Median fundamental (octaves) of voiced 40 ms windows; NaN without any."""
    found = []
    for start in range(0, len(x) - 640, 160):
        y = x[start : start + 640] - x[start : start + 640].mean()
        c = np.correlate(y, y, "full")[639:]
        peaks = 45 + signal.find_peaks(c[45:267], height=max(0.45 * c[0], 1e-9))[0]
        if len(peaks):  # the first of the high ones: later ones are octaves below
            lag = peaks[c[peaks] > 0.85 * c[peaks].max()][0]
            found.append(np.log2(RATE / lag))
    return float(np.median(found)) if len(found) > 3 else np.nan


def test_the_voice_follows_the_script(maker, takes, shipped, media):
    """Loudness and pitch of each word, beside the audio features' channels."""
    loud, energy, height, wanted = [], [], [], []
    for clip, m in zip(shipped, media, strict=True):
        if clip.truth["domain"] == "B":
            continue  # its recording channel cuts the fundamental off
        n = len(clip.words)
        script = take_of(takes, clip).script
        channels = maker.voice_channels(script, (np.arange(n) + 0.5) / n)
        spoken = [m.audio[int(a * RATE) : int(b * RATE)] for _, a, b in clip.words]
        loud += [10 * np.log10(np.mean(x**2)) for x in spoken]
        energy += channels["energy"].tolist()
        mine = np.array([pitch(x) for x in spoken])
        height += (mine - np.nanmedian(mine)).tolist()
        wanted += (channels["pitch"] - np.median(channels["pitch"])).tolist()
    assert np.corrcoef(loud, energy)[0, 1] > 0.8
    height, wanted = np.array(height), np.array(wanted)
    voiced = ~np.isnan(height)
    assert voiced.mean() > 0.85
    # ranks: in a few words the estimate is off by an octave
    assert stats.spearmanr(height[voiced], wanted[voiced]).statistic > 0.65


def test_sound_and_picture_are_aligned(shipped, media):
    for clip, m in zip(shipped, media, strict=True):
        if clip.truth["domain"] == "A":  # no hiss before the first word
            onset = np.flatnonzero(np.abs(m.audio) > 0.02)[0] / RATE
            assert abs(onset - clip.words[0][1]) < 0.03
        assert m.frame_times[0] == 0


# --- making them again ----------------------------------------------------------------


def test_one_clip_is_made_again(maker, takes, shipped, media, tmp_path):
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    k = min(range(len(shipped)), key=lambda k: media[k].seconds)
    clip, old = shipped[k], media[k]
    take = take_of(takes, clip)
    path = maker.make(take, tmp_path)
    if maker.versions() == clips.puppet_card()["made_with"]:
        assert path.read_bytes() == clip.path.read_bytes()
    new = decode(path)
    assert (new.frame_times == old.frame_times).all()
    assert np.abs(new.frames.astype(int) - old.frames).mean() < 1
    assert abs(new.seconds - old.seconds) < 0.07
    again = maker.film(take)
    assert (again == maker.film(take)).all()
    with open(clips.puppet_folder() / "label.csv", newline="") as file:
        assert maker.row(take) in list(csv.DictReader(file))
    entries = json.loads((clips.puppet_folder() / "scripts.json").read_text())
    fresh = json.loads(json.dumps(maker.notes(take)))
    assert entries[take.script.id] == fresh


def test_maker_says_what_to_do_without_espeak(maker, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["make", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="apt install espeak-ng"):
        maker.main()
    assert not list(tmp_path.iterdir())


# --- folders --------------------------------------------------------------------------

COLUMNS = "video_id,clip_id,text,label,label_T,label_A,label_V,annotation,mode"


def folder_with(tmp_path, *rows, columns=COLUMNS, encoding="utf-8"):
    text = "\n".join([columns, *rows]) + "\n"
    (tmp_path / "label.csv").write_bytes(text.encode(encoding))
    for row in rows:
        video, clip = row.split(",")[:2]
        path = tmp_path / "Raw" / video / f"{clip}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def test_folder_as_mmsa_fet_writes_it(tmp_path):
    """Byte order mark, leading zeros, a comma in the text, no unimodal labels."""
    folder = folder_with(
        tmp_path,
        'v,0001,"Café, nice",2.4,,,,Positive,train',
        "v,0002,bad,-3,-1,0.5,,Negative,test",
        encoding="utf-8-sig",
    )
    one, two = read_folder(folder)
    assert (one.id, one.text, one.sentiment) == ("v$_$0001", "Café, nice", 2.4)
    assert one.path == folder / "Raw" / "v" / "0001.mp4"
    assert one.labels == {} and one.split == "train" and one.times is None
    assert two.labels == {"text": -1.0, "audio": 0.5} and two.split == "test"
    slim = "video_id,clip_id,text,label,mode"
    (only,) = read_folder(folder_with(tmp_path, "v,0001,a,1,valid", columns=slim))
    assert only.annotation == "" and only.split == "valid"


def test_all_faulty_rows_are_named_at_once(tmp_path):
    folder = folder_with(
        tmp_path,
        "v,1,fine,1,,,,Positive,train",
        "v,1,twice,1,,,,Positive,train",
        "v,2,high,3.2,,,,Positive,train",
        "v,3,word,good,,,,Positive,train",
        "v,4,nan,nan,,,,Positive,train",
        "v,5,part,1,-4,,,Positive,train",
        "v,6,mode,1,,,,Positive,dev",
        "v,7,gone,1,,,,Positive,train",
        "v,8,none,,,,,Positive,train",
    )
    (folder / "Raw" / "v" / "7.mp4").unlink()
    with pytest.raises(ClipError) as error:
        read_folder(folder)
    message = str(error.value)
    assert "8 faulty rows of 9" in message
    for expected in (
        "v$_$1 (line 3): occurs a second time",
        "v$_$2: label is 3.2",
        "v$_$3: label is 'good'",
        "v$_$4: label is nan",
        "v$_$5: label_T is -4",
        "v$_$6: mode is 'dev', expected train, valid, test",
        "v$_$7: there is no file",
        "v$_$8: label is ''",
    ):
        assert expected in message
    problems = {}
    (good,) = read_folder(folder, problems)
    assert good.text == "fine"
    assert list(problems) == [f"v$_${k}" for k in ("1 (line 3)", *range(2, 9))]


def test_folders_that_cannot_be_read_at_all(tmp_path):
    with pytest.raises(ClipError, match=r"no .*label\.csv"):
        read_folder(tmp_path)
    problems = {}
    folder_with(tmp_path, columns="video_id,clip_id,label")
    with pytest.raises(ClipError, match="lacks the columns text, mode; found video_id"):
        read_folder(tmp_path, problems)
    (tmp_path / "label.csv").write_bytes(b"")
    with pytest.raises(ClipError, match="an empty file"):
        read_folder(tmp_path)
    (tmp_path / "label.csv").write_bytes(COLUMNS.encode() + b"\n\xff\xfe,1\n")
    with pytest.raises(ClipError, match="not UTF-8"):
        read_folder(tmp_path)
    assert issubclass(ClipError, CorpusError) and not problems


SLIM = "video_id,clip_id,text,label,mode"
NOTHING = "video_id,clip_id,text"
LAST = "video_id,clip_id,label,mode,text"
FIRST = "text,label,mode,video_id,clip_id"


def table_of(folder, text, clips=range(1, 7)):
    """A folder with this table and clips of these names in Raw/v."""
    raw = folder / "Raw" / "v"
    raw.mkdir(parents=True, exist_ok=True)
    for k in clips:
        (raw / f"{k}.mp4").touch()
    (folder / "label.csv").write_bytes(text.encode())
    return folder


@pytest.mark.parametrize(
    ("text", "line"),
    [
        # never closed
        (f'{COLUMNS}\nv,1,"oh no,1,,,,Positive,train\nv,2,b,1,,,,Positive,train\n', 2),
        (f'{SLIM}\nv,1,a,1,train\nv,2,"oh no,1,train\nv,3,c,1,train\n', 3),
        (f'{SLIM}\nv,1,a,1,train\n\nv,2,"oh no', 4),
        (f'{SLIM}\r\nv,1,a,1,train\r\nv,2,"oh no,1,train\r\n', 3),
        # closed by the quote of a later row
        (f'{SLIM}\nv,1,"oh no,1,train\nv,2,b,1,train\nv,3,"well, c",1,train\n', 2),
        (f'{SLIM}\nv,1,"oh no,1,train\nv,2,b,1,train\nv,3,c",1,train\n', 2),
        (f'{SLIM}\nv,1,a,1,train\nv,2,"oh, no,1,train\nv,3,c",1,train\n', 3),
        (f'{COLUMNS}\nv,1,"no,1,,,,P,train\nv,2,b,1,,,,P,train\nv,3,"",1,,,,P,test', 2),
        (f'{LAST}\nv,1,1,train,"oh no\nv,2,1,train,b\nv,3,1,train,c"\n', 2),
        (f'{FIRST}\n"oh no,1,train,v,1\nb,1,train,v,2\nc",1,train,v,3\n', 2),
        (f'{FIRST}\n"oh no,1,train,v,1\nc",1,train,v,3\n', 2),
        # clips that are not there are lost all the same
        (f'{SLIM}\nv,8,"oh no,1,train\nv,9,b",1,train\n', 2),
        # text after the closing quote
        (f'{SLIM}\nv,1,"oh" no,1,train\n', 2),
    ],
)
@pytest.mark.parametrize("given", [None, {}])
def test_a_quote_that_is_not_closed_is_named_with_its_line(tmp_path, text, line, given):
    folder = table_of(tmp_path, text)
    for labelled in (True, False):
        with pytest.raises(ClipError, match=rf"label\.csv, line {line}: .*quote"):
            read_folder(folder, given, labelled=labelled)


def test_texts_over_several_lines_are_texts(tmp_path):
    for text, expected in (
        (f'{SLIM}\nv,1,"one\ntwo",1,train\nv,2,b,1,train\n', ["one\ntwo", "b"]),
        (f'{SLIM}\nv,1,"I, well\nyou, they, we",1,train\n', ["I, well\nyou, they, we"]),
        (f'{LAST}\nv,1,1,train,"one\n\ntwo, or three"\n', ["one\n\ntwo, or three"]),
        (f'{FIRST}\n"one\r\ntwo",1,train,v,1\n', ["one\r\ntwo"]),
        (f'{SLIM}\nv,1,"he said ""no""",1,train\n', ['he said "no"']),
        (f'{SLIM}\nv,1,he said "no",1,train\n', ['he said "no"']),
        (f"{SLIM}\nv,1,one\u2028two,1,train\n", ["one\u2028two"]),
    ):
        assert [c.text for c in read_folder(table_of(tmp_path, text))] == expected


def test_a_long_text_is_whole(tmp_path):
    words = "words, " * 60_000
    limit = csv.field_size_limit()
    (clip,) = read_folder(table_of(tmp_path, f'{SLIM}\nv,1,"{words}",1,train\n'))
    assert clip.text == words and csv.field_size_limit() == limit
    rows = "".join(
        f"v,{k},{words[:90].replace(',', '')},1,train\n" for k in range(4000)
    )
    with pytest.raises(ClipError, match="line 2: a quote that opens"):
        read_folder(table_of(tmp_path, f'{SLIM}\nv,1,"oh no,1,train\n{rows}'))
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("columns", [COLUMNS, SLIM, LAST, FIRST])
@pytest.mark.parametrize("change", [-3, -1, 1, 2])
def test_rows_have_as_many_fields_as_the_header(tmp_path, columns, change):
    names = columns.split(",")
    good = dict.fromkeys(names, "") | {
        **{"video_id": "v", "clip_id": "1", "text": "a", "label": "1", "mode": "train"}
    }
    fields = list(good.values())
    bad = [*fields, "x", "y"][: len(fields) + change]
    text = "\n".join(",".join(row) for row in (names, bad, fields, bad))
    problems = {}
    (clip,) = read_folder(table_of(tmp_path, text), problems)
    assert clip.text == "a" and list(problems) == ["line 2", "line 4"]
    said = f"line 2 has {len(bad)} fields, the header {len(names)}"
    assert problems["line 2"].startswith(said)
    with pytest.raises(ClipError, match=f"(?s)2 faulty rows of 3.*{said}"):
        read_folder(tmp_path)


@pytest.mark.parametrize("columns", [COLUMNS, SLIM])
@pytest.mark.parametrize("rest", ["", "\n", "\r\n\r\n", "\n\n\n"])
def test_a_header_alone_holds_no_clip(tmp_path, columns, rest):
    for problems in (None, {}):
        with pytest.raises(ClipError, match=r"label\.csv holds no clip"):
            read_folder(table_of(tmp_path, columns + rest), problems)


def test_a_column_that_is_there_twice(tmp_path):
    text = f"{SLIM},text\nv,1,a,1,train,b\n"
    with pytest.raises(ClipError, match="the columns text more than once"):
        read_folder(table_of(tmp_path, text))


@pytest.mark.parametrize(
    ("video", "clip"),
    [
        ("../../..", "1"),
        ("..", "1"),
        (".", "1"),
        ("", "1"),
        ("v", ""),
        ("v", "../v/1"),
        ("v/../v", "1"),
        ("..\\v", "1"),
        ("ABSOLUTE", "1"),
        ("v", "ABSOLUTE"),
        ("v\0", "1"),
    ],
)
def test_names_that_leave_the_folder_are_refused_by_line(tmp_path, video, clip):
    there = str(tmp_path / "Raw" / "v")
    video, clip = (x.replace("ABSOLUTE", there) for x in (video, clip))
    text = f"{SLIM}\nv,2,a,1,train\n{video},{clip},b,1,train\n"
    folder = table_of(tmp_path, text)
    (tmp_path / "Raw" / "1.mp4").touch()
    for labelled in (True, False):
        problems = {}
        (good,) = read_folder(folder, problems, labelled=labelled)
        assert good.clip_id == "2" and list(problems) == ["line 3"]
        assert problems["line 3"].startswith("line 3 has the ")
    with pytest.raises(ClipError, match="line 3 has the"):
        read_folder(folder)


def test_names_of_files_that_cannot_be(tmp_path):
    text = f"{SLIM}\n{'v' * 300},1,a,1,train\nv,7,b,1,train\nv,1,c,1,train\n"
    os.mkfifo(table_of(tmp_path, text) / "Raw" / "v" / "7.mp4")
    problems = {}
    (good,) = read_folder(tmp_path, problems)
    assert good.text == "c"
    long, pipe = problems.values()
    assert "there is no file" in long and "there is no regular file" in pipe


@pytest.mark.parametrize(
    "text",
    [
        f"{NOTHING}\nv,1,a\nv,2,b\n",
        f"{SLIM}\nv,1,a,,\nv,2,b,good,dev\n",
        f"{COLUMNS}\nv,1,a,,,,,,test\nv,2,b,9,9,9,9,,\n",
    ],
)
def test_without_labels_a_table_needs_none(tmp_path, text):
    found = read_folder(table_of(tmp_path, text), labelled=False)
    assert [c.text for c in found] == ["a", "b"]
    assert all(np.isnan(c.sentiment) and not c.split and not c.labels for c in found)
    with pytest.raises(ClipError):
        read_folder(tmp_path)


def test_a_row_that_is_there_twice_is_never_lost(tmp_path):
    rows = ["v,1,a,1,train", "v,1,b,9,train", "v,2,c,9,train", "v,2,d,8,train"]
    problems = {}
    (good,) = read_folder(table_of(tmp_path, "\n".join([SLIM, *rows])), problems)
    assert good.text == "a"
    assert list(problems) == ["v$_$1 (line 3)", "v$_$2", "v$_$2 (line 5)"]


def test_cases_of_tables(shared_dir, tmp_path):
    cases = shared_dir / "cases" / "label-csv"
    if not cases.is_dir():
        pytest.skip(f"no cases at {cases}")
    for name, said in (
        ("headeronly", "holds no clip"),
        ("huge", "line 2: a quote"),
        ("unclosed", "line 3: a quote"),
        ("short_order", "line 2 has 4 fields, the header 5"),
        ("textlast", "line 2 has 6 fields, the header 5"),
    ):
        folder = table_of(tmp_path / name, (cases / name / "label.csv").read_text())
        with pytest.raises(ClipError, match=said):
            read_folder(folder)
    name = "nolabel"
    folder = table_of(tmp_path / name, (cases / name / "label.csv").read_text())
    assert len(read_folder(folder, labelled=False)) == 2


# --- decoding -------------------------------------------------------------------------


def write(
    path,
    n=20,
    fps=10,
    size=(48, 64),
    rate=RATE,
    layout="mono",
    seconds=None,
    wave=None,
    codec="libx264",
    audio_from=0.0,
    picture=None,
):
    """A clip whose frame k is grey 10 * k and whose sound is a 440 Hz tone."""
    size = size if picture is None else picture.shape[:2]
    seconds = n / fps if seconds is None else seconds
    with av.open(str(path), "w") as out:
        streams = []
        if n is not None:
            video = out.add_stream(codec, rate=fps)
            video.height, video.width = size
            video.pix_fmt = "yuv420p"
            streams.append(video)
        if seconds:
            sound = out.add_stream("aac", rate=rate, layout=layout)
            streams.append(sound)
        for k in range(n or 0):
            grey = np.full((*size, 3), min(10 * k, 255), np.uint8)
            shown = grey if picture is None else picture
            out.mux(video.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        if seconds:
            t = np.arange(int(rate * seconds)) / rate
            x = 0.5 * np.sin(2 * np.pi * 440 * t) if wave is None else wave(t)
            x = np.stack([x] * (2 if layout == "stereo" else 1)).astype(np.float32)
            block = av.AudioFrame.from_ndarray(x, format="fltp", layout=layout)
            block.sample_rate, block.pts = rate, round(audio_from * rate)
            out.mux(sound.encode(block))
        for stream in streams:
            out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"n": 50, "fps": 25, "rate": 44100, "layout": "stereo", "size": (90, 160)},
        {"n": 50, "fps": 25, "rate": 48000},
        {"n": 20, "fps": 10, "rate": 22050, "size": (34, 38)},
        {"n": 60, "fps": 30, "codec": "mpeg4"},
    ],
    ids=["stereo 44.1 kHz", "48 kHz", "small 22 kHz", "mpeg4"],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_any_input_becomes_sixteen_frames_and_mono_16_khz(tmp_path, options, suffix):
    m = decode(write(tmp_path / f"a.{suffix}", **options))
    assert m.frames.shape == (16, *options.get("size", (48, 64)), 3)
    assert m.frames.dtype == np.uint8 and m.audio.dtype == np.float32
    # evenly spaced up to one frame, from the first to the last
    gaps = np.diff(m.frame_times)
    assert m.frame_times[0] == pytest.approx(0, abs=0.07)
    assert gaps.max() - gaps.min() < 1 / options["fps"] + 0.002
    assert m.frame_times[-1] - m.frame_times[0] == pytest.approx(
        2 - 1 / options["fps"], abs=0.002
    )
    # each frame is the one shown at its time: frame k is grey 10 k
    k = (m.frame_times - m.frame_times[0]) * options["fps"]
    grey = m.frames.mean((1, 2, 3))
    assert np.abs(grey - np.minimum(10 * np.rint(k), 255)).max() < 4
    assert m.rate == RATE and m.audio.ndim == 1
    assert abs(len(m.audio) / RATE - 2) < 0.2 and abs(m.seconds - 2) < 0.2
    middle = m.audio[RATE // 2 : RATE // 2 + RATE]
    spectrum = np.abs(np.fft.rfft(middle))
    assert np.argmax(spectrum) == 440
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.1)


def test_fewer_frames_than_asked_and_other_rates(tmp_path):
    path = write(tmp_path / "a.mp4", n=5)
    assert len(decode(path).frames) == 5
    assert len(decode(path, frames=1).frames) == 1
    two = decode(path, frames=2)
    assert two.frame_times == pytest.approx([0, 0.4])
    assert abs(len(decode(path, rate=8000).audio) / 8000 - 0.5) < 0.2
    with pytest.raises(ValueError, match="at least 1"):
        decode(path, frames=0)


def test_sound_that_begins_late_stays_late(tmp_path):
    m = decode(write(tmp_path / "a.mkv", seconds=1.0, audio_from=0.7))
    assert np.flatnonzero(np.abs(m.audio) > 0.1)[0] / RATE == pytest.approx(
        0.7, abs=0.05
    )
    assert m.frame_times[0] == 0


def broken_files(folder):
    """Name: (file, reason)."""
    whole = write(folder / "whole.mp4", n=40).read_bytes()
    made = {
        "good": (whole, None),
        "empty": (b"", "broken"),
        "noise": (np.random.default_rng(0).bytes(5000), "broken"),
        "half": (whole[: len(whole) // 2], "broken"),
    }
    for name, (content, _) in made.items():
        (folder / f"{name}.mp4").write_bytes(content)
    reasons = {name: reason for name, (_, reason) in made.items()}
    write(folder / "mute.mp4", seconds=0)
    write(folder / "zeros.mp4", wave=np.zeros_like)
    write(folder / "blind.mp4", n=None, seconds=1.0)
    write(folder / "frameless.mkv", n=0, seconds=1.0).rename(folder / "frameless.mp4")
    write(folder / "long.mp4", n=70)
    return reasons | {
        "mute": "no audio stream",
        "zeros": "nothing but zeros",
        "blind": "no video stream",
        "frameless": "frameless",
        "long": r"lasts 7\.0 s, longer than longest=5 s",
    }


def test_every_broken_clip_is_named_with_its_reason(tmp_path):
    raw = tmp_path / "Raw" / "v"
    raw.mkdir(parents=True)
    reasons = broken_files(raw)
    (raw / "whole.mp4").unlink()
    rows = [f"v,{name},x,0,,,,Neutral,train" for name in reasons]
    text = "\n".join([COLUMNS, *rows])
    (tmp_path / "label.csv").write_text(text)
    folder = read_folder(tmp_path)
    good, problems = check(folder, longest=5)
    assert [c.clip_id for c in good] == ["good"]
    assert set(problems) == {f"v$_${k}" for k in reasons if k != "good"}
    for clip in folder:
        if clip.clip_id == "good":
            continue
        with pytest.raises(ClipError, match=reasons[clip.clip_id]) as error:
            decode(clip.path, longest=5)
        assert str(clip.path) in str(error.value)
        assert problems[clip.id] == str(error.value)
    with pytest.raises(ClipError, match="no such file"):
        decode(tmp_path / "nowhere.mp4")


def test_a_clip_that_ends_early_is_not_taken_for_a_whole_one(shipped, tmp_path):
    """Its index comes first, so a download that was cut off still opens."""
    content = shipped[0].path.read_bytes()
    path = tmp_path / "a.mp4"
    path.write_bytes(content[: len(content) * 6 // 10])
    with pytest.raises(ClipError, match=r"cut off|broken"):
        decode(path)


def test_check_passes_all_puppets(shipped):
    good, problems = check(shipped[::8])
    assert len(good) == len(shipped[::8]) and not problems


@pytest.mark.parametrize("name", ["-a.mp4", "a:b.mp4", "http:a.mp4", "file:a.mp4"])
def test_a_name_is_never_a_protocol(shipped, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copy(shipped[0].path, f"./{name}")
    assert decode(name, frames=2).seconds == decode(shipped[0].path).seconds


def test_module_needs_no_torch():
    code = (
        "import sys; from mmsa_lib.corpora import clips; "
        "clips.decode(clips.puppet_clips()[0].path); "
        "assert 'torch' not in sys.modules"
    )
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_real_clips_of_mosi(shared_dir):
    folder = shared_dir / "data" / "cmu_mosi" / "clips"
    if not folder.is_dir():
        pytest.skip(f"no CMU-MOSI clips at {folder}")
    real = read_folder(folder)
    assert len(real) == 77
    for clip in real[::11]:
        m = decode(clip.path)
        assert len(m.frames) == 16 and m.frames.std() > 10
        gaps = np.diff(m.frame_times)
        assert gaps.max() - gaps.min() < 0.07  # two frames at 30 a second
        assert abs(len(m.audio) / RATE - m.seconds) < 0.2
    assert check(real[1::11])[1] == {}
