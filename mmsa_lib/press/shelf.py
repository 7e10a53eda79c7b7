"""Run records by the short ids that stand on a page."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mmsa_lib import runs


@dataclass(frozen=True)
class Shelf:
    """Records by the first 12 digits of their id, from folders that may hold them."""

    folders: tuple[Path, ...]

    @cached_property
    def files(self) -> dict[str, Path]:
        paths = (p for f in self.folders if f.is_dir() for p in f.rglob("*.json"))
        return {p.stem.rpartition("-")[2]: p for p in paths}

    def __getitem__(self, short: str) -> runs.RunRecord:
        """Raises `RecordError` if there is none of that id, or it was edited."""
        if short not in self.files:
            places = " or ".join(f.name for f in self.folders)
            raise runs.RecordError(
                f"there is no record {short} in {places}; execute the chapter again"
            )
        return runs.load(self.files[short])
