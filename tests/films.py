"""Films that tests write: any tracks, any times, pictures that are no video."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

RATE = 16000


def tone(hertz=440, seconds=2.0, channels=1, rate=RATE) -> np.ndarray:
    """(channels, n) float32."""
    t = np.arange(round(rate * seconds)) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * hertz * t)] * channels).astype("f4")


def heard(audio: np.ndarray) -> int:
    """The loudest frequency of a second in the middle of two, in hertz."""
    return int(np.argmax(np.abs(np.fft.rfft(audio[RATE // 2 : RATE // 2 + RATE]))))


def film(
    path: Path,
    *sounds: np.ndarray,
    seconds=2.0,
    start=0.0,
    layouts=("mono",),
    codec="aac",
    default: int | None = None,
    video="libx264",
    cover=False,
    rate=RATE,
    title="",
) -> Path:
    """Frames at 10 a second and one track for each sound, all beginning at `start`.

    default  number of the sound that is marked as such; cover adds a picture
    """
    layouts = layouts * len(sounds) if len(layouts) == 1 else layouts
    with av.open(str(path), "w") as out:
        out.metadata["title"] = title
        if cover:
            picture = out.add_stream("png", rate=1)
            picture.width = picture.height = 32
            picture.pix_fmt = "rgb24"
            picture.disposition = Disposition.attached_pic
        if video:
            shown = out.add_stream(video, rate=10)
            shown.width, shown.height, shown.pix_fmt = 64, 48, "yuv420p"
        tracks = []
        for k, layout in enumerate(layouts[: len(sounds)]):
            tracks.append(out.add_stream(codec, rate=rate, layout=layout))
            if default is not None:
                flag = Disposition.default if k == default else Disposition(0)
                tracks[-1].disposition = flag
        if cover:
            square = np.full((32, 32, 3), 9, np.uint8)
            out.mux(picture.encode(av.VideoFrame.from_ndarray(square)))
        for k in range(round(10 * seconds) if video else 0):
            grey = np.full((48, 64, 3), 10 * k % 250, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey)
            frame.pts, frame.time_base = k + round(10 * start), Fraction(1, 10)
            out.mux(shown.encode(frame))
        if video:
            out.mux(shown.encode(None))
        for track, sound, layout in zip(tracks, sounds, layouts, strict=False):
            packed = np.ascontiguousarray(sound.T.reshape(1, -1), np.float32)
            whole = av.AudioFrame.from_ndarray(packed, "flt", layout)
            whole.sample_rate, whole.pts = rate, round(start * rate)
            kind = track.codec_context.format.name
            cut = av.AudioResampler(kind, layout, rate, frame_size=1024)
            for frame in cut.resample(whole) + cut.resample(None):
                out.mux(track.encode(frame))
            out.mux(track.encode(None))
        if cover:
            out.mux(picture.encode(None))
    return path


def displayed(path: Path, a, b, c, d) -> Path:
    """Writes a display matrix into the film's track header, as phones do."""
    content = bytearray(path.read_bytes())
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = content.index(plain, content.index(b"tkhd"))  # of the first track, the film
    a, b, c, d = (round(v * (1 << 16)) for v in (a, b, c, d))
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def pictured_mp3(path: Path) -> Path:
    """A song with its cover in front, as ID3 has it."""
    square = path.with_suffix(".png")
    with av.open(str(square), "w") as out:
        stream = out.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "rgb24"
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 200, np.uint8))
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    film(path, tone(), video="", codec="libmp3lame")
    body = b"\0image/png\0\3\0" + square.read_bytes()
    apic = b"APIC" + struct.pack(">I", len(body)) + b"\0\0" + body
    size = bytes(len(apic) >> shift & 127 for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\3\0\0" + size + apic + path.read_bytes())
    square.unlink()
    return path


def patched_samples(path: Path, values: dict[int, float], seconds=1.0) -> Path:
    """A film with 32-bit float sound in which some samples are what `values` says."""
    sound = tone(seconds=seconds)
    for k, value in values.items():
        sound[0, k] = value
    return film(path, sound, seconds=seconds, codec="pcm_f32le")
