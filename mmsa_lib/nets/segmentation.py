"""A small U-shaped network with one encoder a channel, for pictures stored as pixels.

Used in the chapter "CGGM: when one modality dominates". Each channel has its own
encoder of three levels; a common decoder reads the levels of all channels side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsa_lib.corpora.schema import Batch
from mmsa_lib.errors import CorpusError
from mmsa_lib.nets.fusion import real_steps
from mmsa_lib.nets.output import Output


def _block(d_in: int, d_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(d_in, d_out, 3, stride, 1), nn.ReLU())


class PictureEncoder(nn.Module):
    """(B, 1, H, W) -> levels (B, D, H, W), (B, D, H/2, W/2), (B, D, H/4, W/4)."""

    def __init__(self, width: int):
        super().__init__()
        self.levels = nn.ModuleList(
            [_block(1, width), _block(width, width, 2), _block(width, width, 2)]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for level in self.levels:
            x = level(x)
            found.append(x)
        return found


class SegmentationNet(nn.Module):
    """One encoder a channel, a common decoder with skip connections, logits a pixel.

    `predictions[label]` is (B, classes, H, W), `last` the input of the final layer
    (B, D, H, W), `hidden[m]` the levels of channel m, enlarged and added, (B, D, H, W).
    Takes batches of square pictures: features[m] (B, H W, 1). A missing channel is zero
    from its encoder on. Sides must be multiples of 4.
    """

    def __init__(
        self, modalities: Sequence[str], width: int = 12, classes: int = 4,
        label: str = "lesion",
    ):  # fmt: skip
        super().__init__()
        self.modalities, self.label = tuple(modalities), label
        self.encoders = nn.ModuleDict({m: PictureEncoder(width) for m in modalities})
        wide = len(self.modalities) * width
        self.up = nn.ModuleList(
            _block(d, width) for d in (wide, wide + width, wide + width)
        )
        self.out = nn.Linear(width, classes)  # of every pixel: a 1 x 1 convolution

    def forward(self, batch: Batch) -> Output:
        masks = real_steps(batch, dict.fromkeys(self.modalities, 1))
        levels, hidden = [], {}
        for m, encoder in self.encoders.items():
            x = batch.features[m]
            side = math.isqrt(x.shape[1])
            if side * side != x.shape[1] or side % 4:
                raise CorpusError(
                    f"{m!r} has {x.shape[1]} pixels; expected a square picture whose "
                    "side is a multiple of 4"
                )
            there = masks[m].any(1).to(x.dtype)[:, None, None, None]
            found = [y * there for y in encoder(x.view(-1, 1, side, side))]
            levels.append(found)
            hidden[m] = found[0] + sum(_enlarge(y, side) for y in found[1:])
        fine, middle, coarse = (torch.cat(x, 1) for x in zip(*levels, strict=True))
        y = self.up[0](coarse)
        y = self.up[1](torch.cat([_enlarge(y, middle.shape[-1]), middle], 1))
        last = self.up[2](torch.cat([_enlarge(y, fine.shape[-1]), fine], 1))
        logits = self.out(last.movedim(1, -1)).movedim(-1, 1)
        pooled = last.mean((2, 3))
        return Output({self.label: logits}, pooled, last, hidden, masks)


def _enlarge(x: Tensor, side: int) -> Tensor:
    return F.interpolate(x, size=(side, side), mode="nearest")
