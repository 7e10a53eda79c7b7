"""Wander's fusion beside the naive outer product, for two to seven modalities.

The naive form does what the equation says: it builds the fusion tensor from its
factors and the outer product of all modalities, and contracts the two. That fits into
memory only for tiny sizes ("tiny"); there both run with equal weights and must agree.
Ours alone also runs at the sizes of the book and of the public copies, where an
exponent is fitted: time, memory and parameters against M, log against log. Calls
alternate over M and over both forms; what is reported is CPU time of one thread and
the peak of live tensors.

    python benchmarks/wander.py            # writes results/benchmarks/
    python benchmarks/wander.py --rounds 5 --dry
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mmsa_lib import runs
from mmsa_lib.methods.wander import Wander, WanderConfig
from mmsa_lib.nets import count_parameters

MODALITIES = ("text", "audio", "vision", "pose", "gaze", "hands", "heart")
SIZES = {  # B, d, and the adapter; steps are max_len
    "tiny": (8, 4, WanderConfig(2, 2, 2, 2, max_len=3)),
    "book": (64, 40, WanderConfig(8, 4, 4, 8, max_len=50)),
    "copies": (24, 40, WanderConfig()),
}
RANGE = range(2, 8)


def naive(adapter: Wander, hidden: dict[str, Tensor], masks: dict[str, Tensor]):
    """F / sqrt(R_t R_d) by the fusion tensor W and the outer product of all Z_m."""
    weights = outer = None
    for m in adapter.modalities:
        z, U = adapter.project(m, hidden[m], masks[m])
        factor = torch.einsum("pts,qae->pqtase", U, adapter.V[m]).flatten(2, 3)
        z = z.flatten(1)  # (B, T r)
        if weights is None:
            weights, outer = factor, z
            continue
        weights = (weights[:, :, :, None] * factor[:, :, None]).flatten(2, 3)
        outer = (outer[:, :, None] * z[:, None]).flatten(1)
    W = weights.sum((0, 1))  # ((T r)^M, T_o, d)
    terms = adapter.config.token_rank * adapter.config.feature_rank
    return torch.einsum("bi,ise->bse", outer, W) / math.sqrt(terms)


def ours(adapter: Wander, hidden: dict[str, Tensor], masks: dict[str, Tensor]):
    return adapter.fuse(hidden, masks)


def step(form: Callable, adapter: Wander, hidden, masks) -> Callable:
    """Forward and backward, as in training."""

    def call():
        adapter.zero_grad()
        form(adapter, hidden, masks).square().sum().backward()

    return call


def peak_mib(call: Callable) -> float:
    """The most memory that tensors held at once during `call`, in MiB."""
    call()  # gradients exist from here on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = found.profiler.kineto_results.events()
    memory = [e for e in events if e.name() == "[memory]"]
    memory.sort(key=lambda e: e.start_ns())
    held = np.cumsum([e.nbytes() for e in memory])
    return float(held.max()) / 2**20


def exponent(modalities, values) -> float:
    """Slope of log(value) against log(M)."""
    return float(np.polyfit(np.log(list(modalities)), np.log(list(values)), 1)[0])


def build(name: str, M: int):
    B, d, config = SIZES[name]
    torch.manual_seed(M)
    adapter = Wander(MODALITIES[:M], d, config)
    hidden = {m: torch.randn(B, config.max_len, d) for m in MODALITIES[:M]}
    masks = {m: torch.ones(h.shape[:2]).bool() for m, h in hidden.items()}
    return adapter, hidden, masks


def measure(name: str, rounds: int) -> list[dict]:
    calls, rows = {}, {}
    for M in RANGE:
        adapter, hidden, masks = build(name, M)
        rows[M] = {
            "what": f"{name} sizes, {M} modalities",
            "sizes": name,
            "modalities": M,
            "parameters": count_parameters(adapter)[0],
        }
        calls[M, "ours"] = step(ours, adapter, hidden, masks)
        if name == "tiny":
            calls[M, "naive"] = step(naive, adapter, hidden, masks)
            with torch.no_grad():
                a = ours(adapter, hidden, masks)
                gap = (a - naive(adapter, hidden, masks)).abs().max() / a.abs().max()
            if gap > 1e-4:
                raise SystemExit(f"{M} modalities: the two forms differ by {gap:.1e}")
            rows[M]["output_difference"] = float(gap)
        c, d = adapter.config, adapter.width
        tensor = (c.max_len * c.rank) ** M * c.out_tokens * d
        rows[M]["fusion_tensor_entries"] = float(tensor)
    times = {key: [] for key in calls}
    for number in range(rounds + 1):
        for key, call in calls.items():
            start = time.process_time()
            call()
            if number:
                times[key].append(1000 * (time.process_time() - start))
    for (M, form), values in times.items():
        rows[M][f"{form}_ms_min"] = round(min(values), 3)
        rows[M][f"{form}_ms_median"] = round(statistics.median(values), 3)
        rows[M][f"{form}_peak_mib"] = round(peak_mib(calls[M, form]), 4)
    for row in rows.values():
        if "naive_ms_min" in row:
            for kind in ("ms_min", "ms_median", "peak_mib"):
                row[f"ratio_{kind}"] = round(
                    row[f"naive_{kind}"] / row[f"ours_{kind}"], 2
                )
        print(row, flush=True)
    fit = {"what": f"{name} sizes, exponent against M", "sizes": name}
    for form in ("ours", "naive") if name == "tiny" else ("ours",):
        for kind in ("ms_min", "ms_median", "peak_mib"):
            values = [row[f"{form}_{kind}"] for row in rows.values()]
            fit[f"{form}_exponent_{kind}"] = round(exponent(RANGE, values), 3)
    values = [row["parameters"] for row in rows.values()]
    fit["exponent_parameters"] = round(exponent(RANGE, values), 3)
    print(fit, flush=True)
    return [*rows.values(), fit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--dry", action="store_true", help="print only, write nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in SIZES for row in measure(name, args.rounds)]
    slow = [row["what"] for row in rows if row.get("ours_exponent_ms_min", 0) > 1.2]
    if slow:
        raise SystemExit(f"time grows faster than M^1.2: {', '.join(slow)}")
    if not args.dry:
        settings = {
            "rounds": args.rounds,
            "threads": 1,
            "sizes": {
                name: {
                    "batch_size": B,
                    "width": d,
                    "rank": c.rank,
                    "token_rank": c.token_rank,
                    "feature_rank": c.feature_rank,
                    "out_tokens": c.out_tokens,
                    "steps": c.max_len,
                }
                for name, (B, d, c) in SIZES.items()
            },
            "time": "CPU milliseconds (time.process_time) of a forward and a backward "
            "pass of the fusion; calls alternate over M and over both forms",
            "memory": "peak of live tensors in the same call (torch.profiler), MiB",
            "naive": "the fusion tensor built from its factors, the outer product of "
            "all modalities, one contraction of the two",
            "ours": "einsum: tokens, then features of each modality, then a product",
            "same": "weights and inputs; outputs agree to 1e-4 of their largest value",
        }
        print(runs.save_benchmark("wander", rows, settings=settings, out=args.out))


if __name__ == "__main__":
    main()
