"""Paired comparison of two classifiers: hand-computed values, tables and claims."""

import math
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from synthetic import train_record

from hovit.config.metrics import METRICS
from hovit.config.plan import Plan, load_plan
from hovit.config.schema import Claim
from hovit.records.predictions import predictions_digest, write_predictions
from hovit.records.record import Record, read_record, write_record
from hovit.report.claims.check import Verdict, check_claim
from hovit.report.noise import student
from hovit.report.paired import Pairs, mcnemar, pair
from hovit.report.results import PairedValue, Results
from hovit.report.sources import Sources
from hovit.report.tables.columns import format_p, format_value
from hovit.report.tables.write import write_table


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan("photographs", ROOT / "config")


def predictions(right: str, first: int = 0) -> pd.DataFrame:
    """One image per character: `1` is classified correctly. Images are numbered from `first`."""
    label = list(range(len(right)))
    return pd.DataFrame(
        {
            "index": [first + i for i in label],
            "label": label,
            "predicted": [i if c == "1" else -1 for i, c in zip(label, right, strict=True)],
            "loss": 1.0,
        }
    )


def paired(*tables: tuple[int, pd.DataFrame, pd.DataFrame]) -> Pairs:
    pairs = pair(tables)
    assert pairs is not None
    return pairs


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (0, 5, 2 / 32),
        (5, 0, 2 / 32),
        (1, 9, 2 * 11 / 1024),  # 1 + 10 of 1,024 outcomes are as extreme on one side
        (3, 7, 2 * 176 / 1024),  # 1 + 10 + 45 + 120
    ],
)
def test_mcnemar_counts_outcomes_of_fair_coins(better: int, worse: int, p: float) -> None:
    assert mcnemar(better, worse) == pytest.approx(p, rel=1e-12)


def test_mcnemar_of_many_pairs_is_finite() -> None:
    assert 0 < mcnemar(900, 1100) < 1e-4


def test_one_seed() -> None:
    pairs = paired((0, predictions("11110011"), predictions("11001101")))
    assert (pairs.better, pairs.worse) == (3, 2)
    assert pairs.differences == [100 * (6 - 5) / 8]
    # Bonett and Price: n + 2 = 10 pairs, 4 better, 3 worse
    variance = (0.4 + 0.3 - 0.1**2) / 10
    assert pairs.image_noise == pytest.approx(196 * math.sqrt(variance))


def test_order_of_images_does_not_matter() -> None:
    first, second = predictions("1100"), predictions("1010")
    pairs = paired((0, first, second.iloc[::-1]))
    assert (pairs.better, pairs.worse) == (1, 1)


def test_equal_predictions_leave_an_interval() -> None:
    same = predictions("1" * 98)
    pairs = paired((0, same, same))
    assert pairs.differences == [0.0]
    assert pairs.image_noise == pytest.approx(196 * math.sqrt(2 / 100 / 100))


def test_an_image_that_two_seeds_test_is_one_cluster() -> None:
    first, second = predictions("1111"), predictions("0101")
    shared = paired((0, first, second), (1, first, second))
    assert shared.differences == [50.0, 50.0]
    # Differences 1, 0, 1, 0 twice, and +1, -1: 10 lines of mean 0.4. Residuals by image:
    squares = 2 * (2 * 0.6) ** 2 + 2 * (2 * 0.4) ** 2 + 0.6**2 + 1.4**2
    assert shared.image_noise == pytest.approx(196 * math.sqrt(squares) / 10)
    apart = paired((0, first, second), (1, predictions("1111", 4), predictions("0101", 4)))
    squares = 4 * 0.6**2 + 4 * 0.4**2 + 0.6**2 + 1.4**2
    assert apart.image_noise == pytest.approx(196 * math.sqrt(squares) / 10)


def test_an_image_that_several_seeds_test_counts_once() -> None:
    first, second = predictions("11110"), predictions("01100")
    pairs = paired(*((seed, first, second) for seed in range(3)))
    assert (pairs.better, pairs.worse) == (2, 0)
    mixed = paired((0, first, second), (1, second, first), (2, first, first))
    assert (mixed.better, mixed.worse) == (0, 0)


def test_other_images_or_labels_are_not_paired() -> None:
    assert pair([]) is None
    assert pair([(0, predictions("11"), predictions("111"))]) is None
    assert pair([(0, predictions("11"), predictions("11", 1))]) is None
    labels = predictions("11").assign(label=[1, 0])
    assert pair([(0, predictions("11"), labels)]) is None


# In tables and claims

LINEAR, ROW = "front_linear_frozen", "l_hovit_frozen"


def write_run(plan: Plan, root: Path, row: str, seed: int, right: str) -> Path:
    """A record with these test predictions; returns the path of the predictions."""
    study = plan.study("launcher_imagenet")
    run = next(run for run in plan.runs_of(study, study.row(row)) if run.seed == seed)
    table = predictions(right, first=100 * seed)
    record: Record = train_record(run, 50.0)
    top1 = 100 * right.count("1") / len(right)
    results = record.results | {
        "top1": top1, "images_test": len(right), "predictions_sha256": predictions_digest(table)
    }  # fmt: skip
    write_record(root / run.folder / "record.json", record.model_copy(update={"results": results}))
    write_predictions(root / run.folder / "predictions.csv.gz", table)
    return root / run.folder / "predictions.csv.gz"


@pytest.fixture
def runs(plan: Plan, tmp_path: Path) -> Path:
    for seed, (linear, row) in enumerate((("11111111", "11110000"), ("11110000", "11100001"))):
        write_run(plan, tmp_path, LINEAR, seed, linear)
        write_run(plan, tmp_path, ROW, seed, row)
    return tmp_path


def test_the_mean_per_class_gives_each_class_the_same_weight(plan: Plan, tmp_path: Path) -> None:
    path = write_run(plan, tmp_path, ROW, 0, "11110000")
    table = pd.read_csv(path)
    table["label"] = [0, 0, 0, 0, 0, 0, 1, 2]  # 4 of 6, 0 of 1, 0 of 1
    table["predicted"] = table["label"].where(table.index < 4, -1)
    record = read_record(path.parent / "record.json")
    results = record.results | {"predictions_sha256": predictions_digest(table)}
    write_record(path.parent / "record.json", record.model_copy(update={"results": results}))
    write_predictions(path, table)
    study = plan.study("launcher_imagenet")
    value = Results(plan, tmp_path).value(study, study.row(ROW), "top1_per_class")
    assert value is not None
    assert (value.mean, value.n) == (pytest.approx(100 * 4 / 6 / 3), 1)
    # With one right and one wrong image more: 5 of 8, 1 of 3, 1 of 3
    variance = 5 * 3 / 64 / 6 + 2 * (2 / 9)
    assert value.noise == pytest.approx(196 * variance**0.5 / 3)


def difference(plan: Plan, root: Path, row: str = ROW) -> PairedValue | None:
    study = plan.study("launcher_imagenet")
    value = Results(plan, root).value(study, study.row(row), "top1_difference")
    assert value is None or isinstance(value, PairedValue)
    return value


def test_a_difference_to_the_baseline_over_two_seeds(plan: Plan, runs: Path) -> None:
    value = difference(plan, runs)
    assert value is not None
    assert (value.mean, value.n, value.better, value.worse) == (-25.0, 2, 1, 5)
    assert value.sides == (50.0, 75.0)
    assert value.spread == pytest.approx(50 / 2**0.5)  # of -50 and 0
    assert value.p == pytest.approx(2 * 7 / 64)
    images = (4 + 1 + 1 + 1 + 1 - 18 * (-4 / 18) ** 2) ** 0.5 / 18  # 16 pairs and two more
    variance = 1250 / 2  # over seeds: 100, 50 and 50, 50 % are pooled
    assert value.seed_noise == pytest.approx(math.hypot(*[student(2) * (variance / 2) ** 0.5] * 2))
    assert value.noise == pytest.approx(math.hypot(value.seed_noise, 196 * images))
    assert {path.parts[-3] for path in value.paths} == {
        f"{model}.photographs.deck_frozen"
        for model in (
            "l_hovit-front=tf_efficientnet_lite0",
            "front_linear-front=tf_efficientnet_lite0-pretrained",
        )
    }


def test_seeds_of_one_row_alone_are_not_compared(plan: Plan, runs: Path) -> None:
    before = difference(plan, runs)
    write_run(plan, runs, LINEAR, 2, "11111111")
    after = difference(plan, runs)
    assert before is not None
    assert after is not None
    assert (after.mean, after.n, after.paths) == (before.mean, before.n, before.paths)
    assert after.noise < before.noise  # the variance over seeds is known better


def test_one_common_seed_keeps_the_noise_of_the_others(plan: Plan, tmp_path: Path) -> None:
    for seed, right in enumerate(("11111111", "11110000")):
        write_run(plan, tmp_path, LINEAR, seed, right)
    write_run(plan, tmp_path, ROW, 0, "11110000")
    value = difference(plan, tmp_path)
    assert value is not None
    assert (value.mean, value.n) == (-50.0, 1)
    images = 196 * (4 + 2 - 10 * 0.4**2) ** 0.5 / 10
    variance = 1250  # of 100 and 50 %
    assert value.seed_noise == pytest.approx(math.hypot(*[student(1) * variance**0.5] * 2))
    assert value.noise == pytest.approx(math.hypot(value.seed_noise, images))


def test_no_baseline_no_difference(plan: Plan, runs: Path) -> None:
    assert difference(plan, runs, "front_linear") is None
    assert difference(plan, runs, LINEAR) is None  # its baseline has no record


def test_predictions_of_another_record_are_named_and_not_used(plan: Plan, runs: Path) -> None:
    path = write_run(plan, runs, ROW, 1, "11100001")
    write_predictions(path, predictions("11111111", first=100))
    value = difference(plan, runs)
    assert value is not None
    assert (value.mean, value.n) == (-50.0, 1)
    study = plan.study("launcher_imagenet")
    write_table(plan, study, runs)
    text = (runs / "results/tables/launcher_imagenet.md").read_text()
    assert "seed1/predictions.csv.gz: not the predictions of its record; not used" in text
    path.unlink()
    value = difference(plan, runs)
    assert value is not None
    assert value.n == 1


def test_the_table_shows_interval_difference_and_p(plan: Plan, runs: Path) -> None:
    write_table(plan, plan.study("launcher_imagenet"), runs)
    table = pd.read_csv(runs / "results/tables/launcher_imagenet.csv").set_index("row")
    line = table.loc[ROW]
    assert (line["top1_difference"], line["top1_difference_n"]) == (-25, 2)
    assert (line["top1_difference_better"], line["top1_difference_worse"]) == (1, 5)
    assert line["top1_difference_p"] == pytest.approx(14 / 64)
    assert line["top1_interval"] == line["top1"] == 50
    value = difference(plan, runs)
    assert value is not None
    low, high = value.interval
    assert line["top1_difference_high"] == pytest.approx(high)
    text = (runs / "results/tables/launcher_imagenet.md").read_text()
    assert f"| −25.0 (−{-low:.1f} to {high:.1f}), p = 0.22 |" in text
    tex = (runs / "results/tables/launcher_imagenet.tex").read_text()
    assert "Top-1 $-$ baseline, points" in tex
    assert f"$-$25.0 ($-${-low:.1f} to {high:.1f}), p = 0.22" in tex
    assert [format_p(p) for p in (1.0, 0.0312, 0.0004)] == ["p = 1", "p = 0.031", "p < 0.001"]


def test_more_seeds_help_with_more_images(plan: Plan, runs: Path) -> None:
    """Each of the two seeds tests 8 images of its own."""
    study = plan.study("launcher_imagenet")
    both = Results(plan, runs).value(study, study.row(ROW), "top1")
    assert both is not None
    images = (both.noise**2 - both.seed_noise**2) ** 0.5
    assert images == pytest.approx(196 * (0.5 * 0.5 / 16) ** 0.5)
    write_run(plan, runs, ROW, 1, "11100001").unlink()
    unknown = Results(plan, runs).value(study, study.row(ROW), "top1")
    assert unknown is not None
    images = (unknown.noise**2 - unknown.seed_noise**2) ** 0.5
    assert images == pytest.approx(196 * (0.5 * 0.5 / 8) ** 0.5)


def test_an_interval_ends_at_0_and_100_percent(plan: Plan, runs: Path) -> None:
    study = plan.study("launcher_imagenet")
    value = Results(plan, runs).value(study, study.row(ROW), "top1_interval")
    assert value is not None
    assert value.interval[0] < 0
    assert value.interval[1] > 100
    assert format_value(value, METRICS["top1_interval"]) == "0.0 to 100.0"


def checked(plan: Plan, root: Path, kind: str, metric: str = "top1") -> Verdict:
    claim = Claim(id="x", says="x", place="x", kind=kind, of=f"launcher_imagenet/{ROW}/{metric}",
                  to=f"launcher_imagenet/{LINEAR}/{metric}")  # fmt: skip
    return check_claim(Sources(Results(plan, root), ()), claim, "hovit")


def test_a_claim_about_two_accuracies_is_checked_by_pairs(plan: Plan, tmp_path: Path) -> None:
    """100 images, 34 against 44 right: the intervals overlap, but all discordant pairs agree."""
    write_run(plan, tmp_path, LINEAR, 0, "1" * 44 + "0" * 56)
    write_run(plan, tmp_path, ROW, 0, "1" * 34 + "0" * 66)
    found = checked(plan, tmp_path, "less")
    assert (found.verdict, found.detail, found.measured) == ("provisional", "reproduced", -10.0)
    assert found.why.endswith(
        "on the same test images, only the first is right for 0 and only the second for 10 "
        "(p = 0.002, exact McNemar test)"
    )
    assert checked(plan, tmp_path, "keeps").detail == "contradicted"
    assert "McNemar" not in checked(plan, tmp_path, "less", "loss").why
    write_run(plan, tmp_path, ROW, 0, "1" * 34 + "0" * 65)  # another set of images
    found = checked(plan, tmp_path, "less")
    assert found.verdict == "within noise"
    assert "McNemar" not in found.why
