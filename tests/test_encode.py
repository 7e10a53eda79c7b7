"""Raw pairs through frozen encoders: a stored corpus, and errors with a remedy."""

import json
import os

import numpy as np
import pytest
import torch

from mmsa_lib.corpora import encode, store
from mmsa_lib.corpora.encode import encode_pairs
from mmsa_lib.corpora.schema import Card
from mmsa_lib.errors import CorpusError


def write_encoders(folder):
    """A tiny random BERT and ViT with their tokenizer and processor, on disk."""
    from transformers import BertConfig, BertModel, BertTokenizer, ViTConfig, ViTModel

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hot", "soup", "cake"]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words))
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertConfig(vocab_size=len(words), hidden_size=8, **small)
    BertModel(bert).save_pretrained(folder / "text")
    BertTokenizer(str(vocabulary)).save_pretrained(folder / "text")
    vit = ViTConfig(hidden_size=12, **small, image_size=8, patch_size=4)
    ViTModel(vit).save_pretrained(folder / "image")
    processor = {"image_processor_type": "ViTImageProcessor"}
    processor["size"] = {"height": 8, "width": 8}
    text = json.dumps(processor)
    (folder / "image" / "preprocessor_config.json").write_text(text)
    return {"text": folder / "text", "image": folder / "image"}


def test_raw_pairs_through_frozen_encoders(tmp_path):
    """Texts and images in, a stored corpus with their hidden states out; no network."""
    from PIL import Image

    encoders = write_encoders(tmp_path)
    rows, texts = {}, ["hot soup", "cake", "hot cake soup"]
    for split in ("train", "valid", "test"):
        rows[split] = []
        for i, words in enumerate(texts):
            file = tmp_path / f"{split}-{i}.png"
            Image.new("RGB", (9, 7), (80 * i, 10, 10)).save(file)
            rows[split].append((f"{split}-{i}", words, file, i))
    card = Card("food101", "made up", "tests", "none", synthetic=True)
    folder = tmp_path / "stored" / "food101"
    encode_pairs(rows, folder, card, **encoders, batch_size=2)
    corpus = store.open_store(folder)
    assert corpus.dims == {"text": 8, "vision": 12}
    text, vision = (corpus.train.features[m] for m in ("text", "vision"))
    assert text.lengths.tolist() == [4, 3, 5]  # [CLS] words [SEP]
    assert vision.lengths.tolist() == [5, 5, 5]  # [CLS] and four patches
    assert corpus.train.labels["class"].ravel().tolist() == [0, 1, 2]
    assert corpus.card.options == {"text_encoder": "text", "image_encoder": "image"}
    assert [p.name for p in folder.parent.iterdir()] == ["food101"]
    from transformers import BertModel

    words = torch.tensor([[2, 5, 7, 6, 3]])
    model = BertModel.from_pretrained(encoders["text"]).eval()
    with torch.no_grad():
        alone = model(words).last_hidden_state[0].numpy()
    np.testing.assert_allclose(text[2], alone, atol=5e-3)  # padding changed nothing
    assert np.abs(vision[0] - vision[1]).max() > 1e-2
    file.write_text("no image")
    with pytest.raises(CorpusError, match=r"test-2.png is no readable image"):
        encode_pairs(rows, tmp_path / "again", card, **encoders)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="empty' could not be loaded"):
        missing = encoders | {"text": tmp_path / "empty"}
        encode_pairs(rows, tmp_path / "again", card, **missing)


def test_an_image_is_upright_whole_and_no_pipe(tmp_path):
    from PIL import Image

    shown = np.zeros((40, 60, 3), np.uint8)
    shown[:20, :30], shown[20:, 30:] = (250, 0, 0), (0, 250, 0)
    stored = {1: shown, 2: shown[:, ::-1], 3: np.rot90(shown, 2), 4: shown[::-1]}
    stored |= {6: np.rot90(shown, 1), 8: np.rot90(shown, 3)}
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = tmp_path / f"{orientation}.png"
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, exif=exif)
        assert (np.asarray(encode._opened(file)) == shown).all(), orientation
    content = file.read_bytes()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "script.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9"
    )
    (tmp_path / "empty.png").touch()
    for seed in range(60):
        rng, body = np.random.default_rng(seed), bytearray(content)
        for at in rng.choice(len(body), 3):
            body[at] ^= 1 << rng.integers(8)
        (tmp_path / f"damaged-{seed}.png").write_bytes(body)
    for file in tmp_path.iterdir():
        try:
            picture = encode._opened(file)
        except CorpusError as error:
            assert str(file) in str(error)
        else:
            assert picture.mode == "RGB"
            assert file.stem.isdigit() or file.stem.startswith("damaged")
