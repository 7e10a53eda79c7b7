"""The three operations in which a small Transformer spends its time.

`dropout`, `linear` and `attend` compute what `torch.nn.functional` computes. On a CPU
in float32 they take a faster road to the same result; everywhere else they call it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_BLOCK = 2**18  # attention weights in work at once: 1 MB, so that they stay in cache
_LARGE = 2**21  # multiplications from which oneDNN repays its overhead


def _fast(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


# ---------------------------------------------------------------- dropout


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element with probability `p`, scale the others by 1/(1-p).

    One 64-bit draw decides four elements, so `p` is rounded to a multiple of 2**-16
    (and the scale with it: the expectation is exact). The draws come from torch's
    generator.
    """
    if not training or p == 0.0:
        return x
    if not _fast(x):
        return F.dropout(x, p)
    noise, limit, scale = _noise(x.shape, p)
    # threshold_backward(x, noise, t) is "x where noise > t, else 0" in a single pass
    return torch.ops.aten.threshold_backward(x, noise, limit).mul_(scale)


def _noise(shape: torch.Size, p: float) -> tuple[Tensor, float, float]:
    """(noise, limit, scale): noise <= limit with probability `p`; scale = 1/(1-p)."""
    n = math.prod(shape)
    draws = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None)
    noise = draws.view(torch.int16)[:n].view(shape).float()  # -2**15 .. 2**15 - 1
    dropped = round(p * 2**16)
    return noise, dropped - 2**15 - 0.5, 2**16 / (2**16 - dropped)


# ---------------------------------------------------------------- linear


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False
) -> Tensor:
    """x (B, T, d_in), weight (d_out, d_in), bias (d_out,) -> (B, T, d_out), with `relu`
    of that.

    oneDNN's AVX-512 kernels are up to twice as fast as the BLAS behind `F.linear`.
    Without gradients torch has an operation for them. With gradients they are reached
    by a 1x1 convolution in channels-last layout, the same sum of products.
    """
    size = x.shape[0] * x.shape[1] * weight.numel()
    if not _fast(x) or size < _LARGE or not torch.backends.mkldnn.is_available():
        y = F.linear(x, weight, bias)
    elif torch.is_grad_enabled():
        image = x.unsqueeze(1).permute(0, 3, 1, 2)  # (B, d_in, 1, T)
        image = F.conv2d(image, weight[:, :, None, None], bias)
        y = image.permute(0, 2, 3, 1).squeeze(1)
    else:
        then = "relu" if relu else "none"
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "")
    return F.relu(y, inplace=True) if relu else y


# ---------------------------------------------------------------- attention


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, p: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias), dropout `p` on the weights, times v.

    q (B, h, Tq, d); k, v (B, h, Tk, d) -> (B, h, Tq, d). `bias` is a mask: 0 for a key
    that may be seen, a large negative number for one that may not; (B or 1, 1, Tq or 1,
    Tk).
    """
    if not _fast(q):
        if bias is not None:  # under autocast q may be narrower than the mask
            bias = bias.clamp(min=torch.finfo(q.dtype).min / 4).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)
    # head widths of 5 to 8 are too narrow to be the last axis of a matrix product
    q, k, v = (x.transpose(2, 3).contiguous() for x in (q, k, v))
    if bias is not None:
        bias = bias.transpose(2, 3).contiguous()  # keys first: sums run over rows
    return _Attention.apply(q, k, v, bias, p).transpose(2, 3)


class _Attention(torch.autograd.Function):
    """Attention on (B, h, d, T) tensors, a cache-sized block of samples at a time.

    With w = 2^s, s = q.k log2(e) / sqrt(d) + bias, and Z = sum_k w: out = (w v) / Z.
    The weights are never normalised, and 2^s is several times cheaper than e^s here.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, p):
        B, h, d, Tq = q.shape
        Tk = k.shape[3]
        scale = math.log2(math.e) / math.sqrt(d)
        reach = scale * (_longest(q) * _longest(k)).sqrt().item()  # >= |q.k| scale
        keep = any(ctx.needs_input_grad)
        size = max(1, min(B, _BLOCK // (h * Tq * Tk)))
        gain = 1.0
        held = B if keep else size  # without gradients, blocks share their memory
        weights = q.new_empty(held, h, Tk, Tq)
        dropped = torch.empty_like(weights) if p else weights
        total = q.new_empty(B, h, 1, Tq)
        out = q.new_empty(B, h, d, Tq)
        for i in range(0, B, size):
            block = slice(i, min(i + size, B))
            n = block.stop - i
            w = weights[block] if keep else weights[:n]
            used = dropped[block] if keep else dropped[:n]
            if bias is not None:
                w.copy_(bias[block] if len(bias) > 1 else bias)
            queries, keys = q[block].flatten(0, 1), k[block].flatten(0, 1)
            w.flatten(0, 1).baddbmm_(
                keys.transpose(1, 2), queries, beta=int(bias is not None), alpha=scale
            )
            if reach > 64:  # 2^s could leave the range of float32
                w -= w.amax(2, keepdim=True)
            w.exp2_()
            torch.sum(w, 2, keepdim=True, out=total[block])
            if p:
                noise, limit, gain = _noise(w.shape, p)
                torch.ops.aten.threshold_backward.grad_input(
                    w, noise, limit, grad_input=used
                )
            values, mixed = v[block].flatten(0, 1), used.flatten(0, 1)
            torch.bmm(values, mixed, out=out[block].flatten(0, 1))
        total += total == 0  # a query that sees nothing: 0 / 1
        out *= gain / total
        if keep:
            ctx.gain, ctx.size = gain, size
            ctx.save_for_backward(q, k, v, weights, dropped, total, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, weights, dropped, total, out = ctx.saved_tensors
        B, _, d, _ = q.shape
        grad = grad / total
        delta = (grad * out).sum(2, keepdim=True)  # (B, h, 1, Tq)
        grad *= ctx.gain
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for i in range(0, B, ctx.size):
            block = slice(i, min(i + ctx.size, B))
            g, used = grad[block].flatten(0, 1), dropped[block].flatten(0, 1)
            keys, values = k[block].flatten(0, 1), v[block].flatten(0, 1)
            ds = torch.bmm(values.transpose(1, 2), g)
            ds.mul_(used).addcmul_(
                weights[block].flatten(0, 1), delta[block].flatten(0, 1), value=-1
            )
            torch.bmm(keys, ds, out=dq[block].flatten(0, 1))
            ds, used = ds.transpose(1, 2), used.transpose(1, 2)
            torch.bmm(q[block].flatten(0, 1), ds, out=dk[block].flatten(0, 1))
            torch.bmm(g, used, out=dv[block].flatten(0, 1))
        dq *= d**-0.5
        dk *= d**-0.5
        return dq, dk, dv, None, None


def _longest(x: Tensor) -> Tensor:
    """Largest squared length of the vectors in x (B, h, d, T)."""
    return x.square().sum(2).amax()


def keep_4bit_format(module: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights when a CPU first evaluates them.

    Where a processor has AVX512-BF16 it would, with constants rounded to bfloat16: the
    same model then gives other results afterwards, and no gradient passes it.
    """
    for part in module.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False
