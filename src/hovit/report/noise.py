"""Noise of a result from random seeds, test images and timing rounds."""

import math
import statistics
from collections.abc import Iterable, Sequence

from scipy.special import stdtrit

NORMAL = 1.96  # 95 % (two-sided) of a normal distribution


def student(freedom: int) -> float:
    """Student's t at 95 % (two-sided)."""
    return float(stdtrit(freedom, 0.975))


def binomial_variance(percent: float, images: int) -> float:
    """Variance of an accuracy over `images` images, in points squared."""
    share = percent / 100
    return 1e4 * share * (1 - share) / images


def binomial_noise(percent: float, images: int) -> float:
    """Half the width of the 95 % interval of an accuracy over `images` images, in points."""
    return NORMAL * math.sqrt(binomial_variance(percent, images))


def per_class_noise(right: Iterable[int], images: Iterable[int]) -> float:
    """Half the width of the 95 % interval of the mean of the accuracies of classes, in points.

    One right and one wrong image are added to each class (Laplace), so that a class of two images
    is not certain.

    Args:
        right: images of each class that are classified correctly.
        images: test images of each class.
    """
    pairs = zip(right, images, strict=True)
    variances = [binomial_variance(100 * (r + 1) / (n + 2), n) for r, n in pairs]
    return NORMAL * math.sqrt(sum(variances)) / len(variances)


def pooled_variance(groups: Iterable[Sequence[float]]) -> tuple[float, int]:
    """(variance within groups, its degrees of freedom); (0, 0) if no group has two values."""
    groups = list(groups)
    freedom = sum(len(group) - 1 for group in groups if group)
    if not freedom:
        return 0.0, 0
    return sum(statistics.pvariance(g) * len(g) for g in groups if g) / freedom, freedom


def seed_noise(variance: float, freedom: int, n: int) -> float:
    """Half the width of the 95 % interval of a mean over n random seeds.

    Args:
        variance: pooled variance over random seeds.
        freedom: its degrees of freedom; 0 if the variance is unknown, which gives 0.
        n: number of random seeds in the mean.
    """
    return student(freedom) * math.sqrt(variance / n) if freedom else 0.0


def half_iqr(numbers: Sequence[float]) -> float:
    """Half the interquartile range; quartiles as in records."""
    low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return (high - low) / 2
