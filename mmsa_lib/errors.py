"""Errors a reader can act on: what was found, what was expected, what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class MmsaError(Exception):
    """Base of every error this library raises on purpose."""


class CorpusError(MmsaError, ValueError):
    """A corpus, or a file it is built from, is not what the schema asks for."""


class ClipError(CorpusError):
    """A clip cannot be decoded, or its folder cannot be read."""


class DownloadError(MmsaError, OSError):
    """A file could not be fetched whole and verified."""


class SealedError(MmsaError, PermissionError):
    """Test labels were asked for before validation had frozen a predictor."""


class TrainingError(MmsaError, RuntimeError):
    """Training cannot go on; the message names the batch or the file."""


class MetricError(MmsaError, ValueError):
    """Values cannot be scored or compared: wrong shape, NaN, or too few of them."""


class ConfigError(MmsaError, ValueError):
    """A configuration that nothing can be built from."""


class BookError(MmsaError, RuntimeError):
    """The book cannot be executed or rendered; the message names file and cell."""


class UnknownNameError(MmsaError, KeyError):
    """A name (corpus, chapter, parameter, modality) that does not exist."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """Build the error for an unknown `name`, listing what is known.

    Example: ``raise unknown("corpus", "mossi", ["mosi", "puppets"])``.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    listing = ", ".join(known) or "(none)"
    return UnknownNameError(f"unknown {kind} {name!r}.{hint} Known: {listing}.")


def check_device(device: str) -> None:
    """Raise `UnknownNameError` unless `device` is auto, cpu, cuda or cuda:NUMBER."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UnknownNameError(
            f"unknown device {device!r}. A GPU is called cuda. Known: auto, cpu, cuda."
        )
