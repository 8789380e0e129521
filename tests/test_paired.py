"""Paired differences of two models over the same test images."""

import math

import numpy as np
import pandas as pd
import pytest

from hovit.records.paired import paired_difference


def predictions(right: np.ndarray, first: int = 0) -> pd.DataFrame:
    """Predictions of images `first`, `first + 1`, ...; `right` says which are correct."""
    images = np.arange(first, first + len(right))
    return pd.DataFrame(
        {"index": images, "label": images % 7, "predicted": np.where(right, images % 7, 9),
         "loss": np.where(right, 0.5, 2.0)}
    )  # fmt: skip


def test_one_seed_gives_the_error_of_the_image_differences() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.random(500) < 0.6, generator.random(500) < 0.5
    found = paired_difference([predictions(a)], [predictions(b)])
    assert found is not None
    each = 100.0 * (a.astype(float) - b)
    assert found.mean == pytest.approx(each.mean())
    assert found.error == pytest.approx(each.std(ddof=1) / math.sqrt(500))
    loss = paired_difference([predictions(a)], [predictions(b)], "loss")
    assert loss is not None
    assert loss.mean == pytest.approx(-1.5 * each.mean() / 100)


def test_shared_errors_cancel() -> None:
    """Two models that fail on the same images differ by exactly nothing."""
    right = np.random.default_rng(1).random(400) < 0.3
    found = paired_difference([predictions(right)], [predictions(right)])
    assert found is not None
    assert (found.mean, found.error) == (0.0, 0.0)


def test_repeated_images_of_several_seeds_count_once() -> None:
    """A second seed with equal predictions brings no new information."""
    generator = np.random.default_rng(2)
    a, b = generator.random(300) < 0.6, generator.random(300) < 0.5
    one = paired_difference([predictions(a)], [predictions(b)])
    two = paired_difference([predictions(a)] * 2, [predictions(b)])
    assert one is not None
    assert two is not None
    assert two.error == pytest.approx(one.error)
    assert two.images == 300


def test_the_error_covers_the_difference_of_splits_drawn_by_seed() -> None:
    """Simulated: three seeds draw 100 of 400 images each; the error matches the true spread."""
    generator = np.random.default_rng(3)
    found = []
    for _ in range(300):
        a, b = [], []
        for _seed in range(3):
            images = np.sort(generator.choice(400, 100, replace=False))
            table = predictions(np.ones(400, bool)).iloc[images]
            for models, share in ((a, 0.7), (b, 0.6)):
                right = generator.random(100) < share
                models.append(table.assign(predicted=np.where(right, table["label"], 9)))
        found.append(paired_difference(a, b))
    errors = [each.error for each in found if each]
    assert len(errors) == 300
    assert np.mean(errors) == pytest.approx(np.std([e.mean for e in found if e]), rel=0.15)


def test_other_images_or_labels_are_not_paired() -> None:
    right = np.ones(50, bool)
    assert paired_difference([predictions(right)], [predictions(right, first=1)]) is None
    assert paired_difference([predictions(right)], [predictions(right[:49])]) is None
    other = predictions(right).assign(label=3)
    assert paired_difference([predictions(right)], [other]) is None
    assert paired_difference([], [predictions(right)]) is None
    # Seeds with their own images: the two models must have the same seeds.
    splits = [predictions(right), predictions(right, first=50)]
    assert paired_difference(splits, splits[:1]) is None
