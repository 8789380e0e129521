"""Verdicts: what they mean, that they are fair, and where they come from."""

import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import ROOT
from pydantic import ValidationError
from scipy import stats
from synthetic import GPU, made_up_predictions, measure_record, train_record

from hovit.config.plan import Plan, load_plan
from hovit.config.schema import Claim
from hovit.records.predictions import write_predictions
from hovit.records.record import write_record
from hovit.report.claims.check import (
    ERRATA,
    VERDICTS,
    Verdict,
    check_all,
    check_claim,
    counts,
    tally,
)
from hovit.report.claims.compare import _compare_reported, _compare_two
from hovit.report.claims.write import write_claims
from hovit.report.noise import pooled_variance, seed_noise, student
from hovit.report.number import minus, significant
from hovit.report.order import PAPERS, in_order, paper_of
from hovit.report.results import Results
from hovit.report.sources import Sources, load_sources

CONFIG = ROOT / "config"
STRENGTH = {"within noise": 0, "provisional": 1, "reproduced": 2, "contradicted": 2}


def claim(**keys: object) -> Claim:
    return Claim.model_validate({"id": "x", "says": "x", "place": "x"} | keys)


# Noise --------------------------------------------------------------------------------------------


def test_student_is_that_of_scipy() -> None:
    for freedom in [*range(1, 40), 100, 1000]:
        assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=0.004)


def test_pooled_variance() -> None:
    assert pooled_variance([[1.0], [5.0]]) == (0.0, 0)
    assert pooled_variance([[1.0, 3.0], [5.0, 6.0, 7.0], [9.0], []]) == (pytest.approx(4 / 3), 3)
    assert seed_noise(0.0, 0, 1) == 0.0


def test_more_seeds_never_weaken_a_verdict() -> None:
    """Property: with the same means and the same spread, a verdict only grows stronger with n."""
    generator = random.Random(0)
    greater = claim(kind="greater", of="hovit/hovit/top1", to="hovit/levit_deck/top1")
    grew = 0
    for _ in range(300):
        spread, gap = generator.uniform(0.1, 5), generator.uniform(-20, 20)
        over_images = generator.uniform(0, 5)
        others = [[spread, -spread]] * generator.randint(1, 4)  # the other rows of the study
        strengths = []
        for n in range(1, 9):
            width = spread * 2**0.5 if n > 1 else 0.0  # the sample standard deviation stays
            pattern = [i - (n - 1) / 2 for i in range(n)]
            norm = (sum(x * x for x in pattern) / max(n - 1, 1)) ** 0.5 or 1.0
            row = [width * x / norm for x in pattern]
            variance, freedom = pooled_variance([row, row, *others])
            noise = (2 * seed_noise(variance, freedom, n) ** 2 + over_images**2) ** 0.5
            verdict, _ = _compare_two(greater, gap, noise, f"n = {n}")
            strong = verdict != "within noise"
            strengths.append(STRENGTH["provisional" if strong and n == 1 else verdict])
        assert strengths == sorted(strengths), (spread, gap, strengths)
        grew += strengths[0] < strengths[-1]
    assert grew > 50


def runs(plan: Plan, root: Path, row_id: str, top1: list[float], same_images: bool = True) -> None:
    """Records of a row of the study `hovit`, one for each random seed."""
    study = plan.study("hovit")
    for run, percent in zip(plan.runs_of(study, study.row(row_id)), top1, strict=False):
        write_record(root / run.folder / "record.json", train_record(run, percent))
        predictions = made_up_predictions(percent)
        if not same_images:
            predictions["index"] += 1000
        write_predictions(root / run.folder / "predictions.csv.gz", predictions)


def accuracy(plan: Plan, root: Path) -> Verdict:
    greater = claim(kind="greater", of="hovit/hovit/top1", to="hovit/levit_deck/top1")
    return check_claim(Sources(Results(plan, root), ()), greater, "hovit")


def test_one_seed_is_provisional_and_another_one_settles_it(tmp_path: Path) -> None:
    """The fault that this rules out: +7.8 points with n = 1 `reproduced`, with n = 2 `noise`."""
    plan = load_plan("proxy", CONFIG)
    for row, base in (("levit_deck_fixed", 30.0), ("levit_256", 40.0)):
        runs(plan, tmp_path, row, [base - 1, base, base + 1])
    labels = []
    for n in (1, 2, 3):
        runs(plan, tmp_path, "hovit", [27.5, 28.5, 28.0][:n])
        runs(plan, tmp_path, "levit_deck", [20.5, 19.5, 20.0][:n])
        found = accuracy(plan, tmp_path)
        labels.append(found.label)
        assert f"{n} random seed" in found.why
    assert labels == ["provisional (one seed): reproduced", "reproduced", "reproduced"]


def test_models_are_paired_by_test_image_where_both_saw_the_same(tmp_path: Path) -> None:
    """Made-up models fail on the same images, so a pair differs on few: 3.5 points are no noise."""
    plan = load_plan("proxy", CONFIG)
    noise = {}
    for same in (True, False):
        runs(plan, tmp_path, "hovit", [33.5, 33.5, 33.5])
        runs(plan, tmp_path, "levit_deck", [30.0, 30.0, 30.0], same_images=same)
        found = accuracy(plan, tmp_path)
        noise[same] = float(re.findall(r"up to ([\d.]+) points", found.why)[0])
        assert found.verdict == ("reproduced" if same else "within noise")
    assert noise[True] < 3 < noise[False]


# Verdicts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reported", "number", "verdict", "detail"),
    [
        ("ratio", "1.10", 1.12, "reproduced", ""),
        ("ratio", "1.10", 1.30, "direction only", "larger"),
        ("ratio", "12.3", 9.7, "direction only", "smaller"),
        ("ratio", "1.45", 0.61, "contradicted", ""),
        ("ratio", "1.45", 1.02, "within noise", ""),  # neither faster nor slower
        ("ratio", "0.50", 0.30, "direction only", "larger"),
        ("ratio", "0.50", 0.90, "direction only", "smaller"),
        ("ratio", "1.0", 1.5, "contradicted", ""),  # the claim is that both are equal
        ("reduction", "44.57", 53.0, "direction only", "larger"),
        ("reduction", "44.57", -3.0, "contradicted", ""),
        ("difference", "-1.78", -4.0, "direction only", "larger"),
        ("difference", "-1.78", 4.0, "contradicted", ""),
    ],
)
def test_contradicted_is_for_the_opposite_direction(
    kind: str, reported: str, number: float, verdict: str, detail: str
) -> None:
    metric = "top1" if kind == "difference" else "latency_32"
    refs = {"of": f"hovit/hovit/{metric}", "to": f"hovit/levit_deck/{metric}"}
    made = claim(kind=kind, reported=reported, tolerance=0.04, **refs)
    found = _compare_reported(made, number, 0.03)
    assert (found[0], found[2]) == (verdict, detail)


def test_an_exact_number_is_contradicted_by_another_one() -> None:
    refs = {"of": "hovit/hovit/parameters", "to": "hovit/levit_deck/parameters"}
    exact = claim(kind="reduction", reported="68.62", **refs)
    assert _compare_reported(exact, 60.71, 0.0)[0] == "contradicted"
    errata = claim(kind="reduction", reported="68.62", tolerance=0.005, group="errata", **refs)
    assert _compare_reported(errata, 68.6149, 0.0)[0] == "erratum"
    assert _compare_reported(errata, 68.6151, 0.0)[0] == "consistent"
    with pytest.raises(ValidationError, match="for printed numbers and exact counts"):
        claim(kind="ratio", reported="1.1", group="errata", of="a/b/top1", to="a/c/top1")


@pytest.fixture(scope="module")
def committed() -> Sequence[Verdict]:
    """The verdicts of the committed results alone."""
    return check_all(load_sources(load_plan("smoke", CONFIG), ROOT))


def test_claims_checks_and_errata_are_counted_apart(committed: Sequence[Verdict]) -> None:
    groups = {group: counts(committed, group) for group in ("paper", "own", "errata")}
    assert sum(sum(each.values()) for each in groups.values()) == len(committed)
    assert all(number > 5 for number in (sum(each.values()) for each in groups.values()))
    assert groups["errata"]["erratum"] >= 5
    for verdict in committed:
        allowed = (*ERRATA, "not measured") if verdict.group == "errata" else VERDICTS
        assert verdict.verdict in allowed, verdict.id
        own = "added here:" in verdict.place or "ours:" in verdict.place
        assert own == (verdict.group == "own"), verdict.id
    cells = [v.id for v in committed if v.group == "errata"]
    assert len(cells) == len(set(cells))
    assert tally(committed).count(";") == 2


def test_every_verdict_says_where_it_comes_from(committed: Sequence[Verdict]) -> None:
    for verdict in committed:
        if verdict.verdict == "not measured":
            assert (verdict.source, verdict.records) == ("", ()), verdict.id
            assert verdict.why, verdict.id
            # "Scale smoke does not check ..." is no reason where committed results decide.
            general = "does not check" in verdict.why
            assert not general or verdict.why.startswith("no committed results"), verdict.id
        else:
            start = ("counted", "computed", "this run (", "committed results (scale ")
            assert verdict.source.startswith(start), verdict.id
    sources = {verdict.id: verdict.source for verdict in committed}
    assert sources["hovit-faster"] == "committed results (scale proxy, NVIDIA H200)"
    assert sources["hovit-printed-gain"] == "computed from printed numbers"


def test_no_single_seed_decides_and_no_stand_in_contradicts(committed: Sequence[Verdict]) -> None:
    decided = ("reproduced", "direction only", "contradicted")
    for verdict in committed:
        if "(1 random seed)" in verdict.why:
            assert verdict.verdict not in decided, verdict.id
    by_id = {verdict.id: verdict for verdict in committed}
    assert by_id["head-splits-swin"].verdict == "not comparable"
    assert by_id["skipvit-gain-d6-55-r11"].label == "direction only (larger)"
    assert by_id["efficientvit-m5-swin-tiny-cpu"].label == "direction only (smaller)"


def test_counts_of_this_run_come_first(tmp_path: Path) -> None:
    plan = load_plan("smoke", CONFIG)
    task = plan.measure_task(plan.study("hovit"))
    write_record(tmp_path / task.path, measure_record(plan, "hovit"))
    elsewhere = load_plan("proxy", CONFIG)
    path = tmp_path / "results/evidence/test-gpu/proxy/measure/hovit.json"
    write_record(path, measure_record(elsewhere, "hovit", GPU))
    found = {v.id: v for v in check_all(load_sources(plan, tmp_path))}
    assert found["parameters-hovit"].source == "counted now"
    assert found["hovit-faster"].source.startswith("committed results (scale proxy, Test GPU")


# claims.md ----------------------------------------------------------------------------------------


def test_claims_are_listed_by_paper_and_study(tmp_path: Path) -> None:
    plan = load_plan("smoke", CONFIG)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/evidence").symlink_to(ROOT / "results/evidence")
    write_claims(plan, tmp_path)
    text = (tmp_path / "results/claims.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings[0].startswith("HoViT")
    assert headings.index("Errata: HoViT (slides)") > headings.index("EfficientViT (paper)")
    for file in plan.config.claims.values():
        for each in file.claims:
            assert text.count(f"`{each.id}`: {each.says}") == 1
    assert "### HoViT ([`hovit`](tables/hovit.md))" in text
    assert re.search(r"Measured 2\.\d+ against 5\.\d+ ms\. Committed results", text)
    assert re.search(r"Reported 44\.57 %, measured 44\.20 ± [\d.]+ % \(30 rounds\)", text)


def test_studies_are_ordered_by_paper_and_story() -> None:
    studies = in_order(load_plan("smoke", CONFIG).config.studies.values())
    papers = [paper_of(study) for study in studies]
    assert papers == sorted(papers, key=list(PAPERS).index)
    assert studies[0].id == "hovit"
    new = studies[0].model_copy(update={"id": "zz_new"})
    ids = [study.id for study in in_order([*studies, new])]
    assert ids[ids.index("zz_new") + 1] == "skipvit"  # a new study follows those of its paper


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0"), (9.996, "10.0"), (0.01842, "0.0184"), (131253.4, "131,000"), (-2.3926, "-2.39"),
     (999.6, "1,000"), (20.44, "20.4")],
)  # fmt: skip
def test_three_significant_digits(number: float, text: str) -> None:
    assert significant(number) == text


def test_negative_numbers_have_a_minus_sign() -> None:
    assert minus("-4.1 (-9.5 to 1.3), p = 0.032") == "−4.1 (−9.5 to 1.3), p = 0.032"
    for text in ("2012-2014", "1e-05", "ViT-16", "0.5-0.7"):
        assert minus(text) == text
