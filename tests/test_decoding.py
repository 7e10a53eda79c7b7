"""One clip file: turned upright, the right streams, honest sound, and nothing else."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
from test_clips import write

from mmsa_lib.corpora.clips import decode
from mmsa_lib.corpora.media import MediaConfig, read_media

RATE = 16000

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


def displayed(path: Path, a, b, c, d) -> Path:
    """Writes a display matrix into the film's track header, as phones do."""
    content = bytearray(path.read_bytes())
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = content.index(plain, content.index(b"tkhd"))  # of the first track, the film
    a, b, c, d = (round(v * (1 << 16)) for v in (a, b, c, d))
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


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
