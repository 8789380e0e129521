"""Difference of two models on the same test images, image by image.

Two models that are tested on the same images mostly fail on the same ones. The error of their
difference is therefore smaller than two binomial errors suggest (as in McNemar's test).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

Score = Literal["top1", "loss"]


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference of two models over test images.

    Args:
        mean: a - b, averaged over images and random seeds; top-1 in points.
        error: standard error over test images, in the same unit. It does not contain the variance
            over random seeds.
        images: distinct test images.
    """

    mean: float
    error: float
    images: int


def paired_difference(
    a: Sequence[pd.DataFrame], b: Sequence[pd.DataFrame], score: Score = "top1"
) -> PairedDifference | None:
    """Compare two models by their test predictions, paired by image.

    Each random seed may draw its own test images, as long as both models are tested on the same
    ones. An image that occurs for several seeds counts as one: its predictions are not independent.

    Args:
        a: predictions of the first model, one table for each random seed.
        b: predictions of the second model; the number of seeds may differ.
        score: `top1` or `loss`.

    Returns:
        The difference; None if the two were not tested on the same images.
    """
    if not a or not b:
        return None
    ours, theirs = _by_image(a, score), _by_image(b, score)
    same = len(ours) == len(theirs) and (ours.index == theirs.index).all()
    if not same or ((ours["weight"] - theirs["weight"]).abs() > 1e-9).any():
        return None
    difference = ours["score"] - theirs["score"]
    mean, images = float(difference.sum()), len(ours)
    residuals = difference - mean * ours["weight"]  # of images, clustered over seeds
    correction = images / (images - 1) if images > 1 else 1.0
    return PairedDifference(mean, math.sqrt(correction * float((residuals**2).sum())), images)


def _by_image(predictions: Sequence[pd.DataFrame], score: Score) -> pd.DataFrame:
    """The share of each test image in the mean score, by image and label.

    Returns:
        One row per image, sorted: `score`, which sums to the mean score, and `weight`, which sums
        to 1.
    """
    parts = []
    for table in predictions:
        weight = 1 / (len(table) * len(predictions))
        value = 100.0 * (table["label"] == table["predicted"]) if score == "top1" else table["loss"]
        parts.append(
            pd.DataFrame(
                {"index": table["index"], "label": table["label"], "score": value * weight,
                 "weight": weight}
            )
        )  # fmt: skip
    return pd.concat(parts).groupby(["index", "label"]).sum()
