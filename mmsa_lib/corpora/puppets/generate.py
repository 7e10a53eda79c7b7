"""Assembling a corpus of the one schema from scripts and what modalities show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields

import numpy as np

from mmsa_lib.corpora.puppets.grammar import FORMS
from mmsa_lib.corpora.puppets.latents import Scripts
from mmsa_lib.corpora.puppets.rendering import render
from mmsa_lib.corpora.puppets.world import (
    LATTICE,
    MODALITIES,
    PUPPET_VERSION,
    PuppetConfig,
)
from mmsa_lib.corpora.schema import SPLITS, Card, Corpus, Split, make_corpus
from mmsa_lib.errors import CorpusError, unknown


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
    return make_corpus(card, {name: _split(config, name) for name in SPLITS})


def _split(config: PuppetConfig, name: str) -> Split:
    table = Scripts(config, name)
    features, defects = render(table)
    split = Split(
        name=name,
        ids=table.ids,
        features=features,
        labels=table.labels(),
        raw_text=[table.text(i) for i in range(len(table))],
        truth=_truth(table, defects),
    )
    gone = table.missing()
    if not gone:
        return split
    masks = {f"missing_{m}": g for m, g in gone.items()}
    return split.without(gone)._with(truth=split.truth | masks)


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
