"""The Pareto study: rows that cite other studies, one protocol, a front for each data set."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from synthetic import GPU, measure_record

from hovit.config.load import load_config
from hovit.config.plan import Plan, load_plan
from hovit.records.record import write_record
from hovit.report.figures.draw import FIGURES
from hovit.report.figures.pareto import (
    FAMILIES,
    Point,
    accuracy_points,
    family_of,
    pareto_front,
    size_points,
)
from hovit.report.results import Results
from hovit.report.sources import load_sources
from hovit.utils.errors import HovitError


def test_a_cited_row_gives_model_and_runs(plan: Plan) -> None:
    study = plan.study("pareto")
    cited = plan.study("levit_attention")
    row, other = study.row("gated"), cited.row("gated")
    assert (row.model, row.model_args) == (other.model, other.model_args)
    assert plan.runs_of(study, row) == plan.runs_of(cited, other)
    family = plan.study("efficientvit_family")
    assert plan.runs_of(study, study.row("m3")) == plan.runs_of(family, family.row("m3"))
    imagenet = plan.study("efficientvit_imagenet")
    assert plan.runs_of(imagenet, imagenet.row("m3")) == plan.runs_of(family, family.row("m3"))
    assert {family_of(row) for row in study.rows} == set(FAMILIES)
    keys = [(row.model, str(row.model_args)) for row in study.rows]
    assert len(keys) == len(set(keys))  # every system once


def test_it_is_measured_as_a_whole_where_the_scale_judges_latency(plan: Plan) -> None:
    study = plan.study("pareto")
    assert plan.measure_task(study) is None  # smoke
    cited = {task.id for task in plan.tasks([study])}
    assert set(study.cites) <= cited
    proxy = load_plan("proxy", ROOT / "config")
    task = proxy.measure_task(proxy.study("pareto"))
    assert task is not None
    assert len(task.spec["rows"]) == len(study.rows)
    assert task.spec["latency"]["batches"] == [1, 32, 256]
    assert task.spec["rows"]["mobilevit_xxs"]["image_size"] == 256


def test_only_times_of_the_same_protocol_are_cited(tmp_path: Path) -> None:
    plan = load_plan("proxy", ROOT / "config")
    for name in ("hovit", "skipvit", "efficientvit_imagenet"):
        task = plan.measure_task(plan.study(name))
        write_record(tmp_path / task.path, measure_record(plan, name, GPU))
    results, study = Results(plan, tmp_path), plan.study("pareto")
    assert results.value(study, study.row("hovit"), "latency_1")
    assert results.value(study, study.row("hovit"), "throughput")
    for other in ("skipvit_d6_45_r11", "mobilenetv2"):  # training steps; fp16 at batch 2048
        row = study.row(other)
        assert results.value(study, row, "latency_1") is None
        assert results.value(study, row, "throughput") is None
        assert results.value(study, row, "macs")
    own = results.value(study, study.row("hovit"), "latency_1")
    hovit = plan.study("hovit")
    assert own == results.value(hovit, hovit.row("hovit"), "latency_1")


def test_the_front_is_what_no_other_system_beats() -> None:
    def at(x: float, y: float) -> Point:
        return Point(x, y, "", "")

    points = [at(60, 2), at(70, 3), at(65, 4), at(80, 9), at(80, 8), at(50, 2)]
    assert [(p.x, p.y) for p in pareto_front(points, False)] == [(60, 2), (70, 3), (80, 8)]
    assert [(p.x, p.y) for p in pareto_front(points, True)] == [(80, 9)]
    assert pareto_front([], True) == []


def test_unlike_accuracies_are_kept_apart() -> None:
    """From the committed records."""
    sources = load_sources(load_plan("smoke", ROOT / "config"), ROOT)
    study = sources.plan.study("pareto")
    found = sources.timed(study)
    assert {results.base.name for results in found} >= {"nvidia-h200", "amd-epyc"}
    for results in found:
        points = accuracy_points(results, study, "latency_1")
        assert all(p.data for p in points)  # a front joins only points of one data set
        assert {p.reported for p in points} == {True, False}  # each kind has a column of its own


def test_the_legend_names_what_is_drawn() -> None:
    """From the committed records, in which no SkipViT is timed by this protocol."""
    sources = load_sources(load_plan("smoke", ROOT / "config"), ROOT)
    study = sources.plan.study("pareto")
    points = [p for r in sources.timed(study) for p in size_points(r, study, "macs", "latency_1")]
    with FIGURES["pareto"].drawn(sources) as canvas:
        (legend,) = canvas.legends
        named = [text.get_text() for text in legend.get_texts()]
    assert named == [family for family in FAMILIES if family in {p.family for p in points}]
    assert "SkipViT" not in named


def test_a_panel_has_two_points_and_a_key_names_the_front() -> None:
    """From the committed records: only one accuracy has a latency on the H200."""
    sources = load_sources(load_plan("smoke", ROOT / "config"), ROOT)
    study = sources.plan.study("pareto")
    with FIGURES["pareto"].drawn(sources) as canvas:
        shown = [ax for ax in canvas.axes if ax.get_visible()]
        numbers = {text.get_text() for ax in shown for text in ax.texts}
        note = canvas.get_supxlabel()
        titles = [ax.get_xlabel() for ax in shown if ax.get_xlabel()]
    assert len(canvas.axes) > len(shown) > 4
    for ax in shown:
        marks = [line for line in ax.lines if line.get_marker()]
        assert len(marks) > 1
    assert len(titles) == 4
    key = dict(fact.split(": ") for fact in re.findall(r"\d+: [^·\n]*[^·\n ]", note))
    assert numbers <= key.keys()
    assert set(key.values()) <= {row.label for row in study.rows}


@pytest.mark.parametrize(
    ("ref", "why"),
    [("hovit/nothing", "there is no row hovit/nothing"), ("datasets/pets", "must have a model")],
)
def test_a_wrong_citation_is_named(tmp_path: Path, ref: str, why: str) -> None:
    for folder in (ROOT / "config").iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    studies = tmp_path / "studies"
    studies.unlink()
    studies.mkdir()
    for path in (ROOT / "config/studies").glob("*.yaml"):
        (studies / path.name).symlink_to(path)
    study = yaml.safe_load((studies / "pareto.yaml").read_text())
    study["rows"][0]["same_as"] = ref
    (studies / "pareto.yaml").unlink()
    (studies / "pareto.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(HovitError, match=re.escape(why)):
        load_config(tmp_path)
