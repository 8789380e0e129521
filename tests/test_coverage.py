"""Claims cover the statements of the papers, and the others are listed with a reason.

Where the papers' texts lie beside the artifact (or HOVIT_SEEDS names their folder), every number of
theirs must stand in config.
"""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from pydantic import ValidationError
from synthetic import CPU, GPU, measure_record, write_all

from hovit.config.metrics import quantity
from hovit.config.plan import Plan, load_plan
from hovit.config.schema import Claim, NotChecked, split_ref
from hovit.records.record import Device, write_record
from hovit.report.claims.check import check_claim
from hovit.report.claims.coverage import REASONS, coverage, coverage_lines, coverage_tally
from hovit.report.claims.write import write_claims
from hovit.report.paper.variables import origin
from hovit.report.results import Results
from hovit.report.sources import Sources, load_sources
from hovit.report.tables.write import describe

PLAN = load_plan("mini", ROOT / "config")
CLAIMS = {claim.id: claim for file in PLAN.config.claims.values() for claim in file.claims}
ENTRIES = [e for file in PLAN.config.claims.values() for e in file.not_checkable]
# Where a paper says what its own table does not.
AGAINST_ITSELF = {
    "skipvit-return-10-faster",  # the sentence has layers 10 and 11 the wrong way round
    "skipvit-return-11-faster",  # 2.99 is a difference of two gains, not a gain
    "levit-gla-no-faster",  # 14.13 ms against 16.29 ms
    "levit-focused-no-gain-from-scratch",  # 11.97 % against 2.81 %
    "levit-gated-no-gain-from-scratch",  # 6.26 % against 2.81 %
}
TEXTS = Path(os.environ.get("HOVIT_SEEDS", ROOT.parent / "shared/seeds"))
FILES = dict(zip(("hovit", "skipvit", "efficientvit"), sorted(TEXTS.glob("*.txt")), strict=False))
with_texts = pytest.mark.skipif(len(FILES) < 3, reason="the papers' texts are not here")


# What a claim says, against the cells -------------------------------------------------------------


def printed(ref: str) -> str | None:
    """What the paper printed for what a claim points at."""
    analysis, study, row, metric = split_ref(ref)
    if analysis:
        return None
    metric = metric.removeprefix("reported_")
    metric = re.sub(r"_\d+$", "", metric)  # of latency_32: the deck names no batch
    return PLAN.study(study).row(row).reported.get(metric)  # type: ignore[call-overload]


def unit(number: str) -> float:
    return 10.0 ** -len(number.partition(".")[2])


def both(claim: Claim) -> tuple[float, float] | None:
    """The paper's two numbers of a claim that compares, if it printed both, of that device."""
    found = [printed(claim.of), printed(claim.to or claim.of)]
    if None in found or claim.to is None or claim.device == "cpu":  # V100's stand in the cells
        return None
    return float(str(found[0])), float(str(found[1]))


def agrees(claim: Claim) -> bool:
    """Whether the paper's own two numbers say what the claim says that it says."""
    a, b = both(claim) or (0.0, 0.0)
    if claim.reported is None:
        lost = b - a - (claim.tolerance or 0.0)
        return {"less": a < b, "greater": a > b, "keeps": lost <= 1e-9}[claim.kind]
    own = {"ratio": a / b, "reduction": 100 * (1 - a / b), "difference": a - b}[claim.kind]
    return abs(own - float(claim.reported)) <= 2 * unit(claim.reported)


@pytest.mark.parametrize(
    "claim", [c for c in CLAIMS.values() if c.kind == "value"], ids=lambda c: c.id
)
def test_a_value_is_the_cells(claim: Claim) -> None:
    assert claim.reported == printed(claim.of)


@pytest.mark.parametrize("claim", [c for c in CLAIMS.values() if both(c)], ids=lambda c: c.id)
def test_the_papers_own_numbers_say_what_the_claim_says(claim: Claim) -> None:
    assert agrees(claim) != (claim.id in AGAINST_ITSELF)


def test_most_comparisons_have_cells() -> None:
    assert {c.id for c in CLAIMS.values() if both(c)} >= AGAINST_ITSELF
    assert sum(both(c) is not None for c in CLAIMS.values()) > 90


@pytest.mark.parametrize("claim", [c for c in CLAIMS.values() if c.reported], ids=lambda c: c.id)
def test_a_tolerance_can_fail(claim: Claim) -> None:
    """No gain meets a claim of a gain, and no accuracy meets every number."""
    tolerance, reported = claim.tolerance or 0.0, float(str(claim.reported).partition("–")[0])
    if claim.kind == "ratio" and reported != 1:
        assert tolerance < abs(reported - 1)
    elif claim.kind == "reduction":
        assert tolerance < reported
    else:
        assert tolerance <= 5


def test_times_of_another_device_are_compared_by_ratio_or_rank_alone() -> None:
    made = {"id": "t", "says": "s", "place": "p", "of": "a/b/throughput", "reported": "3"}
    for kind in ({"kind": "value"}, {"kind": "difference", "to": "a/c/throughput"}):
        with pytest.raises(ValidationError, match="compare a time by ratio or rank only"):
            Claim(**made | kind)
    keeps = {"kind": "keeps", "to": "a/c/throughput", "reported": None, "tolerance": 3}
    with pytest.raises(ValidationError, match="compare a time by ratio or rank only"):
        Claim(**made | keeps)
    with pytest.raises(ValidationError, match="belongs to claims about times"):
        Claim(**made | {"kind": "value", "of": "a/b/top1", "device": "cpu"})


# Verdicts -----------------------------------------------------------------------------------------


def checked(plan: Plan, root: Path, claim_id: str):
    return check_claim(Sources(Results(plan, root), ()), CLAIMS[claim_id], "paper")


def test_a_sentence_that_names_its_device_is_checked_there_alone(tmp_path: Path) -> None:
    path = tmp_path / PLAN.measure_task(PLAN.study("efficientvit_imagenet")).path
    name = "efficientvit-m5-efficientnet-b0"
    for device, here, other in ((CPU, "cpu", "gpu"), (GPU, "gpu", "cpu")):
        write_record(path, measure_record(PLAN, "efficientvit_imagenet", device))
        assert checked(PLAN, tmp_path, f"{name}-{here}").verdict != "not measured"
        elsewhere = checked(PLAN, tmp_path, f"{name}-{other}")
        assert elsewhere.verdict == "not measured"
        assert elsewhere.why.startswith(
            f"timed on {device}, but the claim is about a {other.upper()}"
        )


def test_a_verdict_names_what_other_devices_give(tmp_path: Path) -> None:
    proxy = load_plan("proxy", ROOT / "config")
    sources = []
    for plan, device, ms in ((proxy, GPU, {"swin_t": 2.0}), (PLAN, CPU, {"regnety_4g": 2.0})):
        record = measure_record(plan, "backbones", device)
        rows = {
            name: row | {"latency": {size: times_of(ms.get(name, 1.0)) for size in row["latency"]}}
            for name, row in record.results["rows"].items()
        }
        root = tmp_path / device.kind
        write_record(
            root / plan.measure_task(plan.study("backbones")).path,
            record.model_copy(update={"results": record.results | {"rows": rows}}),
        )
        sources.append(Results(plan, root))
    claim = CLAIMS["swin-t-slower-than-regnet"]
    both = check_claim(Sources(sources[0], (sources[1],)), claim, "hovit")
    assert both.verdict == "reproduced"
    assert both.is_disputed
    assert [label for _, label in both.others] == ["contradicted"]
    assert both.why.endswith(": contradicted")
    assert f"{CPU.name}" in both.why
    alone = check_claim(Sources(sources[0], ()), claim, "hovit")
    assert not alone.is_disputed
    assert not alone.others


def times_of(ms: float) -> dict[str, Any]:
    return {"median": ms, "q1": ms, "q3": ms, "n": 3, "ms": [ms] * 3}


@pytest.mark.parametrize(
    ("device", "batch", "said"), [(CPU, 16, "fp32, TF32 off"), (GPU, 2048, "fp16 autocast")]
)
def test_a_throughput_says_how_its_kind_of_device_was_timed(
    tmp_path: Path, device: Device, batch: int, said: str
) -> None:
    study = PLAN.study("efficientvit_imagenet")
    write_record(tmp_path / PLAN.measure_task(study).path, measure_record(PLAN, study.id, device))
    results = Results(PLAN, tmp_path)
    first = results.value(study, study.rows[0], "throughput")
    assert first is not None
    assert first.mean == pytest.approx(batch * 1e3 / 10)
    number = quantity("throughput")
    assert number is not None
    found = origin(results, study, study.rows[0], number, first)
    assert found.field == f"results.rows.m0.latency.{batch}.median"
    lines = describe(results, study)
    assert f"images/s at batch {batch}, {said}, eager" in lines["Latency"]


def test_a_value_is_held_against_the_papers_in_the_headings_unit(tmp_path: Path) -> None:
    record = measure_record(PLAN, "efficientvit_family")
    record.results["rows"]["m0"] |= {"parameters": 2_349_436, "macs": 90_000_000}
    write_record(tmp_path / PLAN.measure_task(PLAN.study("efficientvit_family")).path, record)
    found = checked(PLAN, tmp_path, "efficientvit-m0-parameters")
    assert (found.verdict, found.measured) == ("reproduced", pytest.approx(2.349436))
    assert checked(PLAN, tmp_path, "efficientvit-m0-macs").verdict == "contradicted"


def test_a_difference_is_in_points(tmp_path: Path) -> None:
    claim = CLAIMS["skipvit-warmup-gain"].model_copy(
        update={"of": "hovit/hovit/reported_top1", "to": "hovit/levit_deck/reported_top1",
                "reported": "24.66", "tolerance": None}
    )  # fmt: skip
    found = check_claim(Sources(Results(PLAN, tmp_path), ()), claim, "hovit")
    assert (found.verdict, found.measured) == ("reproduced", pytest.approx(27.47 - 2.81))
    missed = check_claim(
        Sources(Results(PLAN, tmp_path), ()), claim.model_copy(update={"reported": "25"}), "hovit"
    )
    assert missed.verdict == "contradicted"  # both are printed, so exact


def test_a_verdict_names_the_models_that_stand_in(tmp_path: Path) -> None:
    write_record(
        tmp_path / PLAN.measure_task(PLAN.study("skipvit")).path, measure_record(PLAN, "skipvit")
    )
    said = "skipvit_tiny_patch16_224 stands in for skipvit_small_patch16_224"
    assert said in checked(PLAN, tmp_path, "skipvit-fewer-macs").why
    assert said not in checked(PLAN, tmp_path, "skipvit-printed-gain-fused").why


# What is no claim ---------------------------------------------------------------------------------


def test_every_reason_is_explained_and_every_entry_says_something_else() -> None:
    assert set(REASONS) == set(NotChecked.model_fields["reason"].annotation.__args__)
    assert {entry.reason for entry in ENTRIES} == set(REASONS)
    assert len({entry.says for entry in ENTRIES}) == len(ENTRIES)
    assert {file.paper for file in PLAN.config.claims.values() if file.not_checkable} == {
        file.paper for file in PLAN.config.claims.values()
    }


def test_what_an_entry_points_at_is_there() -> None:
    paths = [
        path for e in ENTRIES for path in re.findall(r"\b(?:src|tests|config)/[\w/.]+\w", e.why)
    ]
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]
    named = re.findall(r"\((-?[a-z0-9]+-[a-z0-9-]+)", " ".join(e.why for e in ENTRIES))
    assert len(named) > 4
    assert not [name for name in named if not any(i.startswith(name) for i in CLAIMS)]


def test_cells_are_counted_and_counts_are_compared(tmp_path: Path) -> None:
    write_all(PLAN, tmp_path)
    record = measure_record(PLAN, "hovit")
    record.results["rows"]["hovit"]["parameters"] = 4_937_962
    write_record(tmp_path / PLAN.measure_task(PLAN.study("hovit")).path, record)
    rest = coverage(load_sources(PLAN, tmp_path))
    cells = {cell["cell"]: cell for cell in rest["cells"]}
    assert len(cells) == sum(
        len(row.reported) for study in PLAN.config.studies.values() for row in study.rows
    )
    assert cells["hovit/hovit/parameters"]["same"] is True
    assert cells["hovit/l_hovit/parameters"]["same"] is False
    assert cells["backbones/swin_t/parameters_m"]["counted"] == pytest.approx(0.001013)
    assert cells["hovit/hovit/top1"]["same"] is None  # claims compare what is trained
    assert cells["dropout/levit_deck/parameters"]["same"] is None  # no claim looks at it
    assert f"{len(ENTRIES)} not checkable" in coverage_tally(rest)
    text = "\n".join(coverage_lines(rest, ["skipvit", "hovit", "hovit"]))
    assert re.search(r"^\| hovit \| 2 \| \d{3} \| \d\d \|$", text, re.M)
    assert "| `hovit/l_hovit/parameters` | 47,723,133 |" in text
    assert "`conv_stage/l_conv1/part_parameters`" not in text  # among the errata
    assert "`hovit/hovit/parameters`" not in text
    assert all(entry.says in text and entry.why in text for entry in ENTRIES)


def test_the_tally_ends_with_what_is_not_checkable(tmp_path: Path) -> None:
    first, second = write_claims(PLAN, tmp_path).splitlines()
    assert first.endswith(" not measured")
    assert second == coverage_tally(coverage(load_sources(PLAN, tmp_path)))


# The papers' own texts ----------------------------------------------------------------------------

NUMBER = re.compile(r"\d+(?:,\d{3})+(?:\.\d+)?|\d+[.,]\d+|\d+")
NO_STATEMENT = (
    r"(?m)^- \[\d\].*$",  # the list of references
    r"\[\d+(?:,\s?\d+)?\](?=[\t ,.])",  # references
    r"\b\d{1,2}-\d{1,2}\t",  # a model summary's numbering of its layers
    r"(?m)^\d+ Min Read$",
    r"two,048",  # a machine's translation of 2,048
)


def numbers(text: str) -> set[float]:
    """Its numbers; a comma before three digits sets thousands apart, another is a decimal point."""
    found = set()
    text = re.sub(r"\b(\d),(\d)(?=\()", r"\1 \2", text)  # two layers of a schedule: 4,7(30%,30%)
    for each in NUMBER.findall(text):
        thousands = re.fullmatch(r"\d+(,\d{3})+(\.\d+)?", each)
        found.add(float(each.replace(",", "" if thousands else ".")))
    return found


def text_of(paper: str) -> str:
    text = FILES[paper].read_text(encoding="utf-8")
    for pattern in NO_STATEMENT:
        text = re.sub(pattern, "", text)
    return text


def reported(paper: str) -> set[float]:
    """What the tables of a paper have as reported."""
    studies = [s for s in PLAN.config.studies.values() if s.source.paper == paper]
    return numbers(" ".join(n for s in studies for row in s.rows for n in row.reported.values()))


def told(paper: str) -> set[float]:
    """The numbers that config has of a paper, without the cells of tables."""
    files = [file for file in PLAN.config.claims.values() if file.paper == paper]
    parts = [(c.says, c.place, c.reported or "", c.note) for f in files for c in f.claims]
    parts += [(e.says, e.place, e.why, "") for f in files for e in f.not_checkable]
    rows = [r for s in PLAN.config.studies.values() if s.source.paper == paper for r in s.rows]
    return numbers(" ".join([*(each for part in parts for each in part), *(r.label for r in rows)]))


@with_texts
@pytest.mark.parametrize("paper", ["hovit", "skipvit", "efficientvit"])
def test_every_number_of_the_papers_is_in_config(paper: str) -> None:
    assert sorted(numbers(text_of(paper)) - reported(paper) - told(paper)) == []


@with_texts
@pytest.mark.parametrize("paper", ["hovit", "skipvit"])  # the third prints no table
def test_every_cell_of_the_papers_tables_is_reported_or_named(paper: str) -> None:
    lines = [line for line in text_of(paper).splitlines() if "\t" in line]
    assert len(lines) > 8
    cells = numbers("\n".join(cell for line in lines for cell in line.split("\t")[1:]))
    files = [file for file in PLAN.config.claims.values() if file.paper == paper]
    named = numbers(" ".join(e.says for file in files for e in file.not_checkable))
    sizes = {float(n) for row in PLAN.study("backbones").rows for n in [row.image_size or 0]}
    gains = {float(c.reported or 0) for f in files for c in f.claims if c.kind == "difference"}
    gains |= numbers(" ".join(c.says for f in files for c in f.claims if "gain" in c.id))
    assert not {
        c for c in cells - reported(paper) - named - sizes if c not in {abs(g) for g in gains}
    }


@with_texts
def test_a_number_that_no_one_took_in_would_be_seen() -> None:
    assert numbers("1,234 and 12,34 of [32, 9] \t7") == {1234.0, 12.34, 32.0, 9.0, 7.0}
    assert 86.23 not in reported("hovit") | told("hovit")
