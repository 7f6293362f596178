"""The order in which a run sees its pictures (pure functions of the seed).

Nothing is remembered between steps: what step k draws follows from the seed and k alone. So a run goes on anywhere bit
by bit, and any number of processes draws the same samples.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """What the order depends on, for one picture."""

    group: tuple[int, ...]
    """Only pictures of one group can share a batch: subset, latent height, latent width."""
    batch_size: int
    """Of one process."""
    num_repeats: int = 1
    num_captions: int = 1
    caption_dropout: float = 0.0
    flip: bool = False


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One sample of a step."""

    item: int
    """Index of the picture."""
    index: int
    """Number of the sample in the whole run; noise and noise level follow from it."""
    caption_index: int = 0
    drop_caption: bool = False
    flipped: bool = False


Batch = tuple[Draw, ...]
"""Samples of one shape, of all processes together."""
Step = tuple[Batch, ...]
"""The batches that are accumulated into one step of the optimiser."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Draws the steps of a run."""

    trainees: Sequence[Trainee]
    seed: int
    num_processes: int = 1
    gradient_accumulation_steps: int = 1

    @property
    def num_samples_per_epoch(self) -> int:
        """Pictures times repeats."""
        return sum(trainee.num_repeats for trainee in self.trainees)

    @property
    def num_steps_per_epoch(self) -> int:
        """Steps of the optimiser; what is left over at the end of an epoch makes a smaller step."""
        return -(-self._num_batches() // self.gradient_accumulation_steps)

    def epoch(self, epoch: int) -> list[Step]:
        """All steps of an epoch, counted from 0. Every picture comes `num_repeats` times."""
        rng = random.Random(f"{self.seed} order of epoch {epoch}")
        batches: list[list[int]] = []
        for members in self._groups().values():
            drawn = [item for item in members for _ in range(self.trainees[item].num_repeats)]
            rng.shuffle(drawn)
            size = self.trainees[members[0]].batch_size * self.num_processes
            batches += [drawn[start : start + size] for start in range(0, len(drawn), size)]
        rng.shuffle(batches)
        index = epoch * self.num_samples_per_epoch
        drawn_batches: list[Batch] = []
        for batch in batches:
            drawn_batches.append(tuple(self._draw(item, index + place) for place, item in enumerate(batch)))
            index += len(batch)
        size = self.gradient_accumulation_steps
        return [tuple(drawn_batches[start : start + size]) for start in range(0, len(drawn_batches), size)]

    def _draw(self, item: int, index: int) -> Draw:
        trainee = self.trainees[item]
        rng = random.Random(f"{self.seed} sample {index}")
        dropped, flipped, caption = rng.random(), rng.random(), rng.random()
        return Draw(
            item=item,
            index=index,
            caption_index=int(caption * trainee.num_captions),
            drop_caption=dropped < trainee.caption_dropout,
            flipped=trainee.flip and flipped < 0.5,
        )

    def _groups(self) -> dict[tuple[int, ...], list[int]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for item, trainee in enumerate(self.trainees):
            groups.setdefault(trainee.group, []).append(item)
        return groups

    def _num_batches(self) -> int:
        total = 0
        for members in self._groups().values():
            size = self.trainees[members[0]].batch_size * self.num_processes
            total += -(-sum(self.trainees[item].num_repeats for item in members) // size)
        return total


def share(batch: Batch, process_index: int, num_processes: int) -> Batch:
    """The part of a batch that one process computes: runs of equal length, the last ones shorter or empty."""
    size = -(-len(batch) // num_processes)
    return batch[process_index * size : (process_index + 1) * size]
