"""One training loop, one evaluator, and the seal on the test split.

`fit` trains a model and freezes the epoch that validation prefers; `select` does the
same for predictors that are not trained by gradients. Both return a `Frozen`, the only
thing that `evaluate` accepts for the test split. The loop runs on Accelerate: CPU, one
GPU, mixed precision, accumulation and several processes are configuration.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmsa_lib import metrics
from mmsa_lib.corpora.schema import Batch, Corpus, Receipt, Split
from mmsa_lib.errors import SealedError, TrainingError, check_device, unknown
from mmsa_lib.files import replacing
from mmsa_lib.nets.ops import keep_4bit_format
from mmsa_lib.nets.trained import (
    copied,
    count_parameters,
    load_trained,
    save,
    trained_state,
    weights_sha256,
)
from mmsa_lib.tasks import SENTIMENT, Loss, Task

KEEP = ("best", "last")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Defaults are what the papers on small fusion models share.

    epochs            most epochs to run
    batch_size        samples a step and process (before accumulation)
    lr, weight_decay  of `optimiser`: "adam", "adamw" or "sgd" (momentum 0.9)
    group_lr          own rate of the parameters whose name starts with a key, such as
                      {"regressor": 1e-3}; the longest key counts, the rest has `lr`
    schedule          "constant", "plateau" (x0.1 after 10 flat epochs) or "cosine"
                      (per step, after a linear `warmup` fraction of all steps)
    clip              largest gradient norm, None for no clipping
    patience          epochs without a better validation loss before stopping
    accumulate        batches a step
    eval_batch_size   samples a batch without gradients (validation, prediction)
    bucketed          samples of similar length share a batch: less padding
    precision         "no", "bf16" or "fp16"
    device            "auto", "cpu" or "cuda"
    seed              of initialisation, order and dropout
    checkpoint        folder for resumable state; training continues from it if it is
                      there; written each epoch and every `checkpoint_steps` steps
    """

    epochs: int = 30
    batch_size: int = 64
    lr: float = 1e-3
    group_lr: Mapping[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0
    optimiser: str = "adam"
    schedule: str = "constant"
    warmup: float = 0.0
    clip: float | None = 0.8
    patience: int | None = None
    accumulate: int = 1
    eval_batch_size: int = 256
    bucketed: bool = False
    precision: str = "no"
    device: str = "auto"
    seed: int = 0
    checkpoint: str | None = None
    checkpoint_steps: int | None = None

    def __post_init__(self):
        for name, known in (
            ("optimiser", ("adam", "adamw", "sgd")),
            ("schedule", ("constant", "plateau", "cosine")),
            ("precision", ("no", "bf16", "fp16")),
        ):
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)
        check_device(self.device)
        if ":" in self.device:
            raise TrainingError(
                f'device={self.device!r}: give "cuda", and choose the GPU with '
                "CUDA_VISIBLE_DEVICES"
            )
        for name in ("epochs", "batch_size", "accumulate", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1: {getattr(self, name)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise TrainingError(
                'device="cuda" was asked for but no GPU is visible. Use device="auto", '
                "or install a CUDA build of torch (see README, GPU path)."
            )


@dataclass
class Predictions:
    """Aligned truth and prediction of one split: what metrics are computed from."""

    ids: list[str]
    truth: np.ndarray  # (n,) or (n, k)
    prediction: np.ndarray  # same shape as truth (class labels: (n, classes))
    split: str
    corpus: str


@dataclass
class Frozen:
    """A predictor that validation has chosen; the only key to a test split.

    predict      split -> (n, k) array
    receipt      which corpus, which artefact, by which value it was chosen
    selection    the rule in words
    history      one dict an epoch: epoch, train, valid, seconds
    """

    predict: Callable[[Split, str], np.ndarray]
    receipt: Receipt
    selection: str
    trainable: int = 0
    total: int = 0
    history: list[dict] = field(default_factory=list)
    best_epoch: int | None = None
    module: nn.Module | None = None
    chosen: str | None = None

    def facts(self) -> dict:
        """What a run record keeps of the selection."""
        facts = {}
        if self.receipt.value is not None:
            facts["validation"] = round(self.receipt.value, 6)
        if self.chosen is not None:
            facts["chosen"] = self.chosen
        if self.history:
            facts["best_epoch"] = self.best_epoch
            facts["epochs"] = len(self.history)
            for key in ("train", "valid"):
                if key in self.history[0]:
                    facts[f"{key}_curve"] = [round(row[key], 5) for row in self.history]
        return facts

    def save(self, path: Path) -> Path:
        """Write the trained part as safetensors; `nets.trained.load` puts it back."""
        if self.module is None:
            raise TrainingError("only a trained module has weights to save")
        return save(self.module, path)


# ---------------------------------------------------------------- hooks of a method


class Rule:
    """Hooks around a step, for methods that change batches or gradients or add losses.

    Every hook may be left out. A rule with state implements `state_dict` and
    `load_state_dict` (tensors and plain values), so that a killed run resumes exactly.
    """

    def setup(self, model: nn.Module, device: torch.device) -> None:
        """Called once, after the model is on its device."""

    def batch(self, batch: Batch, epoch: int) -> Batch:
        """Return the batch to train on, such as one with modalities taken away.

        Called after the random stream of the step was seeded.
        """
        return batch

    def loss(self, output, batch: Batch, loss: Tensor) -> Tensor:
        """Return the loss to differentiate, with this rule's terms added."""
        return loss

    def after_backward(self, model: nn.Module) -> None:
        """Gradients of the whole step are there, unscaled and not yet clipped."""

    def after_step(self, model: nn.Module) -> None:
        """Called after the optimiser step."""

    def epoch_end(self, model: nn.Module, row: dict) -> None:
        """Look at the model; add the rule's numbers to the history row of the epoch."""

    def teardown(self, model: nn.Module) -> None:
        """Called once after training, or when it fails: take every hook off again."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: Mapping) -> None:
        pass


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 libraries still read the global state
    torch.manual_seed(seed)


# ---------------------------------------------------------------- order of samples


class EpochBatches:
    """Batch sampler of one process; a function of (seed, epoch) alone, can skip a head.

    Batch k of an epoch goes to process k % world. All processes must take every step,
    so one that has run out gets a batch again, which `fit` gives no weight.

    lengths   (n,) to put samples of similar length into one batch; None: at random
    """

    def __init__(self, n, batch_size, seed, lengths=None, rank=0, world=1):
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.lengths, self.rank, self.world = lengths, rank, world
        self.count = math.ceil(n / batch_size)  # of all processes
        self.epoch, self.skip = 0, 0

    def __len__(self) -> int:
        return math.ceil(self.count / self.world) - self.skip

    def _all(self) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.lengths is None:
            cuts = range(self.batch_size, self.n, self.batch_size)
            return np.split(rng.permutation(self.n), cuts)
        # lengths blurred by a tenth, or every epoch would have the same batches; sizes
        # differ by one at most, or the longest samples would make the one small batch
        order = np.argsort(self.lengths * rng.uniform(0.9, 1.1, self.n))
        batches = np.array_split(order, self.count)
        return [batches[k] for k in rng.permutation(self.count)]

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._all()
        for number in range(self.skip, self.skip + len(self)):
            k = number * self.world + self.rank
            yield batches[k % self.count].tolist()


# ---------------------------------------------------------------- the loop


def fit(
    build: Callable[[], nn.Module],
    corpus: Corpus,
    config: TrainConfig,
    *,
    loss: Loss | None = None,
    rules: Sequence[Rule] = (),
    keep: str = "best",
) -> Frozen:
    """Train on `corpus.train`, freeze the epoch with the lowest validation loss.

    build   called after seeding, so that initialisation belongs to the seed
    loss    (Output, Batch) -> scalar, such as the `objective` of a task or
            `tasks.joint`; default: that of sentiment. The same function, averaged over
            samples, is the selection metric on `corpus.valid`
    keep    "best" epoch by validation, or "last": then no validation split is looked
            at, and none with labels need be there

    Only the trained part (`trained_state`) is kept and written: `build` must give the
    frozen part the same each time. Several processes (torchrun) give what one gives
    with as many times `accumulate`; batch statistics (BatchNorm) are the exception.

    Raises `TrainingError` for a NaN or infinite loss or gradient (naming the batch and
    its ids) and for a checkpoint of another run; resumes exactly after a kill when
    ``config.checkpoint`` is set.
    """
    loss = loss or SENTIMENT.objective
    _check_keep(keep, config)
    _check_samples(corpus, ("train", "valid") if keep == "best" else ("train",))
    accelerator = _accelerator(config)
    seed_everything(config.seed)
    model = build()
    keep_4bit_format(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise TrainingError("no parameter of the model requires a gradient")
    world, rank = accelerator.num_processes, accelerator.process_index
    batches = EpochBatches(
        len(corpus.train),
        config.batch_size,
        config.seed,
        corpus.train.lengths if config.bucketed else None,
        rank,
        world,
    )
    optimiser = _optimiser(config, _groups(config, model))
    model, optimiser = accelerator.prepare(model, optimiser)
    loader = _loader(corpus.train, batches, accelerator.device)
    per_epoch = math.ceil(len(batches) / config.accumulate)
    scheduler = _scheduler(config, optimiser, per_epoch)
    for rule in rules:
        rule.setup(accelerator.unwrap_model(model), accelerator.device)
    state = _State(config, corpus, accelerator, model, optimiser, scheduler, rules)
    try:
        state.resume()
        bar = _progress(config.epochs, state.epoch)
        while state.epoch < config.epochs and not state.stopped(config.patience):
            start = time.perf_counter()
            batches.epoch, batches.skip = state.epoch, state.batches_done
            model.train()
            _epoch(state, loader, batches, parameters, loss)
            valid = None
            if keep == "best":
                valid = _mean_loss(state.module, corpus.valid, loss, config)
            if config.schedule == "plateau":
                scheduler.step(valid)
            state.end_epoch(valid, time.perf_counter() - start)
            state.save()
            bar.update(1)
            if valid is not None:
                bar.set_postfix(valid=f"{valid:.4f}", best=f"{state.best_value:.4f}")
        bar.close()
    finally:
        for rule in rules:
            rule.teardown(state.module)
    return _frozen(state, keep)


def _check_keep(keep: str, config: TrainConfig) -> None:
    if keep not in KEEP:
        raise unknown("keep", keep, KEEP)
    if keep == "last" and (config.patience or config.schedule == "plateau"):
        raise TrainingError(
            'keep="last" looks at no validation split, which patience and '
            'schedule="plateau" need: leave them out'
        )


def _check_samples(corpus: Corpus, names: Sequence[str]) -> None:
    for name in names:
        if not len(corpus[name]):
            raise TrainingError(f"the {name} split of {corpus.name} has no samples")


def _epoch(state: _State, loader, batches: EpochBatches, parameters, loss) -> None:
    """The steps of one epoch, from where a killed run stopped."""
    config, accelerator, model = state.config, state.accelerator, state.model
    rules, optimiser, every = state.rules, state.optimiser, config.checkpoint_steps
    for number, batch in enumerate(loader, start=state.batches_done):
        # the random stream of a batch depends on its place alone: a resumed run
        # and a run on several processes draw the same dropout masks
        k = number * batches.world + batches.rank
        torch.manual_seed(config.seed * 7_919 + state.epoch * 1_000_003 + k)
        counts = int(k < batches.count)  # 0: given again, to keep step
        for rule in rules:
            batch = rule.batch(batch, state.epoch)
        with accelerator.accumulate(model):
            output = model(batch)
            value = loss(output, batch)
            total = value
            for rule in rules:
                total = rule.loss(output, batch, total)
            _require_finite(total, output, batch, state.epoch, number)
            accelerator.backward(total * counts)
            if accelerator.sync_gradients:
                _step(state, parameters, batch, number)
                if config.schedule == "cosine" and state.scheduler is not None:
                    state.scheduler.step()
            optimiser.zero_grad()
        state.batches_done = number + 1
        state.loss_sum += float(value.detach()) * len(batch) * counts
        state.samples += len(batch) * counts
        if every and accelerator.sync_gradients and state.batches_done % every == 0:
            state.save()


def _frozen(state: _State, keep: str) -> Frozen:
    """The kept epoch as the key to the test split."""
    module, config = state.module, state.config
    if keep == "best":
        load_trained(module, state.best)
    module.eval()
    trainable, count = count_parameters(module)
    best = keep == "best"
    receipt = Receipt(
        corpus=state.corpus.fingerprint,
        artefact=weights_sha256(module),
        metric="validation loss" if best else "none: the last epoch",
        value=state.best_value if best else None,
        candidates=len(state.history) if best else 1,
    )
    return Frozen(
        predict=lambda split, label: _predict(module, split, label, config),
        receipt=receipt,
        selection="epoch with the lowest validation loss" if best else "last epoch",
        trainable=trainable,
        total=count,
        history=state.history,
        best_epoch=state.best_epoch if best else len(state.history) - 1,
        module=module,
    )


def _step(state: _State, parameters, batch: Batch, number: int) -> None:
    accelerator, optimiser, rules = state.accelerator, state.optimiser, state.rules
    if accelerator.scaler is not None:
        accelerator.unscale_gradients(optimiser)
    for rule in rules:
        rule.after_backward(state.module)
    if state.config.clip is not None:
        norm = accelerator.clip_grad_norm_(parameters, state.config.clip)
        # fp16 overflows now and then by design: its scaler skips that step
        if accelerator.scaler is None and not torch.isfinite(norm):
            raise TrainingError(
                f"a gradient is NaN or infinite at epoch {state.epoch}, batch {number},"
                f" samples {_shorten(batch.ids)}, although the loss is finite. Lower "
                "the learning rate, or look for sqrt or division at zero."
            )
    optimiser.step()
    for rule in rules:
        rule.after_step(state.module)


def _accelerator(config: TrainConfig):
    with warnings.catch_warnings():
        # a bar of widgets would be nicer, tqdm says at import; nobody asked for one
        warnings.filterwarnings("ignore", "IProgress not found")
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState, PartialState

    cpu = config.device == "cpu" or not torch.cuda.is_available()
    if AcceleratorState._shared_state:
        # a notebook trains many models: let each choose its own precision and device
        single = PartialState().num_processes == 1
        AcceleratorState._reset_state(reset_partial_state=single)
    return Accelerator(
        cpu=cpu,
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulate,
        step_scheduler_with_optimizer=False,
        # parts of a model may see no gradient: an absent modality's encoder
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def _loader(split: Split, batches: EpochBatches, device: torch.device) -> DataLoader:
    """Accelerate's loader (it knows the last batch) without its way of sharding."""
    from accelerate.data_loader import prepare_data_loader

    loader = DataLoader(
        range(len(split)), batch_sampler=batches, collate_fn=split.batch
    )
    return prepare_data_loader(
        loader, device, num_processes=1, process_index=0, put_on_device=True
    )


def _groups(config: TrainConfig, model: nn.Module) -> list[dict]:
    """The trained parameters with the learning rate of each group of them."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for key in config.group_lr:
        if not any(name.startswith(key) for name in trained):
            parts = {name.split(".")[0] for name in trained}
            raise unknown("trained parameter of group_lr", key, parts)
    groups: dict[str, list] = {}
    for name, parameter in trained.items():
        keys = [key for key in config.group_lr if name.startswith(key)]
        groups.setdefault(max(keys, key=len, default=""), []).append(parameter)
    rates = {"": config.lr} | dict(config.group_lr)
    return [{"params": group, "lr": rates[key]} for key, group in groups.items()]


def _optimiser(config: TrainConfig, parameters) -> torch.optim.Optimizer:
    common = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimiser == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **common)
    kind = torch.optim.AdamW if config.optimiser == "adamw" else torch.optim.Adam
    return kind(parameters, **common)


def _scheduler(config: TrainConfig, optimiser, per_epoch: int):
    if config.schedule == "constant":
        return None
    inner = getattr(optimiser, "optimizer", optimiser)
    if config.schedule == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(inner, patience=10)
    total = max(per_epoch * config.epochs, 1)
    warm = int(config.warmup * total)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))

    return torch.optim.lr_scheduler.LambdaLR(inner, factor)


def _progress(epochs: int, done: int):
    from tqdm import tqdm

    # in a notebook stderr is no terminal, but a person watches; papermill is nobody
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    quiet = "MMSA_CHAPTER" in os.environ or not watched
    return tqdm(total=epochs, initial=done, desc="epochs", disable=quiet, leave=False)


def _shorten(ids: Sequence[str], most: int = 8) -> str:
    return ", ".join(ids[:most]) + (", ..." if len(ids) > most else "")


def _require_finite(loss: Tensor, output, batch: Batch, epoch: int, number: int):
    if torch.isfinite(loss):
        return
    blame = []
    for m, x in batch.features.items():
        rows = ~torch.isfinite(x).flatten(1).all(1)
        if rows.any():
            ids = [i for i, bad in zip(batch.ids, rows.tolist(), strict=True) if bad]
            blame.append(f"features of {m!r} are not finite in {_shorten(ids)}")
    for name, p in getattr(output, "predictions", {}).items():
        rows = ~torch.isfinite(p.detach()).flatten(1).all(1)
        if rows.any():
            ids = [i for i, bad in zip(batch.ids, rows.tolist(), strict=True) if bad]
            blame.append(f"predictions of {name!r} are not finite in {_shorten(ids)}")
    why = "; ".join(blame) or "inputs and predictions are finite, so the loss itself"
    raise TrainingError(
        f"the loss is {loss.item()} at epoch {epoch}, batch {number}, samples "
        f"{_shorten(batch.ids)}: {why}. Clean the features when the corpus is built, "
        "or lower the learning rate."
    )


class _State:
    """Everything a killed run needs to go on exactly where it was."""

    def __init__(self, config, corpus, accelerator, model, optimiser, scheduler, rules):
        self.config, self.corpus, self.accelerator = config, corpus, accelerator
        self.model, self.optimiser, self.scheduler = model, optimiser, scheduler
        self.rules = rules
        self.epoch = self.batches_done = self.samples = 0
        self.loss_sum = 0.0
        self.history: list[dict] = []
        self.best: dict[str, Tensor] = {}
        self.best_value, self.best_epoch = math.inf, None
        self.key = self._run_key()

    @property
    def module(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    @property
    def path(self) -> Path | None:
        folder = self.config.checkpoint
        return Path(folder) / "state.pt" if folder else None

    def _run_key(self) -> str:
        """Identifies the run: a checkpoint of another one must not be continued."""
        config = asdict(self.config)
        for key in ("checkpoint", "checkpoint_steps", "device", "eval_batch_size"):
            config.pop(key)
        trained = trained_state(self.module)
        shapes = [
            (name, tuple(tensor.shape), name in trained)
            for name, tensor in self.module.state_dict().items()
        ]
        world = self.accelerator.num_processes  # it decides whose batch is next
        text = f"{sorted(config.items())} {world} {self.corpus.fingerprint} {shapes}"
        return hashlib.sha256(text.encode()).hexdigest()

    def stopped(self, patience: int | None) -> bool:
        if patience is None or self.best_epoch is None:
            return False
        return self.epoch - 1 - self.best_epoch >= patience

    def totals(self) -> tuple[float, int]:
        """Training loss and samples of the epoch so far, summed over all processes."""
        sums = torch.tensor(
            [self.loss_sum, self.samples],
            dtype=torch.float64,
            device=self.accelerator.device,
        )
        sums = self.accelerator.reduce(sums, reduction="sum")
        return float(sums[0]), int(sums[1])

    def end_epoch(self, valid: float | None, seconds: float) -> None:
        loss_sum, samples = self.totals()
        row = {
            "epoch": self.epoch,
            "train": loss_sum / samples,
            **({} if valid is None else {"valid": valid}),
            "seconds": round(seconds, 3),
        }
        for rule in self.rules:
            rule.epoch_end(self.module, row)
        self.history.append(row)
        if valid is not None and valid < self.best_value:
            self.best_value, self.best_epoch = valid, self.epoch
            self.best = copied(trained_state(self.module))
        self.epoch += 1
        self.batches_done, self.samples, self.loss_sum = 0, 0, 0.0

    def save(self) -> None:
        if self.path is None:
            return
        loss_sum, samples = self.totals()  # all processes, before the others leave
        if not self.accelerator.is_main_process:
            return
        body = {
            "key": self.key,
            "model": trained_state(self.module),
            "optimiser": self.optimiser.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else {},
            "scaler": self.accelerator.scaler.state_dict()
            if self.accelerator.scaler
            else {},
            "rules": [rule.state_dict() for rule in self.rules],
            "epoch": self.epoch,
            "batches_done": self.batches_done,
            "samples": samples,
            "loss_sum": loss_sum,
            "history": self.history,
            "best": self.best,
            "best_value": self.best_value,
            "best_epoch": self.best_epoch,
        }
        try:
            with replacing(self.path) as part:
                torch.save(body, part)
        except (OSError, RuntimeError) as error:
            raise TrainingError(
                f"could not write the checkpoint {self.path}: {error}. Free disk space "
                "or choose another folder; the previous checkpoint is untouched."
            ) from error

    def resume(self) -> None:
        if self.path is None or not self.path.is_file():
            return
        try:
            body = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise TrainingError(
                f"the checkpoint {self.path} cannot be read ({error}). Delete it to "
                "start again."
            ) from error
        if body["key"] != self.key:
            raise TrainingError(
                f"the checkpoint {self.path} belongs to another run (its configuration,"
                " corpus or model differ). Delete it or choose another folder."
            )
        load_trained(self.module, body["model"])
        self.optimiser.load_state_dict(body["optimiser"])
        if self.scheduler:
            self.scheduler.load_state_dict(body["scheduler"])
        if self.accelerator.scaler and body["scaler"]:
            self.accelerator.scaler.load_state_dict(body["scaler"])
        for rule, saved in zip(self.rules, body["rules"], strict=True):
            rule.load_state_dict(saved)
        for name in (
            "epoch", "batches_done", "samples", "loss_sum",
            "history", "best", "best_value", "best_epoch",
        ):  # fmt: skip
            setattr(self, name, body[name])
        if not self.accelerator.is_main_process:  # the file holds the sums of all
            self.samples, self.loss_sum = 0, 0.0


# ---------------------------------------------------------------- the evaluator


@torch.inference_mode()
def _mean_loss(module: nn.Module, split: Split, loss: Loss, config) -> float:
    """The loss averaged over the samples of a split, in eval mode."""
    device = next(module.parameters()).device
    module.eval()
    total = 0.0
    for batch in split.batches(config.eval_batch_size):
        batch = batch.to(device)
        with _autocast(device, config.precision):
            value = loss(module(batch), batch)
        total += float(value) * len(batch)
    if not math.isfinite(total):
        raise TrainingError(
            f"the {split.name} loss is not finite: the model has diverged or the "
            "features of that split hold NaN. Lower the learning rate or clean them."
        )
    return total / len(split)


@torch.inference_mode()
def _predict(module: nn.Module, split: Split, label: str, config) -> np.ndarray:
    device = next(module.parameters()).device
    module.eval()
    parts = []
    for batch in split.batches(config.eval_batch_size):
        with _autocast(device, config.precision):
            output = module(batch.to(device))
        if label not in output.predictions:
            raise unknown("prediction", label, output.predictions)
        parts.append(output.predictions[label].float().cpu())
    return torch.cat(parts).numpy()


def _autocast(device: torch.device, precision: str):
    if precision == "no":
        return contextlib.nullcontext()
    kind = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=kind)


def select(
    candidates: Mapping[str, Callable[[Split], np.ndarray]],
    corpus: Corpus,
    task: Task = SENTIMENT,
) -> Frozen:
    """Choose among fitted predictors by the task's metric on validation; freeze it.

    candidates: name -> function of a split giving (n, o) outputs. Ties go to the first;
    a metric that is undefined is worse than any. A single candidate is allowed: nothing
    is chosen, and the receipt says so. Raises `TrainingError` naming a candidate whose
    outputs are not finite or of another shape.
    """
    if not candidates:
        raise TrainingError("there is no candidate to select from")
    _check_samples(corpus, ("valid",))
    truth = corpus.valid.labels[task.label]
    scores, found = {}, {}
    for name, predictor in candidates.items():
        found[name] = _checked(predictor(corpus.valid), task, truth, name)
        scores[name] = task.score(truth, found[name])
    sign = 1 if task.higher_is_better else -1

    def merit(name: str) -> float:
        return -math.inf if math.isnan(scores[name]) else sign * scores[name]

    best = max(scores, key=merit)
    metric = f"validation {metrics.describe(task.metric).name}"
    predictor = candidates[best]
    receipt = Receipt(
        corpus=corpus.fingerprint,
        artefact=hashlib.sha256(found[best].tobytes()).hexdigest(),
        metric=metric,
        value=scores[best],
        candidates=len(candidates),
    )
    end = "highest" if task.higher_is_better else "lowest"
    return Frozen(
        predict=lambda split, _label: np.asarray(predictor(split)),
        receipt=receipt,
        selection=f"{end} {metric} of {len(candidates)} candidates",
        chosen=best,
    )


def _checked(outputs, task: Task, truth: np.ndarray, name: str) -> np.ndarray:
    """Outputs of a candidate as float64, of the task's shape and finite."""
    outputs = np.asarray(outputs, dtype=np.float64)
    expected = truth.shape if truth.ndim > 1 else (len(truth), task.outputs)
    if outputs.shape != expected:
        raise TrainingError(
            f"{name!r} predicts shape {outputs.shape}, the labels are {truth.shape}; "
            f"expected {expected}"
        )
    _check_finite(outputs, repr(name), "validation")
    return outputs


def _check_finite(outputs: np.ndarray, who: str, split: str) -> None:
    bad = int((~np.isfinite(outputs)).sum())
    if bad:
        raise TrainingError(
            f"{who} gives {bad} of {outputs.size} {split} predictions that are NaN or "
            "infinite. Mend it, or leave it out of what is compared."
        )


def evaluate(
    frozen: Frozen, corpus: Corpus, split: str = "test", *, task: Task = SENTIMENT
) -> Predictions:
    """Predict one split with a frozen predictor; the way to test metrics.

    Raises `SealedError` when `frozen` is not a `Frozen`, or when the weights of its
    module changed after validation froze them, and `TrainingError` when it predicts
    NaN or infinity, or for other samples than the split has.
    """
    if not isinstance(frozen, Frozen):
        raise SealedError(
            f"evaluate needs a Frozen from training.fit or training.select, found "
            f"{type(frozen).__name__}: select by validation before you test"
        )
    if (
        frozen.module is not None
        and weights_sha256(frozen.module) != frozen.receipt.artefact
    ):
        raise SealedError(
            "the weights changed after validation had frozen them; train again with "
            "training.fit, or select among the variants with training.select"
        )
    part = corpus[split]
    prediction = np.asarray(frozen.predict(part, task.label))
    who = "the trained model" if frozen.chosen is None else repr(frozen.chosen)
    if prediction.shape[:1] != (len(part),):
        raise TrainingError(
            f"{who} predicts shape {prediction.shape} for {len(part)} samples of "
            f"{split!r}"
        )
    _check_finite(prediction, who, split)
    part = part.unseal(frozen.receipt) if part.sealed else part
    if task.label not in part.labels:
        raise unknown("label", task.label, part.labels)
    truth = part.labels[task.label]
    if truth.ndim == 2 and truth.shape[1] == 1:
        truth, prediction = truth[:, 0], prediction[:, 0]
    return Predictions(list(part.ids), truth, prediction, split, corpus.fingerprint)
