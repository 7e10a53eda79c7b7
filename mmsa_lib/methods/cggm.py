"""CGGM: scale and align the gradients of modalities by how fast each one improves.

Guo et al. 2024, arXiv 2411.01409; specification `cggm.md`, whose sections are quoted
below; built in the chapter "CGGM: when one modality dominates". `GradientModulator` is
a rule for `training.fit` and works with any model: it is told which modules serve which
modality and never looks at names of parameters. M modalities, B samples; a picture
counts as N = B H W samples, one a pixel, everything else as N = B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmsa_lib.corpora.schema import Batch
from mmsa_lib.errors import ConfigError, unknown
from mmsa_lib.nets.encoder import MODES, Encoder
from mmsa_lib.nets.fusion import masked_mean, modality_modules
from mmsa_lib.tasks import SENTIMENT, Task
from mmsa_lib.training import Rule

# what a mode means, flag by flag; each can be set by itself
PAPER = {
    "compare": "gradients",
    "guard": True,
    "delay": False,
    "speed": "ema",
    "first": "neutral",
    "include_projection": True,
    "masks": True,
    "classifier_layers": 1,
}
OFFICIAL = {
    "compare": "weights",
    "guard": False,
    "delay": True,
    "speed": "batch",
    "first": "zero",
    "include_projection": False,
    "masks": False,
    "classifier_layers": 2,
}
METRICS = ("sign", "neg_mae", "accuracy", "dice")


@dataclass(frozen=True)
class CGGMConfig:
    """Settings of the modulation; flags that are None follow `mode`.

    rho, lam           scale of the coefficients c = rho b; weight of the direction loss
    mode               "paper" (equations, guarded) or "official" (released program)
    magnitude          scale the gradients of the encoders
    direction          add the direction loss
    speed              metric whose growth counts: "batch", "ema" over batches or the
                       value of the last "epoch"
    momentum           of the moving average
    eps                smallest progress that counts, so that nothing divides by zero
    speed_metric       "sign" or "neg_mae" for regression, "accuracy" or "dice" for
                       classes; None takes "sign", "accuracy" or, for pictures, "dice"
    renormalise        multiply c by M / (M - 1), so that equal speeds mean c = rho
    include_projection the input projection of a modality is scaled as well
    compare            "gradients" of the last layers (closed form) or their "weights"
    guard              bounded coefficients; False: raw ones, (S - d) / S
    delay              use the direction loss of the batch before
    first              progress of the first step: "neutral" (none) or "zero" (the
                       metric counts from 0)
    masks              classifiers see masks; samples without a modality do not count
    classifier_layers  encoder layers of a classifier; 0: masked mean (released: 2)
    classifier_heads   attention heads there, lowered to a divisor of the width
    classifier_lr      of the classifiers' own Adam
    regions            sets of classes whose Dice is averaged; None: each but class 0
    trace              keep the numbers of every step in `GradientModulator.trace`
    """

    rho: float = 1.3
    lam: float = 0.2
    mode: str = "paper"
    magnitude: bool = True
    direction: bool = True
    speed: str | None = None
    momentum: float = 0.9
    eps: float = 1e-3
    speed_metric: str | None = None
    renormalise: bool = False
    include_projection: bool | None = None
    compare: str | None = None
    guard: bool | None = None
    delay: bool | None = None
    first: str | None = None
    masks: bool | None = None
    classifier_layers: int | None = None
    classifier_heads: int = 5
    classifier_lr: float = 5e-4
    regions: tuple[tuple[int, ...], ...] | None = None
    trace: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        for flag, value in (PAPER if self.mode == "paper" else OFFICIAL).items():
            if getattr(self, flag) is None:
                object.__setattr__(self, flag, value)
        for flag, known in (
            ("speed", ("batch", "ema", "epoch")),
            ("compare", ("gradients", "weights")),
            ("first", ("neutral", "zero")),
            ("speed_metric", METRICS),
        ):
            if getattr(self, flag) not in (*known, None):
                raise unknown(flag, str(getattr(self, flag)), known)
        if not (self.eps > 0 and self.rho >= 0 and self.lam >= 0):
            raise ConfigError(
                f"eps must be positive, rho and lam at least 0: {self.eps}, "
                f"{self.rho}, {self.lam}"
            )
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum is in [0, 1): {self.momentum}")
        if self.delay and self.compare == "gradients":
            raise ConfigError(
                'delay=True needs compare="weights": the gradients of the batch before '
                "no longer reach the model"
            )


# ---------------------------------------------------------------- the pieces


def balance(delta: Tensor, guard: bool = True, eps: float = 1e-3) -> Tensor:
    """b_m = (S - d_m) / S of the progress d (M,), S its sum; the b sum to M - 1.

    guard   d is max(d, 0) + eps, so 0 <= b <= 1, and no progress anywhere gives the
            neutral (M - 1) / M. Without it S is the raw sum + 1e-8: b may be negative
            or huge. (Section 2)
    """
    delta = delta.clamp(min=0) + eps if guard else delta
    total = delta.sum() + (0.0 if guard else 1e-8)
    return (total - delta) / total


def last_gradient(slope: Tensor, z: Tensor) -> Tensor:
    """Gradient of a loss at the weight of its last linear layer, in closed form.

    slope (..., N, o): derivative of the loss at the outputs; z (..., N, D): inputs of
    the layer -> (..., o, D). Differentiable in both, without double backward.
    """
    return slope.transpose(-1, -2) @ z  # (..., o, N) @ (..., N, D) -> (..., o, D)


def direction_loss(b: Tensor, cosine: Tensor) -> Tensor:
    """L_gm = mean_m (|b_m| - b_m cos_m); with guarded b in [0, 2 (M - 1) / M]."""
    return (b.abs() - b * cosine).mean()


def _cosine(g: Tensor, one: Tensor) -> Tensor:
    """Cosine of each of g (M, o, D) with `one` (o, D): (M,); 0 where either is zero."""
    return F.cosine_similarity(g.flatten(1), one.flatten()[None], dim=1, eps=1e-12)


def tally(
    metric: str, p: Tensor, y: Tensor, weight: Tensor, regions=None
) -> tuple[Tensor, Tensor]:
    """A metric as sums (M, R) above and below the line, so that batches can be added.

    p (M, N, o), truth y, weight (M, N). One column, but Dice has one a region; the
    metric is their mean.
    """
    if metric == "dice":
        classes = range(1, p.shape[-1])
        sets = regions or [(k,) for k in classes]
        table = torch.zeros(len(sets), p.shape[-1], device=p.device)
        for row, members in enumerate(sets):
            table[row, list(members)] = 1.0
        weight = weight[..., None]
        found, real = table.T[p.argmax(-1)] * weight, table.T[y] * weight  # (M, N, R)
        return 2 * (found * real).sum(1).double(), (found + real).sum(1).double()
    if metric == "sign":
        value = ((p > 0) == (y > 0)).float().mean(-1)
    elif metric == "neg_mae":
        value = -(p - y).abs().mean(-1)
    else:
        value = (p.argmax(-1) == y).float()
    above = (value * weight).double().sum(1, keepdim=True)
    return above, weight.double().sum(1, keepdim=True)


def _quotient(above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """The metric (M,) of sums (M, R), and where there is any."""
    real = below > 0
    value = (above / below.clamp(min=1e-12) * real).sum(1)
    return value / real.sum(1).clamp(min=1), real.any(1)


# ---------------------------------------------------------------- classifiers


class StackedLinear(nn.Module):
    """M linear layers of equal shape as one product: (M, N, d_in) -> (M, N, d_out)."""

    def __init__(self, M: int, d_in: int, d_out: int):
        super().__init__()
        bound = 1 / math.sqrt(d_in)
        self.weight = nn.Parameter(torch.empty(M, d_out, d_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(M, 1, d_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight.transpose(1, 2))


class Classifiers(nn.Module):
    """The auxiliary classifiers f_m of all modalities (section 4).

    Sequences (B, T_m, D): an encoder of `layers` layers read at its first row, or a
    masked mean; vectors and pictures go on as they are. Then z = ReLU(P (P h)), with
    one matrix P used twice, and a linear layer of the model's last width and outputs.
    A hidden width that is not that of the last layer gets a map of its own first.
    """

    def __init__(
        self, widths: Mapping[str, int], last: int, outputs: int, config: CGGMConfig,
        sequences: bool = True,
    ):  # fmt: skip
        super().__init__()
        M, layers = len(widths), config.classifier_layers
        self.bones = nn.ModuleDict()
        for m, width in widths.items() if sequences and layers else ():
            fits = range(config.classifier_heads, 0, -1)
            heads = next(h for h in fits if width % h == 0)
            self.bones[m] = Encoder(width, layers, heads, mode=config.mode)
        self.maps = nn.ModuleDict()
        if set(widths.values()) != {last}:
            self.maps.update({m: nn.Linear(d, last) for m, d in widths.items()})
        self.inner = StackedLinear(M, last, last)
        self.out = StackedLinear(M, last, outputs)

    def forward(
        self, hidden: Mapping[str, Tensor], masks: Mapping[str, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """-> predictions (M, N, o) and inputs of the last layers (M, N, D')."""
        rows = []
        for m, h in hidden.items():
            if m in self.bones:
                h = self.bones[m](h, masks[m], read="first")  # (B, T_m, D) -> (B, D)
            elif h.ndim == 3:
                mask = masks[m]
                h = h.mean(1) if mask is None else masked_mean(h, mask)  # (B, D)
            h = flat(h)  # (N, D)
            rows.append(self.maps[m](h) if m in self.maps else h)  # (N, D')
        h = torch.stack(rows)  # (M, N, D')
        if not self.maps:
            h = self.inner(h)
        z = F.relu(self.inner(h))
        return self.out(z), z


def flat(x: Tensor) -> Tensor:
    """(B, D) as it is; a picture (B, D, H, W) -> (B H W, D)."""
    return x.movedim(1, -1).flatten(0, -2) if x.ndim == 4 else x


# ---------------------------------------------------------------- the rule

Groups = Mapping[str, nn.Module | Sequence[nn.Module]]


class GradientModulator(Rule):
    """Balances modalities while any model trains: give it to `training.fit` as a rule.

    config      `CGGMConfig`
    task        the `tasks.Task` that the model is trained for: which prediction and
                label it is about, its loss and slope, and how speed is measured
    groups      modality -> its modules; or a function of the model, and of whether
                input projections count, that returns this (default: those of `nets`)
    features    modality -> module whose output is H_m (or a function of the model);
                None reads `output.hidden`. (B, T, D), (B, D) or pictures (B, D, H, W)
    output      function of the model -> its last linear layer, for compare="weights"
    optimiser   function of parameters -> optimiser of the classifiers

    Per step: classifiers read detached H_m and learn (their graph is apart, so one
    backward of each suffices, and neither a gradient scaler nor autocast concerns
    them); their metrics give the progress and b; the direction loss joins the model's
    loss; after the backward pass the gradients of modality m are multiplied by rho b_m,
    before clipping. Under accumulation all batches of a step count together. In several
    processes the metrics are summed, so that all scale alike.
    With one modality there is nothing to balance and nothing is changed.

    Raises `ConfigError` at set-up for modules that are not the model's, have nothing to
    train or serve two modalities, and at the first batch for outputs without what the
    rule reads or of another shape than the classifiers'.
    """

    def __init__(
        self,
        config: CGGMConfig | None = None,
        task: Task = SENTIMENT,
        *,
        groups: Groups | Callable[[nn.Module, bool], Groups] = modality_modules,
        features: Mapping[str, nn.Module] | Callable | None = None,
        output: Callable[[nn.Module], nn.Linear] = lambda model: model.head.out,
        optimiser: Callable | None = None,
    ):
        self.config = config or CGGMConfig()
        self.task = task
        self.metric = self.config.speed_metric or task.progress
        self.groups, self.features = groups, features
        self.output, self.optimiser = output, optimiser
        self.classifiers: Classifiers | None = None
        self.trace: list[dict[str, Tensor]] = []
        self._waiting: dict | None = None  # classifiers' state, until they are built

    # ------------------------------------------------------------ set-up

    def setup(self, model: nn.Module, device: torch.device) -> None:
        groups = self.groups
        if callable(groups):
            groups = groups(model, self.config.include_projection)
        self.names, self.device = tuple(groups), device
        self._parameters = _owned(model, groups)
        self._weight = None
        if self.config.compare == "weights" and self.config.direction:
            self._weight = self.output(model).weight
        self._hooked: dict[str, Tensor] = {}
        self._hooks: list = []
        features = self.features
        features = features(model) if callable(features) else features or {}
        for m in features:
            if m not in self.names:
                raise unknown("modality", m, self.names)
            hook = features[m].register_forward_hook(self._remember(m))
            self._hooks.append(hook)
        self._seed = torch.initial_seed()  # classifiers belong to the run's seed
        M = len(self.names)
        zero = torch.zeros(M, dtype=torch.float64, device=device)
        # level: the metric as last counted; seen: is there one; delta: its growth
        self._state = {
            "level": zero,
            "seen": zero.bool() | (self.config.first == "zero"),
            "delta": zero,
            "epoch": torch.zeros(2, M, 1, dtype=torch.float64, device=device),
            "curves": torch.zeros(4, M, dtype=torch.float64, device=device),
        }
        self._cosines = zero
        self._late: tuple[Tensor, Tensor] | None = None  # (L_gm, gradient) to come
        self._begin_step()

    def _remember(self, m: str):
        def hook(module, inputs, output):
            self._hooked[m] = output[0] if isinstance(output, tuple) else output

        return hook

    def _begin_step(self) -> None:
        self._sums: tuple[Tensor, Tensor] | None = None
        self._batches = 0

    def _build(self, hidden, last: Tensor, outputs: int) -> None:
        """Classifiers for the shapes of the first batch, from the run's seed alone."""
        widths = {m: h.shape[1 if h.ndim == 4 else -1] for m, h in hidden.items()}
        sequences = all(h.ndim == 3 for h in hidden.values())
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed)
            self.classifiers = Classifiers(
                widths, last.shape[-1], outputs, self.config, sequences
            ).to(self.device)
        parameters = list(self.classifiers.parameters())
        if self.optimiser is None:
            lr = self.config.classifier_lr
            self._classifier_steps = torch.optim.Adam(parameters, lr, fused=True)
        else:
            self._classifier_steps = self.optimiser(parameters)
        if self._waiting:
            self.classifiers.load_state_dict(self._waiting["classifiers"])
            self._classifier_steps.load_state_dict(self._waiting["optimiser"])
            self._waiting = None

    # ------------------------------------------------------------ hooks

    def loss(self, output, batch: Batch, loss: Tensor) -> Tensor:
        if len(self.names) < 2:
            return loss
        hidden, masks, present = self._read(output, batch)
        prediction, last, truth = self._target(output, batch)
        if self.classifiers is None:
            self._build(hidden, last, prediction.shape[-1])
        p, z = self.classifiers(hidden, masks)  # (M, N, o), (M, N, D')
        weight = present.repeat_interleave(p.shape[1] // present.shape[1], dim=1)
        share = weight / weight.sum(1, keepdim=True).clamp(min=1)
        (self.task.loss(p, truth) * share).sum().backward()
        p, z = p.detach(), z.detach()
        self._decide(p, truth, weight)
        if not self.config.direction:
            return loss
        slope = self.task.slope(p, truth) * share[..., None]
        own = self.task.slope(prediction, truth) / len(prediction)
        return loss + self._direction(last_gradient(slope, z), own, last).to(loss.dtype)

    def after_backward(self, model: nn.Module) -> None:
        if len(self.names) < 2 or self.classifiers is None:
            return
        self._commit()
        if self.config.trace:
            norms = self._norms()
        if self.config.magnitude:
            for parameters, c in zip(self._parameters, self._scale, strict=True):
                self._modulate([p for p in parameters if p.grad is not None], c)
        if self.config.trace:
            last = self.trace[-1]
            last["norm"], last["scaled_norm"] = norms, self._norms()
        self._train_classifiers()
        self._begin_step()

    def teardown(self, model: nn.Module) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._hooked.clear()

    def epoch_end(self, model: nn.Module, row: dict) -> None:
        if len(self.names) < 2:
            return
        state = self._state
        steps, metric, b, cosine = state["curves"].tolist()
        for i, m in enumerate(self.names):
            n = max(steps[i], 1.0)
            row[f"speed_metric_{m}"] = metric[i] / n
            row[f"b_{m}"] = b[i] / n
            row[f"cosine_{m}"] = cosine[i] / n
        if self.config.speed == "epoch":
            self._grow(*state["epoch"], momentum=0.0)
        state["epoch"] = torch.zeros_like(state["epoch"])
        state["curves"] = torch.zeros_like(state["curves"])

    # ------------------------------------------------------------ reading a batch

    def _read(self, output, batch: Batch):
        """Detached float32 H_m, masks, and who has which modality (M, B)."""
        source = self._hooked or getattr(output, "hidden", None) or {}
        lost = [m for m in self.names if m not in source]
        if lost:
            raise ConfigError(
                f"the model gives no hidden states of {', '.join(lost)}. Return them "
                "in Output.hidden, or name the modules that make them: "
                "GradientModulator(features=lambda model: model.encoders)."
            )
        hidden = {m: source[m].detach().float() for m in self.names}
        known = getattr(output, "mask", None) or batch.mask
        B = len(batch)
        masks, present = {}, []
        for m, h in hidden.items():
            mask = known.get(m)
            masks[m] = mask if h.ndim == 3 and self.config.masks else None
            if mask is None or not self.config.masks:
                present.append(torch.ones(B, device=self.device))
            else:
                present.append(mask.any(1).float())  # (B, T_m) -> (B,)
        return hidden, masks, torch.stack(present)  # (M, B)

    def _target(self, output, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Predictions (N, o), inputs of the last layer (N, D') and truth, flattened."""
        prediction, truth = self.task.pair(output, batch)
        last = getattr(output, "last", None)
        if last is None:
            raise ConfigError(
                "the model's output has no `last`, the input of its final linear "
                "layer: classifiers take its width and the direction loss its values"
            )
        # pictures: (B, H, W) -> (N,), (B, o, H, W) -> (N, o), (B, D', H, W) -> (N, D')
        truth = truth.flatten() if prediction.ndim == 4 else truth
        return flat(prediction), flat(last).float(), truth

    # ------------------------------------------------------------ coefficients

    def coefficients(self, metric: Tensor, delta: Tensor) -> Tensor:
        """b (M,) of a step's metrics (M,) and their growth (M,); yours to override."""
        return balance(delta, self.config.guard, self.config.eps)

    def _decide(self, p: Tensor, truth: Tensor, weight: Tensor) -> None:
        """b and c from the metrics of all batches of this step so far."""
        self._count(tally(self.metric, p, truth, weight, self.config.regions))
        if self.config.speed == "epoch":
            delta = self._state["delta"]
        else:
            momentum = self.config.momentum if self.config.speed == "ema" else 0.0
            _, _, delta = self._growth(*self._sums, momentum)
        self._b = self.coefficients(_quotient(*self._sums)[0], delta)
        M = len(self.names)
        self._scale = self.config.rho * self._b
        if self.config.renormalise:
            self._scale = self._scale * (M / (M - 1))

    def _count(self, sums: tuple[Tensor, Tensor]) -> None:
        sums = torch.stack(sums)
        _sum_over_processes(sums)
        self._sums = sums if self._sums is None else self._sums + sums
        self._batches += 1

    def _growth(self, above: Tensor, below: Tensor, momentum: float):
        """(level, seen, delta) after a metric of sums (M, R); absent ones stay."""
        old, seen = self._state["level"], self._state["seen"]
        value, there = _quotient(above, below)
        level = torch.where(seen, momentum * old + (1 - momentum) * value, value)
        delta = torch.where(seen & there, level - old, torch.zeros_like(old))
        return torch.where(there, level, old), seen | there, delta

    def _grow(self, above: Tensor, below: Tensor, momentum: float) -> None:
        found = self._growth(above, below, momentum)
        self._state |= dict(zip(("level", "seen", "delta"), found, strict=True))

    def _commit(self) -> None:
        """The step is complete: its metrics become the ones to compare with."""
        state, config = self._state, self.config
        if config.speed == "epoch":
            state["epoch"] = state["epoch"] + self._sums
        else:
            self._grow(*self._sums, config.momentum if config.speed == "ema" else 0.0)
        metric, _ = _quotient(*self._sums)
        cosine, b = self._cosines.double(), self._b.double()
        state["curves"] = state["curves"] + torch.stack(
            [torch.ones_like(metric), metric, b, cosine]
        )
        if config.trace:
            step = {"metric": metric, "delta": state["delta"], "b": b}
            step |= {"scale": self._scale, "cosine": cosine}
            self.trace.append({k: v.detach().clone() for k, v in step.items()})

    # ------------------------------------------------------------ direction

    def _direction(self, g: Tensor, slope: Tensor, last: Tensor) -> Tensor:
        """lam L_gm, to be added to the model's loss: g (M, o, D'), slope (N, o)."""
        config = self.config
        if config.compare == "gradients":
            cosine = _cosine(g, last_gradient(slope, last))  # -> (M,)
            self._cosines = cosine.detach()
            return config.lam * direction_loss(self._b, cosine)
        return config.lam * self._weight_direction()

    def _weight_direction(self) -> Tensor:
        """What the released program adds: it compares weights, a batch late.

        The gradient it adds belongs to the weights of the batch before; a term that is
        linear in today's weights carries it.
        """
        theirs, ours = self.classifiers.out.weight.detach(), self._weight
        if theirs.shape[1:] != ours.shape:
            raise ConfigError(
                f"weights of {tuple(ours.shape)} (model) and {tuple(theirs.shape[1:])} "
                'cannot be compared; use compare="gradients" or another `output`'
            )
        then = ours.detach().clone().requires_grad_()
        cosine = _cosine(theirs, then)
        value = direction_loss(self._b, cosine)
        (gradient,) = torch.autograd.grad(value, then)
        self._cosines = cosine.detach()
        now = (value.detach(), gradient)
        use, self._late = (self._late, now) if self.config.delay else (now, None)
        if use is None:
            return torch.zeros((), device=self.device)
        value, gradient = use
        return value + ((ours - ours.detach()) * gradient).sum()

    # ------------------------------------------------------------ gradients

    def _modulate(self, parameters: list[nn.Parameter], c: Tensor) -> None:
        if parameters:
            gradients = [p.grad for p in parameters]
            torch._foreach_mul_(gradients, c.to(gradients[0].dtype))

    def _norms(self) -> Tensor:
        """Gradient norm of each modality (M,)."""
        return torch.stack(
            [
                torch.stack([g.norm() for p in ps if (g := p.grad) is not None]).norm()
                for ps in self._parameters
            ]
        )

    def _train_classifiers(self) -> None:
        gradients = [
            p.grad for p in self.classifiers.parameters() if p.grad is not None
        ]
        share = self._batches * _sum_over_processes(*gradients)
        if share > 1:
            torch._foreach_div_(gradients, float(share))
        self._classifier_steps.step()
        self._classifier_steps.zero_grad()

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict:
        """Levels, classifiers, their optimiser, and a direction loss still to come."""
        state = dict(self._state) | {"late": self._late}
        if self.classifiers is not None:
            state["classifiers"] = self.classifiers.state_dict()
            state["optimiser"] = self._classifier_steps.state_dict()
        elif self._waiting:
            state |= self._waiting
        return state

    def load_state_dict(self, state: Mapping) -> None:
        state = dict(state)
        self._late = state.pop("late")
        if self._late is not None:
            self._late = tuple(x.to(self.device) for x in self._late)
        trained = {k: state.pop(k) for k in ("classifiers", "optimiser") if k in state}
        self._state = {k: v.to(self.device) for k, v in state.items()}
        self.classifiers, self._waiting = None, trained or None


def _owned(model: nn.Module, groups: Groups) -> list[list[nn.Parameter]]:
    """The trainable parameters of each group; each is the model's and has one owner."""
    inside = {id(p) for p in model.parameters()}
    owner: dict[int, str] = {}
    found = []
    for m, modules in groups.items():
        modules = [modules] if isinstance(modules, nn.Module) else modules
        parameters = {id(p): p for part in modules for p in part.parameters()}
        for i in parameters:
            if i not in inside:
                raise ConfigError(
                    f"the group of {m!r} holds a parameter that the model does not "
                    "have; give `groups` as a function of the model that is trained"
                )
            if i in owner:
                raise ConfigError(
                    f"{owner[i]!r} and {m!r} share a parameter: a gradient cannot be "
                    "scaled for two modalities. Leave shared modules out of `groups`."
                )
            owner[i] = m
        trained = [p for p in parameters.values() if p.requires_grad]
        if not trained:
            raise ConfigError(f"the group of {m!r} has nothing to train")
        found.append(trained)
    return found


def _sum_over_processes(*tensors: Tensor) -> int:
    """Sum tensors over all processes, in place; returns how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    for tensor in tensors:
        dist.all_reduce(tensor)
    return dist.get_world_size()
