"""What gradient modulation adds to a training step, in time and memory.

Two backbones with equal weights and batches: ours, and the naive form of
`benchmarks/backbone.py`. On ours: joint training, our modulation, our modulation with
classifiers as large as the released ones, and the same idea written naively (separate
classifiers that compute every row, gradients by `autograd.grad` with a graph of their
own, metrics fetched with `.item()`, parameters found by their names). On the naive
backbone: joint training and the released way, which compares weights. Calls alternate
in one process; what is reported is CPU time of one thread, as a share of joint
training on the same backbone in the same round.

    python benchmarks/cggm.py             # writes results/benchmarks/
    python benchmarks/cggm.py --rounds 5 --dry
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from backbone import DIMS, NaiveEncoder, interleave, make_batch, models
from torch import Tensor, nn

from mmsa_lib import runs
from mmsa_lib.methods.cggm import CGGMConfig, GradientModulator
from mmsa_lib.nets import count_parameters
from mmsa_lib.tasks import SENTIMENT

RHO, LAM = 1.3, 0.2
NAMES = {
    "joint": "joint training",
    "ours": "modulation, ours",
    "ours-two-layers": "modulation, ours, released classifiers",
    "naive": "modulation, naive, gradients compared",
    "released-joint": "joint training, naive backbone",
    "released": "modulation, released way",
}


class NaiveClassifier(nn.Module):
    """Two encoder layers over all rows, then the same linear layer twice."""

    def __init__(self, width: int, heads: int, rates):
        super().__init__()
        self.bone = NaiveEncoder(width, 2, heads, rates)
        self.proj1 = nn.Linear(width, width)
        self.out_layer = nn.Linear(width, 1)

    def forward(self, h: Tensor) -> Tensor:
        z = self.bone(h)[0]
        return self.out_layer(F.relu(self.proj1(self.proj1(z))))


def naive_hidden(model: nn.Module, x: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The naive middle fusion, with its encoders' outputs (T, B, D)."""
    x = [
        p(t.transpose(1, 2)).permute(2, 0, 1)
        for p, t in zip(model.proj, x, strict=True)
    ]
    hidden = [encoder(t) for encoder, t in zip(model.encoders, x, strict=True)]
    z = model.fusion(torch.cat(hidden))[0]
    y = F.dropout(F.relu(model.proj1(z)), model.p, model.training)
    return model.out_layer(model.proj2(y) + z), hidden


class Naive:
    """Modulation step by step, as a program that never thought of its cost."""

    def __init__(self, model, out_layer, prefix, classifiers, gradients: bool):
        self.model, self.out, self.prefix = model, out_layer, prefix
        self.classifiers, self.gradients = classifiers, gradients
        self.adam = torch.optim.Adam(classifiers.parameters(), 5e-4)
        self.before, self.late = [0.0] * len(classifiers), None

    def step(self, prediction, hidden, truth) -> None:
        task = F.l1_loss(prediction, truth)
        outs = [c(h.detach()) for c, h in zip(self.classifiers, hidden, strict=True)]
        metrics = [((p > 0) == (truth > 0)).float().mean().item() for p in outs]
        delta = [a - b for a, b in zip(metrics, self.before, strict=True)]
        self.before, total = metrics, sum(delta) + 1e-8
        b = [(total - d) / total for d in delta]
        M = len(b)
        if self.gradients:
            W = self.out.weight
            g = torch.autograd.grad(task, W, create_graph=True)[0].flatten()
            other = []
            for c, p in zip(self.classifiers, outs, strict=True):
                one = F.l1_loss(p, truth)
                w = c.out_layer.weight
                other.append(
                    torch.autograd.grad(one, w, retain_graph=True)[0].flatten()
                )
            cosines = [F.cosine_similarity(o, g, dim=0) for o in other]
            b = [min(max(x, 0.0), 1.0) for x in b]  # keep the run finite
            loss = (
                task
                + LAM * sum(abs(x) - x * c for x, c in zip(b, cosines, strict=True)) / M
            )
        else:
            loss = task if self.late is None else task + LAM * self.late
        loss.backward()
        sum(F.l1_loss(p, truth) for p in outs).backward()
        if not self.gradients:
            W = self.out.weight.detach().clone().requires_grad_()
            cosines = [
                F.cosine_similarity(c.out_layer.weight.detach(), W)[0]
                for c in self.classifiers
            ]
            self.late = sum(abs(x) - x * c for x, c in zip(b, cosines, strict=True)) / M
        for i, x in enumerate(b):
            for name, p in self.model.named_parameters():
                if self.prefix[i] in name and p.grad is not None:
                    p.grad *= RHO * x
        self.adam.step()
        self.adam.zero_grad()


def build(batch) -> dict[str, Callable]:
    """One training step of each kind, by name."""
    truth = batch.labels["sentiment"]
    steps, parts = {}, {}

    def ours(rule: GradientModulator | None = None) -> Callable:
        torch.manual_seed(0)
        _, model, _ = models("middle")
        adam = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
        if rule is not None:
            rule.setup(model, torch.device("cpu"))

        def call():
            model.train()
            adam.zero_grad()
            output = model(batch)
            loss = SENTIMENT.objective(output, batch)
            if rule is not None:
                loss = rule.loss(output, batch, loss)
            loss.backward()
            if rule is not None:
                rule.after_backward(model)
            nn.utils.clip_grad_norm_(model.parameters(), 0.8)
            adam.step()

        return call

    def naive(own_backbone: bool, modulated: bool) -> Callable:
        torch.manual_seed(0)
        theirs, model, config = models("middle")
        model = model if own_backbone else theirs
        adam = torch.optim.Adam(model.parameters(), 1e-3, fused=own_backbone)
        classifiers = nn.ModuleList(
            NaiveClassifier(config.width, config.heads, config.dropout) for _ in DIMS
        )
        keys = list(DIMS) if own_backbone else [str(i) for i in range(len(DIMS))]
        out = model.head.out if own_backbone else model.out_layer
        prefix = [f"encoders.{k}" for k in keys]
        rule = Naive(model, out, prefix, classifiers, gradients=own_backbone)
        if modulated:
            parts["naive" if own_backbone else "released"] = rule

        def call():
            model.train()
            adam.zero_grad()
            if own_backbone:
                output = model(batch)
                prediction = output.predictions["sentiment"]
                hidden = [h.transpose(0, 1) for h in output.hidden.values()]
            else:
                prediction, hidden = naive_hidden(model, list(batch.features.values()))
            if modulated:
                rule.step(prediction, hidden, truth)
            else:
                F.l1_loss(prediction, truth).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.8)
            adam.step()

        return call

    small = GradientModulator(CGGMConfig(rho=RHO, lam=LAM))
    large = GradientModulator(CGGMConfig(rho=RHO, lam=LAM, classifier_layers=2))
    parts["ours"], parts["ours-two-layers"] = small, large
    steps["joint"], steps["ours"] = ours(), ours(small)
    steps["ours-two-layers"] = ours(large)
    steps["naive"] = naive(True, True)
    steps["released-joint"] = naive(False, False)
    steps["released"] = naive(False, True)
    return steps, parts  # parts: name -> what holds `classifiers`


def held(call: Callable) -> float:
    """MiB of tensors that a step keeps for its backward passes."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            storage = x.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    kept = []  # so that no address is used twice within the step

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return pack(x)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        call()
    return sum(sizes.values()) / 2**20


def percent(share: float) -> float:
    return round(100 * (share - 1), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--dry", action="store_true", help="print only, write nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = make_batch(args.batch_size, args.steps, ragged=False)
    steps, parts = build(batch)
    times = interleave(steps, args.rounds)
    memory = {name: held(call) for name, call in steps.items()}
    rows = []
    for name, values in times.items():
        base = "released-joint" if name.startswith("released") else "joint"
        shares = [x / y for x, y in zip(values, times[base], strict=True)]
        quartiles = statistics.quantiles(shares, n=4)
        extra = memory[name] - memory[base]
        state = 0.0  # parameters, gradients and two moments of Adam
        if name in parts:
            state = 16 * count_parameters(parts[name].classifiers)[1] / 2**20
        rows.append(
            {
                "what": NAMES[name],
                "name": name,
                "base": base,
                "ms_median": round(statistics.median(values), 1),
                "ms_min": round(min(values), 1),
                "overhead_percent": percent(statistics.median(shares)),
                "overhead_quarter": percent(quartiles[0]),
                "overhead_three_quarters": percent(quartiles[2]),
                "overhead_min_percent": percent(min(values) / min(times[base])),
                "activations_mib": round(memory[name], 2),
                "extra_activations_mib": round(extra, 2),
                "extra_state_mib": round(state, 3),
            }
        )
        row = rows[-1]
        print(
            f"{row['what']:<42}{row['ms_median']:>8.1f}{row['ms_min']:>8.1f}"
            f"{row['overhead_percent']:>8.1f} % ({row['overhead_quarter']:.1f} to "
            f"{row['overhead_three_quarters']:.1f})"
            f"{row['overhead_min_percent']:>8.1f} %"
            f"{row['extra_activations_mib']:>8.2f} MiB{state:>8.2f} MiB",
            flush=True,
        )
    if not args.dry:
        settings = {
            "batch_size": args.batch_size,
            "steps": args.steps,
            "dims": DIMS,
            "width": 40,
            "layers": 5,
            "rounds": args.rounds,
            "threads": 1,
            "time": "CPU milliseconds of a training step (time.process_time), calls "
            "alternate; overhead is the median over rounds of the share of joint "
            "training on the same backbone, with the quartiles of these shares",
            "memory": "tensors kept for the backward passes of a step; state is "
            "parameters, gradients and Adam's moments of the classifiers",
        }
        path = runs.save_benchmark("cggm-cost", rows, settings=settings, out=args.out)
        print(path)


if __name__ == "__main__":
    main()
