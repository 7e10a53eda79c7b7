"""One clip file into frames and sound.

Only containers of `FORMATS` and only regular files are opened. A clip can make no other
file and no address be opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.stream import Disposition

from mmsa_lib.errors import ClipError

LONGEST = 60.0  # seconds; an opinion segment of MOSI takes 4
MOST_PIXELS = 2**25  # of a stored frame; 8K has 33 million
# containers, by FFmpeg's names. Those of sound alone are opened to say what they lack.
FORMATS = (
    *("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "asf", "flv", "mpegts"),
    *("mpeg", "ogg", "mxf", "nut", "mp3", "aac", "flac", "wav"),
)
_CUT = 0.9, 0.25  # a clip may lack a tenth and this many seconds of what it declares


@dataclass(frozen=True)
class Media:
    """A decoded clip. Times count from the first frame or sample, whichever is first.

    frames       (n, H, W, 3) uint8, RGB, upright
    frame_times  (n,) seconds
    audio        (samples,) float32, mono, in [-1, 1], `rate` a second
    seconds      duration of the clip
    """

    frames: np.ndarray
    frame_times: np.ndarray
    audio: np.ndarray
    rate: int
    seconds: float


class Unusable(Exception):
    """Why a clip cannot be used, without its name."""


# --- files ----------------------------------------------------------------------------


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, or a link to one, open for reading.

    Raises `OSError`, and `ClipError` for a folder, a pipe, a socket or a device, which
    may never end.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    number = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ClipError(f"{path}: is not a regular file; give a video file")
    return open(number, "rb")


def decode(
    path: str | Path,
    frames: int = 16,
    rate: int = 16000,
    longest: float = LONGEST,
) -> Media:
    """At most `frames` frames, evenly spaced in time, and the whole sound of a clip.

    Of several streams the one marked as default is used, else the first; attached
    pictures are no video. Sound of any rate and layout becomes mono at `rate`, mixed as
    FFmpeg does and clipped to [-1, 1]. Frames keep their size and are turned and
    mirrored as the file says, by quarter turns: the nearest one for other angles.

    Raises `ClipError` that names the clip and the reason: no such file, not a regular
    file, not a format of `FORMATS`, broken, cut off, no video or no audio stream, no
    frame (so that a clip of zero duration is refused too), silent, samples that are NaN
    or infinite, longer than `longest` seconds.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, found {frames}")
    try:
        return read(path, frames, rate, longest)
    except Unusable as error:
        raise ClipError(f"{path}: {error}") from error


def read(path: str | Path, frames: int, rate: int, longest: float) -> Media:
    """As `decode`; raises `Unusable` with the bare reason."""
    try:
        with open_regular(path) as file:
            with _opened(file) as container:
                plan = _plan(container, frames, longest)
            file.seek(0)
            with _opened(file) as container:
                return _decode(container, plan, rate, longest)
    except Unusable:
        raise
    except ClipError as error:
        raise Unusable(str(error).removeprefix(f"{path}: ")) from error
    except (MemoryError, av.error.MemoryError) as error:
        raise Unusable("decoding it takes more memory than there is") from error
    except av.error.FFmpegError as error:
        raise Unusable(f"broken: {error.strerror}") from error
    except FileNotFoundError as error:
        raise Unusable("there is no such file") from error
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}") from error
    except Exception as error:
        raise Unusable(f"broken: {type(error).__name__}: {error}") from error


def _opened(file: BinaryIO):
    options = {
        "format_whitelist": ",".join(FORMATS),
        "protocol_whitelist": "",  # the file is open: nothing else is to be
        "max_pixels": str(MOST_PIXELS),
    }
    try:
        return av.open(file, options=options, metadata_errors="replace")
    except av.error.ArgumentError as error:
        raise Unusable(
            "broken, or not a video container of a known format (mp4, mov, mkv, webm, "
            f"avi, wmv, flv, ts, mpeg, ogg, mxf): {error.strerror}"
        ) from error


# --- what the packets tell before anything is decoded ---------------------------------


@dataclass(frozen=True)
class _Plan:
    targets: np.ndarray  # times of the frames to keep, seconds
    step: float  # from frame to frame, seconds
    stamped: bool  # False where frames have no times (AVI) and are counted instead
    declared: tuple[float, float]  # seconds of video and sound; 0 if unknown


def _chosen(container):
    """The streams that are used: one of video, one of sound."""
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    video = [s for s in container.streams.video if not s.disposition & pictures]
    found = []
    for kind, streams in ("video", video), ("audio", list(container.streams.audio)):
        if not streams:
            raise Unusable(f"has no {kind} stream")
        streams = [s for s in streams if s.codec_context is not None]
        if not streams:
            raise Unusable(f"has no {kind} stream of a codec that is known here")
        default = [s for s in streams if s.disposition & Disposition.default]
        found.append((default or streams)[0])
    return found


def _declared(container, stream) -> float:
    """Seconds that the file declares for a stream, from its start; 0 if unknown."""
    begin = max(0.0, float((stream.start_time or 0) * (stream.time_base or 0)))
    rate = getattr(stream, "average_rate", None)
    if container.format.name == "avi" and stream.frames and rate:
        return float(
            stream.frames / rate
        )  # its durations are guessed from what is there
    if container.format.name == "matroska,webm":  # a tag says when the stream ends
        tags = (v for k, v in stream.metadata.items() if k.startswith("DURATION"))
        ends = max(map(_seconds, tags), default=0.0)
        if ends:
            return max(0.0, ends - begin)
    elif stream.duration:
        return float(stream.duration * stream.time_base)
    if len(container.streams) == 2:  # what the file declares is of these two
        return max(0.0, (container.duration or 0) / av.time_base - begin)
    return 0.0


def _seconds(clock: str) -> float:
    """Seconds of a text such as 00:01:44.400000000; 0 where it is none."""
    try:
        hours, minutes, seconds = map(float, clock.split(":"))
    except ValueError:
        return 0.0
    return 3600 * hours + 60 * minutes + seconds


def _plan(container, frames: int, longest: float) -> _Plan:
    video, sound = _chosen(container)
    declared = tuple(_declared(container, s) for s in (video, sound))
    _limit(max(declared), longest)
    step = float(1 / (video.average_rate or 25))
    times: list[float | None] = []
    for time in _packet_times(container, video):
        times.append(time)
        known = time is not None and times[0] is not None
        _limit(time - times[0] if known else len(times) * step, longest, 1)
    if not times:
        raise Unusable("frameless: its video stream holds no frame")
    # AVI stores no times of presentation; what FFmpeg guesses skips frames
    stamped = container.format.name != "avi" and None not in times
    shown = np.sort(times) if stamped else np.arange(len(times)) * step
    if len(shown) > frames:
        ideal = np.linspace(shown[0], shown[-1], frames)
        after = np.searchsorted(shown, ideal).clip(1, len(shown) - 1)
        nearer = ideal - shown[after - 1] <= shown[after] - ideal
        shown = np.unique(shown[after - nearer])
    return _Plan(shown, step, stamped, declared)


def _packet_times(container, video) -> Iterator[float | None]:
    for packet in container.demux(video):
        if packet.size and not packet.is_discard:
            pts = packet.pts
            yield None if pts is None else float(pts * packet.time_base)


def _limit(seconds: float, longest: float, slack: float = 0.0) -> None:
    """Refuse what is longer; with slack, what has not been seen to its end."""
    if seconds > longest + slack:
        least = "at least " if slack else ""
        raise Unusable(
            f"lasts {least}{seconds:.1f} s, longer than longest={longest:g} s"
        )


# --- frames and sound -----------------------------------------------------------------


class _Span:
    """When a stream begins and ends, of what could be decoded."""

    def __init__(self):
        self.begin, self.end = np.inf, -np.inf

    def add(self, begin: float, end: float) -> None:
        self.begin, self.end = min(self.begin, begin), max(self.end, end)

    @property
    def seconds(self) -> float:
        return max(0.0, self.end - self.begin)


def _decode(container, plan: _Plan, rate: int, longest: float) -> Media:
    video, sound = _chosen(container)
    video.thread_type = "AUTO"
    video.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
    pictures, mix = _Pictures(plan), _Mix(rate)
    for frame in container.decode(video, sound):
        (mix if isinstance(frame, av.AudioFrame) else pictures).add(frame)
        spans = [s for s in (pictures.span, mix.span) if s.seconds]
        if spans:
            begin, end = min(s.begin for s in spans), max(s.end for s in spans)
            _limit(max(end - begin, mix.samples / rate), longest, 1)
    if not pictures.images:
        raise Unusable("frameless: no frame of its video stream can be decoded")
    audio = mix.end()
    origin = min(pictures.times[0], mix.span.begin)
    late = np.zeros(round((mix.span.begin - origin) * rate), np.float32)
    audio = np.concatenate([late, audio])
    seconds = max(pictures.span.end - origin, len(audio) / rate)
    for kind, declared, span in zip(
        ("video", "sound"), plan.declared, (pictures.span, mix.span), strict=True
    ):
        if span.seconds < _CUT[0] * declared - _CUT[1]:
            raise Unusable(
                f"cut off: {span.seconds:.2f} of {declared:.2f} seconds of its {kind} "
                "can be decoded"
            )
    return Media(
        frames=np.stack(pictures.images),
        frame_times=np.array(pictures.times) - origin,
        audio=audio,
        rate=rate,
        seconds=float(seconds),
    )


class _Pictures:
    """Keeps the frames that were planned, upright and all of one size."""

    def __init__(self, plan: _Plan):
        self.plan, self.span = plan, _Span()
        self.images: list[np.ndarray] = []
        self.times: list[float] = []
        self.seen = 0

    def add(self, frame: av.VideoFrame) -> None:
        step, targets = self.plan.step, self.plan.targets
        time = frame.time if self.plan.stamped else self.seen * step
        if time is None:
            time = self.span.end if self.seen else 0.0
        self.seen += 1
        shown = float((frame.duration or 0) * (frame.time_base or 0))
        self.span.add(time, time + max(step, shown if self.plan.stamped else 0.0))
        # the first frame at or after the next target that is not taken yet
        taken = len(self.times)
        if taken < len(targets) and time >= targets[taken] - step / 2:
            size = self.images[0].shape[:2] if self.images else None
            self.images.append(_upright(frame, size))
            self.times.append(time)


def _upright(frame: av.VideoFrame, size: tuple[int, int] | None) -> np.ndarray:
    """A frame (H, W, 3), turned as its display matrix says; of `size` if given."""
    swap, across, down = _turn(frame)
    height, width = size or (None, None)
    if swap:
        height, width = width, height
    image = frame.to_ndarray(
        format="rgb24", height=height or frame.height, width=width or frame.width
    )
    if swap:
        image = image.transpose(1, 0, 2)
    image = image[:: -1 if down else 1, :: -1 if across else 1]
    return np.ascontiguousarray(image)


def _turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Whether rows become columns, then left becomes right, then up becomes down.

    The display matrix takes a point (p, q) to (a p + c q, b p + d q); of the eight ways
    to lay a frame on its side or back, the one nearest to it.
    """
    stored = frame.side_data.get("DISPLAYMATRIX")
    if stored is None:
        return False, False, False
    matrix = np.frombuffer(bytes(stored), np.int32)
    a, b, c, d = (float(matrix[k]) for k in (0, 1, 3, 4))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


class _Mix:
    """Sound of any rate and layout, even of several, as mono at one rate."""

    def __init__(self, rate: int):
        self.rate, self.span, self.samples = rate, _Span(), 0
        self.pieces: list[np.ndarray] = []
        self.kind: tuple | None = None

    def add(self, frame: av.AudioFrame) -> None:
        kind = frame.format.name, frame.layout.name, frame.sample_rate
        if kind != self.kind:
            self._flush()
            self.kind = kind
            # in float64, so that huge samples stay what they are until they are clipped
            options = {"rematrix_maxval": "1", "internal_sample_fmt": "dblp"}
            self.to_mono = AudioResampler("dblp", "mono", options=options)
            self.to_rate = AudioResampler("fltp", "mono", self.rate)
        begin = frame.time
        if begin is None:
            begin = self.span.end if self.pieces else 0.0
        self.span.add(begin, begin + frame.samples / frame.sample_rate)
        self._mixed(self.to_mono.resample(frame))

    def _mixed(self, frames: list[av.AudioFrame]) -> None:
        for frame in frames:
            x = frame.to_ndarray()
            if not np.isfinite(x).all():
                raise Unusable("its sound holds samples that are NaN or infinite")
            clipped = av.AudioFrame.from_ndarray(
                x.clip(-1, 1).astype(np.float32), "fltp", "mono"
            )
            clipped.sample_rate, clipped.pts = frame.sample_rate, frame.pts
            clipped.time_base = frame.time_base
            self._keep(self.to_rate.resample(clipped))

    def _keep(self, frames: list[av.AudioFrame]) -> None:
        for frame in frames:
            self.pieces.append(frame.to_ndarray()[0].clip(-1, 1))
            self.samples += len(self.pieces[-1])

    def _flush(self) -> None:
        if self.kind is not None:
            self._mixed(self.to_mono.resample(None))
            self._keep(self.to_rate.resample(None))

    def end(self) -> np.ndarray:
        """All samples (n,) float32."""
        self._flush()
        audio = np.concatenate(self.pieces) if self.pieces else np.zeros(0, np.float32)
        if not len(audio):
            raise Unusable("silent: its audio stream holds no sample")
        if not np.abs(audio).max() > 2**-15:  # one step of 16-bit sound
            raise Unusable("silent: its audio stream holds nothing but zeros")
        return audio
