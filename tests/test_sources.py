"""Columns take evidence from one source where they can; ratios, claims and figures always do."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from synthetic import GPU, measure_record, train_record, write_all

from hovit.config.metrics import METRICS, Quantity, quantity
from hovit.config.plan import Plan, load_plan
from hovit.records.record import write_record
from hovit.report.claims.check import check_all
from hovit.report.figures.draw import FIGURES
from hovit.report.sources import Sources, load_sources
from hovit.report.tables.columns import NOTHING, Table, make_table
from hovit.report.tables.write import write_table

CPU_EVIDENCE, GPU_EVIDENCE = "results/evidence/test-cpu", "results/evidence/test-gpu"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evidence of scale mini on a CPU; of scale proxy on a GPU, HoViT's runs and latencies only."""
    root = tmp_path_factory.mktemp("artifact")
    write_all(load_plan("mini", ROOT / "config"), root, CPU_EVIDENCE)
    proxy = load_plan("proxy", ROOT / "config")
    study = proxy.study("hovit")
    for row in ("hovit", "l_hovit"):
        for run in proxy.runs_of(study, study.row(row)):
            record = train_record(run, 77.0)
            place = root / GPU_EVIDENCE / proxy.train_task(run).path.relative_to("results/runs")
            write_record(place, record)
    (smaller,) = (root / CPU_EVIDENCE).glob("mini/l_hovit.pets.deck")
    shutil.rmtree(smaller)
    task = proxy.measure_task(study)
    assert task is not None
    place = root / GPU_EVIDENCE / task.path.relative_to("results/runs")
    write_record(place, measure_record(proxy, "hovit", GPU))
    return root


@pytest.fixture
def plan() -> Plan:
    return load_plan("smoke", ROOT / "config")


@pytest.fixture
def sources(plan: Plan, root: Path) -> Sources:
    return load_sources(plan, root)


@pytest.fixture
def table(sources: Sources) -> Table:
    return make_table(sources.plan.study("hovit"), sources)


def test_accuracies_come_from_one_source_and_others_have_a_mark(table: Table) -> None:
    (top1,) = [c for c in table.columns if c.kind == "evidence" and str(c.number) == "top1"]
    marks = {row.id: top1.mark(i) for i, row in enumerate(table.study.rows)}
    assert [results.name for results in table.evidence.values()] == [
        "proxy, test-gpu",
        "mini, test-cpu",
    ]
    assert marks.pop("l_hovit") == "a"  # the only source that has it
    assert set(marks.values()) == {"b"}  # although the other one has `hovit`, too
    assert NOTHING not in top1.cells


def test_times_stand_by_device_and_ratios_come_from_one(table: Table) -> None:
    timed = [c for c in table.columns if c.kind == "evidence" and c.number.metric.name == "latency"]
    for column in timed:
        (name,) = {results.name for results in column.results if results}
        letter = next(key for key, each in table.evidence.items() if each.name == name)
        assert column.source.startswith(f"evidence {letter}, batch ")
        assert not column.marks
    assert {c.source.split(",")[0] for c in timed} == {"evidence a", "evidence b"}


def test_markdown_csv_and_latex_say_where_a_cell_comes_from(
    plan: Plan, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results/evidence").symlink_to(root / "results/evidence")
    write_table(plan, plan.study("hovit"), tmp_path)
    stem = tmp_path / "results/tables/hovit"
    text = stem.with_suffix(".md").read_text()
    title = load_plan("proxy", ROOT / "config").scale.title
    assert (
        f"- **Committed results a**: `results/evidence/test-gpu/proxy`\n  - Scale: `proxy`: {title}"
        in text
    )
    assert r"\textsuperscript{b}" in stem.with_suffix(".tex").read_text()
    header, *lines = stem.with_suffix(".csv").read_text().splitlines()
    assert "evidence_top1_from" in header
    assert "evidence_test-gpu_latency_1" in header
    assert "evidence_test-cpu_latency_1" in header
    assert f"{GPU_EVIDENCE}/proxy" in next(line for line in lines if line.startswith("hovit,"))


def test_a_claim_never_mixes_devices(sources: Sources) -> None:
    places = {v.id: {Path(p).parts[2] for p in v.records} for v in check_all(sources)}
    assert all(len(found) <= 1 for found in places.values())
    assert {"test-cpu"} in places.values()
    assert {"test-gpu"} in places.values()


def test_a_figure_takes_the_source_that_has_most_of_it(sources: Sources) -> None:
    assert FIGURES["five_ideas"].results(sources).name == "mini, test-cpu"


def test_a_changed_row_loses_its_own_evidence_alone(plan: Plan, root: Path) -> None:
    """Only what it is counts: its size may change how it is counted, its label may not."""
    study = plan.study("hovit")
    rows = [
        row.model_copy(
            update={"model_args": {"drop_rate": 0.5}} if row.id == "hovit" else {"label": "Other"}
        )
        for row in study.rows
    ]
    studies = plan.config.studies | {"hovit": study.model_copy(update={"rows": tuple(rows)})}
    changed = Plan(plan.config.model_copy(update={"studies": studies}), plan.scale)
    found = load_sources(changed, root).evidence[0].measured_rows(changed.study("hovit"))
    assert found.keys() == {row.id for row in rows if row.id != "hovit"}


@pytest.mark.parametrize("text", ["top1", "latency_32", "reported_latency", "reported_top1"])
def test_a_quantity_and_its_text(text: str) -> None:
    found = quantity(text)
    assert found is not None
    assert str(found) == text


@pytest.mark.parametrize("text", ["", "latency_0", "latency_x", "top2", "top1_32", "reported_"])
def test_other_texts_are_no_quantity(text: str) -> None:
    assert quantity(text) is None


def test_each_metric_is_a_quantity_of_one_kind() -> None:
    for metric in METRICS.values():
        number = Quantity(metric)
        assert number.is_inexact == (metric.kind in ("trained", "timed"))
        assert sum((number.is_trained, number.is_timed, number.is_counted)) <= 1
