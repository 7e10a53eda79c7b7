"""Puppets: the embedded corpus, a small world whose truth is known.

An utterance starts as a latent **script**: words composed by a grammar into a literal
valence w, a sincerity c = +1 or -1 (sarcasm), what voice and face add (the delivery),
arousal, and the times of prosody and face events. From the script follow

    s = clip(c * (w + voice + face) + stance, -3, 3)            the true sentiment

the label (the mean of five annotators, so a multiple of 0.2), six emotions, and one
feature sequence per modality. `voice` and `face` are what the puppet *displays*: a
sarcastic puppet mocks, so they count with the sign of c. Written with the effective
delivery d = c * (voice + face), this is s = clip(c * w + d + stance).

All contributions to s live on a lattice of 1/16, so every conditional expectation of
the label is a finite sum and the oracles below are exact. Scripts come first and know
nothing about features: the same script can be rendered as vectors (`render`) or drawn
and spoken as a clip. Each purpose has its own random stream, so a knob that concerns
features never changes a script.

Same bytes on every machine: integers of PCG64 are the only source of randomness,
floats see element-wise + - * / only, and stored values lie on a grid of 1/1024.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from itertools import product

import numpy as np

from mmsa_lib.corpora import corruption
from mmsa_lib.corpora.schema import (
    EMOTIONS,
    SPLITS,
    Card,
    Corpus,
    Ragged,
    Split,
    make_corpus,
)
from mmsa_lib.errors import CorpusError, unknown

PUPPET_VERSION = "1"
MODALITIES = ("text", "audio", "vision", "pose", "gaze", "hands", "heart")
DOMAIN_PARTS = ("lexicon", "speaker", "channel", "prior")


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


AUDIO_CHANNELS = _split(
    "pitch energy rate tilt jitter shimmer harmonicity f1 f2 pauses flux voicing"
)
VISION_CHANNELS = _split("AU01 AU02 AU04 AU06 AU07 AU12 AU15 AU20 AU25 AU45")
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
        if not 2 <= self.num_modalities <= len(MODALITIES):
            raise CorpusError(
                f"num_modalities must be 2 to {len(MODALITIES)}, "
                f"found {self.num_modalities}"
            )
        if self.domain not in ("A", "B"):
            raise unknown("domain", self.domain, ("A", "B"))
        for part in self.domain_parts:
            if part not in DOMAIN_PARTS:
                raise unknown("domain part", part, DOMAIN_PARTS)
        for knob in ("informativeness", "noise"):
            for m, value in getattr(self, knob).items():
                if m not in MODALITIES:
                    raise unknown("modality", m, MODALITIES)
                if not value >= 0:
                    raise CorpusError(f"{knob}[{m!r}] must be >= 0, found {value}")
        for knob in ("synergy", "conflict", "missing"):
            if not 0 <= getattr(self, knob) <= 1:
                raise CorpusError(
                    f"{knob} is a share and must lie in [0, 1], "
                    f"found {getattr(self, knob)}"
                )
        for knob in ("delivery", "redundancy", "defects"):
            if not getattr(self, knob) >= 0:
                raise CorpusError(f"{knob} must be >= 0, found {getattr(self, knob)}")
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


class _Stream:
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
        raw = self._raw(int(np.prod(shape, dtype=int)))
        total = np.zeros(raw.shape, dtype=np.int64)
        for shift in (60, 56, 52, 48):
            total += ((raw >> np.uint64(shift)) & np.uint64(15)).astype(np.int64)
        return total.reshape(shape) - 30

    def noise(self, *shape: int) -> np.ndarray:
        """Nearly normal floats of mean 0 and sd 1: the sum of four 16-bit uniforms."""
        raw = self._raw(int(np.prod(shape, dtype=int)))
        total = np.zeros(raw.shape, dtype=np.int64)
        for shift in (48, 32, 16, 0):
            total += ((raw >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
        return ((total - 131070) * (1.732 / 65536)).reshape(shape)

    def choice(self, weights: Sequence[float], *shape: int) -> np.ndarray:
        """Indices drawn in proportion to integer `weights`."""
        edges = np.cumsum(np.asarray(weights, dtype=np.float64))
        index = np.searchsorted(edges, self.uniform(*shape) * edges[-1], side="right")
        return index.astype(np.int64)

    def whole(self, low: int, high: int, *shape: int) -> np.ndarray:
        """Integers low..high, both included."""
        return low + np.floor(self.uniform(*shape) * (high + 1 - low)).astype(np.int64)


def _bell_law() -> np.ndarray:
    """Probabilities of `_Stream.bell` for -30..30: four dice with 16 faces."""
    dice = np.ones(16) / 16
    law = dice
    for _ in range(3):
        law = np.convolve(law, dice)
    return law


BELL = _bell_law()

# --- the lexicon and the grammar -------------------------------------------------
# Valences are in quarters of a label point, factors of intensifiers and negators in
# quarters. The words of domain B express the same range with other words.

VALENCES = (-11, -10, -10, -9, -7, -6, -6, -5, -4, -4, -3, -2, -1)
VALENCES += (0, 2, 3, 3, 4, 4, 6, 6, 7, 9, 9, 10, 10, 11)
ADJECTIVES = {
    domain: dict(zip(_split(words), VALENCES, strict=True))
    for domain, words in {
        "A": """awful terrible horrible dreadful bad poor boring dull messy weak slow
            odd plain usual okay decent fine nice solid good clever funny great lovely
            superb wonderful brilliant""",
        "B": """appalling useless rotten nasty faulty cheap noisy clumsy flimsy dim
            bulky stiff bland common passable tidy neat handy sturdy useful smooth quick
            splendid delightful excellent marvellous flawless""",
    }.items()
}
NOUNS = {
    "A": _split("plot cast acting music ending dialogue story camera pacing humour"),
    "B": _split("screen battery case sound lens keyboard fan charger handle motor"),
}
VERBS = {"A": ("was", "felt", "seemed"), "B": ("is", "feels", "seems")}
INTENSIFIERS = {"": 4, "very": 6, "really": 5, "so": 5, "slightly": 2, "rather": 3}
INTENSIFIER_WEIGHTS = (52, 12, 10, 8, 10, 8)
NEGATORS = {"": 4, "not": -3, "hardly": -2, "never": -4}
NEGATOR_WEIGHTS = (90, 6, 2, 2)
OPENERS = ("", "honestly", "well", "look", "again")
OPENER_WEIGHTS = (60, 10, 10, 10, 10)
# how two clauses combine: quarters of the first and of the second clause's valence
FORMS = {
    "one": (4, 0),  # the plot was dull
    "and": (2, 2),  # the plot was dull and the cast was great
    "but": (2, 4),  # the plot was dull but the cast was great
    "although first": (2, 4),  # although the plot was dull the cast was great
    "although second": (4, 2),  # the plot was dull although the cast was great
}
FORM_WEIGHTS = (40, 16, 20, 12, 12)
CONNECTIVE = {"and": "and", "but": "but", "although second": "although"}
PRIOR_B = 3.0  # domain B's prior: negative adjectives are this much more frequent

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


def _cues(config: PuppetConfig) -> dict[int, dict[tuple[int, int], float]]:
    return CUES if "vision" in config.modalities else CUES_WITHOUT_FACE


def _adjectives(config: PuppetConfig) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Words, valences in quarters and sampling weights of this domain."""
    words = ADJECTIVES["B" if config.differs("lexicon") else "A"]
    valence = np.array(list(words.values()))
    tilt = PRIOR_B if config.differs("prior") else 1.0
    weight = np.where(np.abs(valence) > 8, 1.0, 2.0)  # strong words are rarer
    return list(words), valence, weight * np.where(valence < 0, tilt, 1.0)


def compose(form: str, clauses: Sequence[tuple[int, int, int]]) -> float:
    """Literal valence of a sentence, in label points.

    `form` is a key of FORMS; a clause is (adjective, intensifier, negator) in
    quarters, as the tables above give them. The result is a multiple of 1/16.
    """
    parts = [a * i * n for a, i, n in clauses] + [0]
    first, second = FORMS[form]
    return float(_literal16(first * parts[0] + second * parts[1])) / LATTICE


def _literal16(total):
    """Quarter products (1/256 points) to the lattice, clipped to [-3, 3]."""
    sixteenths = np.rint(np.asarray(total) * (LATTICE / 256)).astype(np.int64)
    return np.clip(sixteenths, -3 * LATTICE, 3 * LATTICE)


def literal_law(config: PuppetConfig) -> np.ndarray:
    """Exact probabilities of w on the lattice -48..48 under the grammar, (97,)."""
    return _literal_law(config.differs("lexicon"), config.differs("prior")).copy()


@lru_cache(maxsize=8)
def _literal_law(lexicon: bool, prior: bool) -> np.ndarray:
    parts = [p for p, on in (("lexicon", lexicon), ("prior", prior)) if on]
    config = PuppetConfig(domain="B", domain_parts=tuple(parts))
    _, valence, weight = _adjectives(config)
    clause: dict[int, float] = {}
    factors = list(zip(INTENSIFIERS.values(), INTENSIFIER_WEIGHTS, strict=True))
    negations = list(zip(NEGATORS.values(), NEGATOR_WEIGHTS, strict=True))
    for (v, p), (i, q), (n, r) in product(
        zip(valence.tolist(), weight.tolist(), strict=True), factors, negations
    ):
        clause[v * i * n] = clause.get(v * i * n, 0.0) + p * q * r
    x = np.array(list(clause))
    p = np.array(list(clause.values()))
    p = p / p.sum()
    law = np.zeros(6 * LATTICE + 1)
    for (first, second), weight in zip(FORMS.values(), FORM_WEIGHTS, strict=True):
        w = _literal16(first * x[:, None] + second * x[None, :]) + 3 * LATTICE
        share = p[:, None] * p[None, :] * (weight / sum(FORM_WEIGHTS))
        law += np.bincount(w.ravel(), share.ravel(), minlength=len(law))
    return law


# --- latent scripts ---------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """One event of voice or face. Times are fractions of the spoken utterance.

    track    "accent" (pitch and energy on the word that matters), "lift" (of pitch,
             late), "smile" (on time, with the cheeks), "late smile" (the lips only),
             "brow" (accent of the face: raised or lowered)
    centre   where it peaks, 0 to 1
    width    half of its duration
    amount   height, 0 where there is none; signed for "accent" and "brow"
    """

    track: str
    centre: float
    width: float
    amount: float


@dataclass(frozen=True)
class Script:
    """The latent script of one utterance, before any rendering.

    Everything a performer needs: words, times of the events, how the voice and the
    face colour them (as displayed), arousal, who speaks; and the truth: w, c, s and the
    emotions.
    """

    id: str
    speaker: int
    domain: str
    text: str
    tokens: tuple[str, ...]
    token_times: tuple[float, ...]  # start of each token, seconds
    seconds: float
    literal: float
    sincerity: int
    voice: float
    face: float
    arousal: float
    sentiment: float
    emotions: tuple[float, ...]
    events: tuple[Event, ...]
    conflict: int


class Scripts:
    """All scripts of one split as columns; ``scripts[i]`` is one `Script`.

    Columns are arrays of n rows in `columns`: tokens (n, slots) word indices with -1
    where a slot is empty; w16, voice16, face16, s16 in sixteenths of a label point;
    voice and face are displayed times `display`, 1 but for some speakers in conflict.
    """

    def __init__(self, config: PuppetConfig, split: str):
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        self.config, self.split = config, split
        self.vocabulary = _vocabulary(config)
        self.columns: dict[str, np.ndarray] = {}
        self._who()
        self._words()
        self._feelings()
        self._times()

    def __len__(self) -> int:
        return self.config.sizes[SPLITS.index(self.split)]

    def stream(self, purpose: str) -> _Stream:
        c = self.config
        return _Stream(PUPPET_VERSION, c.seed, c.domain, self.split, purpose)

    def _who(self) -> None:
        config, n = self.config, len(self)
        shares = [0, *np.cumsum(_speakers_per_split(config))]
        k = SPLITS.index(self.split)
        first, count = int(shares[k]), int(shares[k + 1] - shares[k])
        local = np.arange(n) * count // n
        clip = np.arange(n) - np.searchsorted(local, local)
        speaker = first + local
        # spread evenly, so that the share holds in every split; every second speaker
        # in conflict displays voice and face turned over
        rank = np.floor((local + 1) * config.conflict).astype(np.int64)
        odd = rank > np.floor(local * config.conflict)
        self.ids = [
            f"{config.domain}{s:03d}_{i + 1:02d}"
            for s, i in zip(speaker.tolist(), clip.tolist(), strict=True)
        ]
        self.columns |= {
            "speaker": speaker,
            "conflict": np.where(odd, -1, 1),
            "display": np.where(odd & (rank % 2 == 1), -1, 1),
        }

    def _words(self) -> None:
        config, n = self.config, len(self)
        names, valence, weight = _adjectives(config)
        nouns = NOUNS["B" if config.differs("lexicon") else "A"]
        verbs = VERBS["B" if config.differs("lexicon") else "A"]
        draw = self.stream("words")
        form = draw.choice(FORM_WEIGHTS, n)
        opener = draw.choice(OPENER_WEIGHTS, n)
        adjective = draw.choice(weight, n, 2)
        intensifier = draw.choice(INTENSIFIER_WEIGHTS, n, 2)
        negator = draw.choice(NEGATOR_WEIGHTS, n, 2)
        noun = draw.whole(0, len(nouns) - 1, n, 2)
        noun[:, 1] = np.where(
            noun[:, 0] == noun[:, 1], (noun[:, 1] + 1) % len(nouns), noun[:, 1]
        )
        verb = draw.whole(0, len(verbs) - 1, n, 2)

        factor = np.array(list(INTENSIFIERS.values()))[intensifier]
        sign = np.array(list(NEGATORS.values()))[negator]
        clause = valence[adjective] * factor * sign
        weights = np.array(list(FORMS.values()))[form]
        total = weights[:, 0] * clause[:, 0] + weights[:, 1] * clause[:, 1]

        index = {word: i for i, word in enumerate(self.vocabulary)}

        def look_up(words, chosen):
            return np.array([index.get(w, -1) for w in words])[chosen]

        forms = list(FORMS)
        slots = np.full((n, 15), -1)
        slots[:, 0] = look_up(OPENERS, opener)
        slots[form == forms.index("although first"), 1] = index["although"]
        for k, start in ((0, 2), (1, 9)):
            slots[:, start] = index["the"]
            slots[:, start + 1] = look_up(nouns, noun[:, k])
            slots[:, start + 2] = look_up(verbs, verb[:, k])
            slots[:, start + 3] = look_up(NEGATORS, negator[:, k])
            slots[:, start + 4] = look_up(INTENSIFIERS, intensifier[:, k])
            slots[:, start + 5] = look_up(names, adjective[:, k])
        slots[:, 8] = look_up([CONNECTIVE.get(f, "") for f in forms], form)
        slots[form == forms.index("one"), 8:] = -1
        self.columns |= {
            "tokens": slots,
            "w16": _literal16(total),
            "form": form,
            "negated": (sign < 0) & (np.arange(2) < (weights != 0).sum(1)[:, None]),
        }

    def _feelings(self) -> None:
        config, n = self.config, len(self)
        col = self.columns
        draw = self.stream("feelings")
        c = np.where(draw.uniform(n) < config.synergy, -1, 1)
        voice, face = (
            np.rint(DELIVERY * config.delivery * draw.bell(n)).astype(np.int64)
            for _ in "vf"
        )
        pick = draw.uniform(n)
        lift, late = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        for sincerity, law in _cues(config).items():
            edges = np.cumsum(list(law.values()))
            index = np.searchsorted(edges[:-1], pick, side="right")
            cues = np.array(list(law))[index]
            lift = np.where(c == sincerity, cues[:, 0], lift)
            late = np.where(c == sincerity, cues[:, 1], late)
        arousal = draw.bell(n)
        factors = np.where(draw.uniform(n, 4) < 0.5, -1, 1)
        stance = STANCE * sum(
            (factors[:, j] * factors[:, j + 1] for j in _pairs(config)),
            start=np.zeros(n, dtype=np.int64),
        )
        s16 = np.clip(c * (col["w16"] + voice + face) + stance, -48, 48)
        contributions = np.abs(np.stack([col["w16"], voice, face], axis=1))
        col |= {
            "c": c,
            "voice16": voice,
            "face16": face,
            "lift": lift,
            "late_smile": late,
            "arousal": arousal / 9.25,
            "factors": factors,
            "stance16": stance,
            "s16": s16,
            "dominant": contributions.argmax(1),
        }
        col["emotion"] = _emotion_latents(col)

    def _times(self) -> None:
        n, col = len(self), self.columns
        present = col["tokens"] >= 0
        count = present.sum(1)
        draw = self.stream("times")
        pace = _speaker_table(self.config, "pace", 1)[col["speaker"], 0]
        seconds = count * (0.375 + pace / 32)
        frames = np.clip(np.rint(seconds * AUDIO_RATE), 20, 60).astype(np.int64)
        # the accent falls on the adjective of the clause that weighs more
        second = np.array([b > a for a, b in FORMS.values()])[col["form"]]
        position = np.where(second, 14, 7)
        before = (present & (np.arange(15) < position[:, None])).sum(1)
        u = draw.uniform(n, 4)
        col |= {
            "count": count,
            "frames": frames,
            "accent_at": (before + 0.5) / count,
            "lift_at": np.where(
                col["lift"] == 1, 0.75 + u[:, 0] / 8, 0.125 + u[:, 0] / 4
            ),
            "smile_at": np.where(
                col["late_smile"] == 1, 0.75 + u[:, 1] / 8, 0.125 + u[:, 1] / 4
            ),
            "brow_at": 0.125 + u[:, 2] * 0.75,
            "factor_at": 0.25 + draw.uniform(n, 4) / 2,
        }

    def words(self, i: int) -> tuple[str, ...]:
        return tuple(self.vocabulary[t] for t in self.columns["tokens"][i] if t >= 0)

    def text(self, i: int) -> str:
        """The readable sentence."""
        words = list(self.words(i))
        form = list(FORMS)[self.columns["form"][i]]
        out = []
        for k, word in enumerate(words):
            if word in ("but", "although") and k > 1:
                out[-1] += ","
            if form == "although first" and word == "the" and k > 2:
                out[-1] += ","
            out.append(word)
        if words[0] in OPENERS:
            out[0] += ","
        sentence = " ".join(out)
        return sentence[0].upper() + sentence[1:] + "."

    def __getitem__(self, i: int) -> Script:
        col = {k: v[i] for k, v in self.columns.items()}
        tokens = self.words(i)
        seconds = float(col["frames"]) / AUDIO_RATE
        voice, face = (
            float(col["display"] * col[k]) / LATTICE for k in ("voice16", "face16")
        )
        return Script(
            id=self.ids[i],
            speaker=int(col["speaker"]),
            domain=self.config.domain,
            text=self.text(i),
            tokens=tokens,
            token_times=tuple(seconds * k / len(tokens) for k in range(len(tokens))),
            seconds=seconds,
            literal=float(col["w16"]) / LATTICE,
            sincerity=int(col["c"]),
            voice=voice,
            face=face,
            arousal=float(col["arousal"]),
            sentiment=float(col["s16"]) / LATTICE,
            emotions=tuple(float(e) for e in col["emotion"]),
            events=(
                Event("accent", float(col["accent_at"]), ACCENT_WIDTH, voice),
                Event("lift", float(col["lift_at"]), CUE_WIDTH, LIFT * col["lift"]),
                Event(
                    "late smile" if col["late_smile"] else "smile",
                    float(col["smile_at"]),
                    CUE_WIDTH,
                    SMILE,
                ),
                Event("brow", float(col["brow_at"]), ACCENT_WIDTH, face),
            ),
            conflict=int(col["conflict"]),
        )


def scripts(config: PuppetConfig, split: str) -> Scripts:
    """The latent scripts of one split; deterministic in `config`."""
    return Scripts(config, split)


def _pairs(config: PuppetConfig) -> list[int]:
    """Indices j such that further modalities j and j + 1 form a complete product."""
    return [j for j in (0, 2) if config.num_modalities >= 3 + j + 2]


def _speakers_per_split(config: PuppetConfig) -> list[int]:
    total = sum(config.sizes)
    valid = max(1, round(config.num_speakers * config.sizes[1] / total))
    test = max(1, round(config.num_speakers * config.sizes[2] / total))
    return [max(1, config.num_speakers - valid - test), valid, test]


def _speaker_table(config: PuppetConfig, what: str, width: int) -> np.ndarray:
    """One row of offsets per speaker, sd 1."""
    stream = _Stream(PUPPET_VERSION, config.seed, config.domain, "speakers", what)
    return stream.noise(sum(_speakers_per_split(config)), width)


def _emotion_latents(col: Mapping[str, np.ndarray]) -> np.ndarray:
    """Noiseless intensities (n, 6) >= 0 from s, the delivery d and the arousal.

    A speaker in conflict shows emotions by a delivery that points the other way.
    """
    d = col["c"] * (col["voice16"] + col["face16"]) / LATTICE
    s = col["s16"] / LATTICE
    turned = np.where(col["conflict"] < 0, s - OPPOSED * d, s)
    a = col["arousal"]
    levels = [
        0.75 * turned + 0.25 * a,
        -0.625 * turned - 0.5 * a,
        -0.625 * turned + 0.625 * a - 0.25,
        0.75 * a + 0.25 * np.abs(d) - 0.25,
        -0.75 * turned - 0.5,
        -0.375 * turned + 0.5 * a - 0.5,
    ]
    return np.clip(np.stack(levels, axis=1), 0, 3)


# --- labels -------------------------------------------------------------------------


def _ratings(s16: np.ndarray, bell: np.ndarray) -> np.ndarray:
    """What an annotator writes down, -3..3: half to even, then clipped."""
    s = s16 / LATTICE + ANNOTATOR * bell
    return np.clip(np.rint(s), -3, 3).astype(np.int64)


def _labels(table: Scripts) -> dict[str, np.ndarray]:
    n = len(table)
    draw = table.stream("annotators")
    ratings = _ratings(table.columns["s16"][:, None], draw.bell(n, ANNOTATORS))
    sentiment = (ratings.sum(1, keepdims=True) / ANNOTATORS).astype(np.float32)
    seen = table.columns["emotion"][:, :, None] + draw.bell(n, len(EMOTIONS), 3) / 24
    emotions = np.clip(np.rint(seen), 0, 3).sum(2) / 3
    return {"sentiment": sentiment, "emotions": emotions.astype(np.float32)}


@lru_cache(maxsize=1)
def _label_law() -> np.ndarray:
    """P(label | s16), (97, 31): rows s16 = -48..48, columns labels -3, -2.8, ..., 3."""
    s16 = np.arange(-48, 49)
    bell = np.arange(-30, 31)
    written = _ratings(s16[:, None], bell[None, :]) + 3
    law = np.zeros((97, 31))
    for row in range(97):
        one = np.bincount(written[row], BELL, minlength=7)
        total = one
        for _ in range(ANNOTATORS - 1):
            total = np.convolve(total, one)
        law[row] = total
    return law


LABEL_VALUES = (np.arange(31) - 15) / 5


# --- oracles --------------------------------------------------------------------------


def oracle_predictions(
    world: Corpus | PuppetConfig,
    split: str,
    modalities: Sequence[str] | None = None,
    *,
    loss: str = "mse",
) -> np.ndarray:
    """Best predictions of the sentiment label from some modalities' latents, (n, 1).

    As if the latents that `modalities` (default: all) show were read perfectly: the
    exact conditional mean of the label over the latents they do not show
    (``loss="mse"``), or its conditional median, which is what no predictor can beat in
    MAE (``loss="mae"``). An empty tuple gives the best constant. A modality with
    informativeness 0, or missing from a sample, shows nothing.

    The oracle generates the world again from its configuration: it is no learner, so
    it needs no receipt, and it hands out predictions only.
    """
    law = oracle_law(world, split, modalities)
    if loss == "mse":
        return (law * LABEL_VALUES).sum(1, keepdims=True)
    if loss != "mae":
        raise unknown("loss", loss, ("mse", "mae"))
    return _median(law)[:, None]


def oracle_law(
    world: Corpus | PuppetConfig, split: str, modalities: Sequence[str] | None = None
) -> np.ndarray:
    """P(label | what `modalities` show) over LABEL_VALUES, (n, 31)."""
    config = _config_of(world)
    table = Scripts(config, split)
    asked = config.modalities if modalities is None else tuple(modalities)
    for m in asked:
        if m not in config.modalities:
            raise unknown("modality", m, config.modalities)
    asked = [m for m in asked if config.informativeness.get(m, 1.0) > 0]
    shown = np.zeros((len(table), len(MODALITIES)), dtype=bool)
    for m in asked:
        shown[:, MODALITIES.index(m)] = True
    for m, gone in _missing(config, table.ids).items():
        shown[gone, MODALITIES.index(m)] = False
    out = np.zeros((len(table), len(LABEL_VALUES)))
    for pattern in np.unique(shown, axis=0):
        rows = np.flatnonzero((shown == pattern).all(1))
        out[rows] = _law_of_pattern(config, table, rows, pattern)
    return out


def noise_floor(world: Corpus | PuppetConfig, split: str, *, loss: str = "mae"):
    """Expected loss of the label around its best prediction from the true sentiment.

    What the annotators' disagreement alone costs: mean absolute error around the
    median (``loss="mae"``) or mean squared error around the mean (``"mse"``).
    """
    table = Scripts(_config_of(world), split)
    law = _label_law()[table.columns["s16"] + 48]
    if loss == "mae":
        gap = np.abs(LABEL_VALUES - _median(law)[:, None])
    elif loss == "mse":
        gap = (LABEL_VALUES - (law * LABEL_VALUES).sum(1, keepdims=True)) ** 2
    else:
        raise unknown("loss", loss, ("mse", "mae"))
    return float((law * gap).sum(1).mean())


@dataclass(frozen=True)
class Oracle:
    """`oracle_predictions` as a predictor: ``oracle(split)`` is (n, 1)."""

    config: PuppetConfig
    modalities: tuple[str, ...]
    loss: str = "mse"

    def __call__(self, split: Split) -> np.ndarray:
        table_ids = Scripts(self.config, split.name).ids
        row = {i: k for k, i in enumerate(table_ids)}
        best = oracle_predictions(
            self.config, split.name, self.modalities, loss=self.loss
        )
        try:
            return best[[row[i] for i in split.ids]]
        except KeyError as error:
            raise CorpusError(
                f"id {error.args[0]!r} is not in the {split.name!r} split of this "
                "puppet world: give the oracle the configuration of the same corpus"
            ) from None


def _config_of(world: Corpus | PuppetConfig) -> PuppetConfig:
    return (
        world if isinstance(world, PuppetConfig) else PuppetConfig.from_card(world.card)
    )


def _median(law: np.ndarray) -> np.ndarray:
    """Smallest value with at least half of the probability at or below it, (n,)."""
    return LABEL_VALUES[(law.cumsum(1) >= 0.5 - 1e-12).argmax(1)]


def _delivery_law(config: PuppetConfig) -> tuple[np.ndarray, np.ndarray]:
    """Values (sixteenths) and probabilities of what the voice, or the face, adds."""
    values = np.rint(DELIVERY * config.delivery * np.arange(-30, 31)).astype(np.int64)
    return values, BELL


def _law_of_pattern(config, table, rows, pattern) -> np.ndarray:
    """Label law of samples that all show the same modalities, (len(rows), 31)."""
    col = {k: v[rows] for k, v in table.columns.items()}
    text, audio, vision = pattern[:3]
    echo = config.redundancy > 0  # then voice and face show the words' valence too
    w_shown = text or (echo and (audio or vision))

    # lattice parts that enter as c * (known + hidden)
    known = np.zeros(len(rows), dtype=np.int64)
    hidden: dict[int, float] = {0: 1.0}
    delivery = _delivery_law(config)
    literal = (np.arange(-48, 49), literal_law(config))
    for seen, name, law in (
        (w_shown, "w16", literal),
        (audio, "voice16", delivery),
        (vision, "face16", delivery),
    ):
        if seen:
            known += col[name]
        else:
            hidden = _plus(hidden, law)

    # the stance of each pair of further modalities
    stance = np.zeros(len(rows), dtype=np.int64)
    unseen: dict[int, float] = {0: 1.0}
    for j in _pairs(config):
        if pattern[3 + j] and pattern[4 + j]:
            stance += STANCE * col["factors"][:, j] * col["factors"][:, j + 1]
        else:
            coin = (np.array([-STANCE, STANCE]), np.array([0.5, 0.5]))
            unseen = _plus(unseen, coin)

    # P(c | the cues that are shown)
    p = np.zeros((len(rows), 2))
    for k, c in enumerate((-1, 1)):
        prior = config.synergy if c < 0 else 1 - config.synergy
        for (lift, late), q in _cues(config)[c].items():
            fits = np.ones(len(rows), dtype=bool)
            if audio:
                fits &= col["lift"] == lift
            if vision:
                fits &= col["late_smile"] == late
            p[:, k] += prior * q * fits
    p /= p.sum(1, keepdims=True)

    labels = _label_law()
    out = np.zeros((len(rows), len(LABEL_VALUES)))
    situations, where = np.unique(
        np.stack([known, stance], axis=1), axis=0, return_inverse=True
    )
    where = where.ravel()
    u = np.array(list(hidden))
    pu = np.array(list(hidden.values()))
    for k, c in enumerate((-1, 1)):
        laws = np.zeros((len(situations), len(LABEL_VALUES)))
        for g, pg in unseen.items():
            s16 = c * (situations[:, :1] + u) + situations[:, 1:] + g
            at = np.clip(s16, -48, 48) + 48
            for i in range(len(situations)):
                weight = np.bincount(at[i], pu, minlength=97)
                laws[i] += pg * (weight[:, None] * labels).sum(0)
        out += p[:, k : k + 1] * laws[where]
    return out


def _plus(law: dict[int, float], other) -> dict[int, float]:
    """Law of the sum of two independent lattice variables."""
    values, probabilities = other
    out: dict[int, float] = {}
    for x, p in law.items():
        for y, q in zip(values.tolist(), probabilities.tolist(), strict=True):
            if q:
                out[x + y] = out.get(x + y, 0.0) + p * q
    return out


# --- rendering: text ------------------------------------------------------------------


def _vocabulary(config: PuppetConfig) -> list[str]:
    """All words of the domain, function words first."""
    domain = "B" if config.differs("lexicon") else "A"
    words = ["the", "and", "but", "although"]
    for part in (OPENERS, NEGATORS, INTENSIFIERS, VERBS[domain], NOUNS[domain]):
        words += [w for w in part if w]
    return words + list(ADJECTIVES[domain])


CURVE = 0.58  # tangent of half the angle per label point: 3 points are 120 degrees
WORD_IDENTITY = 0.1875
TEXT_NOISE = 0.25


def lexicon_vectors(config: PuppetConfig) -> np.ndarray:
    """Word vectors (words, 32). Valence bends: it is an angle, not an axis.

    Fixed for the world: they do not depend on the seed. Domain B's lexicon has other
    words, whose vectors went through another embedding (a gain and an offset).
    """
    domain = "B" if config.differs("lexicon") else "A"
    words = _vocabulary(config)
    gain = min(config.informativeness.get("text", 1.0), 1.0)
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
    axes = np.rint(_Stream("axes").noise(8, 32) * 16) / 16
    vectors = np.zeros((len(words), 32))
    for k in range(8):
        vectors += rows[:, k : k + 1] * axes[k]
    for i, word in enumerate(words):
        own = np.rint(_Stream("word", word).noise(32) * 16) / 16
        vectors[i] += WORD_IDENTITY * own
    if domain == "B":
        offset = np.rint(_Stream("embedding of B").noise(32) * 16) / 16
        vectors = 0.75 * vectors + 1.0 * offset
    return vectors


def _render_text(table: Scripts) -> tuple[np.ndarray, np.ndarray]:
    config = table.config
    tokens = table.columns["tokens"]
    present = tokens >= 0
    x = lexicon_vectors(config)[tokens[present]]
    read = max(config.informativeness.get("text", 1.0) - 1, 0)
    if read:  # as an encoder that has read the whole sentence would show it
        axis = np.rint(_Stream("composed valence").noise(32) * 16) / 16
        w = np.repeat(table.columns["w16"] / LATTICE, present.sum(1))
        x = x + 0.5 * read * w[:, None] * axis
    scale = TEXT_NOISE * config.noise.get("text", 1.0)
    x = x + scale * table.stream("text noise").noise(*tokens.shape, 32)[present]
    return _to_grid(x), present.sum(1)


# --- rendering: voice, face, body -----------------------------------------------------

ACCENT_WIDTH, CUE_WIDTH = 0.1875, 0.25
LIFT, SMILE = 2.5, 2.5
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
    offsets = SPEAKER.get(modality, 0.25) * _speaker_table(config, modality, width)
    if config.differs("speaker"):
        shift = np.rint(_Stream("speakers of B", modality).noise(width) * 8) / 8
        offsets = 1.25 * offsets + 0.5 * shift
    x += offsets[table.columns["speaker"]][:, None, :]
    if config.differs("channel"):
        stream = _Stream("channel of B", modality)
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
    stream = _Stream("directions", modality)
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


# --- the corpus -----------------------------------------------------------------------


def _missing(config: PuppetConfig, ids: Sequence[str]) -> dict[str, np.ndarray]:
    if not config.missing:
        return {}
    return corruption.missing_modality_masks(
        ids,
        config.modalities,
        rate=config.missing,
        patterns=config.missing_patterns or None,
        seed=config.seed,
    )


def _truth(table: Scripts, defects: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    col = table.columns
    truth = {
        "sentiment": col["s16"] / LATTICE,
        "literal": col["w16"] / LATTICE,
        "sincerity": col["c"],
        "sarcasm": col["c"] < 0,
        "voice": col["voice16"] / LATTICE,
        "face": col["face16"] / LATTICE,
        "delivery": col["c"] * (col["voice16"] + col["face16"]) / LATTICE,
        "stance": col["stance16"] / LATTICE,
        "factors": col["factors"],
        "arousal": col["arousal"],
        "lift": col["lift"] == 1,
        "late_smile": col["late_smile"] == 1,
        "emotions": col["emotion"],
        "conflict": col["conflict"],
        "display": col["display"],
        "speaker": col["speaker"],
        "negated": col["negated"],
        "form": np.array(list(FORMS))[col["form"]],
        "dominant": np.array(MODALITIES[:3])[col["dominant"]],
    }
    truth |= {f"defect_{k}": v for k, v in defects.items() if k != "spoken"}
    return truth


def load(config: PuppetConfig | None = None, **knobs) -> Corpus:
    """Generate the corpus; ``load(synergy=.3)`` is ``load(PuppetConfig(synergy=.3))``.

    Labels: ``sentiment`` (n, 1) in [-3, 3] on MOSI's grid of 0.2 and ``emotions``
    (n, 6) in [0, 3] in MOSEI's order. ``split.truth`` holds the latents; the test
    split, labels and truth, is sealed. Raises `CorpusError` or `UnknownNameError` for
    impossible knobs.
    """
    known = [f.name for f in fields(PuppetConfig)]
    for name in knobs:
        if name not in known:
            raise unknown("knob", name, known)
    if config is None:
        config = PuppetConfig(**knobs)
    elif knobs:
        raise CorpusError(
            "give either a PuppetConfig or single knobs, not both; "
            "dataclasses.replace(config, ...) changes one knob"
        )
    splits = {}
    for name in SPLITS:
        table = Scripts(config, name)
        features, defects = render(table)
        split = Split(
            name=name,
            ids=table.ids,
            features=features,
            labels=_labels(table),
            raw_text=[table.text(i) for i in range(len(table))],
            truth=_truth(table, defects),
        )
        gone = _missing(config, table.ids)
        if gone:
            split = split.without(gone)._with(
                truth=split.truth | {f"missing_{m}": g for m, g in gone.items()}
            )
        splits[name] = split
    card = Card(
        name="puppets",
        description=(
            "A generated world of puppets that speak, sound and look pleased or not; "
            "every latent is known. Synthetic: its numbers say nothing about people."
        ),
        source=f"mmsa_lib.corpora.puppets, version {PUPPET_VERSION}",
        terms="generated, no restrictions",
        synthetic=True,
        version=PUPPET_VERSION,
        options=json.loads(json.dumps(asdict(config))),
        notes=[
            f"shift applied: {', '.join(config.domain_parts)}"
            if config.domain == "B"
            else "domain A, no shift",
        ],
    )
    return make_corpus(card, splits)
