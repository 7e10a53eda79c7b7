"""What each modality shows of a script: its feature sequences, and recording defects.

Text is word vectors; voice, face and body are tracks (accents, cues, sustained colour)
mixed into channels, with offsets of the speaker and noise from frame to frame.
"""

from __future__ import annotations

import numpy as np

from mmsa_lib.corpora.puppets.grammar import (
    ADJECTIVES,
    INTENSIFIERS,
    NEGATORS,
    NOUNS,
    vocabulary_of,
)
from mmsa_lib.corpora.puppets.latents import (
    ACCENT_WIDTH,
    CUE_WIDTH,
    LIFT,
    SMILE,
    Scripts,
)
from mmsa_lib.corpora.puppets.world import (
    GRID,
    LATTICE,
    MODALITIES,
    WIDTHS,
    PuppetConfig,
    Stream,
    speaker_offsets,
)
from mmsa_lib.corpora.schema import Ragged

# --- text -----------------------------------------------------------------------------

CURVE = 0.58  # tangent of half the angle per label point: 3 points are 120 degrees
WORD_IDENTITY = 0.1875
TEXT_NOISE = 0.25


def lexicon_vectors(config: PuppetConfig) -> np.ndarray:
    """Word vectors (words, 32). Valence bends: it is an angle, not an axis.

    Fixed for the world: they do not depend on the seed. Domain B's lexicon has other
    words, whose vectors went through another embedding (a gain and an offset).
    """
    domain = "B" if config.differs("lexicon") else "A"
    words = vocabulary_of(config)
    rows = _meanings(words, domain, config.informativeness.get("text", 1.0))
    axes = np.rint(Stream("axes").noise(8, 32) * 16) / 16
    vectors = np.zeros((len(words), 32))
    for k in range(8):
        vectors += rows[:, k : k + 1] * axes[k]
    for i, word in enumerate(words):
        own = np.rint(Stream("word", word).noise(32) * 16) / 16
        vectors[i] += WORD_IDENTITY * own
    if domain == "B":
        offset = np.rint(Stream("embedding of B").noise(32) * 16) / 16
        vectors = 0.75 * vectors + 1.0 * offset
    return vectors


def _meanings(words: list[str], domain: str, informativeness: float) -> np.ndarray:
    """What words mean on eight axes (words, 8): valence on the first two."""
    gain = min(informativeness, 1.0)
    rows = np.zeros((len(words), 8))
    for i, word in enumerate(words):
        if word in ADJECTIVES[domain]:
            t = CURVE * ADJECTIVES[domain][word] / 4
            norm = 1 + t * t
            rows[i, 0] = 1.5 * gain * 2 * t / norm  # sine
            rows[i, 1] = 1.5 * gain * (1 - t * t) / norm  # cosine
            rows[i, 2] = 0.5
        elif word in NEGATORS:
            rows[i, 3] = 1.75 * gain * NEGATORS[word] / -3
        elif word in INTENSIFIERS:
            rows[i, 4] = 1.0 * gain * (INTENSIFIERS[word] - 4) / 2
            rows[i, 2] = -0.5
        elif word in ("but", "although", "and"):
            rows[i, 5] = gain * {"but": 1.25, "although": -1.25, "and": 0.25}[word]
        elif word in NOUNS[domain]:
            rows[i, 6] = 0.75
        else:
            rows[i, 7] = 0.75
    return rows


def _render_text(table: Scripts) -> tuple[np.ndarray, np.ndarray]:
    config = table.config
    tokens = table.columns["tokens"]
    present = tokens >= 0
    x = lexicon_vectors(config)[tokens[present]]
    read = max(config.informativeness.get("text", 1.0) - 1, 0)
    if read:  # as an encoder that has read the whole sentence would show it
        axis = np.rint(Stream("composed valence").noise(32) * 16) / 16
        w = np.repeat(table.columns["w16"] / LATTICE, present.sum(1))
        x = x + 0.5 * read * w[:, None] * axis
    scale = TEXT_NOISE * config.noise.get("text", 1.0)
    x = x + scale * table.stream("text noise").noise(*tokens.shape, 32)[present]
    return _to_grid(x), present.sum(1)


# --- voice, face, body ----------------------------------------------------------------

NOISE = {"audio": 0.5, "vision": 0.5}
SPEAKER = {"audio": 0.25, "vision": 0.25}  # sd of a speaker's offset
CARRY = 0.75  # of frame noise from one frame to the next
FRESH = 0.6614  # sqrt(1 - CARRY**2)

# how a track shows in the channels, in the order of AUDIO_CHANNELS
AUDIO_TRACKS = {
    #            pitch  en   rate tilt  jit  shim  harm  f1    f2   pau  flux  voi
    "decline": (0.50, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.25),
    "accent": (0.75, 0.50, 0.0, 0.25, 0.0, 0.0, 0.50, 0.25, 0.0, 0.0, 0.25, 0.0),
    "colour": (0.0, 0.0, 0.0, 0.50, -0.25, -0.25, 0.50, 0.0, 0.50, 0.0, 0.0, 0.25),
    "lift": (1.0, 0.25, 0.0, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.75),
    "arousal": (0.25, 0.75, 0.75, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0, -0.50, 0.50, 0.0),
    "echo": (0.0, 0.0, 0.0, 0.0, 0.0, 0.75, 0.0, 0.75, -0.50, 0.0, 0.0, 0.0),
    "carrier": (0.0, 0.0, 0.0, 0.0, 0.75, 0.0, 0.0, 0.0, 0.50, 0.75, 0.0, 0.0),
}
VISION_TRACKS = {
    #         AU01  AU02  AU04  AU06  AU07  AU12  AU15  AU20  AU25  AU45
    "brow": (0.50, 0.50, -0.75, 0.25, 0.0, 0.0, -0.25, 0.0, 0.0, 0.0),
    "colour": (0.0, 0.25, -0.50, 0.50, 0.25, 0.0, -0.50, -0.25, 0.0, 0.0),
    "smile": (0.0, 0.0, 0.0, 0.75, 0.25, 0.75, 0.0, 0.0, 0.25, 0.0),
    "late": (0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.75, 0.75, 0.0),
    "arousal": (0.25, 0.25, 0.0, 0.0, 0.25, 0.0, 0.0, 0.25, 0.75, 0.50),
    "echo": (0.75, 0.0, 0.0, 0.0, 0.50, 0.0, 0.0, -0.75, 0.0, 0.0),
    "carrier": (0.0, 0.75, 0.0, 0.0, -0.50, 0.0, 0.0, 0.0, 0.0, 0.75),
    "talk": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 0.50, 0.0),
}
CARRIER = 1.5  # height of the echo's carrier at redundancy 1
COLOUR = 1.25  # sustained part of voice and face beside their accents


def _pulse(time: np.ndarray, centre: np.ndarray, width: float) -> np.ndarray:
    """A smooth bump of height 1: (1 - u**2)**2 inside |u| < 1."""
    u = (time - centre[:, None]) / width
    inside = np.maximum(1 - u * u, 0)
    return inside * inside


def _frames(table: Scripts, modality: str, steps: np.ndarray, tracks, defs):
    """Add tracks (n, T) into channels, then speaker, channel and frame noise."""
    config, width = table.config, WIDTHS[modality]
    n, most = len(table), int(steps.max())
    gain = config.informativeness.get(modality, 1.0)
    x = np.zeros((n, most, width))
    for name, contour in tracks.items():
        for k, weight in enumerate(defs[name]):
            if weight:
                x[:, :, k] += gain * weight * contour
    draw = table.stream(f"{modality} noise")
    fresh = draw.noise(n, most, width)
    scale = NOISE.get(modality, 0.5) * config.noise.get(modality, 1.0)
    if config.differs("channel"):
        scale *= 1.25
    level = fresh[:, 0].copy()
    for t in range(most):
        if t:
            level = CARRY * level + FRESH * fresh[:, t]
        x[:, t] += scale * level
    offsets = SPEAKER.get(modality, 0.25) * speaker_offsets(config, modality, width)
    if config.differs("speaker"):
        shift = np.rint(Stream("speakers of B", modality).noise(width) * 8) / 8
        offsets = 1.25 * offsets + 0.5 * shift
    x += offsets[table.columns["speaker"]][:, None, :]
    if config.differs("channel"):
        stream = Stream("channel of B", modality)
        channel_gain = 1 + np.rint(stream.noise(width) * 6) / 16
        x = x * channel_gain + np.rint(stream.noise(width) * 12) / 16
    return x


def _echo(table: Scripts, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """Echo of the words' valence and the carrier that gives it its sign, (n,) each.

    Only the product of the two tells w: this is easy to see in the words and slow to
    learn from voice or face, which is what lets text dominate.
    """
    redundancy = table.config.redundancy
    sign = np.where(
        table.stream(f"{modality} carrier").uniform(len(table)) < 0.5, -1, 1
    )
    echo = redundancy * sign * table.columns["w16"] / LATTICE
    return echo, sign * min(redundancy, 1.0) * CARRIER


def _render_audio(table: Scripts, defects: dict) -> tuple[np.ndarray, np.ndarray]:
    col = table.columns
    steps = defects["spoken"] + defects["trailing"]
    time = (np.arange(int(steps.max())) + 0.5)[None, :] / defects["spoken"][:, None]
    echo, carrier = _echo(table, "audio")
    voice = (col["display"] * col["voice16"])[:, None] / LATTICE
    one = np.ones_like(time)
    tracks = {
        "decline": 1 - 2 * time,
        "accent": 2 * voice * _pulse(time, col["accent_at"], ACCENT_WIDTH),
        "colour": COLOUR * voice * one,
        "lift": LIFT * col["lift"][:, None] * _pulse(time, col["lift_at"], CUE_WIDTH),
        "arousal": 0.75 * col["arousal"][:, None] * one,
        "echo": echo[:, None] * one,
        "carrier": carrier[:, None] * one,
    }
    x = _frames(table, "audio", steps, tracks, AUDIO_TRACKS)
    clipped = defects["clipped"]
    x[clipped] = np.clip(x[clipped], -1, 1)
    x[time > 1] = 0
    return _pack(x, steps)


def _render_vision(table: Scripts, defects: dict) -> tuple[np.ndarray, np.ndarray]:
    col = table.columns
    spoken = (defects["spoken"] + 1) // 2
    steps = spoken + defects["trailing"] // 2
    time = (np.arange(int(steps.max())) + 0.5)[None, :] / spoken[:, None]
    echo, carrier = _echo(table, "vision")
    face = (col["display"] * col["face16"])[:, None] / LATTICE
    one = np.ones_like(time)
    late = col["late_smile"][:, None]
    smile = _pulse(time, col["smile_at"], CUE_WIDTH)
    tracks = {
        "brow": 2 * face * _pulse(time, col["brow_at"], ACCENT_WIDTH),
        "colour": COLOUR * face * one,
        "smile": SMILE * (1 - late) * smile,
        "late": SMILE * late * smile,
        "arousal": 0.75 * col["arousal"][:, None] * one,
        "echo": echo[:, None] * one,
        "carrier": carrier[:, None] * one,
        "talk": one,
    }
    x = _frames(table, "vision", steps, tracks, VISION_TRACKS)
    t = np.arange(x.shape[1])[None, :]
    hidden = (t >= defects["occluded"][:, :1]) & (t < defects["occluded"][:, 1:])
    x[hidden] = 0
    x[time > 1] = 0
    frozen = defects["frozen_from"]
    for i in np.flatnonzero(frozen >= 0):
        x[i, frozen[i] :] = x[i, frozen[i]]
    return _pack(x, steps)


def _render_further(table: Scripts, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """Pose, gaze, hands, heart: a pulse whose sign is one factor of a product."""
    col, width = table.columns, WIDTHS[modality]
    j = MODALITIES.index(modality) - 3
    steps = np.clip(col["frames"] // 5, 5, 12)
    time = (np.arange(int(steps.max())) + 0.5)[None, :] / steps[:, None]
    factor = col["factors"][:, j][:, None]
    stream = Stream("directions", modality)
    tracks = {
        "factor": 1.5 * factor * _pulse(time, col["factor_at"][:, j], 0.5),
        "arousal": 0.5 * col["arousal"][:, None] * np.ones_like(time),
    }
    definition = {
        name: tuple((np.rint(stream.noise(width) * 8) / 8).tolist()) for name in tracks
    }
    return _pack(_frames(table, modality, steps, tracks, definition), steps)


def _defects(table: Scripts) -> dict[str, np.ndarray]:
    """What went wrong in recording: trailing padding, freezes, occlusion, clipping."""
    n, share = len(table), table.config.defects
    draw = table.stream("defects")
    u = draw.uniform(n, 4)
    trailing = np.where(u[:, 0] < 0.12 * share, 2 * draw.whole(2, 6, n), 0)
    spoken = np.minimum(table.columns["frames"], 60 - trailing)
    seen = (spoken + 1) // 2
    start = np.floor(draw.uniform(n) * (seen - 5)).astype(np.int64)
    stop = start + draw.whole(2, 4, n)
    occluded = np.where(
        (u[:, 1] < 0.10 * share)[:, None], np.stack([start, stop], 1), 0
    )
    frozen = np.where(u[:, 2] < 0.06 * share, seen * 3 // 5, -1)
    return {
        "spoken": spoken,
        "trailing": trailing,
        "occluded": occluded,
        "frozen_from": frozen,
        "clipped": u[:, 3] < 0.08 * share,
    }


def _pack(x: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _to_grid(x[np.arange(x.shape[1]) < steps[:, None]]), steps


def _to_grid(x: np.ndarray) -> np.ndarray:
    return (np.rint(x * GRID) / GRID).astype(np.float32)


def render(table: Scripts) -> tuple[dict[str, Ragged], dict[str, np.ndarray]]:
    """Feature sequences of scripts, and what went wrong in recording them."""
    defects = _defects(table)
    features = {}
    for m in table.config.modalities:
        if m == "text":
            values, lengths = _render_text(table)
        elif m == "audio":
            values, lengths = _render_audio(table, defects)
        elif m == "vision":
            values, lengths = _render_vision(table, defects)
        else:
            values, lengths = _render_further(table, m)
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        features[m] = Ragged(values, starts, lengths)
    return features, defects
