"""The order of samples: every picture as often as asked for, from seed and step alone, however it is shared out."""

from __future__ import annotations

from collections import Counter

import pytest
from flux2_kit.training.batches import Schedule, Trainee, share

TRAINEES = [
    *(Trainee(group=(0, 4, 4), batch_size=2, num_repeats=3, num_captions=4, caption_dropout=0.3, flip=True),) * 5,
    *(Trainee(group=(0, 2, 8), batch_size=2),) * 3,
    *(Trainee(group=(1, 4, 4), batch_size=4),) * 6,
]


def items(steps) -> list[int]:
    return [draw.item for step in steps for batch in step for draw in batch]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_epoch_shows_every_picture_as_often_as_its_repeats(num_processes, accumulation):
    schedule = Schedule(
        trainees=TRAINEES, seed=1, num_processes=num_processes, gradient_accumulation_steps=accumulation
    )
    for epoch in range(3):
        steps = schedule.epoch(epoch)
        assert len(steps) == schedule.num_steps_per_epoch
        assert Counter(items(steps)) == {item: TRAINEES[item].num_repeats for item in range(len(TRAINEES))}


def test_batches_hold_one_group_and_no_more_than_their_size():
    for step in Schedule(trainees=TRAINEES, seed=1, num_processes=2).epoch(0):
        for batch in step:
            assert len({TRAINEES[draw.item].group for draw in batch}) == 1
            assert len(batch) <= 2 * TRAINEES[batch[0].item].batch_size


def test_numbers_of_samples_run_through_without_a_gap():
    schedule = Schedule(trainees=TRAINEES, seed=1, gradient_accumulation_steps=2)
    steps = [*schedule.epoch(0), *schedule.epoch(1)]
    numbers = [draw.index for step in steps for batch in step for draw in batch]
    assert numbers == list(range(2 * schedule.num_samples_per_epoch))


def test_seed_and_epoch_change_the_order_and_nothing_else_does():
    first, again = Schedule(trainees=TRAINEES, seed=1), Schedule(trainees=TRAINEES, seed=1)
    assert first.epoch(1) == again.epoch(1)
    assert items(first.epoch(0)) != items(first.epoch(1))
    assert items(first.epoch(0)) != items(Schedule(trainees=TRAINEES, seed=2).epoch(0))


def test_two_processes_share_the_batches_of_one_with_twice_the_batch():
    half = [Trainee(group=(0,), batch_size=2) for _ in range(10)]
    whole = [Trainee(group=(0,), batch_size=4) for _ in range(10)]
    shared, alone = Schedule(trainees=half, seed=3, num_processes=2), Schedule(trainees=whole, seed=3)
    assert shared.epoch(0) == alone.epoch(0)
    for (batch,) in alone.epoch(0):
        assert share(batch, 0, 2) + share(batch, 1, 2) == batch


def test_a_share_may_be_empty():
    batch = Schedule(trainees=TRAINEES[:1], seed=0).epoch(0)[0][0][:1]
    assert [len(share(batch, index, 3)) for index in range(3)] == [1, 0, 0]


def test_captions_dropout_and_flips_come_as_often_as_asked_for():
    trainee = Trainee(group=(0,), batch_size=1, num_captions=4, caption_dropout=0.25, flip=True)
    schedule = Schedule(trainees=[trainee] * 4000, seed=5)
    draws = [draw for step in schedule.epoch(0) for batch in step for draw in batch]
    assert 0.22 < sum(draw.drop_caption for draw in draws) / len(draws) < 0.28
    assert 0.47 < sum(draw.flipped for draw in draws) / len(draws) < 0.53
    counts = Counter(draw.caption_index for draw in draws)
    assert set(counts) == {0, 1, 2, 3} and min(counts.values()) > 850


def test_nothing_is_dropped_or_flipped_unasked():
    draws = [draw for step in Schedule(trainees=TRAINEES[5:], seed=0).epoch(0) for batch in step for draw in batch]
    assert not any(draw.drop_caption or draw.flipped or draw.caption_index for draw in draws)
