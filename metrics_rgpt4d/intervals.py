"""95 % intervals of what the metrics report: a proportion, a mean of scores, and a mean of several of these."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
INTERVAL_METHOD = "Wilson score, 95 %; macro: MOVER of the categories' Wilson intervals (Zou and Donner, 2008)"


def wilson_interval(correct: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Wilson's score interval of a proportion (Wilson, 1927), as fractions; `None` for n = 0.

    It stays inside [0, 1] and keeps its coverage for small n, where the normal approximation fails: R4D-Bench's
    smallest category has 24 items.
    """
    if n == 0:
        return None
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half_width = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and n the exact ends are 0 and 1; the sum above misses them by a rounding error.
    return (0.0 if correct == 0 else centre - half_width, 1.0 if correct == n else centre + half_width)


def bootstrap_interval(
    scores: Sequence[float], seed: int = 0, resamples: int = 2000, confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean of scores in [0, 1]; `None` without scores.

    Items are drawn with replacement (Efron, 1979). Where all scores are equal, one item included, every resample is the
    same and would show no doubt at all; then Wilson's interval with the sum of the scores as right answers is returned:
    no score between 0 and 1 varies more than right and wrong do, so it is wide enough.

    Args:
        scores (`Sequence[float]`): one an item; their order does not matter.
        seed (`int`, defaults to 0): of the draws; the same seed gives the same interval.
        resamples (`int`, defaults to 2000): number of resamples.
    """
    if len(scores) == 0:
        return None
    values = np.sort(np.asarray(scores, dtype=np.float64))
    if values[0] == values[-1]:
        return wilson_interval(float(values.sum()), len(values), confidence)
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def mean_interval(means: Sequence[tuple[float, tuple[float, float]]]) -> tuple[float, float] | None:
    """Interval of the unweighted mean of independent estimates, from each one's own; `None` without any.

    The distances from each estimate to its two limits add in quadrature (MOVER; Zou and Donner, Statistics in Medicine
    27, 2008).

    Args:
        means (`Sequence`): (estimate, (low, high)) of each.
    """
    if not means:
        return None
    mean = sum(estimate for estimate, _ in means) / len(means)
    below = math.sqrt(sum((estimate - low) ** 2 for estimate, (low, _) in means)) / len(means)
    above = math.sqrt(sum((high - estimate) ** 2 for estimate, (_, high) in means)) / len(means)
    return mean - below, mean + above


def macro_interval(counts: Sequence[tuple[int, int]]) -> tuple[float, float] | None:
    """Interval of an unweighted mean of independent proportions, from each one's Wilson interval ([`mean_interval`]).

    Args:
        counts (`Sequence[tuple[int, int]]`): (correct, n) of each category, every n > 0.
    """
    return mean_interval([(correct / n, wilson_interval(correct, n)) for correct, n in counts])


def percent(interval: tuple[float, float] | None) -> list[float] | None:
    """An interval of fractions as `[low, high]` in percent, which JSON keeps."""
    return None if interval is None else [100.0 * end for end in interval]
