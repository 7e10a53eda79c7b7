"""Latent scripts: what an utterance is, before anything of it is shown.

Words, delivery, cues, arousal and times of every utterance of a split, what follows
from them (the true sentiment and emotions), what annotators make of that (the labels),
and which modalities a sample lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mmsa_lib.corpora import corruption
from mmsa_lib.corpora.puppets.grammar import (
    CONNECTIVE,
    FORM_WEIGHTS,
    FORMS,
    INTENSIFIER_WEIGHTS,
    INTENSIFIERS,
    NEGATOR_WEIGHTS,
    NEGATORS,
    NOUNS,
    OPENER_WEIGHTS,
    OPENERS,
    VERBS,
    adjectives_of,
    literal16,
    vocabulary_of,
)
from mmsa_lib.corpora.puppets.world import (
    ANNOTATOR,
    ANNOTATORS,
    AUDIO_RATE,
    DELIVERY,
    LATTICE,
    OPPOSED,
    PUPPET_VERSION,
    STANCE,
    PuppetConfig,
    Stream,
    cues_of,
    speaker_offsets,
    speakers_per_split,
    stance_pairs,
)
from mmsa_lib.corpora.schema import EMOTIONS, SPLITS
from mmsa_lib.errors import unknown

# of accents and of the cues of sarcasm, as fractions of the utterance; their heights
ACCENT_WIDTH, CUE_WIDTH = 0.1875, 0.25
LIFT, SMILE = 2.5, 2.5


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
        self.vocabulary = vocabulary_of(config)
        self.columns: dict[str, np.ndarray] = {}
        self._who()
        self._words()
        self._feelings()
        self._times()

    def __len__(self) -> int:
        return self.config.sizes[SPLITS.index(self.split)]

    def stream(self, purpose: str) -> Stream:
        """The random numbers of this split for one purpose."""
        c = self.config
        return Stream(PUPPET_VERSION, c.seed, c.domain, self.split, purpose)

    def _who(self) -> None:
        config, n = self.config, len(self)
        shares = [0, *np.cumsum(speakers_per_split(config))]
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
        names, valence, weight = adjectives_of(config)
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

        picks = (
            (nouns, noun),
            (verbs, verb),
            (NEGATORS, negator),
            (INTENSIFIERS, intensifier),
            (names, adjective),
        )

        factor = np.array(list(INTENSIFIERS.values()))[intensifier]
        sign = np.array(list(NEGATORS.values()))[negator]
        clause = valence[adjective] * factor * sign
        weights = np.array(list(FORMS.values()))[form]
        total = weights[:, 0] * clause[:, 0] + weights[:, 1] * clause[:, 1]

        self.columns |= {
            "tokens": self._slots(form, opener, picks),
            "w16": literal16(total),
            "form": form,
            "negated": (sign < 0) & (np.arange(2) < (weights != 0).sum(1)[:, None]),
        }

    def _slots(self, form, opener, clauses) -> np.ndarray:
        """Word indices (n, 15): an opener, "although", two clauses with a connective.

        clauses   words to choose from, and what each clause chose (n, 2), in the order
                  in which they are said
        """
        index = {word: i for i, word in enumerate(self.vocabulary)}

        def look_up(words, chosen):
            return np.array([index.get(w, -1) for w in words])[chosen]

        forms = list(FORMS)
        slots = np.full((len(self), 15), -1)
        slots[:, 0] = look_up(OPENERS, opener)
        slots[form == forms.index("although first"), 1] = index["although"]
        for k, start in ((0, 2), (1, 9)):
            slots[:, start] = index["the"]
            for step, (words, chosen) in enumerate(clauses, 1):
                slots[:, start + step] = look_up(words, chosen[:, k])
        slots[:, 8] = look_up([CONNECTIVE.get(f, "") for f in forms], form)
        slots[form == forms.index("one"), 8:] = -1
        return slots

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
        lift, late = _cues(config, c, pick)
        arousal = draw.bell(n)
        factors = np.where(draw.uniform(n, 4) < 0.5, -1, 1)
        stance = STANCE * sum(
            (factors[:, j] * factors[:, j + 1] for j in stance_pairs(config)),
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
        pace = speaker_offsets(self.config, "pace", 1)[col["speaker"], 0]
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

    def labels(self) -> dict[str, np.ndarray]:
        """What the annotators say: sentiment (n, 1) and emotions (n, 6), float32."""
        n, col = len(self), self.columns
        draw = self.stream("annotators")
        ratings = ratings_of(col["s16"][:, None], draw.bell(n, ANNOTATORS))
        sentiment = (ratings.sum(1, keepdims=True) / ANNOTATORS).astype(np.float32)
        seen = col["emotion"][:, :, None] + draw.bell(n, len(EMOTIONS), 3) / 24
        emotions = np.clip(np.rint(seen), 0, 3).sum(2) / 3
        return {"sentiment": sentiment, "emotions": emotions.astype(np.float32)}

    def missing(self) -> dict[str, np.ndarray]:
        """By modality, which samples lack it, (n,) bool; empty where nothing does."""
        config = self.config
        if not config.missing:
            return {}
        return corruption.missing_modality_masks(
            self.ids,
            config.modalities,
            rate=config.missing,
            patterns=config.missing_patterns or None,
            seed=config.seed,
        )

    def words(self, i: int) -> tuple[str, ...]:
        """The words of sample i, in order."""
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


def _cues(config: PuppetConfig, c: np.ndarray, pick: np.ndarray):
    """Late lift and late smile (n,) of sincerities c, by uniform numbers `pick`."""
    lift, late = np.zeros_like(c), np.zeros_like(c)
    for sincerity, law in cues_of(config).items():
        edges = np.cumsum(list(law.values()))
        index = np.searchsorted(edges[:-1], pick, side="right")
        cues = np.array(list(law))[index]
        lift = np.where(c == sincerity, cues[:, 0], lift)
        late = np.where(c == sincerity, cues[:, 1], late)
    return lift, late


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


def ratings_of(s16: np.ndarray, bell: np.ndarray) -> np.ndarray:
    """What an annotator writes down, -3..3: half to even, then clipped."""
    s = s16 / LATTICE + ANNOTATOR * bell
    return np.clip(np.rint(s), -3, 3).astype(np.int64)
