"""Splits: exact sizes, every class in proportion, and one draw per random seed."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, small_run
from hypothesis import given
from hypothesis import strategies as st

from hovit.config.plan import Plan, load_plan
from hovit.config.schema import Dataset, Split
from hovit.data.pack import open_pack, prepare
from hovit.data.split import draw_splits, splits_of, stratified_order

PETS = Split(train=0.7, val=0.15, stratify=True, per_run=True)
BREEDS = np.repeat(np.arange(37), [200] * 3 + [13] * 26 + [12] * 7 + [11])  # 1,033 images


def test_shares_hold_for_all_images_and_within_each_class() -> None:
    splits = draw_splits(BREEDS, PETS, seed=0)
    assert [len(part) for part in splits.values()] == [723, 154, 156]
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1033))
    for name, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        counts = np.bincount(BREEDS[splits[name]], minlength=37)
        wanted = share * np.bincount(BREEDS)  # exact shares of all images come first
        assert (abs(counts - wanted) <= 1 + 0.01 * np.bincount(BREEDS)).all(), name
        assert counts.min() >= 1


def test_each_seed_draws_its_own_split() -> None:
    first, again, other = (draw_splits(BREEDS, PETS, seed)["test"] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert len(set(first) & set(other)) < 50  # of 156; by chance about 24


def test_without_stratify_the_draw_is_plain() -> None:
    plain = PETS.model_copy(update={"stratify": False})
    splits = draw_splits(BREEDS, plain, seed=0)
    order = np.random.default_rng(0).permutation(1033)
    assert np.array_equal(np.concatenate(list(splits.values())), order)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.floats(0, 1))
def test_any_cut_is_proportional(labels: list[int], share: float) -> None:
    array = np.array(labels)
    order = stratified_order(array)
    assert sorted(order) == list(range(len(labels)))
    cut = array[order][: int(share * len(labels))]
    for label in set(labels):
        n = labels.count(label)
        within = n * len(cut) / len(labels)
        assert abs((cut == label).sum() - within) <= 1 + n * len(set(labels)) / len(labels)


def test_a_pack_is_made_once_and_split_by_each_run(plan: Plan, tmp_path: Path) -> None:
    digits = plan.run("levit_deck.pets.deck").dataset
    split = Split(train=0.7, val=0.15, stratify=True, per_run=True)
    run = small_run(plan, dataset=digits.model_copy(update={"split": split}))
    prepare(run.pack, tmp_path, tmp_path / run.pack.folder)
    packed = open_pack(run.pack, tmp_path / run.pack.folder)
    shares = np.bincount(packed.labels[packed.splits["test"]]) / np.bincount(packed.labels)
    assert abs(shares - 0.15).max() < 0.01  # its own split is stratified, too
    other = run.model_copy(update={"seed": 1})
    assert other.pack == run.pack
    mine, theirs = splits_of(run, packed), splits_of(other, packed)
    assert not np.array_equal(np.sort(mine["test"]), np.sort(theirs["test"]))
    usual = small_run(plan)
    assert splits_of(usual, dataclasses.replace(packed)) is packed.splits


def test_new_keys_of_a_split_change_no_spec() -> None:
    old = Split(train=0.7, val=0.15)
    assert old.to_spec() == {"train": 0.7, "val": 0.15, "seed": 0}
    assert PETS.to_spec() == old.to_spec() | {"stratify": True, "per_run": True}


def test_a_published_test_set_is_not_split_again() -> None:
    pets = load_plan("paper", ROOT / "config").config.datasets["cifar10"]
    with pytest.raises(ValueError, match="without a published test set"):
        Dataset(**pets.model_dump(exclude={"split"}), split=PETS)
