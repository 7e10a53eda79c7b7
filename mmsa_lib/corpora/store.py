"""Corpora on disk: one safetensors file and a JSON card, memory-mapped.

    folder/card.json                  the card, the layout, the name of the data file
    folder/data-<hash>.safetensors    "train/features/text" (steps, width) F32 or F16,
                                      "train/offsets/text" (n + 1,), "train/labels/...",
                                      "train/ids" and "train/raw_text" as UTF-8 bytes

Writing a new data file under a new name and then replacing the card makes the change
atomic: a reader sees the old store or the new one.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from mmsa_lib.corpora.download import disk_remedy
from mmsa_lib.corpora.schema import (
    Card,
    Corpus,
    Ragged,
    Split,
    _modality_facts,
    _split_facts,
    fingerprint,
)
from mmsa_lib.errors import CorpusError, unknown
from mmsa_lib.files import publish

FORMAT = "mmsa-store 1"
RELEASE_BYTES = 64 << 20  # mapped pages count as memory: give them back this often
_FAULT_AROUND = 1 << 16  # the kernel maps up to this much around a page that is read
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_NAMES = {np.dtype(v): k for k, v in _DTYPES.items()}


@dataclass
class _Tensor:
    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def write(corpus: Corpus, folder: str | Path, float16: Sequence[str] = ()) -> Path:
    """Store a corpus in `folder`, replacing a store there only when all is written.

    Samples are read and written one by one, so feature values may be memory-mapped,
    HDF5 data sets, or anything with `ndim`, `shape` and slices. Modalities named in
    `float16` take half the space. The card's fingerprint is that of what was stored.
    Raises `CorpusError` when the disk is full or read-only; nothing is then left.
    """
    folder = Path(folder)
    for m in float16:
        if m not in corpus.modalities:
            raise unknown("modality", m, corpus.modalities)
    if any(split.extras for split in corpus.splits.values()):
        raise CorpusError(
            f"{corpus.name} holds extras beside its sequences, which a store does not "
            "keep. Clips have a cache of their own: media.clip_corpus(cache=...)."
        )
    tensors = _plan(corpus, float16)
    made = not folder.exists()
    parts = [folder / f".{os.getpid()}.{kind}.part" for kind in ("data", "card")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_old_parts(folder)
        _publish(corpus, float16, tensors, folder, *parts)
    except BaseException as error:
        if folder.is_dir():
            for part in parts:
                part.unlink(missing_ok=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            size = sum(t.nbytes for t in tensors) / 1e6
            raise CorpusError(
                f"could not write a store of {size:,.0f} MB to {folder}: "
                f"{disk_remedy(error, folder / 'card.json')}"
            ) from error
        raise
    return folder


def open_store(folder: str | Path) -> Corpus:
    """Map a store; features are read when a sample is. `test` is sealed.

    Raises `CorpusError` when the folder holds no store or a damaged one. Feature values
    are not scanned: `verify` does that.
    """
    folder = Path(folder)
    document = _read_card(folder)
    try:
        card = Card(**document["card"])
        layout = document["splits"]
        data_file = folder / Path(document["data"]["file"]).name  # never elsewhere
        data = _Data(data_file, document["data"]["bytes"])
        if data.fingerprint != card.sha256:
            raise _damaged(
                folder,
                f"card.json describes data with fingerprint {card.sha256[:12]}..., but "
                f"{data_file.name} has {data.fingerprint[:12]}...",
            )
        splits = {
            name: _read_split(data, name, parts) for name, parts in layout.items()
        }
        for name, split in splits.items():
            _compare(folder, card, name, split)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"card.json lacks or misuses {error}") from error
    return Corpus(document["name"], card, splits)


def verify(folder: str | Path) -> str:
    """Read a whole store and return its fingerprint; `CorpusError` if it changed."""
    corpus = open_store(folder)
    found = fingerprint(corpus.splits)
    if found != corpus.card.sha256:
        raise _damaged(
            Path(folder),
            f"its content has fingerprint {found[:12]}..., the card says "
            f"{corpus.card.sha256[:12]}...: values were changed",
        )
    return found


# ------------------------------------------------------------------------- writing


def _publish(corpus, float16, tensors, folder, data_part, card_part) -> None:
    layout = {
        name: {
            "modalities": list(split.features),
            "labels": list(split._labels),
            "truth": list(split._truth),
            "raw_text": split.raw_text is not None,
        }
        for name, split in corpus.splits.items()
    }
    with data_part.open("w+b") as file:
        size = _write_data(file, tensors)
        data = _Data(data_part, size)
        stored = {name: _read_split(data, name, layout[name]) for name in layout}
        sha256 = fingerprint(stored)
        file.seek(0)
        file.write(_header(tensors, sha256))
        file.flush()
        os.fsync(file.fileno())
    token = hashlib.sha256(_header(tensors, sha256)).hexdigest()[:12]
    data_file = folder / f"data-{token}.safetensors"
    # Views (`only`, `standardised`) keep the card of the corpus they look at.
    facts = {}
    for m, found in _modality_facts(corpus.splits).items():
        kept_as = {"stored_as": "float16" if m in float16 else "float32"}
        facts[m] = {**corpus.card.modalities.get(m, {}), **found, **kept_as}
    card = replace(
        corpus.card,
        sha256=sha256,
        modalities=facts,
        splits=_split_facts(corpus.splits),
    )
    document = {
        "format": FORMAT,
        "name": corpus.name,
        "card": card.as_dict(),
        "data": {"file": data_file.name, "bytes": size},
        "splits": layout,
    }
    with card_part.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, ensure_ascii=False, default=_json_number)
        file.flush()
        os.fsync(file.fileno())
    try:
        previous = _read_card(folder)["data"]["file"]
    except (CorpusError, KeyError, TypeError):
        previous = None
    publish(data_part, data_file)
    publish(card_part, folder / "card.json")
    _sync_folder(folder)
    if previous not in (None, data_file.name):
        (folder / Path(previous).name).unlink(missing_ok=True)


def _plan(corpus: Corpus, float16: Sequence[str]) -> list[_Tensor]:
    tensors = []
    for name, split in corpus.splits.items():
        tensors += _plan_strings(f"{name}/ids", split.ids)
        if split.raw_text is not None:
            tensors += _plan_strings(f"{name}/raw_text", split.raw_text)
        for m, ragged in split.features.items():
            tensors += _plan_features(name, m, ragged, m in float16)
        for k, array in split._labels.items():
            tensors.append(_plan_array(f"{name}/labels/{k}", array))
        for k, array in split._truth.items():
            if array.dtype.kind == "U":
                tensors += _plan_strings(f"{name}/truth/{k}", array.tolist())
            else:
                tensors.append(_plan_array(f"{name}/truth/{k}", array))
    # Wide types first: every tensor then starts at a multiple of its item size.
    return sorted(tensors, key=lambda t: -t.dtype.itemsize)


def _plan_array(key: str, array: np.ndarray) -> _Tensor:
    little = array.dtype.newbyteorder("<")
    if little not in _NAMES:
        raise CorpusError(
            f"{key} has dtype {array.dtype}, which a store cannot hold; convert it to "
            "numbers first"
        )
    return _Tensor(key, little, array.shape, lambda: [array.astype(little)])


def _plan_strings(key: str, strings: Sequence[str]) -> list[_Tensor]:
    encoded = [s.encode("utf-8", "surrogatepass") for s in strings]
    offsets = _offsets([len(b) for b in encoded])
    text = np.frombuffer(b"".join(encoded), np.uint8)
    return [_plan_array(key, text), _plan_array(f"{key}.offsets", offsets)]


def _plan_features(split: str, m: str, ragged: Ragged, half: bool) -> list[_Tensor]:
    dtype = np.dtype("<f2" if half else "<f4")
    offsets = _offsets(ragged.lengths)

    def blocks() -> Iterator[np.ndarray]:
        for i in range(len(ragged)):
            x = ragged[i]
            if half and np.abs(x).max(initial=0) > np.finfo(np.float16).max:
                raise CorpusError(
                    f"modality {m!r} holds values up to {np.abs(x).max():.3g}, beyond "
                    "float16; write it as float32"
                )
            yield x.astype(dtype)

    shape = (int(offsets[-1]), ragged.width)
    return [
        _Tensor(f"{split}/features/{m}", dtype, shape, blocks),
        _plan_array(f"{split}/offsets/{m}", offsets),
    ]


def _offsets(lengths) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _header(tensors: list[_Tensor], sha256: str) -> bytes:
    entries = {"__metadata__": {"format": FORMAT, "fingerprint": sha256}}
    end = 0
    for t in tensors:
        entries[t.key] = {
            "dtype": _NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [end, end + t.nbytes],
        }
        end += t.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_data(file, tensors: list[_Tensor]) -> int:
    file.write(_header(tensors, "0" * 64))  # the fingerprint comes when all is written
    for t in tensors:
        written = 0
        for block in t.blocks():
            written += file.write(block.tobytes())
        if written != t.nbytes:
            raise CorpusError(
                f"{t.key} gave {written} bytes, expected {t.nbytes} for shape {t.shape}"
            )
    file.flush()
    return file.tell()


def _json_number(x):
    if isinstance(x, np.generic):
        return x.item()
    raise CorpusError(f"the card holds {x!r}, which JSON cannot hold")


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_old_parts(folder: Path) -> None:
    """A killed writer leaves its part; a day later nobody is writing it any more."""
    for part in folder.glob(".*.part"):
        if time.time() - part.stat().st_mtime > 86_400:
            part.unlink(missing_ok=True)


# ------------------------------------------------------------------------- reading


class _Data:
    """A mapped safetensors file, its header checked against its size."""

    def __init__(self, path: Path, expected_bytes: int):
        self.path = path
        if not path.is_file():
            raise _damaged(path.parent, f"{path.name} is missing")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected_bytes or size < 10:
                raise _damaged(
                    path.parent,
                    f"{path.name} has {size:,} bytes, the card says "
                    f"{expected_bytes:,}: it is truncated or another file",
                )
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise _damaged(path.parent, f"{path.name} has no safetensors header")
            try:
                self.entries = json.loads(file.read(length))
                self.fingerprint = self.entries.pop("__metadata__")["fingerprint"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise _damaged(
                    path.parent, f"the header of {path.name} is unreadable"
                ) from error
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.start = 8 + length
        self._read = 0

    def array(self, key: str) -> np.ndarray:
        """A read-only view; nothing is read from disk yet."""
        if key not in self.entries:
            split = key.split("/")[0]
            there = [k for k in self.entries if k.startswith(f"{split}/")]
            raise _damaged(
                self.path.parent,
                f"the card lists {key!r}, but {self.path.name} has no such key (it has "
                f"{', '.join(sorted(there)) or 'nothing of this split'})",
            )
        entry = self.entries[key]
        try:
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            shape = tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if end - begin != dtype.itemsize * math.prod(shape) or begin < 0:
                raise ValueError
            return np.ndarray(shape, dtype, self.map, self.start + begin)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(
                self.path.parent,
                f"{key!r} in {self.path.name} is declared as {entry}, which does not "
                "fit the file",
            ) from error

    def strings(self, key: str) -> list[str]:
        data = self.array(key).tobytes()
        offsets = self.array(f"{key}.offsets")
        bounds = offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != len(data) or (np.diff(offsets) < 0).any():
            raise _damaged(self.path.parent, f"the offsets of {key!r} do not fit it")
        try:
            return [
                data[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(bounds)
            ]
        except UnicodeDecodeError as error:
            raise _damaged(self.path.parent, f"{key!r} is not UTF-8") from error

    def note_read(self, nbytes: int) -> None:
        """Count what was read; from time to time hand the mapped pages back.

        They stay in the kernel's cache and are mapped again when needed.
        """
        self._read += nbytes + _FAULT_AROUND
        if self._read > RELEASE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)
            self._read = 0


class _Rows:
    """The values of a `Ragged` in a mapped file: slices of rows, pages given back."""

    ndim = 2

    def __init__(self, data: _Data, key: str):
        self._data = data
        self._array = data.array(key)
        if self._array.ndim != 2:
            raise _damaged(
                data.path.parent,
                f"{key!r} has shape {self._array.shape}, expected (steps, width)",
            )
        self.shape, self.dtype = self._array.shape, self._array.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows) -> np.ndarray:
        found = self._array[rows]
        self._data.note_read(found.nbytes)
        return found

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self._array, dtype=dtype, copy=copy)


def _read_card(folder: Path) -> dict:
    path = folder / "card.json"
    if not path.is_file():
        raise CorpusError(
            f"{folder} holds no corpus store (no card.json). Build one first: "
            "mmsa-book data get NAME, or store.write(corpus, folder)."
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        written_as = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, "card.json is not the JSON of a store") from error
    if written_as != FORMAT:
        raise CorpusError(
            f"{path} has format {written_as!r}, this version reads {FORMAT!r}: build "
            "the store again"
        )
    return document


def _read_split(data: _Data, name: str, layout: dict) -> Split:
    ids = data.strings(f"{name}/ids")
    features = {}
    for m in layout["modalities"]:
        rows = _Rows(data, f"{name}/features/{m}")
        offsets = data.array(f"{name}/offsets/{m}")
        if offsets.shape != (len(ids) + 1,) or offsets[-1] != len(rows):
            raise _damaged(
                data.path.parent,
                f"split {name!r} has {len(ids)} ids, but modality {m!r} has offsets of "
                f"shape {offsets.shape} over {len(rows)} steps",
            )
        features[m] = Ragged(rows, offsets[:-1].copy(), np.diff(offsets))
    return Split(
        name,
        ids,
        features,
        {k: data.array(f"{name}/labels/{k}").copy() for k in layout["labels"]},
        raw_text=data.strings(f"{name}/raw_text") if layout["raw_text"] else None,
        truth={k: _read_truth(data, f"{name}/truth/{k}") for k in layout["truth"]},
        sealed=name == "test",
    )


def _read_truth(data: _Data, key: str) -> np.ndarray:
    if f"{key}.offsets" in data.entries:
        return np.array(data.strings(key), dtype=str)
    return data.array(key).copy()


def _compare(folder: Path, card: Card, name: str, split: Split) -> None:
    """The facts on the card must be those of the data."""
    if (size := card.splits[name]["size"]) != len(split):
        raise _damaged(
            folder, f"the card says {size} samples in {name!r}, the data {len(split)}"
        )
    widths = {m: facts["width"] for m, facts in card.modalities.items()}
    if widths != split.dims:
        raise _damaged(
            folder,
            f"the card says modalities {widths}, split {name!r} has {split.dims}",
        )


def _damaged(folder: Path, what: str) -> CorpusError:
    return CorpusError(
        f"the store in {folder} is damaged: {what}. Delete the folder and build it "
        "again (mmsa-book data get NAME), or restore it from a copy."
    )
