"""One clip file: turned upright, the right streams, honest sound, and nothing else."""

import itertools
import os
import re
import socket

import numpy as np
import pytest
from films import (
    RATE,
    displayed,
    film,
    heard,
    patched_samples,
    pictured_mp3,
    tone,
)
from test_clips import write

from mmsa_lib.corpora import apart, decoding
from mmsa_lib.corpora.clips import decode
from mmsa_lib.corpora.media import MediaConfig, clip_corpus, read_media
from mmsa_lib.errors import ClipError

# --- turned and mirrored --------------------------------------------------------------

UPRIGHT = (1, 0, 0, 1)
EIGHT = [
    (a, b, c, d)
    for a, b, c, d in itertools.product((-1, 0, 1), repeat=4)
    if abs(a * d - b * c) == 1 and abs(a) + abs(b) == 1 and abs(c) + abs(d) == 1
]


def quarters(height=48, width=96) -> np.ndarray:
    """A picture whose four quarters differ, so that each way to turn it shows."""
    picture = np.zeros((height, width, 3), np.uint8)
    top, left = height // 2, width // 2
    picture[:top, :left], picture[:top, left:] = (200, 40, 40), (40, 200, 40)
    picture[top:, :left], picture[top:, left:] = (40, 40, 200), (220, 220, 220)
    return picture


def laid(picture: np.ndarray, a, b, c, d) -> np.ndarray:
    """The picture after a display matrix, pixel by pixel: (p, q) to (ap+cq, bp+dq)."""
    height, width = picture.shape[:2]
    q, p = np.mgrid[:height, :width]
    x, y = a * p + c * q, b * p + d * q
    x, y = x - x.min(), y - y.min()
    out = np.zeros((y.max() + 1, x.max() + 1, 3), np.uint8)
    out[y, x] = picture
    return out


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("matrix", EIGHT, ids=str)
def test_frames_are_shown_as_the_file_says(tmp_path, matrix, suffix):
    stored = quarters()
    path = write(tmp_path / f"a.{suffix}", n=4, picture=stored)
    plain = decode(path)
    turned = decode(displayed(path, *matrix))
    assert turned.frames.shape[1:] == laid(stored, *matrix).shape
    for before, after in zip(plain.frames, turned.frames, strict=True):
        assert (laid(before, *matrix) == after).all()
    assert (turned.audio == plain.audio).all()
    grid = read_media(turned, MediaConfig(max_pixels=84 * 84))["grid"]
    landscape = grid[2] > grid[1]
    assert landscape == (matrix[0] != 0)


@pytest.mark.parametrize("scale", [0.5, 1, 2])
@pytest.mark.parametrize("degrees", [*range(-180, 181, 30), 89, 1, 100])
def test_other_angles_are_the_nearest_quarter_turn(tmp_path, degrees, scale):
    quarter = round(degrees / 90)
    a, b = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarter % 4]
    path = write(tmp_path / "a.mp4", n=2, picture=quarters())
    plain = decode(path).frames[0]
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = scale * np.array([cos, sin, -sin, cos])
    (turned, _) = decode(displayed(path, *matrix)).frames
    assert (turned == laid(plain, a, b, -b, a)).all()


def test_a_matrix_of_zeros_turns_nothing(tmp_path):
    path = write(tmp_path / "a.mp4", n=2, picture=quarters())
    plain = decode(path).frames
    assert (decode(displayed(path, 0, 0, 0, 0)).frames == plain).all()


def test_rotated_phone_video(shared_dir):
    folder = shared_dir / "cases" / "rotated-phone-video"
    if not folder.is_dir():
        pytest.skip(f"no case at {folder}")
    upright, rotated = (decode(folder / f"{k}.mp4") for k in ("upright", "rotated"))
    off = upright.frames.astype(int) - rotated.frames
    assert np.abs(off).mean() < 4  # it was encoded again


# --- which stream, how long -----------------------------------------------------------


def test_attached_pictures_are_no_video(tmp_path):
    for path in (
        pictured_mp3(tmp_path / "song.mp3"),
        film(tmp_path / "song.mov", tone(), video="", cover=True),
    ):
        with pytest.raises(ClipError, match=f"{path.name}: has no video stream"):
            decode(path)
    m = decode(film(tmp_path / "a.mp4", tone(), cover=True))
    assert m.frames.shape == (16, 48, 64, 3)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("default", [0, 1, None])
def test_the_default_sound_is_used_and_its_duration_counts(tmp_path, suffix, default):
    """The other track lasts 20 seconds."""
    sounds = [tone(300), tone(700)]
    other = 1 - (default or 0)
    sounds[other] = tone(900, seconds=20)
    path = film(tmp_path / f"a.{suffix}", *sounds, default=default)
    m = decode(path, longest=5)
    assert heard(m.audio) == (700 if default == 1 else 300)
    assert m.seconds == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "flv"])
@pytest.mark.parametrize("start", [7, 100, 5000])
def test_time_counts_from_where_a_clip_starts(tmp_path, suffix, start):
    path = film(tmp_path / f"a.{suffix}", tone(), start=start)
    m = decode(path)
    assert m.seconds == pytest.approx(2, abs=0.25) and len(m.frames) == 16
    assert m.frame_times[0] < 0.15


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("start", [0, 100])
@pytest.mark.parametrize(
    ("suffix", "video", "codec"),
    [("avi", "mpeg4", "libmp3lame"), ("mkv", "libx264", "aac")],
)
def test_frames_that_are_declared_and_not_there(
    tmp_path, suffix, video, codec, start, share
):
    if suffix == "avi" and start:
        pytest.skip("an AVI starts at zero")
    path = tmp_path / f"a.{suffix}"
    film(path, tone(seconds=4), seconds=4, video=video, codec=codec, start=start)
    whole = decode(path)
    assert whole.seconds == pytest.approx(4, abs=0.2)
    content = path.read_bytes()
    path.write_bytes(content[: round(share * len(content))])
    with pytest.raises(ClipError, match=r"cut off|broken|has no|frameless|silent"):
        decode(path)


def test_cases_of_streams(shared_dir):
    cases = shared_dir / "cases"
    if not cases.is_dir():
        pytest.skip(f"no cases at {cases}")
    m = decode(cases / "duration-of-other-streams" / "starts-at-100s.mkv")
    assert m.seconds == pytest.approx(4.45, abs=0.1)
    with pytest.raises(ClipError, match=r"cut off: 2.20 of 4.40"):
        decode(cases / "truncated-avi" / "half.avi")
    with pytest.raises(ClipError, match="has no video stream"):
        decode(cases / "cover-art" / "song.mp3")
    changing = cases / "audio-layout-changes" / "mono-then-stereo.ts"
    assert decode(changing).seconds == pytest.approx(4.5, abs=0.1)
    with pytest.raises(ClipError, match="NaN or infinite"):
        decode(cases / "nonfinite-audio" / "inf.mov")


# --- sound ----------------------------------------------------------------------------


def alone(path, channels, layout, k):
    """Loudness of channel k after mixing, of 1."""
    sound = np.zeros((channels, 2 * RATE), np.float32)
    sound[k] = tone()[0]
    m = decode(film(path, sound, layouts=(layout,), codec="flac"))
    return np.abs(m.audio[RATE // 2 : -RATE // 2]).max() / 0.5


def test_surround_is_mixed_as_ffmpeg_does(tmp_path):
    """ITU's shares, scaled so that nothing can clip; the bass channel is left out."""
    path, root = tmp_path / "a.mkv", np.sqrt(0.5)
    share = np.array([root, root, 1, 0, 0.5, 0.5])
    for layout in ("5.1", "5.1(side)"):
        found = [
            alone(path, 6, layout, k) if share[k] else 0 for k in range(len(share))
        ]
        assert found == pytest.approx(share / share.sum(), abs=0.01)
    for k in (0, 1):
        assert alone(path, 2, "stereo", k) == pytest.approx(0.5, abs=0.01)
    sound = np.zeros((6, 2 * RATE), np.float32)
    sound[3] = tone(50)[0]
    with pytest.raises(ClipError, match="silent"):
        decode(film(path, sound, layouts=("5.1",), codec="flac"))
    full = decode(film(path, tone(channels=8), layouts=("7.1",), codec="flac"))
    assert np.abs(full.audio).max() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    "parts",
    [
        [("mono", 1, RATE), ("stereo", 2, RATE)],
        [("stereo", 2, 44100), ("stereo", 2, 48000)],
        [("mono", 1, 48000), ("stereo", 2, RATE), ("mono", 1, 44100)],
    ],
    ids=["layout", "rate", "both, twice"],
)
def test_sound_that_changes_inside_a_file(tmp_path, parts):
    """Transport streams may be joined end to end."""
    content = b""
    for k, (layout, channels, rate) in enumerate(parts):
        sound = tone(channels=channels, rate=rate)
        piece = film(
            tmp_path / "piece.ts", sound, start=2 * k, layouts=(layout,), rate=rate
        )
        content += piece.read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(content)
    m = decode(path)
    total = 2 * len(parts)
    assert m.seconds == pytest.approx(total, abs=0.4)
    assert len(m.audio) / RATE == pytest.approx(total, abs=0.4)
    for k in range(len(parts)):
        assert heard(m.audio[2 * k * RATE :]) == 440


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_sound_that_is_no_number_is_refused_by_name(tmp_path, value):
    path = patched_samples(tmp_path / "a.mov", {5000: value})
    with pytest.raises(ClipError, match=r"a\.mov: .*sound holds samples .*NaN or inf"):
        decode(path)


@pytest.mark.parametrize("value", [1.5, -4.0, 1e10, -3e38])
def test_sound_over_full_scale_is_clipped(tmp_path, value):
    path = patched_samples(tmp_path / "a.mov", {5000: value, 5001: value})
    m = decode(path)
    assert m.audio.dtype == np.float32 and np.isfinite(m.audio).all()
    assert np.abs(m.audio).max() == 1
    beyond = np.r_[m.audio[:4900], m.audio[5100:]]
    assert np.abs(beyond).max() == pytest.approx(0.5, abs=0.01)


def test_huge_sound_of_another_rate_is_clipped(tmp_path):
    sound = tone(rate=44100, channels=2)
    sound[:, 40000:40003] = 3e38
    path = film(
        tmp_path / "a.mkv", sound, layouts=("stereo",), codec="pcm_f32le", rate=44100
    )
    m = decode(path)
    assert np.isfinite(m.audio).all() and np.abs(m.audio).max() <= 1
    assert heard(m.audio) == 440


# --- files that are not what they say -------------------------------------------------


def playlists(folder, target):
    """Texts that FFmpeg would play, by name."""
    web = f"http://{target}/x.ts"
    size = 'duration="PT4S"'
    return {
        "ffconcat": "ffconcat version 1.0\nfile good.mp4\n",
        "ffconcat-web": f"ffconcat version 1.0\nfile {web}\n",
        "absolute": f"ffconcat version 1.0\nfile {folder / 'good.mp4'}\n",
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{web}\n",
        "hls-local": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\ngood.mp4\n",
        "dash": f"<?xml version='1.0'?><MPD {size}><Period><AdaptationSet>"
        f"<Representation><BaseURL>{web}</BaseURL></Representation></AdaptationSet>"
        "</Period></MPD>",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "pls": f"[playlist]\nFile1={web}\nNumberOfEntries=1\n",
        "asx": f"<asx version='3.0'><entry><ref href='{web}'/></entry></asx>",
        "url": web,
    }


def test_playlists_are_no_clips_and_reach_no_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.mp4")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        target = "{}:{}".format(*server.getsockname())
        for name, text in playlists(tmp_path, target).items():
            for suffix in ("mp4", "m3u8", "mpd", "sdp", "ffconcat", "txt"):
                path = tmp_path / f"{name}.{suffix}"
                path.write_text(text)
                with pytest.raises(ClipError, match=r"not a video container|broken"):
                    decode(path)
                path.unlink()
        for path in (f"http://{target}/x.mp4", f"tcp://{target}", "concat:good.mp4"):
            with pytest.raises(ClipError, match="no such file"):
                decode(path)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_even_a_playlist_of_a_known_format_opens_nothing(tmp_path, monkeypatch):
    """The second lock: were concat and hls on the list, they could open no file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decoding, "FORMATS", (*decoding.FORMATS, "concat", "hls"))
    write(tmp_path / "good.mp4")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        target = "{}:{}".format(*server.getsockname())
        for name, text in playlists(tmp_path, target).items():
            path = tmp_path / f"{name}.mp4"
            path.write_text(text)
            with pytest.raises(ClipError):
                decode(path)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_only_regular_files_are_opened(tmp_path):
    good = write(tmp_path / "good.mp4")
    (tmp_path / "link.mp4").symlink_to(good)
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "link-to-pipe.mp4").symlink_to(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    assert decode(tmp_path / "link.mp4").seconds == decode(good).seconds
    for name in ("pipe", "link-to-pipe", "folder", "zero"):
        with pytest.raises(ClipError, match=f"{name}.mp4: is not a regular file"):
            decode(tmp_path / f"{name}.mp4")
    with pytest.raises(ClipError, match=r"loop\.mp4: cannot be read"):
        decode(tmp_path / "loop.mp4")
    clips = [clip_of(p, k) for k, p in enumerate(sorted(tmp_path.iterdir()))]
    problems = {}
    corpus = clip_corpus(clips, FEW, problems=problems)
    assert len(corpus.train) == 2 and len(problems) == 5


def test_a_frame_without_bounds_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mkv", size=(480, 640), codec="mpeg4")
    assert decode(path).frames.shape[1:3] == (480, 640)
    monkeypatch.setattr(decoding, "MOST_PIXELS", 400 * 600)
    with pytest.raises(ClipError):
        decode(path)


FEW = MediaConfig(frames=2, max_pixels=56 * 56)


def clip_of(path, k):
    from mmsa_lib.corpora.clips import Clip

    return Clip(str(k), path, "words", 0.0, "train", "v", str(k))


@pytest.mark.parametrize(
    ("suffix", "video", "codec"),
    [
        ("mp4", "libx264", "aac"),
        ("mkv", "libx264", "aac"),
        ("avi", "mpeg4", "libmp3lame"),
        ("ts", "mpeg2video", "mp2"),
    ],
)
def test_damaged_files_are_refused_or_read(tmp_path, suffix, video, codec):
    """50 seeded damages of each container, 200 in all: bits turned, ends missing."""
    content = film(
        tmp_path / f"whole.{suffix}",
        tone(seconds=1),
        seconds=1,
        video=video,
        codec=codec,
    ).read_bytes()
    clips = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        body = bytearray(content)
        if seed % 5 == 0:
            del body[rng.integers(len(body)) :]
        else:  # half of them where the headers are: at both ends
            ends = np.r_[0 : min(2000, len(body)), max(0, len(body) - 2000) : len(body)]
            pool = ends if seed % 2 else np.arange(len(body))
            for at in rng.choice(pool, rng.choice([1, 5, 40])):
                body[at] ^= 1 << rng.integers(8)
        path = tmp_path / f"{seed}.{suffix}"
        path.write_bytes(body)
        clips.append(clip_of(path, seed))
    good = clip_of(tmp_path / f"whole.{suffix}", "good")
    problems = {}
    corpus = clip_corpus([*clips, good], FEW, problems=problems)
    assert sorted([*corpus.train.ids, *problems]) == sorted(
        [*map(str, range(50)), "good"]
    )
    assert "good" in corpus.train.ids and problems
    assert all(f"{k}.{suffix}: " in why for k, why in problems.items())
    for k in range(len(corpus.train)):
        assert np.isfinite(corpus.train.features["audio"][k]).all()


def test_odd_tags_are_no_fault(tmp_path):
    """A title in another encoding than UTF-8."""
    path = film(tmp_path / "a.mkv", tone(), title="Title")
    content = path.read_bytes()
    assert content.count(b"Title") == 1
    path.write_bytes(content.replace(b"Title", b"T\xeftle"))
    assert decode(path).seconds == pytest.approx(2, abs=0.2)


# --- decoders of their own ------------------------------------------------------------

ODD = """
import ctypes, os, signal
from mmsa_lib.corpora import apart
original = apart.read

def read(path, *rest):
    if "killed" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    if "fault" in path:
        ctypes.string_at(0)
    if "leaves" in path:
        os._exit(3)
    if "memory" in path:
        bytearray(apart.MEMORY + 1)
    if "babbles" in path:
        os.write(1, b"nonsense\\n")
        os._exit(0)
    return original(path, *rest)

apart.read = read
apart.serve()
"""


def test_a_decoder_that_dies_costs_one_clip(tmp_path, monkeypatch):
    monkeypatch.setattr(apart, "_PROGRAM", ODD.replace("\\\\", "\\"))
    names = ["good", "killed", "fault", "leaves", "babbles", "last"]
    for name in names:
        film(tmp_path / f"{name}.mp4", tone(seconds=1), seconds=1)
    clips = [clip_of(tmp_path / f"{name}.mp4", name) for name in names]
    problems = {}
    corpus = clip_corpus(clips, FEW, problems=problems)
    assert corpus.train.ids == ["good", "last"]
    for name, why in (
        ("killed", r"killed\.mp4: .*SIGKILL, as the system does when memory runs out"),
        ("fault", r"fault\.mp4: .*its decoder was ended by SIGSEGV"),
        ("leaves", r"leaves\.mp4: .*exit status 3"),
        ("babbles", r"babbles\.mp4: .*exit status 0"),
    ):
        assert re.search(why, problems[name]), problems[name]
    assert not apart._workers.idle and not apart._workers.blocks


def test_a_decoder_that_is_killed_once_is_followed_by_another(tmp_path):
    path = film(tmp_path / "a.mp4", tone(seconds=1), seconds=1)
    with apart.kept():
        first = apart.decode(path)
        (worker,) = apart._workers.idle
        worker.process.kill()
        again = apart.decode(path)
    assert (first.frames == again.frames).all() and (first.audio == again.audio).all()
    assert worker.process.poll() is not None


def test_decoding_apart_equals_decoding_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    film(tmp_path / "a.mp4", tone())
    here, there = decode("a.mp4", 5), apart.decode("a.mp4", 5)
    for name in ("frames", "frame_times", "audio"):
        found = getattr(there, name)
        assert (found == getattr(here, name)).all() and found.flags.writeable
        assert found.dtype == getattr(here, name).dtype
    assert there.seconds == here.seconds and there.rate == here.rate
    for call in (decode, apart.decode):
        with pytest.raises(ClipError, match=r"^gone\.mp4: there is no such file"):
            call("gone.mp4")
