"""The order of training data that a run can be resumed in."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from common.sampler import SampleKey


class ResumableSampler(Sampler[SampleKey]):
    """Numbers what a sampler yields, and can start an epoch in its middle.

    Args:
        sampler: Sampler of this process's indices with ``set_epoch``, whose order depends on the epoch only.
        rank: Rank of this process.
        world_size: Number of processes. Index ``i`` of rank ``r`` has position ``i * world_size + r`` in the epoch.
    """

    def __init__(self, sampler: Sampler[int], rank: int = 0, world_size: int = 1) -> None:
        self.sampler = sampler
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the number of this process's samples to leave out at its beginning."""
        self.epoch = epoch
        self.start = start
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[SampleKey]:
        for i, index in enumerate(self.sampler):
            if i >= self.start:
                yield SampleKey(index, self.epoch, i * self.world_size + self.rank)

    def __len__(self) -> int:
        return len(self.sampler)
