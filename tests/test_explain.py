"""`hovit explain` and `hovit list`, of made-up records: where a number comes from, what is done."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from hovit.config.plan import Plan, load_plan
from hovit.records.record import read_record
from hovit.report.explain import explain
from hovit.report.listing import (
    count_runs,
    list_analyses,
    list_runs,
    list_studies,
    nearest,
    unknown_name,
)
from hovit.utils.errors import HovitError


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan("mini", ROOT / "config")


def test_explain_leads_to_the_record_and_back(
    plan: Plan, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    text = explain(plan, "hovit", "hovit", "top1")
    run = plan.run("hovit.pets.deck", 1)
    for fact in ("27.47", str(run.folder / "record.json"), run.spec_hash, "commit", "n = 2",
                 f"--force '{run.folder / 'record.json'}' --config scale=mini"):  # fmt: skip
        assert fact in text
    shvit = explain(plan, "efficientvit_imagenet", "m2", "throughput_cpu")
    assert "reported  147 images/s" in shvit
    assert "nothing is measured for it" in shvit
    assert "record" not in shvit.replace("no record yet", "")
    assert "10.50" in explain(plan, "hovit", "levit_deck", "latency_32")
    assert "7,349 images" in explain(plan, "datasets", "pets_rule", "images_train")
    for table, row, column, what in (
        ("nosuch", "hovit", "top1", "no study"),
        ("hovit", "nosuch", "top1", "has no row"),
        ("hovit", "hovit", "nosuch", "no column"),
    ):
        with pytest.raises(HovitError, match=what):
            explain(plan, table, row, column)


def test_explain_gives_no_count_of_this_run_as_committed(
    plan: Plan, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    text = explain(plan, "hovit", "hovit", "macs")
    assert "this run  no record yet" not in text
    assert "committed" not in text
    shutil.copytree(root / "results/runs", root / "results/evidence/some-card")
    text = explain(plan, "hovit", "hovit", "macs")
    assert "mini, some-card" in text


def test_explain_says_of_evidence_what_it_says_of_a_run(
    plan: Plan, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "results/evidence").mkdir()
    (root / "results/runs").rename(root / "results/evidence/some-card")
    monkeypatch.chdir(root)
    smoke = load_plan("smoke", ROOT / "config")
    run = plan.run("hovit.pets.deck", 1)
    made = read_record(root / "results/evidence/some-card/mini" / run.id / "seed1/record.json")
    before, after = explain(smoke, "hovit", "hovit", "top1").split("  committed ")
    assert "no record yet" in before
    for fact in (f"record    results/evidence/some-card/mini/{run.id}/seed1/record.json",
                 f"spec      {run.spec_hash}", f"commit    {made.provenance.commit}",
                 "on Test CPU, 2 threads", "% at 96 px on Tiny-ImageNet-37 (",
                 "n = 2 seeds), mini, some-card",
                 f"--force '{run.folder / 'record.json'}' --config scale=mini"):  # fmt: skip
        assert fact in after
    study = plan.study("hovit")
    timed = explain(smoke, "hovit", "hovit", "latency_32").split("  committed ")[1]
    for fact in (
        " ms at batch 32, 224 px (",
        "n = 30 rounds",
        "interleaved over",
        f"{plan.measure_task(study).path}' --config scale=",
    ):
        assert fact in timed
    (root / "results/evidence/some-card/mini" / run.id / "seed0/record.json").unlink()
    alone = explain(smoke, "hovit", "hovit", "top1").split("  committed ")[1]
    assert "(n = 1 seed)" in alone
    assert "seed0" not in alone


def test_explain_says_why_nothing_is_run(
    plan: Plan, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    backbones = explain(plan, "backbones", "swin_t", "top1")
    assert "hovit evaluate backbones IMAGENET --weights FOLDER" in backbones
    assert "at scale mini: no images for coco" in explain(
        plan, "efficientvit_detection", "m4", "ap"
    )
    counted = explain(plan, "efficientvit_family", "m0", "macs")
    assert "this run  2 G multiply-adds at 224 px, 1000 classes\n" in counted
    assert "interleaved" not in counted
    assert "n =" not in counted


def test_explain_traces_an_analysis(
    plan: Plan, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    path = plan.analyse_task(plan.analysis("head_similarity")).path
    evidence = Path("results/evidence/some-card") / path.relative_to("results/runs")
    evidence.parent.mkdir(parents=True)
    shutil.copy(path, evidence)
    text = explain(plan, "head_similarity")
    for fact in (f"record    {path}", "this run  4 rows", "commit", "Test CPU",
                 f"--force '{path}' --config scale=mini", f"record    {evidence}"):  # fmt: skip
        assert fact in text
    assert "this run  60\n" in explain(plan, "head_similarity", "mhsa_share/swin_50", "mean")
    assert "this run  no record yet" in explain(
        load_plan("smoke", ROOT / "config"), "head_similarity"
    )
    for row, column, what in (
        ("nosuch", "mean", "head_similarity has no row 'nosuch'; it has mhsa_share/swin_50"),
        ("mhsa_share/swin_50", "nosuch", "has no number 'nosuch'; it has mean"),
    ):
        with pytest.raises(HovitError, match=what):
            explain(plan, "head_similarity", row, column)
    with pytest.raises(HovitError, match="name both a row and a column: `hovit explain hovit"):
        explain(plan, "hovit", "hovit")


def test_the_list_tells_runs_done_here_from_evidence(plan: Plan, root: Path) -> None:
    run = plan.run("hovit.pets.deck", 1)
    (root / run.folder / "record.json").unlink()
    first = plan.run("levit_256.pets.deck", 0).folder.relative_to("results/runs")
    elsewhere = root / "results/evidence/some-card" / first
    shutil.copytree(root / "results/runs" / first, elsewhere)
    lines = {line.split()[0]: line.split()[1:3] for line in list_runs(plan, root).splitlines()}
    assert lines["hovit.pets.deck"] == ["1/2", "0/2"]
    assert lines["levit_256.pets.deck"] == ["2/2", "1/2"]
    assert lines["resnet50.pretrain.pretrain"] == ["1/1", "0/1"]


def test_the_list_names_studies_and_analyses(plan: Plan) -> None:
    assert list_analyses(plan).splitlines()[:2] == [
        f"analyses ({len(plan.config.analyses)})",
        "  attention_maps       6 rows  Attention map of the middle token for each attention form",
    ]
    bare = Plan(plan.config.model_copy(update={"analyses": {}}), plan.scale)
    assert list_analyses(bare) == "analyses (0)"
    lines = list_studies(plan).splitlines()
    assert lines[0] == f"studies ({len(lines) - 1})" == f"studies ({len(plan.config.studies)})"


def test_the_list_is_short_and_an_unknown_name_has_neighbours(plan: Plan) -> None:
    assert count_runs(plan).startswith(f"runs at scale mini: {len(plan.runs)} (`hovit list --runs`")
    assert "\n" not in count_runs(plan)
    message = str(unknown_name(plan, "hovit_cifar"))
    assert message.startswith("no study, analysis or run 'hovit_cifar' at scale mini; nearest: ")
    assert "studies hovit_cifar100, hovit, " in message
    assert "runs hovit.cifar100.deck_100, " in message
    assert "analyses " in message
    assert nearest("SKIP", ["swin", "skipvit"], 1) == ["skipvit"]
