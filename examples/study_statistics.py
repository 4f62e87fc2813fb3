"""Statistics of the study: means over test clips and seeds, their intervals, paired tests, and what follows for a claim.

A row is trained with several seeds, and all of these models answer the same questions about the same clips. So clips and seeds
are crossed, both are samples of many, and questions about one clip are not independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import permutation_test

from metrics_rgpt4d.intervals import CONFIDENCE, wilson_interval

RESAMPLES = 9999  # of the bootstrap
PERMUTATIONS = 9999  # of the test
LEVEL = 0.05  # of a decision, after Holm's correction
HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "fails", "not decided", "not run"


@dataclass(frozen=True)
class Sample:
    """What was measured of a row: for each seed and clip the sum of some values, and how many values these are.

    Args:
        seeds: of the S runs, rising.
        sums: `(S, clips)` float64, such as the number of right answers.
        counts: `(S, clips)` float64, such as the number of questions; a clip may have none.
    """

    seeds: tuple[int, ...]
    sums: np.ndarray
    counts: np.ndarray

    @property
    def by_seed(self) -> np.ndarray:
        """`(S,)` mean over the values of each run."""
        return self.sums.sum(axis=1) / self.counts.sum(axis=1)

    @property
    def mean(self) -> float:
        return float(self.by_seed.mean())

    def of(self, seeds: Sequence[int]) -> "Sample":
        """The runs with these seeds alone."""
        kept = [self.seeds.index(seed) for seed in seeds]
        return Sample(tuple(seeds), self.sums[kept], self.counts[kept])


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; `by_seed` has the number of each seed, `p` the test of no difference, if any."""

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    p: float | None = None

    def times(self, factor: float) -> "Estimate":
        scaled = [factor * number for number in (self.value, self.low, self.high)]
        return Estimate(*scaled, tuple(factor * number for number in self.by_seed), self.p)


class Resamples:
    """Draws of a two-level bootstrap: clips and seeds, each with replacement and independently (Owen, 2007).

    Every row gets the same draws, so that two rows are compared on the same clips and seeds. Of seeds there are few, and a
    plain bootstrap of n values has (n - 1) / n of their variance, two thirds of three seeds'. The bootknife mends that:
    n are drawn from all but one, which is left out at random (Hesterberg, 2004).

    Args:
        num_clips: clips of the test.
        seed: of the draws.
    """

    def __init__(self, num_clips: int, seed: int = 0):
        self._seed = seed
        draws = np.random.default_rng([seed, 0]).multinomial(num_clips, np.full(num_clips, 1 / num_clips), RESAMPLES)
        self._clips = draws.astype(np.float64)

    def _seeds(self, count: int) -> np.ndarray:
        """`(RESAMPLES, count)` weight of each seed; a row sums to one."""
        if count == 1:
            return np.ones((RESAMPLES, 1))
        rng = np.random.default_rng([self._seed, 1, count])
        left_out = rng.integers(count, size=(RESAMPLES, 1))
        drawn = (left_out + rng.integers(1, count, size=(RESAMPLES, count))) % count
        return (drawn[..., None] == np.arange(count)).mean(axis=1)

    def means(self, sample: Sample) -> np.ndarray:
        """`(RESAMPLES,)` mean of the sample in each draw; NaN in one whose clips have no value at all."""
        totals = self._clips @ np.concatenate([sample.sums, sample.counts]).T
        sums, counts = np.split(totals, 2, axis=1)
        means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
        return (means * self._seeds(len(sample.seeds))).sum(axis=1)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(values, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(low), float(high)


def share(sample: Sample, resamples: Resamples) -> Estimate:
    """Mean of values in [0, 1].

    Where all are equal no resample differs, which would show no doubt at all; then the interval is Wilson's, of as many
    trials as clips have values.
    """
    clips = sample.counts.sum(axis=0) > 0
    if np.ptp(sample.sums[:, clips] / sample.counts[:, clips]) == 0:
        interval = wilson_interval(sample.mean * int(clips.sum()), int(clips.sum()))
    else:
        interval = _interval(resamples.means(sample))
    return Estimate(sample.mean, *interval, tuple(sample.by_seed))


def mean(sample: Sample, resamples: Resamples) -> Estimate:
    """Mean of any values."""
    return Estimate(sample.mean, *_interval(resamples.means(sample)), tuple(sample.by_seed))


def _paired(first: Sample, second: Sample) -> tuple[Sample, Sample] | None:
    """Both with the seeds that they have in common: the same seed is the same order of questions."""
    seeds = [seed for seed in first.seeds if seed in second.seeds]
    return (first.of(seeds), second.of(seeds)) if seeds else None


def difference(first: Sample, second: Sample, resamples: Resamples, rivals: int = 1) -> Estimate | None:
    """Mean of `first` minus mean of `second`, with the p of [`paired_p`]; `None` without a common seed.

    Args:
        rivals: `second` was chosen among so many as the best; p is multiplied by it (Bonferroni).
    """
    pair = _paired(first, second)
    if pair is None:
        return None
    one, other = pair
    low, high = _interval(resamples.means(one) - resamples.means(other))
    p = min(1.0, rivals * paired_p(one, other))
    return Estimate(one.mean - other.mean, low, high, tuple(one.by_seed - other.by_seed), p)


def ratio(first: Sample, second: Sample, resamples: Resamples) -> Estimate | None:
    """Mean of `first` over mean of `second`, with the p of [`paired_p`]; `None` without a common seed."""
    pair = _paired(first, second)
    if pair is None:
        return None
    one, other = pair
    low, high = _interval(resamples.means(one) / resamples.means(other))
    return Estimate(one.mean / other.mean, low, high, tuple(one.by_seed / other.by_seed), paired_p(one, other))


def paired_p(first: Sample, second: Sample) -> float:
    """Two-sided p of a sign-flip permutation test: the two rows' sums of a clip, over all seeds, may be exchanged.

    The smallest is 2 / (PERMUTATIONS + 1). It asks whether these models differ on other clips; that other seeds might
    have given other models is not in it, but in the interval.
    """
    pairs = first.sums.sum(axis=0), second.sums.sum(axis=0)
    found = permutation_test(
        pairs,
        lambda one, other, axis: (one - other).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        batch=500,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm, 1979), in the order given."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def judge_difference(found: Estimate, p_holm: float, target: float = 0.0, p_below: float = 1.0) -> str:
    """Whether a difference is above zero and at least `target`.

    It is decided if its interval excludes zero and its corrected p is below [`LEVEL`]. It also fails if all of its interval
    is below a target above zero.

    Args:
        p_below: what the claim says of its p, before correction.
    """
    decided = (found.low > 0 or found.high < 0) and p_holm < LEVEL
    if decided and found.value > 0 and found.value >= target and found.p < p_below:
        return HOLDS
    if (decided and found.value < max(target, 0)) or found.high < target > 0:
        return FAILS
    return UNDECIDED


def judge_level(found: Estimate, low: float = -np.inf, high: float = np.inf) -> str:
    """Whether a number lies within bounds: all of its interval inside holds, all of it outside fails."""
    if low <= found.low and found.high <= high:
        return HOLDS
    return FAILS if found.high < low or found.low > high else UNDECIDED
