"""Seeds, and which samples are in which batch."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

from mmsa_lib.corpora.schema import Split


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 libraries still read the global state
    torch.manual_seed(seed)


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


def loader_of(split: Split, batches: EpochBatches, device: torch.device) -> DataLoader:
    """Accelerate's loader (it knows the last batch) without its way of sharding."""
    from accelerate.data_loader import prepare_data_loader

    loader = DataLoader(
        range(len(split)), batch_sampler=batches, collate_fn=split.batch
    )
    return prepare_data_loader(
        loader, device, num_processes=1, process_index=0, put_on_device=True
    )
