"""The streaming bootstrap: the same draws everywhere, and intervals as wide as they should be."""

from __future__ import annotations

import numpy as np

from samtune.metrics.bootstrap import Bootstrap, interval, weights
from samtune.metrics.measure import means


def test_weights_are_poisson_and_belong_to_the_name():
    drawn = weights("a", 20000)
    np.testing.assert_array_equal(drawn, weights("a", 20000))
    assert (drawn != weights("b", 20000)).any()
    assert abs(drawn.mean() - 1) < 0.03 and abs(drawn.var() - 1) < 0.06
    assert abs(np.corrcoef(drawn, weights("b", 20000))[0, 1]) < 0.03


def test_weights_stay_those_of_this_version():
    """An interval in a published scores.json can be had again."""
    assert weights("picture", 12).tolist() == [0, 0, 2, 1, 0, 1, 0, 1, 1, 1, 0, 0]


def test_order_and_shards_leave_no_trace():
    rng = np.random.default_rng(0)
    sums = {f"{k}": rng.random(3) * 10.0 ** rng.integers(-3, 7, 3) for k in range(40)}

    def filled(names) -> Bootstrap:
        bootstrap = Bootstrap(3, 64)
        for name in names:
            bootstrap.add(name, sums[name])
        return bootstrap

    whole, names = filled(sums), sorted(sums, reverse=True)
    shard = filled(names[::2])
    shard.merge(filled(names[1::2]))
    np.testing.assert_array_equal(whole.replicates(), shard.replicates())
    exact = sum(weights(name, 64)[:, None] * value for name, value in sums.items())
    np.testing.assert_allclose(whole.replicates(), exact, atol=1e-4)


def test_intervals_cover_the_true_mean_about_as_often_as_they_say():
    rng, covered, widths = np.random.default_rng(5), 0, []
    for trial in range(120):
        bootstrap = Bootstrap(2, 200)
        for k, value in enumerate(rng.exponential(1, 50)):
            bootstrap.add(f"{trial}/{k}", np.array([value, 1.0]))
        low, high = interval(means(bootstrap.replicates())[:, 0])
        covered += low <= 1 <= high
        widths.append(high - low)
    assert 0.84 <= covered / 120 <= 0.99
    assert 0.85 < np.mean(widths) / (2 * 1.96 / np.sqrt(50)) < 1.1


def test_undefined_replicates_are_left_out():
    assert interval(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)
    assert interval(np.array([np.nan])) is None
