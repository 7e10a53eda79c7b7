"""Discriminative readout of an omni-modal language model, and its generative twin.

After arXiv 2606.05713 (specification: the chapters "QLoRA and a regression head" and
"Generative against discriminative"). A frozen 4-bit Thinker is adapted with LoRA; the
hidden state of the last real token goes through a small head that gives a score
(`Readout`), or the same backbone, adapted in the same way, writes the score as text
(`Generative`). Both are trained by `training.fit` on a corpus of clips.

In the order of the chapters: LoRA and its arithmetic, the last token, the head, the
readout, the twin with its parser, saving and predicting.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import replace as altered
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmsa_lib.corpora.clips import Clip, read_folder
from mmsa_lib.corpora.media import MediaConfig, clip_corpus
from mmsa_lib.corpora.schema import Batch, Split
from mmsa_lib.errors import ClipError, ConfigError, unknown
from mmsa_lib.files import replacing, sha256_of, write_atomic
from mmsa_lib.nets import omni
from mmsa_lib.nets.omni import MODALITIES, Thinker, answer_loss
from mmsa_lib.nets.output import Output

SUFFIXES = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)
LOWEST, HIGHEST = -3.0, 3.0


@dataclass(frozen=True)
class ReadoutConfig:
    """The paper's settings where they are known, ours elsewhere (chapter, table).

    rank, alpha, lora_dropout, suffixes  of LoRA: Linear layers whose name ends so
    freeze_towers  adapt the language model only
    width, dropout  of the head's hidden layer (our name for the paper's 256)
    ln             where the head's LayerNorm stands: "hidden" (after the first Linear
                   layer) or "input" (before it); the paper's two witnesses disagree
    pool           "last" real token, "mean" over real tokens, or "attention"
    layer          whose output is read: -1 the last one, after its norm
    clip           clip predictions to [-3, 3] at evaluation
    """

    rank: int = 32
    alpha: int = 32
    lora_dropout: float = 0.1
    suffixes: tuple[str, ...] = SUFFIXES
    freeze_towers: bool = False
    width: int = 256
    dropout: float = 0.2
    ln: str = "hidden"
    pool: str = "last"
    layer: int = -1
    clip: bool = False

    def __post_init__(self):
        for name, known in (
            ("ln", ("hidden", "input")),
            ("pool", ("last", "mean", "attention")),
        ):
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)
        if self.rank < 1 or self.width < 1:
            raise ConfigError(
                f"rank and width must be at least 1: {self.rank}, {self.width}"
            )


# --- LoRA -----------------------------------------------------------------------------


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Linear layers of a model by name, (in, out); works on the meta device."""
    return {
        name: (m.in_features, m.out_features)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
    }


def adapted(names: Iterable[str], suffixes: Sequence[str] = SUFFIXES) -> list[str]:
    """The layers that LoRA adapts: those whose last name part is one of `suffixes`."""
    return [n for n in names if n.rpartition(".")[2] in suffixes]


def count_lora(
    shapes: Mapping[str, tuple[int, int]],
    suffixes: Sequence[str] = SUFFIXES,
    rank: int = 32,
) -> int:
    """Parameters of LoRA on the matching layers: rank * (in + out) each.

    `shapes` is what `linear_shapes` gives, (in, out) by name.
    """
    return rank * sum(sum(shapes[n]) for n in adapted(shapes, suffixes))


def attach_lora(model: nn.Module, config: ReadoutConfig) -> nn.Module:
    """The model wrapped by peft, base weights frozen, adapters in float32.

    Raises `ConfigError` if no layer of the model has one of the suffixes.
    """
    from peft import LoraConfig, get_peft_model

    names = adapted(linear_shapes(model), config.suffixes)
    if config.freeze_towers:
        names = [n for n in names if "audio_tower" not in n and "visual" not in n]
    if not names:
        raise ConfigError(
            f"no Linear layer ends with {', '.join(config.suffixes)}: LoRA would adapt "
            "nothing"
        )
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules=names,
        bias="none",
    )
    with warnings.catch_warnings():
        # peft asks the model by a name that transformers is about to give up
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")
        wrapped = get_peft_model(model, lora)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    return wrapped


# --- the head -------------------------------------------------------------------------


def last_index(mask: Tensor) -> Tensor:
    """Place (B,) of the last real token in a mask (B, T), whichever side is padded.

    The sum of the mask minus one is the same only without padding on the left. Raises
    `ConfigError` for a row without a real token.
    """
    if not bool(mask.bool().any(1).all()):
        rows = (~mask.bool().any(1)).nonzero().flatten().tolist()
        raise ConfigError(f"rows {rows} of the mask have no real token")
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask.long() * places).argmax(1)


class Regressor(nn.Module):
    """The head h -> width -> 1: (B, h) -> (B, 1) in standardised units, float32."""

    def __init__(self, hidden: int, config: ReadoutConfig):
        super().__init__()
        self.before = nn.LayerNorm(hidden) if config.ln == "input" else nn.Identity()
        self.inner = nn.Linear(hidden, config.width)
        self.after = (
            nn.LayerNorm(config.width) if config.ln == "hidden" else nn.Identity()
        )
        self.dropout = nn.Dropout(config.dropout)
        self.outer = nn.Linear(config.width, 1)

    def last(self, z: Tensor) -> Tensor:
        """The input (B, width) of the final layer."""
        return self.dropout(self.after(self.inner(self.before(z))).relu())

    def forward(self, z: Tensor) -> Tensor:
        return self.outer(self.last(z))


class Pool(nn.Module):
    """Hidden states (B, T, h) and their mask -> one vector (B, h) a sample."""

    def __init__(self, how: str, hidden: int):
        super().__init__()
        self.how = how
        self.query = nn.Linear(hidden, 1, bias=False) if how == "attention" else None

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self.how == "last":
            rows = torch.arange(len(hidden), device=hidden.device)
            return hidden[rows, last_index(mask)].float()
        hidden, real = hidden.float(), mask[..., None]
        if self.how == "mean":
            return (hidden * real).sum(1) / real.sum(1)
        weight = self.query(hidden).masked_fill(~real, -torch.inf).softmax(1)
        return (weight * hidden).sum(1)


class Scaler(nn.Module):
    """Mean and standard deviation of training labels; kept with the weights."""

    def __init__(self, labels=None):
        super().__init__()
        mean, sd = 0.0, 1.0
        if labels is not None:
            values = np.asarray(labels, dtype=np.float64)
            mean, sd = float(values.mean()), float(values.std())
            if not sd > 0:
                raise ConfigError("the training labels are all equal: nothing to learn")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("sd", torch.tensor(sd, dtype=torch.float32))

    def scale(self, y: Tensor) -> Tensor:
        """Labels -> standardised units."""
        return (y - self.mean) / self.sd

    def unscale(self, u: Tensor) -> Tensor:
        """Standardised units -> labels."""
        return u * self.sd + self.mean


class Readout(nn.Module):
    """Score a batch of clips from one forward pass, without vocabulary logits.

    `body` is a `Thinker`, or any module that maps a batch to hidden states (B, T, h)
    and a mask (B, T); then give its width as `hidden`. The body comes adapted (see
    `discriminative`).
    """

    def __init__(
        self,
        body: nn.Module,
        config: ReadoutConfig | None = None,
        labels=None,
        hidden: int | None = None,
    ):
        super().__init__()
        self.config = config or ReadoutConfig()
        self.body = body
        if self.config.layer != -1:
            depth = len(body.base.model.language_model.layers)
            if not -depth <= self.config.layer < depth:
                raise ConfigError(
                    f"layer {self.config.layer} of a language model with {depth} layers"
                )
        hidden = hidden or body.width
        self.pool = Pool(self.config.pool, hidden)
        # never called "head": a suffix match for it would catch lm_head as well
        self.regressor = Regressor(hidden, self.config)
        self.scaler = Scaler(labels)

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states (B, T, h) of the chosen layer and the mask (B, T)."""
        if self.config.layer == -1:
            return self.body(batch)
        layers = self.body.base.model.language_model.layers
        kept = []
        hook = layers[self.config.layer].register_forward_hook(
            lambda _m, _i, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        try:
            _, mask = self.body(batch)
        finally:
            hook.remove()
        return kept[0], mask

    def forward(self, batch: Batch) -> Output:
        hidden, mask = self.hidden(batch)
        with torch.autocast(hidden.device.type, enabled=False):  # the head is float32
            z = self.pool(hidden, mask)
            last = self.regressor.last(z)
            y = self.scaler.unscale(self.regressor.outer(last))
        if self.config.clip and not self.training:
            y = y.clamp(LOWEST, HIGHEST)
        return Output(predictions={"sentiment": y}, pooled=z, last=last)


_LOSSES = {
    "l1": nn.functional.l1_loss,
    "mse": nn.functional.mse_loss,
    "huber": nn.functional.huber_loss,
}


def standardised_loss(labels, kind: str = "l1"):
    """The loss of a readout for `training.fit`, in units of the labels' deviation.

    `labels` are the training labels, as for the readout itself; `kind` is "l1", "mse"
    or "huber".
    """
    if kind not in _LOSSES:
        raise unknown("loss", kind, _LOSSES)
    scaler, distance = Scaler(labels), _LOSSES[kind]
    mean, sd = float(scaler.mean), float(scaler.sd)

    def loss(output: Output, batch: Batch) -> Tensor:
        prediction, truth = output.predictions["sentiment"], batch.labels["sentiment"]
        return distance((prediction.float() - mean) / sd, (truth - mean) / sd)

    return loss


def discriminative(
    thinker: Thinker, config: ReadoutConfig | None = None, labels=None
) -> Readout:
    """LoRA on a loaded Thinker and a head on its last hidden state.

    `labels` of the training split set the scaler. Wraps the Thinker's model in place.
    """
    config = config or ReadoutConfig()
    thinker.model = attach_lora(thinker.model, config)
    return Readout(thinker, config, labels)


# --- the generative twin --------------------------------------------------------------


def spell(score: float) -> str:
    """The one format of a label as text: sign, digit, point, digit, such as +1.6.

    Clips to [-3, 3]. Raises `ConfigError` for NaN.
    """
    if math.isnan(score):
        raise ConfigError("a label is NaN: there is nothing to write")
    return f"{max(LOWEST, min(HIGHEST, float(score))):+.1f}".replace("-0.0", "+0.0")


_DASHES = r"+\-\u2212\u2010-\u2015\u00b1"
# a number that is not a piece of a longer word or number: 1.1.1 is none. What could be
# its sign is taken along, even where it stands apart or is a word.
_NUMBER = re.compile(
    rf"(?<![\w.,{_DASHES}])((?:[{_DASHES}]|\bminus\b|\bnegative\b)\s*)?"
    r"(\d+(?:[.,]\d+)?|[.,]\d+)(?!\w|[.,]\d)",
    re.IGNORECASE,
)


def parse_score(text: str) -> float | None:
    """The first number in an answer, or None. Never clips and never guesses.

    A comma or a point may separate the decimals; words for numbers do not count. A
    number whose sign is in doubt ("- 1.2", "minus 1.2") makes the answer unparsable.
    """
    found = _NUMBER.search(text)
    if found is None or found[1] not in (None, "+", "-", "\u2212"):
        return None
    number = float(found[2].replace(",", "."))
    return -number if found[1] in ("-", "\u2212") else number


@dataclass(frozen=True)
class Answers:
    """What a model wrote, and what could be read from it.

    ids, texts  one a sample; `values` (n,) has NaN where nothing could be read
    """

    ids: list[str]
    texts: list[str]
    values: np.ndarray

    @property
    def unparsable(self) -> float:
        """Share of answers without a number."""
        return float(np.isnan(self.values).mean())

    @property
    def out_of_range(self) -> float:
        """Share of answers whose number lies outside [-3, 3]."""
        with np.errstate(invalid="ignore"):
            return float((np.abs(self.values) > HIGHEST).mean())

    def scores(self, otherwise: float) -> np.ndarray:
        """Scores (n, 1): numbers clipped to the range, `otherwise` where none is."""
        values = np.where(np.isnan(self.values), otherwise, self.values)
        return values.clip(LOWEST, HIGHEST)[:, None]


@dataclass
class Spoken:
    """Token cross-entropy (B,) of the written labels; no predictions in training."""

    tokens: Tensor
    predictions: dict[str, Tensor] = field(default_factory=dict)


class Generative(nn.Module):
    """The twin: the same adapted Thinker, taught to write the label.

    Calling it on a labelled batch gives the cross-entropy of the written labels;
    `answer` lets it write.
    """

    def __init__(self, body: Thinker, config: ReadoutConfig | None = None, labels=None):
        super().__init__()
        self.config = config or ReadoutConfig()
        self.body = body
        self.scaler = Scaler(labels)

    def forward(self, batch: Batch) -> Spoken:
        labels = batch.labels["sentiment"].flatten().tolist()
        return Spoken(answer_loss(self.body, batch, [spell(y) for y in labels]))

    @torch.inference_mode()
    def answer(self, split: Split, batch_size: int = 8) -> Answers:
        """Let the model write a score for every sample of a split."""
        self.eval()
        texts: list[str] = []
        for batch in split.batches(batch_size):
            texts += self.body.say(batch.to(self.body.device))
        values = [parse_score(t) for t in texts]
        found = np.array([math.nan if v is None else v for v in values])
        return Answers(list(split.ids), texts, found)

    def predict(self, split: Split, label: str = "sentiment") -> np.ndarray:
        """Scores (n, 1); what cannot be read counts as the mean training label."""
        if label != "sentiment":
            raise unknown("label", label, ("sentiment",))
        return self.answer(split).scores(float(self.scaler.mean))


def token_loss(output: Spoken, batch: Batch) -> Tensor:
    """The loss of the twin for `training.fit`: mean cross-entropy of written labels."""
    return output.tokens.mean()


def generative(
    thinker: Thinker, config: ReadoutConfig | None = None, labels=None
) -> Generative:
    """The same LoRA on a loaded Thinker, to be trained on written labels."""
    config = config or ReadoutConfig()
    thinker.model = attach_lora(thinker.model, config)
    return Generative(thinker, config, labels)


def writing(frozen):
    """The frozen twin that `training.fit` chose, predicting by what it writes."""
    module = frozen.module
    return altered(frozen, predict=lambda split, label: module.predict(split, label))


# --- saving and predicting ------------------------------------------------------------

SETTINGS, HEAD = "readout.json", "regressor.safetensors"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def save(
    model: Readout | Generative,
    folder: str | Path,
    *,
    backbone: str,
    media: MediaConfig,
) -> Path:
    """Write the trained parts: a standard PEFT adapter, the head, the settings.

    folder/adapter_config.json, adapter_model.safetensors   load with peft alone
    folder/regressor.safetensors   head, pooling and label scaler
    folder/readout.json            configuration, backbone, its fingerprint, how clips
                                   are read, and the sha256 of the other parts

    The twin has no head: its regressor.safetensors holds the scaler only.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    peft = model.body.model
    name = "default"
    peft.peft_config[name].base_model_name_or_path = backbone
    # the vocabulary is as it was: peft need not look for that on the hub
    peft.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty template
    parts = {
        k: v.detach().cpu().contiguous()
        for k, v in model.state_dict().items()
        if not k.startswith("body.")
    }
    with replacing(folder / HEAD) as part:
        save_file(parts, part)
    settings = {
        "kind": type(model).__name__.lower(),
        "backbone": backbone,
        "backbone_sha256": omni.fingerprint(model.body),
        "readout": asdict(model.config),
        "media": asdict(media),
        "modalities": list(model.body.modalities),
        "sha256": {part: sha256_of(folder / part) for part in (*ADAPTER, HEAD)},
    }
    write_atomic(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
    return folder


def load(
    folder: str | Path,
    *,
    backbone: str | Path | None = None,
    quantise: bool = True,
    device: str = "auto",
) -> tuple[Readout | Generative, MediaConfig]:
    """A saved readout (or twin) on its backbone, in eval mode; how its clips are read.

    backbone: another place of the same model than the one that was saved, such as a
    local folder. Raises `ConfigError` when a part is missing, damaged or does not fit.
    """
    folder = Path(folder)
    lacking = [n for n in (SETTINGS, HEAD, *ADAPTER) if not (folder / n).is_file()]
    if lacking:
        raise ConfigError(
            f"{folder} holds no readout: {', '.join(lacking)} missing. "
            "methods.readout.save or scripts/train_readout.py write one."
        )
    try:
        settings = json.loads((folder / SETTINGS).read_text("utf-8"))
        damaged = [
            n for n, d in settings["sha256"].items() if sha256_of(folder / n) != d
        ]
        kept = settings["readout"]
        config = ReadoutConfig(**(kept | {"suffixes": tuple(kept["suffixes"])}))
        media = MediaConfig(**settings["media"])
        kind = {"readout": Readout, "generative": Generative}[settings["kind"]]
        source, modalities = backbone or settings["backbone"], settings["modalities"]
        trained_on = settings["backbone_sha256"]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{folder / SETTINGS} is damaged or of another version "
            f"({type(error).__name__}: {error}); save the readout again"
        ) from error
    if damaged:
        raise ConfigError(
            f"{', '.join(damaged)} in {folder}: not what was saved there, but damaged "
            "or of another readout. Copy or save the whole folder again."
        )
    thinker = omni.load(source, quantise=quantise, device=device, modalities=modalities)
    if omni.fingerprint(thinker) != trained_on:
        raise ConfigError(
            f"{folder} was not made for the backbone {source}: the weights there are "
            "not those that it was trained on. Name the right ones, or train it again "
            "(scripts/train_readout.py)."
        )
    from peft import PeftModel  # after `load`, which keeps what it imports quiet

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            thinker.model = PeftModel.from_pretrained(thinker.model, str(folder))
        model = kind(thinker, config)
        found = model.load_state_dict(load_file(folder / HEAD), strict=False)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{folder} was not made for the backbone {source}: {error}"
        ) from error
    wrong = [k for k in found.missing_keys if not k.startswith("body.")]
    wrong += found.unexpected_keys
    if wrong:
        raise ConfigError(f"{folder / HEAD} does not fit {SETTINGS}: {wrong}")
    for name, part in model.named_children():
        if name != "body":  # which is there, and 4-bit weights bear no second move
            part.to(thinker.device)
    return model.eval(), media


@dataclass(frozen=True)
class Prediction:
    """One clip's score, or why it has none."""

    path: str
    score: float | None
    refused: str | None = None  # the reason, when `score` is None


def predict(
    paths: Sequence[str | Path],
    model: str | Path | None = None,
    *,
    texts: Sequence[str] | None = None,
    backbone: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 4,
) -> list[Prediction]:
    """Score video files with a saved readout; unreadable ones are refused by reason.

    paths     files, or folders in MMSA-FET's layout: these stand for all their clips,
              with the transcripts of their label.csv
    model     folder that `save` wrote; default: the tiny readout of the package, which
              has learned from the puppets' clips and knows nothing but puppets
    texts     a transcript for each file; without them the model sees and hears only
    backbone  see `load`

    Raises `ConfigError` when the model cannot be loaded, or when there are not as many
    texts as files.
    """
    clips, refused = _clips([Path(p) for p in paths], texts)
    if model is None:
        model = omni.tiny_folder() / "readout"
        if not model.is_dir():
            raise ConfigError(
                "this installation lacks the tiny readout, the default model "
                f"({model}). Name a model: the folder that methods.readout.save or "
                "scripts/train_readout.py wrote."
            )
    reader, media = load(model, backbone=backbone, device=device)
    scores: dict[str, float] = {}
    most = 8 * batch_size  # clips in memory at a time
    for start in range(0, len(clips), most):
        some = [c for c in clips[start : start + most] if c.id not in refused]
        scores |= _scores(reader, some, media, batch_size, refused)
    return [Prediction(str(c.path), scores.get(c.id), refused.get(c.id)) for c in clips]


def _clips(paths: list[Path], texts: Sequence[str] | None):
    """The clips of files and folders, ids 0, 1, ...; and those refused already."""
    files = [p for p in paths if not p.is_dir()]
    if texts is not None and len(texts) != len(files):
        raise ConfigError(
            f"{len(files)} files but {len(texts)} transcripts: give one for each file, "
            "an empty one where nothing is known, or none at all"
        )
    words = iter(texts or [""] * len(files))
    found: list[tuple[Path, str, str | None]] = []
    for path in paths:
        if not path.is_dir():
            found.append((path, next(words), None))
            continue
        faults: dict[str, str] = {}
        try:
            found += [(c.path, c.text, None) for c in read_folder(path, faults)]
        except ClipError as error:
            faults = {"": str(error)}
        found += [(path / row, "", why) for row, why in faults.items()]
    clips = [
        Clip(str(k), path, text, 0.0, "valid", video_id="", clip_id=str(k))
        for k, (path, text, _) in enumerate(found)
    ]
    return clips, {str(k): why for k, (*_, why) in enumerate(found) if why}


def _scores(reader, clips: list[Clip], media, batch_size: int, refused: dict):
    """Scores of the readable clips by id; the others enter `refused` with a reason."""
    problems: dict[str, str] = {}
    try:
        split = clip_corpus(clips, media, problems=problems)["valid"]
    except ClipError:
        if len(problems) < len(clips):
            raise
        return {}
    finally:
        refused |= problems
    scores: dict[str, float] = {}
    if isinstance(reader, Generative):
        answers = reader.answer(split, batch_size)
        for i, text, value in zip(
            answers.ids, answers.texts, answers.values.tolist(), strict=True
        ):
            if math.isnan(value):
                refused[i] = f"the model wrote {text!r}, which holds no score"
            else:
                scores[i] = max(LOWEST, min(HIGHEST, value))
        return scores
    with torch.inference_mode():
        for batch in split.batches(batch_size):
            y = reader(batch.to(reader.body.device)).predictions["sentiment"]
            scores |= dict(zip(batch.ids, y.flatten().tolist(), strict=True))
    return scores


__all__ = [
    "MODALITIES",
    "SUFFIXES",
    "Answers",
    "Generative",
    "Pool",
    "Prediction",
    "Readout",
    "ReadoutConfig",
    "Regressor",
    "Scaler",
    "Spoken",
    "adapted",
    "attach_lora",
    "count_lora",
    "discriminative",
    "generative",
    "last_index",
    "linear_shapes",
    "load",
    "parse_score",
    "predict",
    "save",
    "spell",
    "standardised_loss",
    "token_loss",
    "writing",
]
