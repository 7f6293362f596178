"""What a step needs from the cache: read and put together ahead of use, grouped by shape."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from .batches import Draw, Schedule, Step, Trainee, share
from .cache import CachedDataset, CachedItem, Sample
from .config import TrainConfig
from .kept_files import KeptFiles
from .processes import Processes
from .train_batch import BatchMaker, TrainBatch

NUM_STEPS_AHEAD = 2
Group = list[tuple[Draw, Sample]]
"""Samples with what was drawn for them."""


class StepLoader:
    """Makes the batches of the next steps in a thread while this one runs."""

    def __init__(
        self,
        dataset: CachedDataset,
        order: Schedule,
        processes: Processes,
        maker: BatchMaker,
        first_step: int,
        num_steps: int,
    ) -> None:
        self.dataset, self.order, self.processes, self.maker = dataset, order, processes, maker
        self.first_step, self.num_steps = first_step, num_steps
        self.read = KeptFiles()

    def __enter__(self) -> Iterator[tuple[int, int, list[TrainBatch]]]:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="flux2-kit-loader")
        return self._steps()

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _steps(self) -> Iterator[tuple[int, int, list[TrainBatch]]]:
        """Step, number of its samples in all processes, and the batches of this one."""
        coming: deque[tuple[int, int, Future[list[TrainBatch]]]] = deque()
        for step, plan in zip(range(self.first_step, self.num_steps), self._plans(), strict=False):
            coming.append((step, sum(len(batch) for batch in plan), self.pool.submit(self._load, plan)))
            if len(coming) > NUM_STEPS_AHEAD:
                yield self._next(coming)
        while coming:
            yield self._next(coming)

    def _next(self, coming: deque[tuple[int, int, Future[list[TrainBatch]]]]) -> tuple[int, int, list[TrainBatch]]:
        step, num_samples, batches = coming.popleft()
        return step, num_samples, batches.result()

    def _plans(self) -> Iterator[Step]:
        first_epoch, first = divmod(self.first_step, self.order.num_steps_per_epoch)
        for epoch in range(first_epoch, -(-self.num_steps // self.order.num_steps_per_epoch)):
            yield from self.order.epoch(epoch)[first if epoch == first_epoch else 0 :]

    def _load(self, plan: Step) -> list[TrainBatch]:
        made = []
        for batch in plan:
            group = [(draw, self._read(draw)) for draw in share(batch, self.processes.index, self.processes.count)]
            made += [self.maker(alike) for alike in by_shape(group)]
        return made

    def _read(self, draw: Draw) -> Sample:
        return self.dataset.load(
            self.dataset.items[draw.item],
            caption_index=draw.caption_index,
            drop_caption=draw.drop_caption,
            flipped=draw.flipped,
            read=self.read,
        )


def make_schedule(config: TrainConfig, dataset: CachedDataset, num_processes: int = 1) -> Schedule:
    """The order in which a run takes its pictures."""
    return Schedule(
        trainees=[trainee(item, dataset) for item in dataset.items],
        seed=config.seed,
        num_processes=num_processes,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )


def count_steps(config: TrainConfig, schedule: Schedule) -> int:
    """Steps of the whole run."""
    epochs = config.max_train_epochs
    return config.max_train_steps if epochs is None else epochs * schedule.num_steps_per_epoch


def trainee(item: CachedItem, dataset: CachedDataset) -> Trainee:
    subset = dataset.config.subsets[item.item.subset]
    return Trainee(
        group=(item.item.subset, *item.latents_size),
        batch_size=subset.batch_size,
        num_repeats=subset.num_repeats,
        num_captions=len(item.item.captions),
        caption_dropout=subset.caption_dropout,
        flip=subset.flip,
    )


def by_shape(batch: Group) -> list[Group]:
    """Samples of a batch, parted by the number and sizes of their references."""
    groups: dict[tuple[torch.Size, ...], Group] = {}
    for draw, sample in batch:
        groups.setdefault(tuple(latents.shape for latents in sample.references), []).append((draw, sample))
    return list(groups.values())


def largest_batch(dataset: CachedDataset) -> list[Draw]:
    """The samples that one forward can have at most, by tokens."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for index, item in enumerate(dataset.items):
        alike.setdefault((item.item.subset, item.latents_size, item.reference_sizes), []).append(index)

    def rows(key: tuple[Any, ...]) -> int:
        subset = dataset.config.subsets[key[0]]
        return min(subset.batch_size, len(alike[key]) * subset.num_repeats)

    def num_tokens(key: tuple[Any, ...]) -> int:
        return rows(key) * sum(height * width for height, width in (key[1], *key[2]))

    largest = max(alike, key=num_tokens)
    members = alike[largest]
    return [Draw(item=members[place % len(members)], index=place) for place in range(rows(largest))]
