"""The lexicon and the grammar: how words compose into a literal valence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np

from mmsa_lib.corpora.puppets.world import LATTICE, PuppetConfig

# Valences are in quarters of a label point, factors of intensifiers and negators in
# quarters. The words of domain B express the same range with other words.
VALENCES = (-11, -10, -10, -9, -7, -6, -6, -5, -4, -4, -3, -2, -1)
VALENCES += (0, 2, 3, 3, 4, 4, 6, 6, 7, 9, 9, 10, 10, 11)
ADJECTIVES = {
    domain: dict(zip(words.split(), VALENCES, strict=True))
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
    domain: tuple(words.split())
    for domain, words in {
        "A": "plot cast acting music ending dialogue story camera pacing humour",
        "B": "screen battery case sound lens keyboard fan charger handle motor",
    }.items()
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


def adjectives_of(config: PuppetConfig) -> tuple[list[str], np.ndarray, np.ndarray]:
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
    return float(literal16(first * parts[0] + second * parts[1])) / LATTICE


def literal16(total):
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
    _, valence, weight = adjectives_of(config)
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
        w = literal16(first * x[:, None] + second * x[None, :]) + 3 * LATTICE
        share = p[:, None] * p[None, :] * (weight / sum(FORM_WEIGHTS))
        law += np.bincount(w.ravel(), share.ravel(), minlength=len(law))
    return law


def vocabulary_of(config: PuppetConfig) -> list[str]:
    """All words of the domain, function words first."""
    domain = "B" if config.differs("lexicon") else "A"
    words = ["the", "and", "but", "although"]
    for part in (OPENERS, NEGATORS, INTENSIFIERS, VERBS[domain], NOUNS[domain]):
        words += [w for w in part if w]
    return words + list(ADJECTIVES[domain])
