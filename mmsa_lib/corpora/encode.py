"""Raw pairs of a text and an image, through frozen encoders, as a stored corpus."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmsa_lib.corpora import store
from mmsa_lib.corpora.decoding import open_regular
from mmsa_lib.corpora.schema import SPLITS, Card, Ragged, Split, make_corpus
from mmsa_lib.errors import CorpusError, check_device, unknown

Pair = tuple[str, str, str | Path, int]  # id, text, image file, number of the class
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_Encode = Callable[[list], Iterable[Tensor]]  # inputs -> hidden states (T_i, d)


@torch.inference_mode()
def encode_pairs(
    rows: Mapping[str, Sequence[Pair]],
    folder: str | Path,
    card: Card,
    text: str | Path,
    image: str | Path,
    tokens: int = 50,
    batch_size: int = 32,
    device: str = "cpu",
) -> Path:
    """Raw texts and images through frozen Hugging Face encoders into a stored corpus.

    rows         by split ("train", "valid", "test"): what `Pair` says
    card         name, source and terms of the corpus; the encoders are added to it
    text, image  hub names or local folders, such as a BERT and a ViT (or one CLIP); all
                 rows of their last hidden state are kept, as float16, at most `tokens`
                 of a text
    Steps wait on disk, not in memory. Returns `folder`; raises `CorpusError` where an
    encoder or an image cannot be read or a split has no rows, and `UnknownNameError`
    for another split or device.
    """
    check_device(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, pairs in rows.items():
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        if not len(pairs):
            raise CorpusError(f"split {name!r} has no rows: leave it out or fill it")
    read, look = _text_encoder(text, tokens, device), _image_encoder(image, device)
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    names = {
        k: Path(x).name if Path(x).is_dir() else str(x)
        for k, x in {"text_encoder": text, "image_encoder": image}.items()
    }
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        splits = {}
        for name, pairs in rows.items():
            ids, texts, files, y = zip(*pairs, strict=True)
            streams = {
                "text": _batched(read, texts, batch_size),
                "vision": _batched(look, files, batch_size),
            }
            features = {
                m: _on_disk(Path(scratch, f"{name}-{m}"), x) for m, x in streams.items()
            }
            splits[name] = Split(name, ids, features, {"class": np.asarray(y)}, texts)
        card = replace(card, options={**card.options, **names})
        return store.write(make_corpus(card, splits), folder, float16=tuple(features))


def _text_encoder(name: str | Path, tokens: int, device: str) -> _Encode:
    from transformers import AutoTokenizer

    model, tokenizer = _frozen(name, "text_model", AutoTokenizer, device)

    def read(texts):
        shape = {"truncation": True, "max_length": tokens, "padding": True}
        batch = tokenizer(texts, return_tensors="pt", **shape).to(device)
        hidden = model(**batch).last_hidden_state
        return [h[k.bool()] for h, k in zip(hidden, batch.attention_mask, strict=True)]

    return read


def _image_encoder(name: str | Path, device: str) -> _Encode:
    from transformers import AutoImageProcessor

    model, processor = _frozen(name, "vision_model", AutoImageProcessor, device)

    def look(files):
        batch = processor([_opened(f) for f in files], return_tensors="pt").to(device)
        return model(**batch).last_hidden_state

    return look


def _frozen(name: str | Path, part: str, processor, device: str):
    """The `part` of a model, or all of it, and what prepares its inputs."""
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(name)
        model = getattr(model, part, model)  # a CLIP holds both
        return model.to(device).eval(), processor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"the encoder {str(name)!r} could not be loaded: {error}\nConnect to "
            "the Hugging Face hub, or give a local folder with its files."
        ) from error


def _opened(file: str | Path):
    """An image (RGB), turned as its camera says."""
    from PIL import Image, ImageOps

    try:
        with open_regular(file) as body, Image.open(body, formats=FORMATS) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # Pillow raises many kinds on a damaged file
        raise CorpusError(
            f"{file} is no readable image ({', '.join(FORMATS)}): "
            f"{type(error).__name__}: {error}. Replace it, or drop its row."
        ) from error


def _batched(encode: _Encode, inputs: Sequence, batch_size: int) -> Iterator[Tensor]:
    for start in range(0, len(inputs), batch_size):
        yield from encode(list(inputs[start : start + batch_size]))


def _on_disk(file: Path, sequences: Iterable[Tensor]) -> Ragged:
    """Sequences (T_i, d) written one after the other as float16, then mapped."""
    lengths, width = [], 0
    with file.open("wb") as out:
        for x in sequences:
            lengths.append(len(x))
            width = x.shape[1]
            out.write(x.cpu().half().numpy().tobytes())
    values = np.memmap(file, np.float16, "r", shape=(sum(lengths), width))
    return Ragged(values, np.cumsum([0, *lengths[:-1]]), lengths)
