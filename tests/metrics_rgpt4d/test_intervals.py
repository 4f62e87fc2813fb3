import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from metrics_rgpt4d.intervals import bootstrap_interval, macro_interval, mean_interval, wilson_interval


@pytest.mark.parametrize(("correct", "n"), [(0, 24), (1, 24), (11, 24), (24, 24), (655, 1419), (1, 1)])
def test_wilson_interval_equals_scipy(correct, n):
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    assert wilson_interval(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_macro_interval_of_one_category_is_its_own():
    assert macro_interval([(11, 24)]) == pytest.approx(wilson_interval(11, 24))
    low, high = macro_interval([(50, 100)] * 4)
    one_low, one_high = wilson_interval(50, 100)
    assert high - low == pytest.approx((one_high - one_low) / 2)  # four times the items: half the width


def test_mean_interval_adds_distances_in_quadrature():
    low, high = mean_interval([(0.5, (0.2, 0.6)), (0.7, (0.3, 0.9))])
    assert (low, high) == pytest.approx((0.6 - 0.5 / 2, 0.6 + np.hypot(0.1, 0.2) / 2))
    assert mean_interval([]) is None


def test_bootstrap_interval_equals_scipy_but_for_the_draws():
    scores = np.random.default_rng(3).integers(0, 11, size=400) / 10
    expected = bootstrap((scores,), np.mean, method="percentile", random_state=1).confidence_interval
    assert bootstrap_interval(scores) == pytest.approx((expected.low, expected.high), abs=0.004)


def test_bootstrap_interval_depends_on_the_seed_and_not_on_the_order():
    scores = [0.1, 0.4, 0.9, 0.3, 1.0, 0.0, 0.7]
    assert bootstrap_interval(scores) == bootstrap_interval(scores[::-1]) != bootstrap_interval(scores, seed=1)


def test_bootstrap_interval_of_equal_scores_is_not_a_point():
    assert bootstrap_interval([1.0] * 5) == wilson_interval(5, 5)
    low, high = bootstrap_interval([0.7])
    assert low < 0.2 and high > 0.95
    assert bootstrap_interval([]) is None
