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
the label is a finite sum and the oracles are exact. Scripts come first and know
nothing about features: the same script can be rendered as vectors (`render`) or drawn
and spoken as a clip. Each purpose has its own random stream, so a knob that concerns
features never changes a script.

Same bytes on every machine: integers of PCG64 are the only source of randomness,
floats see element-wise + - * / only, and stored values lie on a grid of 1/1024.
"""

from mmsa_lib.corpora.puppets.generate import load
from mmsa_lib.corpora.puppets.grammar import (
    ADJECTIVES,
    FORMS,
    INTENSIFIERS,
    NEGATORS,
    compose,
    literal16,
    literal_law,
)
from mmsa_lib.corpora.puppets.latents import Event, Script, Scripts, scripts
from mmsa_lib.corpora.puppets.oracle import (
    LABEL_VALUES,
    Oracle,
    label_law,
    noise_floor,
    oracle_law,
    oracle_predictions,
)
from mmsa_lib.corpora.puppets.rendering import (
    AUDIO_TRACKS,
    COLOUR,
    VISION_TRACKS,
    lexicon_vectors,
    render,
)
from mmsa_lib.corpora.puppets.world import (
    AUDIO_CHANNELS,
    AUDIO_RATE,
    BELL,
    DELIVERY,
    DOMAIN_PARTS,
    GRID,
    LATTICE,
    MODALITIES,
    PUPPET_VERSION,
    STANCE,
    VISION_CHANNELS,
    VISION_RATE,
    WIDTHS,
    PuppetConfig,
    Stream,
    cues_of,
)

__all__ = [
    "ADJECTIVES",
    "AUDIO_CHANNELS",
    "AUDIO_RATE",
    "AUDIO_TRACKS",
    "BELL",
    "COLOUR",
    "DELIVERY",
    "DOMAIN_PARTS",
    "FORMS",
    "GRID",
    "INTENSIFIERS",
    "LABEL_VALUES",
    "LATTICE",
    "MODALITIES",
    "NEGATORS",
    "PUPPET_VERSION",
    "STANCE",
    "VISION_CHANNELS",
    "VISION_RATE",
    "VISION_TRACKS",
    "WIDTHS",
    "Event",
    "Oracle",
    "PuppetConfig",
    "Script",
    "Scripts",
    "Stream",
    "compose",
    "cues_of",
    "label_law",
    "lexicon_vectors",
    "literal16",
    "literal_law",
    "load",
    "noise_floor",
    "oracle_law",
    "oracle_predictions",
    "render",
    "scripts",
]
