"""Everything that a killed run needs to go on exactly where it was."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from mmsa_lib.errors import TrainingError
from mmsa_lib.files import replacing
from mmsa_lib.nets.trained import copied, load_trained, trained_state


class Progress:
    """Where a run stands: kept in memory, and in a file that it continues from."""

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
