"""What a puppet world is made of: its knobs, its random numbers and its constants.

Nothing here makes an utterance: `grammar` has the words, `latents` the scripts.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmsa_lib.corpora.schema import Card
from mmsa_lib.errors import CorpusError, unknown

PUPPET_VERSION = "1"
MODALITIES = ("text", "audio", "vision", "pose", "gaze", "hands", "heart")
DOMAIN_PARTS = ("lexicon", "speaker", "channel", "prior")
AUDIO_CHANNELS = (
    *("pitch", "energy", "rate", "tilt", "jitter", "shimmer"),
    *("harmonicity", "f1", "f2", "pauses", "flux", "voicing"),
)
VISION_CHANNELS = tuple(f"AU{k:02d}" for k in (1, 2, 4, 6, 7, 12, 15, 20, 25, 45))
WIDTHS = dict(
    zip(
        MODALITIES,
        (32, len(AUDIO_CHANNELS), len(VISION_CHANNELS), 6, 4, 8, 3),
        strict=True,
    )
)
AUDIO_RATE, VISION_RATE = 10, 5  # frames per second
LATTICE = 16  # contributions to the true sentiment are multiples of 1/16
GRID = 1024  # stored feature values are multiples of 1/1024


@dataclass(frozen=True)
class PuppetConfig:
    """Every knob of the world; the defaults are the corpus of the book's pages.

    sizes              utterances in train, valid and test
    seed               world seed; another seed is another draw of the same world
    num_modalities     2 to 7: the first so many of `MODALITIES`. With 2 there is no
                       face, so the voice alone tells sarcasm. (pose, gaze) from 5 on
                       and (hands, heart) at 7 each add a stance to s that only their
                       product reveals; at 4 and 6 the last one has no partner and
                       tells nothing about s
    num_speakers       over all splits; no speaker is in two splits
    synergy            probability of sarcasm, 0 to 1 (Wander)
    delivery           how much voice and face add to the words; 1 = a standard
                       deviation of .65 label points each
    redundancy         how strongly voice and face also repeat the words' valence, as
                       the product of two tracks, so that it is slow to learn; 0 = not
                       at all, 1 = strongly (CGGM)
    informativeness    by modality, factor on the signal it shows, 1 unless given; 0
                       shows nothing. What text has above 1 shows the composed valence
                       in every word vector, as an encoder that read the sentence
                       would: text becomes easy and fast to learn (CGGM)
    noise              by modality, factor on its frame noise, 1 unless given (CGGM)
    conflict           share of speakers, 0 to 1, whose emotions go against the delivery
                       that their sentiment goes with; every second of them displays
                       the delivery turned over, and who they are is not told (MMoLRE).
                       The two tasks' gradients oppose each other on average from about
                       .75 on
    domain             "A" or "B" (CASP); B draws its own utterances and speakers
    domain_parts       what of domain B differs from A: "lexicon" (other words, other
                       embedding), "speaker" (other voices and neutral faces),
                       "channel" (gain, offset and noise of the recording), "prior"
                       (more negative opinions)
    missing            share of samples that lose modalities, in every split (MPLMM)
    missing_patterns   sets of modalities left, drawn uniformly; () = all incomplete
                       ones
    defects            share factor of trailing padding, frozen video, occlusions and
                       clipped audio; 1 = as in the default corpus, 0 = none
    """

    sizes: tuple[int, int, int] = (1200, 240, 600)
    seed: int = 0
    num_modalities: int = 3
    num_speakers: int = 68
    synergy: float = 0.0
    delivery: float = 1.0
    redundancy: float = 0.0
    informativeness: Mapping[str, float] = field(default_factory=dict)
    noise: Mapping[str, float] = field(default_factory=dict)
    conflict: float = 0.0
    domain: str = "A"
    domain_parts: tuple[str, ...] = DOMAIN_PARTS
    missing: float = 0.0
    missing_patterns: tuple[tuple[str, ...], ...] = ()
    defects: float = 1.0

    def __post_init__(self):
        for name in ("sizes", "domain_parts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        patterns = tuple(tuple(p) for p in self.missing_patterns)
        object.__setattr__(self, "missing_patterns", patterns)
        self._check_names()
        self._check_numbers()

    def _check_names(self) -> None:
        if self.domain not in ("A", "B"):
            raise unknown("domain", self.domain, ("A", "B"))
        for part in self.domain_parts:
            if part not in DOMAIN_PARTS:
                raise unknown("domain part", part, DOMAIN_PARTS)
        for m in (*self.informativeness, *self.noise):
            if m not in MODALITIES:
                raise unknown("modality", m, MODALITIES)

    def _check_numbers(self) -> None:
        if not 2 <= self.num_modalities <= len(MODALITIES):
            raise CorpusError(
                f"num_modalities must be 2 to {len(MODALITIES)}, "
                f"found {self.num_modalities}"
            )
        at_least_0 = {
            k: getattr(self, k) for k in ("delivery", "redundancy", "defects")
        }
        for knob in ("informativeness", "noise"):
            values = getattr(self, knob)
            at_least_0 |= {f"{knob}[{m!r}]": value for m, value in values.items()}
        for knob, value in at_least_0.items():
            if not value >= 0:
                raise CorpusError(f"{knob} must be >= 0, found {value}")
        for knob in ("synergy", "conflict", "missing"):
            if not 0 <= getattr(self, knob) <= 1:
                raise CorpusError(
                    f"{knob} is a share and must lie in [0, 1], "
                    f"found {getattr(self, knob)}"
                )
        if len(self.sizes) != 3 or min(self.sizes) < 1:
            raise CorpusError(
                "sizes must be three numbers >= 1 (train, valid, test), "
                f"found {self.sizes}"
            )
        if self.num_speakers < 3:
            raise CorpusError(
                "num_speakers must be at least 3, one per split, because no speaker "
                f"crosses splits; found {self.num_speakers}"
            )

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities of this world, in order."""
        return MODALITIES[: self.num_modalities]

    @classmethod
    def from_card(cls, card: Card) -> PuppetConfig:
        """The configuration a corpus was generated with, read back from its card."""
        if card.name != "puppets":
            raise CorpusError(
                f"corpus {card.name!r} is not a puppet world: only puppets have oracles"
            )
        return cls(**card.options)

    def differs(self, part: str) -> bool:
        """True if `part` of the world is domain B's."""
        return self.domain == "B" and part in self.domain_parts


# --- randomness: integers of PCG64, everything else by exact arithmetic ------------


class Stream:
    """One purpose's random numbers, the same on every machine and NumPy version."""

    def __init__(self, *key):
        words = [zlib.crc32(str(k).encode()) for k in key]
        self._raw = np.random.PCG64(np.random.SeedSequence(words)).random_raw

    def uniform(self, *shape: int) -> np.ndarray:
        """Multiples of 2**-53 in [0, 1)."""
        raw = self._raw(int(np.prod(shape, dtype=int)))
        return ((raw >> np.uint64(11)) * 2.0**-53).reshape(shape)

    def bell(self, *shape: int) -> np.ndarray:
        """Integers -30..30, the sum of four dice with 16 faces, sd 9.22 (see BELL)."""
        return self._sum_of_four(4, shape) - 30

    def noise(self, *shape: int) -> np.ndarray:
        """Nearly normal floats of mean 0 and sd 1: the sum of four 16-bit uniforms."""
        return (self._sum_of_four(16, shape) - 131070) * (1.732 / 65536)

    def _sum_of_four(self, bits: int, shape: tuple[int, ...]) -> np.ndarray:
        """Of each 64-bit integer the four highest parts of so many bits, added up."""
        raw = self._raw(int(np.prod(shape, dtype=int)))
        total = np.zeros(raw.shape, dtype=np.int64)
        mask = np.uint64(2**bits - 1)
        for k in (1, 2, 3, 4):
            total += ((raw >> np.uint64(64 - k * bits)) & mask).astype(np.int64)
        return total.reshape(shape)

    def choice(self, weights: Sequence[float], *shape: int) -> np.ndarray:
        """Indices drawn in proportion to integer `weights`."""
        edges = np.cumsum(np.asarray(weights, dtype=np.float64))
        index = np.searchsorted(edges, self.uniform(*shape) * edges[-1], side="right")
        return index.astype(np.int64)

    def whole(self, low: int, high: int, *shape: int) -> np.ndarray:
        """Integers low..high, both included."""
        return low + np.floor(self.uniform(*shape) * (high + 1 - low)).astype(np.int64)


def _bell_law() -> np.ndarray:
    """Probabilities of `Stream.bell` for -30..30: four dice with 16 faces."""
    dice = np.ones(16) / 16
    law = dice
    for _ in range(3):
        law = np.convolve(law, dice)
    return law


BELL = _bell_law()

# --- sentiment: lattice constants ---------------------------------------------------

DELIVERY = 1.125  # of voice and of face per unit of their bell, in sixteenths
OPPOSED = 5.0  # how far a speaker in conflict turns emotions against the delivery
STANCE = 12  # of a completed product of two further modalities, in sixteenths
ANNOTATOR = 1 / 16  # an annotator reads s + ANNOTATOR * bell, sd .58
ANNOTATORS = 5
# P(lift late, smile late | sincerity). A sarcastic puppet lifts its pitch late and
# smiles late; a sincere one does at most one of the two. Neither cue alone makes
# sarcasm more likely than not while synergy <= .31 (.3 / (.3 + .7 * .45) = .49).
CUES = {
    -1: {(1, 1): 1.0},
    +1: {(1, 0): 0.45, (0, 1): 0.45, (0, 0): 0.10},
}
CUES_WITHOUT_FACE = {-1: {(1, 1): 1.0}, +1: {(0, 1): 0.5, (0, 0): 0.5}}


def cues_of(config: PuppetConfig) -> dict[int, dict[tuple[int, int], float]]:
    """P(lift late, smile late | sincerity), by sincerity."""
    return CUES if "vision" in config.modalities else CUES_WITHOUT_FACE


def stance_pairs(config: PuppetConfig) -> list[int]:
    """Indices j such that further modalities j and j + 1 form a complete product."""
    return [j for j in (0, 2) if config.num_modalities >= 3 + j + 2]


def speakers_per_split(config: PuppetConfig) -> list[int]:
    """How many speakers train, valid and test have."""
    total = sum(config.sizes)
    valid = max(1, round(config.num_speakers * config.sizes[1] / total))
    test = max(1, round(config.num_speakers * config.sizes[2] / total))
    return [max(1, config.num_speakers - valid - test), valid, test]


def speaker_offsets(config: PuppetConfig, what: str, width: int) -> np.ndarray:
    """One row of offsets per speaker, sd 1."""
    stream = Stream(PUPPET_VERSION, config.seed, config.domain, "speakers", what)
    return stream.noise(sum(speakers_per_split(config)), width)
