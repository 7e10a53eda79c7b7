"""Discriminative readout of an omni-modal language model.

After arXiv 2606.05713 (specification: the chapter "QLoRA and a regression head"). A
frozen 4-bit Thinker is adapted with LoRA; the hidden state of the last real token goes
through a small head that gives a score (`Readout`), trained by `training.fit` on a
corpus of clips. Its twin that writes the score is `methods.generative`;
`methods.saving` keeps and loads both.

In the order of the chapter: LoRA and its arithmetic, the last token, the head, the
readout and its loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mmsa_lib.corpora.schema import Batch
from mmsa_lib.errors import ConfigError, unknown
from mmsa_lib.nets.omni import Thinker
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
    mode           "paper": no code was released that another mode could follow
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
    mode: str = "paper"

    def __post_init__(self):
        for name, known in (
            ("ln", ("hidden", "input")),
            ("pool", ("last", "mean", "attention")),
            ("mode", ("paper",)),
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
        a = self.inner(self.before(z))  # (B, h) -> (B, width)
        return self.dropout(self.after(a).relu())

    def forward(self, z: Tensor) -> Tensor:
        return self.outer(self.last(z))  # (B, h) -> (B, width) -> (B, 1)


class Pool(nn.Module):
    """Hidden states (B, T, h) and their mask -> one vector (B, h) a sample."""

    def __init__(self, how: str, hidden: int):
        super().__init__()
        self.how = how
        self.query = nn.Linear(hidden, 1, bias=False) if how == "attention" else None

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self.how == "last":
            rows = torch.arange(len(hidden), device=hidden.device)
            return hidden[rows, last_index(mask)].float()  # (B, h)
        hidden, real = hidden.float(), mask[..., None]  # (B, T, h), (B, T, 1)
        if self.how == "mean":
            return (hidden * real).sum(1) / real.sum(1)  # (B, h) / (B, 1)
        weight = self.query(hidden)  # (B, T, 1)
        weight = weight.masked_fill(~real, -torch.inf).softmax(1)
        return (weight * hidden).sum(1)  # (B, h)


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
        hidden, mask = self.hidden(batch)  # (B, T, h), (B, T)
        with torch.autocast(hidden.device.type, enabled=False):  # the head is float32
            kind = self.regressor.outer.weight.dtype
            z = self.pool(hidden, mask).to(kind)  # (B, h)
            last = self.regressor.last(z)  # (B, width)
            y = self.scaler.unscale(self.regressor.outer(last))  # (B, 1)
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
