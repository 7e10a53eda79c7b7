"""Draw and speak puppet scripts: the clip form of the embedded corpus.

    python scripts/make_puppet_clips.py                  # all, into the package
    python scripts/make_puppet_clips.py --out elsewhere  # all, into another folder

The scripts are those of `mmsa_lib.corpora.puppets`, chosen so that labels are balanced.
The face is drawn from the ten action units that the vision features also hold, the
voice follows the pitch, energy, rate and tilt contours of the audio features; both
without the features' noise. Written are `label.csv` and `Raw/` in MMSA-FET's layout,
`scripts.json` (word times and latent tracks) and `card.json`.

Choice, labels, texts, word times, tracks and drawn frames follow from the scripts
alone. The sound depends on the version of espeak-ng, the bytes of a clip also on those
of Pillow and of PyAV's codecs; the card names them.
"""

from __future__ import annotations

import argparse
import colorsys
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import wave
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import PIL
from PIL import Image, ImageDraw
from scipy import signal

from mmsa_lib.corpora import puppets
from mmsa_lib.corpora.clips import puppet_folder
from mmsa_lib.corpora.puppets import PuppetConfig, Script, Scripts
from mmsa_lib.corpora.schema import SPLITS

VERSION = "1"
PACKAGE = puppet_folder()
SIZE, FPS, RATE = 168, 10, 16000  # pixels, frames a second, samples a second
PER_BIN = {"train": 5, "valid": 1, "test": 2}  # clips by domain and label bin
LEAD, TAIL, SHORTEST = 0.2, 0.3, 2.0  # seconds before and after speech, of a clip

# Stronger delivery than the feature corpus, so that a face is worth looking at. Domain
# B keeps A's prior, because labels are balanced anyway. Recordings have no defects.
WORLDS = tuple(
    PuppetConfig(
        sizes=(700, 140, 280),
        num_speakers=16,
        synergy=0.2,
        delivery=1.5,
        defects=0.0,
        domain=domain,
        domain_parts=("lexicon", "speaker", "channel"),
    )
    for domain in "AB"
)


# --- which scripts --------------------------------------------------------------------


@dataclass(frozen=True)
class Take:
    """One chosen script, its label and split."""

    script: Script
    label: float
    split: str
    running: tuple[float, ...]  # valence of the sentence after each token


def choose() -> list[Take]:
    """As many takes of each domain and label bin, spread over the speakers."""
    takes = []
    for world in WORLDS:
        for split in SPLITS:
            table = Scripts(world, split)
            label = table.labels()["sentiment"][:, 0]
            bins = np.rint(label).astype(int)
            order = np.argsort(table.stream("clips").uniform(len(table)))
            speaker = table.columns["speaker"]
            chosen: list[int] = []
            for b in range(-3, 4):
                pool = [i for i in order.tolist() if bins[i] == b]
                for _ in range(PER_BIN[split]):
                    used = Counter(speaker[chosen].tolist())
                    i = min(pool, key=lambda i: used[speaker[i]])
                    pool.remove(i)
                    chosen.append(i)
            takes += [
                Take(
                    script=table[i],
                    label=round(float(label[i]), 1),
                    split=split,
                    running=_running_valence(table, i),
                )
                for i in chosen
            ]
    return sorted(takes, key=lambda t: (SPLITS.index(t.split), t.script.id))


def _running_valence(table: Scripts, i: int) -> tuple[float, ...]:
    """What a listener takes the words to mean after each token, in label points.

    A clause counts from its adjective on, and in full until a connective weakens it.
    The last value is the script's literal valence.
    """
    slots = table.columns["tokens"][i]
    words = [table.vocabulary[t] if t >= 0 else "" for t in slots]
    form = list(puppets.FORMS)[table.columns["form"][i]]
    adjectives = puppets.ADJECTIVES["B" if table.config.differs("lexicon") else "A"]
    weights = puppets.FORMS[form]
    first = second = 0
    full = 2 if form == "although first" else 4
    out = []
    for slot, word in enumerate(words):
        if slot in (7, 14) and word:
            negator, intensifier = words[slot - 2], words[slot - 1]
            clause = (
                adjectives[word]
                * puppets.NEGATORS[negator]
                * puppets.INTENSIFIERS[intensifier]
            )
            first, second = (clause, 0) if slot == 7 else (first, clause)
        if slot == 8 and word:
            full = weights[0]
        if word:
            value = puppets.literal16(full * first + weights[1] * second)
            out.append(float(value) / puppets.LATTICE)
    return tuple(out)


# --- time -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """When each token is spoken; events keep their place among the words."""

    starts: np.ndarray  # (n,) seconds
    stops: np.ndarray
    seconds: float

    @property
    def times(self) -> np.ndarray:
        """One time per video frame."""
        return np.arange(round(self.seconds * FPS)) / FPS

    def phase(self, seconds) -> np.ndarray:
        """Fraction of the utterance, 0 to 1, in which every token counts the same."""
        n = len(self.starts)
        knots = np.stack([self.starts, self.stops], 1).ravel()
        steps = np.stack([np.arange(n), np.arange(1, n + 1)], 1).ravel() / n
        return np.interp(seconds, knots, steps)


def timing(script: Script) -> Timing:
    """Longer words take longer; the pace is the speaker's, commas make a pause."""
    pace = script.seconds / len(script.tokens) / 0.375
    now, starts, stops = LEAD, [], []
    for word, written in zip(script.tokens, script.text.split(), strict=True):
        syllables = len(re.findall("[aeiouy]+", word))
        starts.append(now)
        now += pace * (0.06 + 0.10 * syllables + 0.017 * len(word))
        stops.append(now)
        now += 0.1 * written.endswith(",")
    seconds = np.ceil(max(now + TAIL, SHORTEST) * FPS) / FPS
    return Timing(np.array(starts), np.array(stops), float(seconds))


def _pulse(phase: np.ndarray, event: puppets.Event) -> np.ndarray:
    u = (np.asarray(phase) - event.centre) / event.width
    return np.maximum(1 - u * u, 0) ** 2


def _event(script: Script, *names: str) -> puppets.Event:
    return next(e for e in script.events if e.track in names)


def voice_channels(script: Script, phase) -> dict[str, np.ndarray]:
    """The noiseless audio features at some phases, by channel."""
    phase = np.asarray(phase)
    lift = _event(script, "lift")
    tracks = {
        "decline": 1 - 2 * phase,
        "accent": 2 * script.voice * _pulse(phase, _event(script, "accent")),
        "colour": puppets.COLOUR * script.voice + 0 * phase,
        "lift": lift.amount * _pulse(phase, lift),
        "arousal": 0.75 * script.arousal + 0 * phase,
    }
    return _mix(tracks, puppets.AUDIO_TRACKS, puppets.AUDIO_CHANNELS)


def action_units(script: Script, phase) -> dict[str, np.ndarray]:
    """The noiseless vision features at some phases, by action unit."""
    phase = np.asarray(phase)
    smile = _event(script, "smile", "late smile")
    height = smile.amount * _pulse(phase, smile)
    tracks = {
        "brow": 2 * script.face * _pulse(phase, _event(script, "brow")),
        "colour": puppets.COLOUR * script.face + 0 * phase,
        "smile" if smile.track == "smile" else "late": height,
        "arousal": 0.75 * script.arousal + 0 * phase,
        "talk": 1 + 0 * phase,
    }
    return _mix(tracks, puppets.VISION_TRACKS, puppets.VISION_CHANNELS)


def _mix(tracks, definitions, channels) -> dict[str, np.ndarray]:
    return {
        name: sum(definitions[t][k] * contour for t, contour in tracks.items())
        for k, name in enumerate(channels)
    }


def tracks(take: Take, when: Timing) -> dict[str, np.ndarray]:
    """What each modality says about sentiment at each frame, in label points.

    Text is the valence of the words so far. Voice and face reach what they add to the
    sentiment where their accents peak.
    """
    script, phase = take.script, when.phase(when.times)
    heard = np.searchsorted(when.starts, when.times, side="right")
    peak = puppets.COLOUR + 2
    shape = {
        m: (puppets.COLOUR + 2 * _pulse(phase, _event(script, event))) / peak
        for m, event in (("audio", "accent"), ("vision", "brow"))
    }
    return {
        "text": np.array([0.0, *take.running])[heard],
        "audio": script.voice * shape["audio"],
        "vision": script.face * shape["vision"],
    }


def cues(script: Script, when: Timing) -> dict[str, np.ndarray]:
    """Lift of the pitch and smile at each frame, 0 to 1."""
    phase = when.phase(when.times)
    lift, smile = _event(script, "lift"), _event(script, "smile", "late smile")
    return {
        "lift": (lift.amount > 0) * _pulse(phase, lift),
        "smile": _pulse(phase, smile),
    }


# --- voice ----------------------------------------------------------------------------

VOICES = (
    "en-gb-x-rp+m3",
    "en-us+f2",
    "en-gb-scotland+m1",
    "en-gb-scotland+f4",
    "en-us+m7",
    "en-gb-x-rp+f3",
    "en-029+m2",
    "en-029+f1",
)


@lru_cache(maxsize=4096)
def _espeak(word: str, voice: str, pitch: int, speed: int) -> np.ndarray:
    """One word without the silence around it, at 16 kHz."""
    command = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(speed), "-z"]
    done = subprocess.run([*command, "--stdout", f"{word},"], capture_output=True)
    if done.returncode or done.stderr:
        sys.exit(f"espeak-ng failed on {word!r}: {done.stderr.decode().strip()}")
    with wave.open(io.BytesIO(done.stdout)) as file:
        rate = file.getframerate()
    x = np.frombuffer(done.stdout[44:], "<i2") / 32768
    x = signal.resample_poly(x, RATE, rate)
    loud = np.flatnonzero(np.abs(x) > 0.01)
    return x[loud[0] : loud[-1] + 1]


def speak(take: Take) -> np.ndarray:
    """The spoken script, (samples,) at 16 kHz, as long as the clip."""
    script, when = take.script, timing(take.script)
    voice = VOICES[script.speaker % len(VOICES)]
    base = 40 + 5 * (script.speaker // len(VOICES) % 3)
    n = len(script.tokens)
    level = voice_channels(script, (np.arange(n) + 0.5) / n)
    out = np.zeros(round(when.seconds * RATE))
    for k, word in enumerate(script.tokens):
        pitch = int(np.clip(base + 13 * level["pitch"][k], 0, 99))
        share = np.clip(0.94 - 0.05 * level["rate"][k], 0.8, 1.0)
        length = share * (when.stops[k] - when.starts[k])
        plain = len(_espeak(word, voice, pitch, 175)) / RATE
        speed = int(np.clip(175 * plain / length, 80, 450))
        x = _espeak(word, voice, pitch, speed)[: round((length + 0.03) * RATE)]
        bright = signal.lfilter([1, -0.9], [1], x)
        x = x + 1.2 * np.tanh(0.6 * level["tilt"][k]) * bright
        x = x / np.sqrt(np.mean(x**2))
        x *= 0.09 * 10 ** (np.clip(2.5 * level["energy"][k], -8, 8) / 20)
        ramp = np.minimum(np.arange(len(x)), np.arange(len(x))[::-1]) / (0.008 * RATE)
        start = round(when.starts[k] * RATE)
        x = x[: len(out) - start] * np.minimum(ramp, 1)[: len(out) - start]
        out[start : start + len(x)] += x
    if script.domain == "B":  # another recording channel: a telephone with hiss
        sos = signal.butter(2, [250, 3600], "bandpass", fs=RATE, output="sos")
        out = signal.sosfilt(sos, out)
        out += 0.002 * puppets.Stream("hiss", script.id).noise(len(out))
    return (0.9 * np.tanh(out / 0.9)).astype(np.float32)


# --- face -----------------------------------------------------------------------------

INK = (52, 26, 38)
DRAWN_AT = 4  # times the size, then averaged


def _hue(h: float, lightness: float, saturation: float) -> tuple[int, ...]:
    rgb = colorsys.hls_to_rgb(h % 1, lightness, saturation)
    return tuple(round(255 * v) for v in rgb)


def _blend(a, b, share: float) -> tuple[int, ...]:
    return tuple(round((1 - share) * x + share * y) for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Look:
    """What a speaker looks like in every clip."""

    skin: tuple[int, ...]
    hair: tuple[int, ...]
    shirt: tuple[int, ...]
    style: int
    width: float
    height: float
    domain: str


def look(script: Script) -> Look:
    """Colours go round the circle, so that neighbours differ; no randomness."""
    k = script.speaker + (5 if script.domain == "B" else 0)
    hue = k * 0.381966 + 0.06
    return Look(
        skin=_hue(hue, 0.70, 0.62),
        hair=_hue(hue + 0.42, 0.30, 0.45),
        shirt=_hue(hue + 0.58, 0.46, 0.42),
        style=k % 8,
        width=45 + 4 * (k % 3 - 1),
        height=47 + 3 * (k // 3 % 3 - 1),
        domain=script.domain,
    )


class Canvas:
    """Polygons and strokes in clip pixels, turned and shifted with the head."""

    def __init__(self, background: Image.Image):
        self.image = background.copy()
        self.pen = ImageDraw.Draw(self.image)
        self.turn, self.shift = 0.0, (0.0, 0.0)

    def _place(self, points) -> list[tuple[float, float]]:
        x, y = np.asarray(points, float).T
        x, y = x - 84, y - 125
        c, s = np.cos(self.turn), np.sin(self.turn)
        x, y = c * x - s * y + 84 + self.shift[0], s * x + c * y + 125 + self.shift[1]
        return list(zip(DRAWN_AT * x, DRAWN_AT * y, strict=True))

    def shape(self, points, fill, edge: float = 0) -> None:
        self.pen.polygon(self._place(points), fill=fill)
        if edge:
            self.stroke(np.concatenate([points, points[:1]]), edge)

    def stroke(self, points, width: float, fill=INK) -> None:
        placed = self._place(points)
        self.pen.line(placed, fill=fill, width=round(width * DRAWN_AT), joint="curve")
        r = width * DRAWN_AT / 2
        for x, y in (placed[0], placed[-1]):
            self.pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def pixels(self) -> np.ndarray:
        return np.asarray(self.image.reduce(DRAWN_AT))


def _oval(x, y, rx, ry=None, power: float = 2.0, n: int = 60) -> np.ndarray:
    t = np.arange(n) * (2 * np.pi / n)
    c, s = np.cos(t), np.sin(t)
    ry = rx if ry is None else ry
    c, s = (np.sign(v) * np.abs(v) ** (2 / power) for v in (c, s))
    return np.stack([x + rx * c, y + ry * s], 1)


@lru_cache(maxsize=2)
def _background(domain: str) -> Image.Image:
    """A theatre for film reviews (A), a shelf with products for the others (B)."""
    big = SIZE * DRAWN_AT
    if domain == "A":
        fold = np.arange(big) / DRAWN_AT / 12
        shade = (0.82 + 0.18 * np.cos(2 * np.pi * fold))[None, :, None]
        light = np.linspace(0.75, 1.0, big)[:, None, None]
        rgb = np.array([150, 44, 52]) * shade * light
        return Image.fromarray(np.rint(rgb).astype(np.uint8))
    image = Image.new("RGB", (big, big), (116, 142, 148))
    canvas = Canvas(image)
    board, dark = (150, 118, 88), (84, 104, 112)

    def box(x, y, w, h, fill):
        canvas.shape(np.array([(x, y), (x + w, y), (x + w, y + h), (x, y + h)]), fill)

    box(0, 46, 168, 5, board)
    box(0, 112, 168, 5, board)
    box(6, 22, 22, 24, dark)
    box(9, 25, 16, 15, (170, 196, 196))
    box(140, 12, 13, 34, (176, 130, 92))
    canvas.shape(_oval(20, 99, 11, 13), (146, 110, 120))
    canvas.shape(_oval(150, 98, 12, 14, 4), dark)
    canvas.shape(_oval(150, 98, 6), (60, 72, 82))
    return canvas.image


def _hair_behind(c: Canvas, who: Look) -> None:
    top = 76 - who.height
    if who.style == 1:  # bob
        c.shape(_oval(84, 80, who.width + 10, who.height + 9, 2.6), who.hair, 1.5)
    elif who.style == 3:  # two buns
        for side in (-1, 1):
            c.shape(_oval(84 + side * 36, top + 10, 15), who.hair, 1.5)
    elif who.style == 5:  # feelers
        for side in (-1, 1):
            c.stroke([(84 + side * 14, top + 6), (84 + side * 22, top - 13)], 3)
            c.shape(_oval(84 + side * 22, top - 13, 6), who.hair, 1.5)
    elif who.style == 7:  # cat's ears
        for side in (-1, 1):
            ear = [(84 + side * x, top + y) for x, y in ((40, 25), (39, -12), (10, 6))]
            c.shape(np.array(ear), who.skin, 2)
    else:
        for side in (-1, 1):  # ears
            c.shape(_oval(84 + side * who.width, 82, 8, 10), who.skin, 1.5)


def _hair_before(c: Canvas, who: Look) -> None:
    top, w = 76 - who.height, who.width
    if who.style == 0:  # tuft
        for x, y in ((-9, -10), (0, -15), (10, -10)):
            c.stroke([(84 + x / 3, top + 4), (84 + x, top + y + 2)], 5, who.hair)
    elif who.style in (1, 3):  # fringe
        x = np.linspace(-0.63, 0.63, 30)
        upper = np.stack([84 + w * x, 76 - who.height * np.sqrt(1 - x**2) - 1], 1)
        lower = np.stack([84 + w * x, 76 - who.height * (0.74 + 0.02 * x**2)], 1)
        c.shape(np.concatenate([upper, lower[::-1]]), who.hair, 1.2)
    elif who.style == 2:  # spikes
        x = np.linspace(-32, 32, 11)
        y = np.where(np.arange(11) % 2 == 0, 4, -13) + (x / 32) ** 2 * 12
        c.shape(
            np.concatenate([np.stack([84 + x, top + y], 1), [(84, top + 9)]]), who.hair
        )
    elif who.style == 4:  # woollen hat
        x = np.linspace(-1, 1, 30)
        y = np.sqrt(1 - x**2)
        dome = np.stack([84 + (w - 6) * x, top + 14 - 25 * y], 1)
        c.shape(_oval(84, top - 13, 7), (245, 240, 228), 1.2)
        c.shape(dome, who.shirt, 1.5)
        c.shape(_oval(84, top + 12, w - 4, 5, 4), who.hair, 1.5)
    elif who.style == 6:  # curls
        for a in np.linspace(-1.15, 1.15, 8):
            x, y = 84 + (w - 2) * np.sin(a), 76 - (who.height - 1) * np.cos(a)
            c.shape(_oval(x, y, 9), who.hair)


def draw(who: Look, au: dict[str, float], voice: float, blink: float, pose) -> Canvas:
    """One frame from action units, opening of the voice (0-1), blink (0-1), pose."""
    c = Canvas(_background(who.domain))
    c.shape(_oval(84, 172, 58, 42, 2.6), who.shirt, 2)
    c.shape(_oval(84, 134, 19, 9), _blend(who.shirt, (255, 255, 255), 0.55), 1.5)
    c.turn, c.shift = pose
    _hair_behind(c, who)
    c.shape(_oval(84, 76, who.width, who.height, 2.3), who.skin, 2)
    _hair_before(c, who)

    happy = max(au["AU06"], 0)
    blush = min(0.1 + 0.16 * happy, 0.55)
    for side in (-1, 1):
        cheek = _blend(who.skin, (240, 84, 96), blush)
        c.shape(_oval(84 + side * 30, 92 - 0.8 * min(happy, 2), 8, 5.5), cheek)
    smirk = float(np.clip(0.75 * au["AU20"] - 0.35, 0, 1))
    _eyes(c, who, au, blink, smirk)
    c.shape(_oval(84, 87, 6.5, 5.5), _blend(who.skin, (225, 70, 70), 0.45), 1.2)
    _mouth(c, au, voice, smirk, chin=76 + who.height - 5)
    return c


def _eyes(c: Canvas, who: Look, au, blink: float, smirk: float) -> None:
    lid = _blend(who.skin, INK, 0.28)
    upper = 0.10 + 0.09 * np.clip(au["AU04"], 0, 2) - 0.06 * np.clip(au["AU01"], 0, 1.5)
    upper = np.clip(upper + 0.05 * smirk, 0, 0.5) + 0.62 * blink
    lower = 0.03 + 0.09 * np.clip(au["AU06"] + 0.4 * au["AU07"], 0, 3) + 0.2 * blink
    for side in (-1, 1):
        x, y, rx, ry = 84 + side * 17, 71, 11.5, 13
        top, bottom = y - ry * (1 - 2 * upper), y + ry * (1 - 2 * lower)
        bottom = max(bottom, top + 0.8)
        c.shape(_oval(x, y, rx, ry), lid, 1.4)
        for shape, fill in (
            (_oval(x, y, rx - 0.6, ry - 0.6), (255, 253, 246)),
            (_oval(x + 3.5 * smirk - side * 1.5, y + 1, 5.4), INK),
            (_oval(x + 3.5 * smirk - side * 1.5 - 1.8, y - 1.2, 1.7), (255, 255, 255)),
        ):
            shape[:, 1] = np.clip(shape[:, 1], top, bottom)
            c.shape(shape, fill)
        half = rx * np.sqrt(max(1 - ((top - y) / ry) ** 2, 0.05))
        c.stroke([(x - half, top), (x + half, top)], 1.8)
        # the brow: lifted at its inner end (AU1), its outer end (AU2), knitted (AU4)
        frown = np.clip(au["AU04"], -1.5, 3)
        inner = 3.4 * frown - 2.2 * np.clip(au["AU01"], -1.5, 2.5)
        outer = -0.6 * frown - 2.6 * np.clip(au["AU02"], -1.5, 2.5)
        inner, outer = np.clip(inner, -7, 9), np.clip(outer, -7, 4)
        near, far = x - side * (9.5 + 0.6 * max(frown, 0)), x + side * 10.5
        arch = 2.5 - 0.9 * np.clip(frown, -1, 2)
        brow = [(near, 54 + inner), (x, 54 + (inner + outer) / 2 - arch)]
        c.stroke([*brow, (far, 55 + outer)], 4.6, _blend(who.hair, INK, 0.45))


def mouth_curve(au: dict[str, float]):
    """How far the corners point up, -1 to 1: lips pulled up (AU12) or down (AU15)."""
    return np.tanh((0.6 * au["AU12"] - 1.5 * au["AU15"]) / 1.5)


def _mouth(c: Canvas, au, voice: float, smirk: float, chin: float) -> None:
    curve = float(mouth_curve(au))
    half = np.clip(15 + 2.2 * au["AU12"] + 1.2 * au["AU20"], 11, 22)
    opening = voice * np.clip(0.55 + 0.28 * au["AU25"], 0.3, 1.25)
    opening += 0.2 * max(curve - 0.5, 0)
    u = np.linspace(-1, 1, 25)
    middle = 107 + curve * (5 - 13 * u**2) - 6 * smirk * np.maximum(u, 0) ** 2
    x = 84 + half * u + 2.5 * smirk
    bow = 1 - u**2
    upper = np.stack([x, middle - 2.5 * opening * bow], 1)
    lower = np.stack([x, np.minimum(middle + 9.5 * opening * bow, chin)], 1)
    if opening > 0.06:
        c.shape(np.concatenate([upper, lower[::-1]]), (122, 26, 44))
        if opening > 0.3:
            tongue = lower + (upper - lower) * 0.38 * bow[:, None]
            c.shape(np.concatenate([tongue, lower[::-1]]), (232, 108, 112))
            teeth = upper + (lower - upper) * 0.22 * bow[:, None]
            c.shape(np.concatenate([upper, teeth[::-1]]), (255, 253, 246))
    c.stroke(upper, 2.6)
    c.stroke(lower, 2.6)


def film(take: Take) -> np.ndarray:
    """The drawn script, (frames, 168, 168, 3) uint8."""
    script, when, who = take.script, timing(take.script), look(take.script)
    times = when.times
    phase = when.phase(times)
    units = action_units(script, phase)
    nod = _pulse(phase, _event(script, "accent")) * min(abs(script.voice), 2)
    lively = 1 + 0.35 * script.arousal
    draws = puppets.Stream("blink", script.id).uniform(8)
    first = 0.3 + 1.2 * draws[0]
    blinks = first + np.cumsum([0, *(1.3 + 1.8 * draws[1:4] - 0.2 * script.arousal)])
    frames = []
    for k, t in enumerate(times):
        au = {name: float(v[k]) for name, v in units.items()}
        blink = 1.0 if np.any((t >= blinks) & (t < blinks + 0.15)) else 0.0
        turn = 0.035 * lively * np.sin(2.1 * t + 6 * draws[4])
        shift = (1.6 * lively * np.sin(1.3 * t + 6 * draws[5]), 2.2 * float(nod[k]))
        canvas = draw(who, au, _opening(script, when, t), blink, (turn, shift))
        frames.append(canvas.pixels())
    return np.stack(frames)


def _opening(script: Script, when: Timing, t: float) -> float:
    """The mouth opens once per syllable, more on open vowels."""
    k = int(np.searchsorted(when.starts, t, side="right")) - 1
    if k < 0 or t >= when.stops[k]:
        return 0.0
    vowels = re.findall("[aeiouy]+", script.tokens[k]) or ["e"]
    place = (t - when.starts[k]) / (when.stops[k] - when.starts[k]) * len(vowels)
    syllable = min(int(place), len(vowels) - 1)
    wide = 1.0 if set(vowels[syllable]) & set("ao") else 0.7
    return wide * (0.35 + 0.65 * float(np.sin(np.pi * (place - syllable))))


# --- files ----------------------------------------------------------------------------


def write_mp4(path: Path, frames: np.ndarray, audio: np.ndarray) -> None:
    """H.264 and AAC; one thread, because more would make the bytes depend on it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as out:
        video = out.add_stream("libx264", rate=FPS)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.thread_count = 1
        video.options = {"crf": "26", "preset": "veryslow", "tune": "animation"}
        sound = out.add_stream("aac", rate=RATE, layout="mono")
        sound.bit_rate = 28000
        for image in frames:
            out.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(video.encode(None))
        block = av.AudioFrame.from_ndarray(audio[None], format="fltp", layout="mono")
        block.sample_rate = RATE
        block.pts = 0  # else the encoder's first block, silence, is heard
        out.mux(sound.encode(block))
        out.mux(sound.encode(None))


def row(take: Take) -> dict[str, str]:
    """The clip's line in label.csv."""
    script = take.script
    video, clip = script.id.split("_")
    sign = (take.label > 0) - (take.label < 0)
    return {
        "video_id": video,
        "clip_id": clip,
        "text": script.text,
        "label": f"{take.label:g}",
        "label_T": f"{script.literal:g}",
        "label_A": f"{np.clip(script.voice, -3, 3):g}",
        "label_V": f"{np.clip(script.face, -3, 3):g}",
        "annotation": ("Neutral", "Positive", "Negative")[sign],
        "mode": take.split,
    }


def notes(take: Take) -> dict:
    """The clip's entry in scripts.json."""
    script, when = take.script, timing(take.script)
    spoken = zip(script.tokens, when.starts, when.stops, strict=True)
    truth = asdict(script)
    for name in ("id", "text", "tokens", "token_times", "seconds"):
        del truth[name]
    rounded = {
        kind: {m: [round(float(v), 3) for v in x] for m, x in values.items()}
        for kind, values in (
            ("tracks", tracks(take, when)),
            ("cues", cues(script, when)),
        )
    }
    return {
        "words": [(w, round(float(a), 3), round(float(b), 3)) for w, a, b in spoken],
        "step_seconds": 1 / FPS,
        **rounded,
        "truth": truth,
    }


def versions() -> dict[str, str]:
    """Of everything that the bytes of a clip depend on."""
    espeak = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True)
    return {
        "espeak-ng": re.search(r"\d+\.\d+(\.\d+)?", espeak.stdout).group(),
        "pyav": av.__version__,
        "ffmpeg libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        "pillow": PIL.__version__,
    }


def card(folder: Path, takes: list[Take], seconds: list[float]) -> dict:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != ".")
    files = [p for p in files if p.name != "card.json"]
    splits = {}
    for split in SPLITS:
        labels = [t.label for t in takes if t.split == split]
        counts = Counter(round(v) for v in labels)
        speakers = {t.script.id.split("_")[0] for t in takes if t.split == split}
        splits[split] = {
            "size": len(labels),
            "speakers": len(speakers),
            "histogram_-3_to_3": [counts[b] for b in range(-3, 4)],
            "sarcastic": sum(t.script.sincerity < 0 for t in takes if t.split == split),
        }
    return {
        "name": "puppet-clips",
        "description": (
            "Drawn puppets with a synthesised voice who review films (domain A) and "
            "products (domain B): the clip form of the puppet corpus, from the same "
            "latent scripts as its features. No person is seen or heard."
        ),
        "source": "scripts/make_puppet_clips.py",
        "terms": "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/",
        "synthetic": True,
        "version": VERSION,
        "puppet_version": puppets.PUPPET_VERSION,
        "worlds": [asdict(world) for world in WORLDS],
        "splits": splits,
        "clips": len(takes),
        "seconds": {
            "min": min(seconds),
            "median": float(np.median(seconds)),
            "max": max(seconds),
            "sum": round(sum(seconds), 1),
        },
        "video": {"codec": "h264", "width": SIZE, "height": SIZE, "fps": FPS},
        "audio": {"codec": "aac", "rate": RATE, "channels": 1},
        "bytes": sum(p.stat().st_size for p in files),
        "made_with": versions(),
        "notes": [
            "label is the mean of five simulated annotators, as in the puppet corpus; "
            "label_T, label_A and label_V are the true valence of the words and what "
            "the voice and the face display, in label points.",
            "Labels are balanced over seven bins in each split and domain, and the "
            "scripts chosen for that; speakers never cross splits. Sarcasm has "
            "probability .2 before the choice.",
            "Words take as long as their syllables need, so a clip is shorter than the "
            "feature sequence of its script; every event keeps its place among the "
            "words.",
            "Face and voice are noiseless and nothing went wrong in recording: clips "
            "are easier to read than the features.",
            "Choice, labels, texts, times, tracks and drawing follow from the scripts. "
            "The sound depends on the version of espeak-ng, the bytes also on those of "
            "Pillow and of PyAV's codecs.",
        ],
        "sha256": {
            p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in files
        },
    }


def make(take: Take, folder: Path) -> Path:
    """Render one clip into `folder`; returns its path."""
    where = row(take)
    path = folder / "Raw" / where["video_id"] / f"{where['clip_id']}.mp4"
    write_mp4(path, film(take), speak(take))
    return path


def make_all(folder: Path) -> None:
    takes = choose()
    shutil.rmtree(folder / "Raw", ignore_errors=True)
    for k, take in enumerate(takes):
        make(take, folder)
        print(f"\r{k + 1} of {len(takes)} clips", end="", flush=True)
    rows = [row(t) for t in takes]
    with open(folder / "label.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    entries = [
        f"{json.dumps(t.script.id)}: {json.dumps(notes(t), separators=(',', ':'))}"
        for t in takes
    ]
    (folder / "scripts.json").write_text("{\n" + ",\n".join(entries) + "\n}\n")
    facts = card(folder, takes, [timing(t.script).seconds for t in takes])
    (folder / "card.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"\n{facts['bytes']} bytes, {facts['seconds']['sum']} seconds in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=PACKAGE, help="folder to write")
    arguments = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        sys.exit(
            "espeak-ng is not installed, and nothing else here can speak. Install it "
            "(Debian and Ubuntu: apt install espeak-ng) and run this script again."
        )
    make_all(arguments.out)


if __name__ == "__main__":
    main()
