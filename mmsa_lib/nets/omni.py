"""Omni-modal language models: the Thinker of Qwen2.5-Omni, tiny and 7B by one path.

`load` gives a `Thinker`: the model of Hugging Face's transformers, its weights in 4-bit
NF4 through bitsandbytes, and what turns a `Batch` of clips into its inputs. The tiny
Thinker of the package has the same classes, layout and tokens as the published one and
was pretrained by ``scripts/pretrain_tiny_thinker.py``.

Loading transformers' model code and bitsandbytes takes seconds, so both are imported
where they are needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mmsa_lib.corpora.media import MERGE
from mmsa_lib.corpora.schema import Batch
from mmsa_lib.errors import ConfigError, check_device, unknown
from mmsa_lib.nets.ops import keep_4bit_format
from mmsa_lib.nets.trained import freeze

TINY = "tiny"  # the name of the embedded model
HUB = ("Qwen/Qwen2.5-Omni-7B", "Qwen/Qwen2.5-Omni-3B")
KINDS = ("qwen2_5_omni", "qwen2_5_omni_thinker")  # with the Talker, and without
MODALITIES = ("text", "vision", "audio")
SYSTEM = "You judge how people feel."
QUESTION = "How positive or negative is the speaker? Answer from -3.0 to +3.0."
KEEP = ("lm_head",)  # Linear layers that stay as they are stored
TOWERS = ("model.audio_tower", "model.visual")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def tiny_folder() -> Path:
    """Where the tiny Thinker lies in the package, with its `card.json`."""
    return Path(str(resources.files("mmsa_lib.nets") / "tiny_thinker"))


# --- configurations -------------------------------------------------------------------


def full_config():
    """The configuration of the published 7B Thinker, without downloading anything.

    transformers' defaults are those of the 7B except for the width of the vision
    tower, which is 1280 in the checkpoint.
    """
    from transformers import Qwen2_5OmniThinkerConfig

    config = Qwen2_5OmniThinkerConfig()
    config.vision_config.hidden_size = 1280
    return config


def tiny_config(tokenizer, **text):
    """A Thinker of about a million parameters that reads with `tokenizer`.

    `text` overrides fields of the language model. Patches, log-mel channels, special
    tokens and the names of all layers are those of the published model.
    """
    from transformers import Qwen2_5OmniThinkerConfig

    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "max_window_layers": 4,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [4, 6, 6],  # together half of a head's 32 channels
        },
    } | text
    ids = tokenizer.convert_tokens_to_ids
    return Qwen2_5OmniThinkerConfig(
        text_config=sizes,
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": sizes["hidden_size"],
            "fullatt_block_indexes": [1],
        },
        audio_config={
            "d_model": 96,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 192,
            "output_dim": sizes["hidden_size"],
        },
        audio_token_index=ids("<|AUDIO|>"),
        image_token_index=ids("<|IMAGE|>"),
        video_token_index=ids("<|VIDEO|>"),
        audio_start_token_id=ids("<|audio_bos|>"),
        audio_end_token_id=ids("<|audio_eos|>"),
        vision_start_token_id=ids("<|vision_bos|>"),  # ty: ignore[unknown-argument]
        vision_end_token_id=ids("<|vision_eos|>"),  # ty: ignore[unknown-argument]
        pad_token_id=ids("<|endoftext|>"),  # ty: ignore[unknown-argument]
    )


def meta_thinker(config):
    """The model of a configuration on the meta device: shapes without any weights."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    with torch.device("meta"):
        return Qwen2_5OmniThinkerForConditionalGeneration(config)


# --- loading --------------------------------------------------------------------------


def load(
    source: str | Path = TINY,
    *,
    quantise: bool = True,
    towers: bool = True,
    device: str = "auto",
    compute: str | None = None,
    checkpointing: bool = False,
    padding_side: str = "left",
    modalities: Sequence[str] = MODALITIES,
) -> Thinker:
    """A Thinker with frozen weights, ready to be adapted or asked.

    source         "tiny", a folder, or a name on the hub such as Qwen/Qwen2.5-Omni-7B
    quantise       Linear layers in NF4 with double quantisation (bitsandbytes); with
                   ``towers=False`` those of the audio and vision towers stay as stored
    compute        "float32" or "bfloat16"; default: bfloat16 on a GPU, else float32
    checkpointing  recompute activations in the backward pass: less memory, more time
    padding_side   of the token sequences; the published processor pads on the left
    modalities     which of text, vision and audio the prompt holds

    Raises `ConfigError` that says what to do when the source cannot be found.
    """
    from transformers import (
        AutoTokenizer,
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniThinkerForConditionalGeneration,
    )

    place = pick_device(device)
    compute = compute or ("bfloat16" if place.type == "cuda" else "float32")
    if compute not in DTYPES:
        raise unknown("compute precision", compute, DTYPES)
    where = str(tiny_folder()) if str(source) == TINY else str(source)
    local = Path(where).is_dir() or not _hub_answers()
    options: dict = {"dtype": DTYPES[compute]}
    if quantise:
        options["quantization_config"] = nf4(compute, towers)
        options["device_map"] = {"": place}
    try:
        about, _ = Qwen2_5OmniThinkerConfig.get_config_dict(
            where, local_files_only=local
        )
        # transformers would build a random 7B for any other kind
        if (kind := about.get("model_type")) not in KINDS:
            raise ConfigError(
                f"{str(source)!r} holds a model of type {kind or 'unknown'} in its "
                f"config.json, expected {' or '.join(KINDS)}"
            )
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=local)
            model, found = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
                where, local_files_only=local, output_loading_info=True, **options
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"no omni-modal model could be loaded from {str(source)!r}: {error}\nGive "
            f"{TINY!r}, the folder of a checkpoint, or a name on the hub "
            f"({', '.join(HUB)}) with a network or a filled cache."
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"{str(source)!r} lacks {len(missing)} weights of a Thinker, such as "
            f"{missing[0]}: it is incomplete, or another kind of model"
        )
    for name, layer in model.named_modules():  # transformers does not look at these
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state and tuple(state.shape) != (layer.out_features, layer.in_features):
            raise ConfigError(
                f"the weight of {name} in {str(source)!r} has shape "
                f"{tuple(state.shape)}, but config.json makes it "
                f"{(layer.out_features, layer.in_features)}: the files belong to "
                "different models"
            )
    if quantise:
        keep_4bit_format(model)
    else:
        model.to(place)
    return wrap(
        model,
        tokenizer,
        checkpointing=checkpointing,
        padding_side=padding_side,
        modalities=modalities,
    )


def _hub_answers() -> bool:
    """Ask once: without a network the hub's own client tries for most of a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # each version of the client has its own errors
        return False
    return True


@contextlib.contextmanager
def _quiet():
    """No progress bars where nobody watches, and no advice about CPU kernels."""
    from transformers.utils import logging as hub

    shown = hub.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        hub.disable_progress_bar()
    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = kernels.level
    kernels.setLevel(logging.ERROR)  # a kernel that only bfloat16 would use
    try:
        yield
    finally:
        kernels.setLevel(level)
        if shown:
            hub.enable_progress_bar()


def nf4(compute: str = "float32", towers: bool = True):
    """bitsandbytes' settings: NF4, double quantisation, `compute` for the products."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[compute],
        llm_int8_skip_modules=[*KEEP, *(() if towers else TOWERS)],
    )


def wrap(
    model,
    tokenizer,
    *,
    checkpointing: bool = False,
    padding_side: str = "left",
    modalities: Sequence[str] = MODALITIES,
) -> Thinker:
    """A `Thinker` around a model that is already built; its weights are frozen.

    Raises `ConfigError` if the tokenizer's marks are not those of the model.
    """
    marks = {
        "<|AUDIO|>": model.config.audio_token_index,
        "<|VIDEO|>": model.config.video_token_index,
        "<|audio_bos|>": model.config.audio_start_token_id,
        "<|vision_bos|>": model.config.vision_start_token_id,
    }
    for mark, expected in marks.items():
        if tokenizer.convert_tokens_to_ids(mark) != expected:
            raise ConfigError(
                f"token {expected} of the model is {mark}, but not of its tokenizer: "
                "the files of the tokenizer are missing or another model's"
            )
    model.eval()
    freeze(model, evaluating=not checkpointing)  # recomputing needs training mode
    if checkpointing:
        settings = {"use_reentrant": False}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    return Thinker(model, tokenizer, padding_side, modalities)


def fingerprint(thinker: Thinker) -> str:
    """sha256 of a model's norms and biases in bfloat16: the weights it started from.

    These are few, no quantisation touches them, and adapters leave them as they are.
    """
    digest = hashlib.sha256()
    for name, p in sorted(thinker.base.named_parameters()):
        if p.ndim == 1:
            digest.update(name.replace(".base_layer", "").encode())
            kept = p.detach().to("cpu", torch.bfloat16)
            digest.update(kept.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def pick_device(device: str) -> torch.device:
    """A torch device; "auto" takes a GPU where there is one.

    Raises `UnknownNameError` for another device than auto, cpu, cuda and cuda:NUMBER,
    and `ConfigError` if a GPU was asked for that is not visible.
    """
    check_device(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for but no GPU is visible")
    number, there = device.partition(":")[2], torch.cuda.device_count()
    if number and int(number) >= there:
        raise ConfigError(f"device {device!r} was asked for; GPUs there are: {there}")
    if device == "cuda":  # under torchrun every process has its own
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)


# --- the model and its inputs ---------------------------------------------------------


class Thinker(nn.Module):
    """A Thinker and what it reads. Calling it gives hidden states, never logits.

    ``thinker(batch)`` -> H (B, T, h) of the last layer after its norm, and the mask
    (B, T) of real tokens. `model` is transformers' (or peft's) module.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        padding_side: str = "left",
        modalities: Sequence[str] = MODALITIES,
    ):
        super().__init__()
        for m in modalities:
            if m not in MODALITIES:
                raise unknown("modality", m, MODALITIES)
        if not modalities:
            raise ConfigError("a prompt needs at least one modality")
        if padding_side not in ("left", "right"):
            raise unknown("padding side", padding_side, ("left", "right"))
        self.model = model
        self.tokenizer = tokenizer
        self.padding_side = padding_side
        self.modalities = tuple(m for m in MODALITIES if m in modalities)

    @property
    def base(self) -> nn.Module:
        """transformers' model, below peft's wrapper if there is one."""
        model = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def width(self) -> int:
        """Width h of the hidden states."""
        return self.base.config.text_config.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the model is, and so its inputs have to be."""
        return self.base.get_input_embeddings().weight.device

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = self.inputs(batch)
        return self.read(inputs), inputs["attention_mask"].bool()

    def read(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Hidden states (B, T, h) of prepared inputs: the inner model, no LM head."""
        return self.base.model(**inputs, use_cache=False).last_hidden_state

    def prompts(
        self,
        batch: Batch,
        answers: Sequence[str] | None = None,
        questions: Sequence[str] | None = None,
    ) -> list[str]:
        """The whole text of each sample, places of video and sound included."""
        count = self._places(batch)
        texts = []
        for i in range(len(batch)):
            user = ""
            if count["vision"][i]:
                places = "<|VIDEO|>" * count["vision"][i]
                user += f"<|vision_bos|>{places}<|vision_eos|>"
            if count["audio"][i]:
                places = "<|AUDIO|>" * count["audio"][i]
                user += f"<|audio_bos|>{places}<|audio_eos|>"
            if "text" in self.modalities and batch.raw_text is not None:
                user += f"Transcript: {_plain(batch.raw_text[i])}\n"
            user += questions[i] if questions else QUESTION
            texts.append(chat(user, answers[i] if answers else ""))
        return texts

    def _places(self, batch: Batch) -> dict[str, list[int]]:
        """How many tokens the towers make of each sample's frames and sound."""
        count = {"vision": [0] * len(batch), "audio": [0] * len(batch)}
        if self._uses("vision", batch):
            tokens = batch.extras["grid"].prod(1) // MERGE**2
            count["vision"] = (tokens * batch.available["vision"]).tolist()
        if self._uses("audio", batch):
            steps = batch.mask["audio"].sum(1)
            # a stride of 2, then means over 2; of fewer than 3 steps nothing is left
            count["audio"] = (((steps - 1) // 2 - 1) // 2 + 1).tolist()
        return count

    def _uses(self, modality: str, batch: Batch) -> bool:
        return modality in self.modalities and modality in batch.features

    def inputs(
        self,
        batch: Batch,
        answers: Sequence[str] | None = None,
        questions: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """What the model is called with: tokens, mask, log-mel frames, patches.

        With `answers` each prompt is followed by one, as in a conversation; with
        `questions` each sample is asked its own.
        """
        self._require(batch)
        tokens = self.tokenizer(
            self.prompts(batch, answers, questions),
            padding=True,
            padding_side=self.padding_side,
            add_special_tokens=False,
            return_tensors="pt",
        )
        inputs = {k: tokens[k] for k in ("input_ids", "attention_mask")}
        count = self._places(batch)
        heard = [i for i, n in enumerate(count["audio"]) if n]
        if heard:
            inputs["input_features"] = batch.features["audio"][heard].transpose(1, 2)
            inputs["feature_attention_mask"] = batch.mask["audio"][heard].long()
        seen = [i for i, n in enumerate(count["vision"]) if n]
        if seen:
            x, mask = batch.features["vision"][seen], batch.mask["vision"][seen]
            inputs["pixel_values_videos"] = x[mask]
            inputs["video_grid_thw"] = batch.extras["grid"][seen]
            inputs["video_second_per_grid"] = batch.extras["pace"][seen].flatten()
        return {k: v.to(self.device) for k, v in inputs.items()}

    def _require(self, batch: Batch) -> None:
        """Refuse what the model cannot read, by name."""
        if not len(batch):
            raise ConfigError("the batch is empty")
        used = [m for m in ("vision", "audio") if self._uses(m, batch)]
        if used and "grid" not in batch.extras:
            raise ConfigError(
                "this corpus holds features, not clips: an omni-modal model reads raw "
                'video and sound. Use corpora.load("puppet-clips") or "clips".'
            )
        if "text" not in self.modalities or batch.raw_text is None:
            count = zip(*self._places(batch).values(), strict=True)
            empty = [i for i, n in zip(batch.ids, count, strict=True) if not any(n)]
            if empty:
                raise ConfigError(
                    f"nothing of {', '.join(self.modalities)} is there in "
                    f"{', '.join(empty[:5])}"
                )
        for m in used:
            bad = ~torch.isfinite(batch.features[m]).flatten(1).all(1)
            if bad.any():
                ids = [i for i, b in zip(batch.ids, bad.tolist(), strict=True) if b]
                raise ConfigError(f"{m} holds NaN or infinity in {', '.join(ids[:5])}")

    @torch.inference_mode()
    def say(
        self, batch: Batch, most: int = 8, questions: Sequence[str] | None = None
    ) -> list[str]:
        """What the model answers, greedily, in at most `most` tokens a sample."""
        side, self.padding_side = self.padding_side, "left"  # new tokens join the end
        try:
            inputs = self.inputs(batch, questions=questions)
        finally:
            self.padding_side = side
        made = self.base.generate(
            **inputs,
            max_new_tokens=most,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.convert_tokens_to_ids("<|im_end|>"),
        )
        new = made[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)


def chat(user: str, answer: str = "") -> str:
    """One exchange in the chat format of Qwen, open at the end without an answer."""
    text = (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    )
    return text + f"{answer}<|im_end|>" if answer else text


def _plain(text: str) -> str:
    """A transcript cannot contain tokens that mean something to the model."""
    return text.replace("<|", "< |")


def answer_loss(
    thinker: Thinker,
    batch: Batch,
    answers: Sequence[str],
    questions: Sequence[str] | None = None,
) -> Tensor:
    """Cross-entropy (B,) in nats a token of each answer after its prompt.

    Logits are computed at the answers' places only.
    """
    side, thinker.padding_side = thinker.padding_side, "left"  # answers end together
    try:
        inputs = thinker.inputs(batch, answers, questions)
    finally:
        thinker.padding_side = side
    ids = inputs["input_ids"]
    written = thinker.tokenizer(
        [f"{a}<|im_end|>" for a in answers], add_special_tokens=False
    )["input_ids"]
    lengths = torch.tensor([len(w) for w in written], device=ids.device)
    most = int(lengths.max())
    hidden = thinker.read(inputs)[:, -most - 1 : -1]
    logits = thinker.base.lm_head(hidden).float()
    loss = nn.functional.cross_entropy(
        logits.transpose(1, 2), ids[:, -most:], reduction="none"
    )
    real = torch.arange(most, 0, -1, device=ids.device) <= lengths[:, None]
    return (loss * real).sum(1) / lengths


def count_tokens(thinker: Thinker, batch: Batch) -> dict[str, list[int]]:
    """Tokens of each sample by modality, "text" being everything that is written."""
    count = thinker._places(batch)
    whole = thinker.tokenizer(thinker.prompts(batch), add_special_tokens=False)
    columns = (whole["input_ids"], count["vision"], count["audio"])
    rest = [len(w) - v - a for w, v, a in zip(*columns, strict=True)]
    return {"text": rest, **count}


# --- memory by arithmetic -------------------------------------------------------------


def nf4_bytes(shapes: Mapping[str, Sequence[int]], skip: Sequence[str] = KEEP) -> float:
    """Bytes of weights by arithmetic: matrices in NF4 with double quantisation.

    shapes: every parameter's by name. A matrix of a Linear layer costs half a byte a
    weight, a byte for each block of 64 and 4 bytes for each 256 blocks; what is no
    such matrix, and what starts with a name in `skip`, costs two bytes (bfloat16).
    """
    total = 0.0
    for name, shape in shapes.items():
        n = math.prod(shape)
        table = "embed" in name or "audio_bos_eos" in name  # no product, no Linear
        matrix = len(shape) == 2 and not table
        if matrix and not any(name.startswith(s) for s in skip):
            total += n / 2 + n / 64 + 4 * n / (64 * 256)
        else:
            total += 2 * n
    return total
