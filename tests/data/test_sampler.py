"""Who sees which sample when."""

from collections import Counter

import pytest

from samtune.data.sampler import EpochBatches, TrainPlan, eval_batches
from samtune.errors import UserError

# (world, batch_size, accumulate) with the same 8 samples per step
SPLITS = [(1, 8, 1), (1, 2, 4), (1, 1, 8), (2, 4, 1), (2, 1, 4), (4, 2, 1), (4, 1, 2), (8, 1, 1)]
SAMPLES = [8, 9, 15, 16, 23, 64, 65]


def plans(samples, world, batch_size, accumulate, seed=3):
    return [TrainPlan(samples, batch_size, accumulate, rank, world, seed) for rank in range(world)]


def real(batches):
    return [key for batch in batches for key in batch if key.weight == 1]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("samples", SAMPLES)
def test_every_sample_once_per_epoch(samples, split):
    """Nothing is dropped at the end of an epoch, nothing counts twice."""
    keys = [key for plan in plans(samples, *split) for key in real(plan.batches(epoch=5))]
    assert Counter(key.index for key in keys) == dict.fromkeys(range(samples), 1)
    assert {key.epoch for key in keys} == {5}


@pytest.mark.parametrize("split", SPLITS[1:])
@pytest.mark.parametrize("samples", SAMPLES)
def test_every_split_of_a_step_has_the_samples_of_one_process(samples, split):
    (alone,) = plans(samples, *SPLITS[0])
    together = plans(samples, *split)
    assert all(plan.steps_per_epoch == alone.steps_per_epoch for plan in together)
    for step in range(alone.steps_per_epoch):
        batches, count = alone.step(2, step)
        shares = [plan.step(2, step) for plan in together]
        joined = [key for share, _ in shares for key in real(share)]
        assert sorted(joined) == sorted(real(batches)) and len(joined) == count
        assert {share_count for _, share_count in shares} == {count}


@pytest.mark.parametrize("split", [*SPLITS, (3, 2, 1), (3, 1, 3)])
@pytest.mark.parametrize("samples", SAMPLES)
def test_all_processes_do_the_same_number_of_batches(samples, split):
    """A process with a batch fewer would leave the others waiting for its gradient."""
    together = plans(samples, *split)
    for step in range(together[0].steps_per_epoch):
        shares = [[len(batch) for batch in plan.step(0, step)[0]] for plan in together]
        assert len({len(share) for share in shares}) == 1
        for share in shares:
            assert 1 <= len(share) <= split[2] and min(share) >= 1 and max(share) <= split[1]


def test_a_filler_comes_only_where_a_batch_would_be_missing():
    """It would enter the statistics of a BatchNorm that trains."""
    together = plans(7, 2, 4, 1)
    assert [len(plan.step(0, 0)[0][0]) for plan in together] == [4, 3]


def test_fillers_repeat_a_sample_of_their_own_step_without_weight():
    together = plans(9, 2, 4, 1)
    batches, count = together[1].step(0, 1)
    assert count == 1 and batches == [[together[0].step(0, 1)[0][0][0]._replace(weight=0.0)]]


def test_starting_in_the_middle_goes_on_as_if_never_interrupted():
    plan = TrainPlan(50, 2, 2, rank=1, world=2, seed=3)
    whole = plan.batches(4)
    for start in range(plan.steps_per_epoch + 1):
        done = sum(len(plan.step(4, step)[0]) for step in range(start))
        fresh = TrainPlan(50, 2, 2, rank=1, world=2, seed=3)
        assert fresh.batches(4, start * plan.samples_per_step) == whole[done:]


@pytest.mark.parametrize("split", [*SPLITS, (3, 2, 1), (3, 1, 3)])
@pytest.mark.parametrize("samples", SAMPLES)
def test_one_object_gives_every_epoch_from_any_step(samples, split):
    """For a loader that lives through all epochs; its length is that of a whole one."""
    for plan in plans(samples, *split):
        keys = EpochBatches(plan)
        for epoch, seen in ((0, 0), (1, plan.samples_per_step), (1, 3), (1, 0), (4, samples)):
            keys.begin(epoch, seen)
            assert list(keys) == plan.batches(epoch, seen)
        assert len(keys) == len(plan.batches(0))


def test_an_iteration_under_way_is_not_moved_by_the_next():
    plan = TrainPlan(9, 2, 1, 0, 1, seed=3)
    keys = EpochBatches(plan)
    first = iter(keys)
    begun = [next(first)]
    keys.begin(7, 4)
    assert begun + list(first) == plan.batches(0) and list(keys) == plan.batches(7, 4)


@pytest.mark.parametrize("samples", SAMPLES)
def test_steps_of_another_size_go_on_with_the_samples_that_are_left(samples):
    """An epoch in three parts on other processes: each sample once, in the order of one part."""
    order, seen, given = TrainPlan(samples, 1, 1, 0, 1, seed=3).order(6).tolist(), 0, []
    for split, steps in (((2, 1, 1), 1), ((3, 2, 1), 1), ((1, 1, 3), samples)):
        together = plans(samples, *split)
        for _ in range(steps):
            shares = [plan.take(6, seen) for plan in together]
            if not (count := shares[0][1]):
                break
            indices = {key.index for batches, _ in shares for key in real(batches)}
            assert indices == set(order[seen : seen + count])
            given += indices
            seen += count
    assert seen == samples and sorted(given) == list(range(samples))


def test_epochs_and_seeds_shuffle_differently():
    plan, other = (TrainPlan(100, 4, 1, 0, 1, seed) for seed in (3, 4))
    orders = [plan.order(0), plan.order(1), other.order(0), other.order(1)]
    for i, one in enumerate(orders):
        assert sorted(one) == list(range(100))
        assert all((one != another).mean() > 0.9 for another in orders[:i])
    assert (plan.order(0) == orders[0]).all()


def test_negative_seeds_work():
    assert sorted(TrainPlan(5, 1, 1, 0, 1, seed=-7).order(0)) == list(range(5))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((3, 1, 1, 0, 4), "3 training images are too few for 4 processes"),
        ((0, 1, 1, 0, 1), "no training image is left"),
        ((3, 0, 1, 0, 1), "--batch_size 0: must be at least 1"),
        ((3, 1, 0, 0, 1), "--accumulate 0: must be at least 1"),
    ],
)
def test_impossible_numbers_are_refused(numbers, message):
    with pytest.raises(UserError, match=message):
        TrainPlan(*numbers, seed=0)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("samples", [1, 5, 6, 20])
def test_evaluation_sees_every_sample_once(samples, world):
    shares = [eval_batches(samples, 4, rank, world) for rank in range(world)]
    keys = [key for share in shares for batch in share for key in batch]
    assert sorted(key.index for key in keys) == list(range(samples))
    assert all(key.weight == 1 for key in keys)
    assert all(1 <= len(batch) <= 4 for share in shares for batch in share)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
