"""The loop: `fit` trains a model and freezes the epoch that validation prefers."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mmsa_lib.corpora.schema import Batch, Corpus, Receipt, Split
from mmsa_lib.errors import TrainingError, unknown
from mmsa_lib.nets.ops import keep_4bit_format
from mmsa_lib.nets.trained import count_parameters, load_trained, weights_sha256
from mmsa_lib.tasks import SENTIMENT, Loss
from mmsa_lib.training.batches import EpochBatches, loader_of, seed_everything
from mmsa_lib.training.config import TrainConfig
from mmsa_lib.training.frozen import Frozen, check_samples
from mmsa_lib.training.progress import Progress
from mmsa_lib.training.rule import Rule

KEEP = ("best", "last")


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
    check_samples(corpus, ("train", "valid") if keep == "best" else ("train",))
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
    loader = loader_of(corpus.train, batches, accelerator.device)
    per_epoch = math.ceil(len(batches) / config.accumulate)
    scheduler = _scheduler(config, optimiser, per_epoch)
    for rule in rules:
        rule.setup(accelerator.unwrap_model(model), accelerator.device)
    state = Progress(config, corpus, accelerator, model, optimiser, scheduler, rules)
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


def _epoch(state: Progress, loader, batches: EpochBatches, parameters, loss) -> None:
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


def _frozen(state: Progress, keep: str) -> Frozen:
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


def _step(state: Progress, parameters, batch: Batch, number: int) -> None:
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
