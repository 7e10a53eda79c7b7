"""The Transformer encoder that all backbones share: pre-norm, sinusoidal positions.

Equations and notation: specification `backbones.md`, sections 1 and 4. Shapes are batch
first: x (B, T, D). Masks are True where a step is real.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsa_lib.errors import ConfigError, unknown
from mmsa_lib.nets.official import official_positions
from mmsa_lib.nets.ops import attend, dropout, linear

MODES = ("paper", "official")
READS = ("all", "first", "last")


@dataclass(frozen=True)
class Dropout:
    """The five rates of the papers' scripts."""

    attention: float = 0.0  # on attention weights
    relu: float = 0.0  # inside the feed-forward block
    embedding: float = 0.0  # on the scaled input plus positions
    residual: float = 0.0  # on what each block adds to the stream
    output: float = 0.0  # inside the residual head

    def __post_init__(self):
        for name, p in vars(self).items():
            if not 0.0 <= p < 1.0:
                raise ConfigError(f"dropout {name}={p}: a rate is in [0, 1)")


def sinusoids(rows: int, width: int) -> Tensor:
    """Table (rows, width) of positions: row 0 is zero, row p >= 1 holds all sines
    sin(p w_k), then all cosines, w_k = 10000^(-k / (width//2 - 1)); an odd width ends
    with a zero column. Computed in float32, as the released code does.
    """
    half = width // 2
    if half < 2:
        raise ConfigError(f"sinusoidal positions need a width of at least 4: {width}")
    frequency = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
    angle = torch.arange(rows)[:, None] * frequency
    table = torch.cat([angle.sin(), angle.cos()], dim=1)
    table[0] = 0.0
    return F.pad(table, (0, width - 2 * half))


class EncoderLayer(nn.Module):
    """Attention, then feed-forward of width 4D; both pre-norm, with residuals."""

    def __init__(self, width: int, heads: int, rates: Dropout):
        super().__init__()
        if width % heads:
            raise ConfigError(
                f"{heads} heads do not divide width {width}; choose a divisor"
            )
        self.heads, self.rates = heads, rates
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_ffn = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        for part in (self.qkv, self.out, self.fc1, self.fc2):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)

    def forward(self, x: Tensor, keys: _Keys, kv=None, row=None) -> Tensor:
        """x (B, T, D) -> (B, T, D), or (B, 1, D) where one `row` is asked for. `kv`
        (B, Tk, 2D) holds keys and values of another stream, side by side.
        """
        rates, D = self.rates, x.shape[-1]
        normed = self.norm_attention(x)
        weight, bias = self.qkv.weight, self.qkv.bias
        if kv is None and row is None:
            q, k, v = linear(normed, weight, bias).chunk(3, dim=-1)
        else:
            q = linear(_take(normed, row), weight[:D], bias[:D])
            if kv is None:
                kv = linear(normed, weight[D:], bias[D:])
            k, v = kv.chunk(2, dim=-1)
        p = rates.attention if self.training else 0.0
        y = attend(self._split(q), self._split(k), self._split(v), keys.bias(row), p)
        y = linear(y.transpose(1, 2).flatten(2), self.out.weight, self.out.bias)
        if keys.present is not None:
            y = y * keys.present  # attention over nothing adds nothing
        x = _take(x, row) + dropout(y, rates.residual, self.training)

        y = linear(self.norm_ffn(x), self.fc1.weight, self.fc1.bias, relu=True)
        y = dropout(y, rates.relu, self.training)
        y = linear(y, self.fc2.weight, self.fc2.bias)
        return x + dropout(y, rates.residual, self.training)

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, heads, T, D / heads), a view."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


@dataclass
class _Keys:
    """What the queries of all layers attend to, prepared once a forward pass."""

    context: tuple[Tensor, ...] | None  # keys and values (B, Tk, 2D) of each layer
    present: Tensor | None  # (B, 1, 1), 0 for a sample without any key
    scores: Tensor | None  # (B or 1, Tq or 1, Tk), added to the attention scores

    def bias(self, row) -> Tensor | None:
        """(B or 1, 1, Tq or 1, Tk); with a `row`, for that query only."""
        if self.scores is None:
            return None
        scores = self.scores
        if row is not None and scores.shape[1] > 1:
            if isinstance(row, Tensor):
                scores = scores.expand(len(row), -1, -1)
            scores = _take(scores, row)
        return scores[:, None]


class Encoder(nn.Module):
    """`layers` pre-norm layers between sinusoidal positions and a final LayerNorm.

    With a `context` it is the cross-attention encoder of MulT: the other stream gives
    keys and values, embedded once and normalised in each layer by that layer's first
    LayerNorm. Parameters: L(12 D^2 + 13 D) + 2 D either way.

    mode     "paper": padding is masked, positions count real steps, output is zero
             where `mask` is False. "official": masks are ignored, a step whose first
             channel is exactly 0 gets no position, padded steps are attended.
    causal   query i sees key j only if j <= i + |Tk - Tq| (real lengths in paper mode)
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        dropout: Dropout | None = None,
        mode: str = "paper",
        causal: bool = False,
    ):
        super().__init__()
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        if layers < 1:
            raise ConfigError(f"an encoder needs at least one layer, not {layers}")
        self.rates = dropout or Dropout()
        self.mode, self.causal, self.scale = mode, causal, math.sqrt(width)
        self.layers = nn.ModuleList(
            EncoderLayer(width, heads, self.rates) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("positions", sinusoids(512, width), persistent=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        read: str = "all",
    ) -> Tensor:
        """x (B, T, D), mask (B, T), context (B, Tk, D) -> (B, T, D); (B, D) if one row
        is read: the first or last real row in paper mode, row 0 or -1 in official mode.

        When one row is read the last layer computes that row only, which is exact.
        A sample without any real step gives zeros.
        """
        if read not in READS:
            raise unknown("read", read, READS)
        if self.mode == "official":
            mask = context_mask = None
        mask, context_mask = _useful(mask), _useful(context_mask)
        if mask is not None and _ragged(mask):
            return self._by_length(x, mask, context, context_mask, read)
        return self._encode(x, mask, context, context_mask, read)

    def begin(self, x: Tensor, mask: Tensor) -> tuple[Tensor, _Keys]:
        """Embedded x (B, T, D) and the keys that each of `layers` takes, for who runs
        the layers of several encoders side by side; `end` follows the last one.
        """
        mask = None if self.mode == "official" else _useful(mask)
        return self._embed(x, mask), self._keys(x, mask, None, None)

    def end(self, x: Tensor, mask: Tensor) -> Tensor:
        """The final LayerNorm; in paper mode zero where masked."""
        x = self.norm(x)
        return x if self.mode == "official" else x * mask[..., None].to(x.dtype)

    def _encode(self, x, mask, context, context_mask, read) -> Tensor:
        T = x.shape[1]
        row = None if read == "all" else _row(mask, T, read)
        keys = self._keys(x, mask, context, context_mask)
        x = self._embed(x, mask)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            kv = keys.context[i] if keys.context else None
            x = layer(x, keys, kv, row if i == last else None)
        x = self.norm(x)
        if mask is not None:
            real = mask if row is None else mask.any(1, keepdim=True)
            x = x * real[..., None].to(x.dtype)
        return x if row is None else x[:, 0]

    def _embed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """sqrt(D) x + positions, with dropout."""
        T = x.shape[1]
        if len(self.positions) <= T:
            table = sinusoids(2 * T, x.shape[2])
            self.positions = table.to(self.positions)
        if self.mode == "official":
            positions = F.embedding(official_positions(x), self.positions)
        elif mask is None:
            positions = self.positions[1 : T + 1]
        else:
            positions = F.embedding(_numbers(mask), self.positions)
        x = torch.add(positions.to(x.dtype), x, alpha=self.scale)
        return dropout(x, self.rates.embedding, self.training)

    def _keys(self, x, mask, context, context_mask) -> _Keys:
        key_mask = mask if context is None else context_mask
        blocked = None if key_mask is None else ~key_mask[:, None, :]
        if self.causal:
            Tk = x.shape[1] if context is None else context.shape[1]
            i, n = _count(mask, x.shape[1], x.device)
            j, nk = _count(key_mask, Tk, x.device)
            future = j[:, None, :] > i[:, :, None] + (nk - n).abs()[:, :, None]
            blocked = future if blocked is None else blocked | future
        scores = present = None
        if blocked is not None:
            # finite, so that a query that may see nothing stays finite too
            scores = blocked.to(x.dtype) * (torch.finfo(x.dtype).min / 4)
        if context is not None:
            if context_mask is not None:
                present = context_mask.any(1)[:, None, None].to(x.dtype)
            context = self._project(self._embed(context, context_mask))
        return _Keys(context, present, scores)

    def _project(self, context: Tensor) -> tuple[Tensor, ...]:
        """Keys and values (B, Tk, 2D) of the embedded context in every layer.

        One product makes them all: what differs between the layers' LayerNorms is
        affine, so it goes into the weights.
        """
        D = context.shape[-1]
        weights, biases = [], []
        for layer in self.layers:
            norm, weight = layer.norm_attention, layer.qkv.weight[D:]
            weights.append(weight * norm.weight)
            biases.append(weight @ norm.bias + layer.qkv.bias[D:])
        normed = F.layer_norm(context, (D,), eps=self.norm.eps)
        kv = linear(normed, torch.cat(weights), torch.cat(biases))
        return kv.chunk(len(self.layers), dim=-1)

    def _by_length(self, x, mask, context, context_mask, read) -> Tensor:
        """Encode samples of similar length together, without their common padding."""
        lengths = mask.sum(1)
        order = lengths.argsort()
        back = order.argsort()
        parts = []
        size = max(_SIMILAR, min(len(order) // 2, _STEPS // x.shape[1]))
        for part in order.split(size):
            T = max(int(lengths[part[-1]]), 1)
            c, cm = context, context_mask
            if context is not None:
                c, cm = context[part], None if cm is None else cm[part]
            y = self._encode(x[part, :T], mask[part, :T], c, cm, read)
            parts.append(F.pad(y, (0, 0, 0, x.shape[1] - T)) if read == "all" else y)
        return torch.cat(parts)[back]


_SIMILAR = 16  # samples of similar length that are encoded together, at least,
_STEPS = 1600  # and about as many steps: smaller tensors cost more than padding


def _useful(mask: Tensor | None) -> Tensor | None:
    """None for a mask that hides nothing; on a GPU the look would cost a wait."""
    if mask is None or (mask.device.type == "cpu" and mask.all()):
        return None
    return mask


def _ragged(mask: Tensor) -> bool:
    """Is sorting by length worth it? Only on a CPU, where it costs no wait."""
    if mask.device.type != "cpu" or len(mask) < 2 * _SIMILAR:
        return False
    if (mask[:, 1:] & ~mask[:, :-1]).any():  # padding in between
        return False
    return mask.float().mean().item() < 0.8


def _take(x: Tensor, row) -> Tensor:
    """(B, T, ...) -> (B, 1, ...): one row, an int or (B,) one a sample; None = all."""
    if row is None:
        return x
    if isinstance(row, int):
        return x[:, row : row + 1]
    return x[torch.arange(len(row), device=x.device), row][:, None]


def _row(mask: Tensor | None, T: int, read: str):
    """Index of the first or last real step: an int without a mask, else (B,)."""
    if mask is None:
        return 0 if read == "first" else T - 1
    if read == "first":
        return mask.int().argmax(1)
    return T - 1 - mask.int().flip(1).argmax(1)


def _numbers(mask: Tensor) -> Tensor:
    """Position numbers (B, T): real steps count from 1, the others have 0."""
    return mask.cumsum(1) * mask


def _count(mask: Tensor | None, T: int, device) -> tuple[Tensor, Tensor]:
    """Position numbers (B or 1, T) and lengths (B or 1, 1)."""
    if mask is None:
        mask = torch.ones(1, T, dtype=torch.bool, device=device)
    return _numbers(mask), mask.sum(1, keepdim=True)
