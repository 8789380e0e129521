"""Paired comparison of two classifiers on the same test images.

Sources: the exact McNemar test (McNemar, Psychometrika 12, 1947), and the interval of Bonett and
Price for a difference of paired proportions (J. Educ. Behav. Stat. 37, 2012).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..records.predictions import KEY


@dataclass(frozen=True)
class Pairs:
    """Outcomes of two classifiers, with one row per test image and random seed.

    Args:
        table: columns `seed`, `index` (of the image), `first` and `second`: whether each classifier
            is right, 0 or 1.
    """

    table: pd.DataFrame

    @property
    def differences(self) -> list[float]:
        """Top-1 of the first minus that of the second in points, one number per seed."""
        return [100.0 * float(x) for x in self._difference.groupby(self.table["seed"]).mean()]

    @property
    def accuracies(self) -> tuple[float, float]:
        """Top-1 of each classifier in percent, the mean over seeds."""
        first, second = self.table.groupby("seed")[["first", "second"]].mean().mean() * 100
        return float(first), float(second)

    @property
    def better(self) -> int:
        """Number of images on which the first is right in more seeds than the second.

        Each image counts once, because its outcomes in several seeds depend on each other.
        """
        return int((self._by_image > 0).sum())

    @property
    def worse(self) -> int:
        """Number of images on which the second is right in more seeds than the first."""
        return int((self._by_image < 0).sum())

    @property
    def _difference(self) -> pd.Series:
        """1 if only the first classifier is right, -1 if only the second is, 0 if they agree."""
        return self.table["first"] - self.table["second"]

    @property
    def _by_image(self) -> pd.Series:
        return self._difference.groupby(self.table["index"]).sum()

    @property
    def image_noise(self) -> float:
        """Half the width of the 95 % interval over test images, in points.

        Like Bonett and Price, this adds one pair in favour of each classifier, so that the width is
        not 0 for few or no discordant pairs. An image that several seeds test counts as one
        cluster.
        """
        values = np.append(self._difference.to_numpy(float), [1.0, -1.0])
        images = np.append(self.table["index"].to_numpy(), [-1, -2])  # indices of real images: >= 0
        sums = pd.Series(values - values.mean()).groupby(images).sum()
        return 196.0 * math.sqrt(float((sums**2).sum())) / len(values)


def pair(tables: Sequence[tuple[int, pd.DataFrame, pd.DataFrame]]) -> Pairs | None:
    """Pair the predictions of two classifiers, seed by seed.

    Args:
        tables: for each seed, (seed, predictions of the first, predictions of the second).

    Returns:
        None if there is no seed, or if two tables have different images or labels.
    """
    found = []
    for seed, first, second in tables:
        first, second = (each.sort_values("index", ignore_index=True) for each in (first, second))
        if not first[KEY].equals(second[KEY]):
            return None
        right = [(each["label"] == each["predicted"]).astype(int) for each in (first, second)]
        found.append(
            pd.DataFrame(
                {"seed": seed, "index": first["index"], "first": right[0], "second": right[1]}
            )
        )
    return Pairs(pd.concat(found, ignore_index=True)) if found else None


def mcnemar(better: int, worse: int) -> float:
    """Two-sided p value of the exact McNemar test, a binomial test on the discordant pairs."""
    pairs = better + worse
    tail, ways = 0, 1  # ways to choose k of the pairs: C(n, k + 1) = C(n, k) (n - k) / (k + 1)
    for k in range(min(better, worse) + 1):
        tail += ways
        ways = ways * (pairs - k) // (k + 1)
    return min(1.0, 2 * tail / 2**pairs)
