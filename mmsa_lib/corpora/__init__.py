"""Corpora by name. Importing this is cheap; a builder is imported when it is needed."""

from __future__ import annotations

import inspect
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mmsa_lib.errors import unknown

if TYPE_CHECKING:
    from mmsa_lib.corpora.schema import Corpus

_CORPORA = {  # name: (module, what it is and its options)
    "puppets": (
        "puppets",
        "embedded synthetic world with known ground truth; options: every field of "
        "PuppetConfig",
    ),
    "mosi-text-audio": (
        "mosi_text_audio",
        "CMU-MOSI, text and audio, 2199 segments, from public files; options: encoder "
        "(Hugging Face name or folder) or text_features (.npz)",
    ),
    "mosei-video": (
        "mosei_video",
        "CMU-MOSEI, 901 whole videos, text, audio and vision, from a given file; "
        "options: path (.npz)",
    ),
    "lesions": (
        "lesions",
        "synthetic pictures of four channels, each showing a known part of a lesion, "
        "as sequences of pixels; options: sizes, side, seed",
    ),
    "puppet-clips": (
        "media",
        "the puppets' 112 embedded clips: raw video, sound and words; options: frames, "
        "max_pixels",
    ),
    "clips": (
        "media",
        "your clips in MMSA-FET's layout: raw video, sound and words; options: folder, "
        "frames, max_pixels, skip_unusable",
    ),
}
_COMMON = ("data_dir", "accept_terms")
# need no data folder
_EMBEDDED = {"puppets": "load", "lesions": "load", "puppet-clips": "embedded"}


def names() -> list[str]:
    """The corpora that `load` knows."""
    return list(_CORPORA)


def describe(name: str) -> str:
    """One line: what the corpus is and what options it takes."""
    return _entry(name)[1]


def data_folder(data_dir: str | Path | None = None) -> Path:
    """Where real data lies: `data_dir`, else the variable MMSA_DATA, else ./data."""
    return Path(data_dir or os.environ.get("MMSA_DATA") or "data")


def load(name: str, data_dir: str | Path | None = None, **options) -> Corpus:
    """A corpus by name, its test split sealed.

    Raises `UnknownNameError` for a name or option that does not exist, and
    `CorpusError` with the command to run when real data is not there.
    """
    module = _module(name)
    if name in _EMBEDDED:
        build = getattr(module, _EMBEDDED[name])
        _check_options(name, options, inspect.signature(build))
        return build(**options)
    _check_options(name, options, inspect.signature(module.load))
    return module.load(data_folder(data_dir), **options)


def prepare(
    name: str,
    data_dir: str | Path | None = None,
    accept_terms: bool = False,
    **options,
) -> Path | None:
    """Download and convert what `load` needs; returns where it lies.

    What is embedded needs nothing: None. Raises `DownloadError` (terms not accepted,
    file not fetched), `CorpusError` (bad content, full or read-only disk).
    """
    module = _module(name)
    if name in _EMBEDDED:
        return None
    _check_options(name, options, inspect.signature(module.prepare))
    return module.prepare(data_folder(data_dir), accept_terms, **options)


def options(name: str) -> dict[str, str]:
    """What `prepare` takes for a corpus: names and, as in the source, types."""
    module = _module(name)
    if name in _EMBEDDED:
        return {}
    known = inspect.signature(module.prepare).parameters.values()
    return {p.name: str(p.annotation) for p in known if p.name not in _COMMON}


def terms(name: str) -> str:
    """The terms under which a corpus may be used."""
    return getattr(_module(name), "TERMS", "Generated; no terms.")


def _entry(name: str) -> tuple[str, str]:
    if name not in _CORPORA:
        raise unknown("corpus", name, _CORPORA)
    return _CORPORA[name]


def _module(name: str):
    return import_module(f"mmsa_lib.corpora.{_entry(name)[0]}")


def _check_options(name: str, options: dict, signature: inspect.Signature) -> None:
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return  # the builder checks them itself
    known = [p for p in signature.parameters if p not in _COMMON]
    for option in options:
        if option not in known:
            raise unknown(f"option of {name}", option, known)
