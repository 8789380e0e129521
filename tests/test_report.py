"""The report, from made-up records: tables, claims, figures. Nothing is trained here."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from killed import start
from pydantic import ValidationError
from synthetic import CPU, GPU, measure_record, train_record

from hovit.config.metrics import quantity
from hovit.config.plan import Plan, load_plan
from hovit.config.schema import Claim, Study
from hovit.records.record import read_record, write_record
from hovit.report.claims.check import (
    ACCEPTED,
    accept,
    check_accepted,
    check_all,
    check_claim,
    reported_numbers,
    tally,
)
from hovit.report.claims.write import write_claims
from hovit.report.figures.draw import FIGURES, draw
from hovit.report.noise import student
from hovit.report.number import significant
from hovit.report.paper.variables import Variable, by_scale, resolve
from hovit.report.results import Results, Value
from hovit.report.sources import Sources, load_sources
from hovit.report.tables.view import view
from hovit.report.tables.write import write_index, write_table, write_table_from
from hovit.utils.errors import HovitError
from hovit.utils.files import write_json


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan("mini", ROOT / "config")


def test_every_table_in_three_forms(plan: Plan, root: Path) -> None:
    for study in plan.config.studies.values():
        write_table(plan, study, root)
        stem = root / "results/tables" / study.id
        text = stem.with_suffix(".md").read_text()
        table = pd.read_csv(stem.with_suffix(".csv"), dtype=str)
        assert list(table["row"]) == [row.id for row in study.rows]
        rows = re.findall(r"^\|.*$", text, re.M)
        if not study.cites:  # whole tables, with header and rule
            assert len(rows) % (len(study.rows) + 2) == 0
        assert len(rows) > 0
        assert max(map(len, rows)) <= 100, study.id
        tex = stem.with_suffix(".tex").read_text()
        assert tex.count(r"\begin") == tex.count(r"\end") == 2
        body = tex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
        columns = re.search(r"\\begin\{tabular\}\{(l+r+)\}", tex)
        assert columns is not None
        assert {len(re.split(r"(?<!\\)&", line)) for line in body} == {len(columns[1])}
        for metric in study.columns:  # each reported number stands there, to its last digit
            for i, row in enumerate(study.rows):
                if printed := row.reported.get(metric):
                    assert table[f"{metric}_reported"][i] == printed
        if study.kind == "models":
            ran = study.trained and bool(plan.rows_run(study))
            if study.trained and not ran:  # no COCO at this scale
                continue
            facts = ["Scale", *["Data"] * study.trained, *["Seeds"] * ran]
            if ran and any(row.pretrained for row in study.rows):
                facts.append("Pretrained weights from")
            for fact in facts:
                assert f"\n  - {fact}: " in text, study.id
    write_index(plan, root)
    index = (root / "results/tables/index.md").read_text()
    assert all(f"`{study}`" in index for study in plan.config.studies)


def test_a_mean_has_its_spread_and_latency_its_ratio(plan: Plan, root: Path) -> None:
    study = plan.study("hovit")
    write_table(plan, study, root)
    table = pd.read_csv(root / "results/tables/hovit.csv").set_index("row")
    base = 20.0 + list(plan.runs).index("hovit.pets.deck")
    assert table.loc["hovit", "top1"] == base + 0.5
    assert table.loc["hovit", "top1_sd"] == pytest.approx(0.5**0.5)
    assert table.loc["hovit", "top1_n"] == 2
    text = (root / "results/tables/hovit.md").read_text()
    assert f"| {base + 0.5:.1f} ± 0.7 (2) |" in text
    assert "| 1.30 |" in text  # 13 ms over LeViT's 10 ms
    assert "| 5.82 | 0.554 |" in text  # the deck's 5.82 over 10.50
    assert "| 10.50 |" in text
    assert "Top-1, % on stand-ins" in text
    assert "batch 32, ms" in text


def test_committed_tables_fit_a_page_and_hide_smoke_accuracies(tmp_path: Path) -> None:
    """Of every study: lines of at most 100 characters; no smoke number next to a reported one."""
    smoke = load_plan("smoke", ROOT / "config")
    study = smoke.study("hovit_cifar100")  # no committed result
    for run in smoke.runs_of(study, study.row("hovit")):
        write_record(tmp_path / run.folder / "record.json", train_record(run, 51.5))
    (tmp_path / "results/evidence").symlink_to(ROOT / "results/evidence")
    sources = load_sources(smoke, tmp_path)
    for each in smoke.config.studies.values():
        write_table_from(sources, each, tmp_path)
        text = (tmp_path / f"results/tables/{each.id}.md").read_text()
        lines = re.findall(r"^\|.*$", text, re.M)  # none without committed results
        assert max(map(len, lines), default=0) <= 100, each.id
        assert not re.search(r", ,|;;|, ;|\( | \)|  \(", text), each.id  # an empty part
    text = (tmp_path / "results/tables/hovit_cifar100.md").read_text()
    assert "| HoViT | 50–60 |\n" in text
    assert "51.5" not in text.split("## Provenance")[0]
    assert "Accuracies and times of this run (scale `smoke`" in text
    assert "51.5" in (tmp_path / "results/tables/hovit_cifar100.csv").read_text()
    skipvit = (tmp_path / "results/tables/skipvit.md").read_text()
    assert "ViT-S baseline (ViT-Ti here)" in skipvit


def test_rows_of_a_table_come_from_one_source_where_possible(plan: Plan, root: Path) -> None:
    """One row of a larger scale does not stand among rows of a smaller one."""
    proxy = load_plan("proxy", ROOT / "config")
    study = proxy.study("hovit")
    shutil.copytree(root / "results/runs", root / "results/evidence/test-cpu")
    for run in proxy.runs_of(study, study.row("hovit")):
        place = run.folder.relative_to("results/runs") / "record.json"
        write_record(root / "results/evidence/test-gpu" / place, train_record(run, 77.0))
    sources = load_sources(plan, root)
    text = "\n".join(view(sources, study))
    assert "77.0" not in text
    assert "committed results, scale mini" in text
    write_table_from(sources, study, root)
    table = pd.read_csv(root / "results/tables/hovit.csv", index_col="row")
    folders = set(table["evidence_top1_from"].dropna())
    assert folders == {"results/evidence/test-cpu/mini"}
    variables = [Variable(of=f"hovit/{row}/top1") for row in ("hovit", "levit_deck")]
    found = [resolve(by_scale(sources), row.of, row) for row in variables]
    assert {each["scale"] for each in found} == {"mini"}
    of_scale = Variable(of="hovit/hovit/top1", scale="proxy")
    assert resolve(by_scale(sources), "x", of_scale)["scale"] == "proxy"
    nowhere = Variable(of="hovit/hovit/top1", scale="paper")
    assert resolve(by_scale(sources), "x", nowhere)["why"] == "no records of scale paper"


def test_threads_belong_to_times(plan: Plan, root: Path) -> None:
    results = Results(plan, root)
    assert results.where(plan.study("hovit")).endswith(f", {CPU}")
    assert results.where(plan.study("scratch")).endswith(f", {CPU.name}")  # only counted


def test_a_range_has_the_ratios_of_all_studies(plan: Plan, root: Path) -> None:
    variable = Variable(
        of="hovit/levit_deck_fixed/latency_32", to="hovit/levit_deck/latency_32", kind="range"
    )
    path = root / plan.measure_task(plan.study("depth")).path
    record = read_record(path)
    batch = record.results["rows"]["levit_deck_fixed"]["latency"]["32"]
    base = record.results["rows"]["levit_deck"]["latency"]["32"]["median"]
    for factor in (0.5, 3.0):
        batch["median"] = factor * base
        write_record(path, record)
        sources = by_scale(load_sources(plan, root))
        ends = resolve(sources, "x", variable)["text"].split(" to ")
        assert ends[factor > 1] == f"{factor:.2f}"
        assert 0.5 < float(ends[factor < 1]) < 3


def test_a_ratio_of_times_has_its_noise(plan: Plan, root: Path) -> None:
    times = {"of": "hovit/hovit/latency_32", "to": "hovit/levit_deck/latency_32"}
    ratio, saved = (
        resolve(by_scale(load_sources(plan, root)), "x", Variable(**times, kind=kind))["text"]
        for kind in ("ratio", "reduction")
    )
    assert re.fullmatch(r"\d\.\d\d ± 0\.\d+", ratio)
    assert re.fullmatch(r"−?\d+\.\d ± \d\.\d+", saved)
    counts = {"of": "hovit/hovit/parameters", "to": "hovit/levit_deck/parameters"}
    exact = Variable(**counts, kind="ratio")
    assert "±" not in resolve(by_scale(load_sources(plan, root)), "x", exact)["text"]


def test_without_evidence_no_cell_has_evidence(plan: Plan, root: Path) -> None:
    study = plan.study("hovit")
    number = quantity("top1")
    assert number is not None
    sources = Sources(Results(plan, root), ())
    assert sources.best(study, number) == [None] * len(study.rows)


def timed_text(plan: Plan, root: Path, device, protocol: str | None, **more) -> str:
    """The table of `hovit`, its latencies from `device` with `more` in each row."""
    record = measure_record(plan, "hovit", device)
    if protocol:
        record.results["protocol"] = protocol
    for i, row in enumerate(record.results["rows"].values()):
        row |= {key: make(row, i) for key, make in more.items()}
    write_record(root / plan.measure_task(plan.study("hovit")).path, record)
    write_table(plan, plan.study("hovit"), root)
    return (root / "results/tables/hovit.md").read_text()


def scaled(factor: float):
    """`captured` of a row: each latency times a factor."""

    def make(row, i):
        return {
            batch: each | {key: each[key] * factor for key in ("median", "q1", "q3")}
            | {"ms": [factor * ms for ms in each["ms"]]}
            for batch, each in row["latency"].items()
        }  # fmt: skip

    return make


def test_cuda_graphs_have_columns_where_they_differ(plan: Plan, root: Path) -> None:
    text = timed_text(plan, root, GPU, "cuda-events-10ms", captured=scaled(0.25))
    assert "batch 1, CUDA graph, ms" in text
    table = pd.read_csv(root / "results/tables/hovit.csv").set_index("row")
    assert table.loc["levit_deck", "captured_1"] == 2.5
    assert table.loc["levit_deck", "captured_1_n"] == 30
    assert "captured" not in timed_text(plan, root, GPU, None, captured=scaled(0.99))


def test_a_table_says_how_a_record_was_measured(plan: Plan, root: Path) -> None:
    def in_processes(row, i):
        return {b: each | {"processes": [10.0, 10.0 + i]} for b, each in row["latency"].items()}

    assert "one pass per sample" in timed_text(plan, root, GPU, None)
    text = timed_text(plan, root, GPU, "cuda-events-10ms")
    assert "a sample is the mean of the passes in 10 ms, after 0.3 s of warm-up" in text
    text = timed_text(plan, root, CPU, "cpu-clock", latency=in_processes)
    rows = len(plan.measure_task(plan.study("hovit")).spec["rows"])
    assert f"in 2 processes, whose medians of a row differ by up to {rows - 1}0%" in text
    assert "processes" not in timed_text(plan, root, CPU, "cpu-clock")


def test_reported_and_three_baselines_wherever_the_deck_compares(plan: Plan) -> None:
    for study in plan.config.studies.values():
        ids = {row.id for row in study.rows}
        if "levit_deck" in ids:
            assert {"levit_deck", "levit_deck_fixed", "levit_256"} <= ids
        for row in study.rows:
            assert bool(row.reported) != row.ours, f"{study.id}/{row.id}"


def test_each_row_has_its_baseline_in_the_notes(plan: Plan, root: Path) -> None:
    write_table(plan, plan.study("attention_gradients"), root)
    text = (root / "results/tables/attention_gradients.md").read_text()
    assert "- × is the ratio to dot product (SDPA), 196 tokens, with these exceptions:\n" in text
    other = next(line for line in text.splitlines() if line.startswith("  - to "))
    base, _, rows = other.partition(" for ")
    assert base == "  - to dot product (SDPA), 49 tokens"
    study = plan.study("attention_gradients")
    small = [row.label for row in study.rows if row.baseline and "49 tokens" in row.label]
    assert rows.removesuffix(".").split("; ") == small
    assert len(small) > 1
    write_table(plan, plan.study("checkerboard"), root)
    text = (root / "results/tables/checkerboard.md").read_text()
    assert "- × is the ratio to LeViT (deck).\n" in text


def test_latencies_of_two_devices_are_refused(plan: Plan, root: Path) -> None:
    record = measure_record(plan, "hovit")
    record.results["rows"]["l_hovit"]["device"] = GPU.model_dump()
    write_record(root / plan.measure_task(plan.study("hovit")).path, record)
    with pytest.raises(HovitError, match=r"Test CPU.*Test GPU"):
        write_table(plan, plan.study("hovit"), root)
    assert not (root / "results/tables/hovit.md").exists()


def test_a_record_of_another_spec_is_named_and_not_used(plan: Plan, root: Path) -> None:
    run = plan.run("hovit.pets.deck")
    other = run.model_copy(update={"image_size": 97})
    write_record(root / run.folder / "record.json", train_record(other, 99.0))
    assert "hovit.pets.deck/seed0/record.json: its spec does not match config" in not_used(
        plan, root
    )
    assert value_of(plan, root, "hovit").n == 1  # the other seed alone


def test_a_record_of_other_code_is_named_and_not_used(plan: Plan, root: Path) -> None:
    path = root / plan.run("hovit.pets.deck").folder / "record.json"
    record = read_record(path)
    made = record.provenance.model_copy(update={"code": "0" * 64})
    write_record(path, record.model_copy(update={"provenance": made}))
    assert "record.json: made by other code than the current code" in not_used(plan, root)
    assert value_of(plan, root, "hovit").n == 1


def test_a_flipped_digit_is_named_and_not_used(plan: Plan, root: Path) -> None:
    path = root / plan.run("hovit.pets.deck").folder / "record.json"
    text = path.read_text()
    flips = [
        text[: m.start()] + str((int(m[0]) + 1) % 10) + text[m.end() :]
        for m in re.finditer(r"[0-9]", text)
    ]
    # The 17th digit of a number may be another without the number being another.
    flips = [flipped for flipped in flips if parsed(flipped) != parsed(text)]
    for flipped in flips[:: len(flips) // 12]:
        path.write_text(flipped)
        assert "record.json" in not_used(plan, root)
        assert value_of(plan, root, "hovit").n == 1
        path.write_text(text)
    assert not_used(plan, root) == ""


def parsed(text: str) -> object:
    """The JSON value; None for what is no JSON any more."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def not_used(plan: Plan, root: Path) -> str:
    """What the table says of records that it left out."""
    write_table(plan, plan.study("hovit"), root)
    text = (root / "results/tables/hovit.md").read_text()
    found = re.search(r"\*\*Not used\*\*: (.*)", text)
    return found[1] if found else ""


def value_of(plan: Plan, root: Path, row: str, metric: str = "top1") -> Value:
    study = plan.study("hovit")
    value = Results(plan, root).value(study, study.row(row), metric)
    assert value is not None
    return value


def test_a_changed_spec_in_a_record_is_named(plan: Plan, root: Path) -> None:
    path = root / plan.run("hovit.pets.deck").folder / "record.json"
    content = json.loads(path.read_text())
    content["spec"]["recipe"]["lr"] = 0.5
    write_json(path, content)
    with pytest.raises(HovitError, match="spec_hash does not match"):
        read_record(path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(HovitError, match="not readable as JSON"):
        read_record(path)


def claim(**keys: object) -> Claim:
    return Claim.model_validate({"id": "x", "says": "x", "place": "x"} | keys)


def verdict(plan: Plan, root: Path, **keys: object) -> str:
    return check_claim(Sources(Results(plan, root), ()), claim(**keys), "hovit").verdict


def test_verdicts(plan: Plan, root: Path) -> None:
    value = {"kind": "value", "of": "hovit/levit_deck/parameters"}
    assert verdict(plan, root, **value, reported="1000") == "reproduced"
    assert verdict(plan, root, **value, reported="1001") == "contradicted"
    assert verdict(plan, root, **value, reported="990–1010") == "reproduced"
    ratio = {"of": "hovit/hovit/latency_1", "to": "hovit/levit_deck/latency_1"}
    assert verdict(plan, root, kind="ratio", **ratio, reported="1.30") == "reproduced"
    assert verdict(plan, root, kind="ratio", **ratio, reported="1.28") == "direction only"
    assert verdict(plan, root, kind="ratio", **ratio, reported="0.80") == "contradicted"
    assert verdict(plan, root, kind="ratio", **ratio, reported="1.00") == "contradicted"
    assert (
        verdict(plan, root, kind="ratio", **ratio, reported="1.28", tolerance=0.03) == "reproduced"
    )
    assert verdict(plan, root, kind="reduction", **ratio, reported="-30.0") == "reproduced"
    assert verdict(plan, root, kind="greater", **ratio) == "reproduced"
    assert verdict(plan, root, kind="less", **ratio) == "contradicted"
    kept = {"kind": "keeps", "of": "hovit/levit_deck/parameters", "to": "hovit/hovit/parameters"}
    assert verdict(plan, root, **kept) == "contradicted"  # 1,000 against 1,003
    assert verdict(plan, root, **kept, tolerance=3) == "reproduced"
    assert verdict(plan, root, **kept | {"to": "hovit/levit_deck/parameters"}) == "reproduced"
    same = {"of": "hovit/hovit/top1", "to": "hovit/hovit/top1"}
    assert verdict(plan, root, kind="less", **same) == "within noise"
    assert verdict(plan, root, kind="keeps", **same) == "within noise"


def test_stand_in_images_are_not_comparable(plan: Plan, root: Path) -> None:
    """Neither an absolute accuracy nor an analysis of a model that learned from them."""
    found = {v.id: v for v in check_all(load_sources(plan, root))}
    absolute, analysis = found["timm-poor-from-scratch"], found["taylor-v-late"]
    assert (absolute.verdict, absolute.measured) == ("not comparable", None)
    results, study = Results(plan, root), plan.study("scratch")
    own = results.value(study, study.row("resnet50"), "top1")
    assert own is not None
    number = f"{own.mean:.2f} ± {significant(own.noise)} % (2 random seeds)"
    assert absolute.with_noise_and_n == number
    assert absolute.why == "measured on Tiny-ImageNet-37, which stands in for Oxford-IIIT Pet"
    assert absolute.source.startswith("this run (scale mini, Tiny-ImageNet-37, ")
    assert len(absolute.records) == 2
    row = plan.study("mhsa_share").row("swin")
    top1 = results.value(plan.study("mhsa_share"), row, "top1")
    assert top1 is not None
    assert analysis.verdict == "not comparable"
    assert f"stands in for ImageNet (Swin-T: {top1.mean:.1f} % top-1)" in analysis.why
    assert re.fullmatch(r"[\d.]+ against [\d.]+ %", analysis.shown)
    change = found["skipvit-change-d6-50-r11"]
    assert change.why.endswith("skipvit_tiny_patch16_224 stands in for skipvit_small_patch16_224")
    assert found["memory-bound-share"].verdict != "not comparable"  # a share of time


def test_rounds_are_compared_in_pairs(plan: Plan, root: Path) -> None:
    """Drift that hits both rows alike is no noise: 20 % of it hides no difference of 5 %."""
    path = root / plan.measure_task(plan.study("hovit")).path
    record = read_record(path)
    rows = record.results["rows"]
    for name, factor in (("levit_deck", 1.0), ("hovit", 0.95)):
        ms = [factor * (10 + (r % 5) / 2) for r in range(30)]
        rows[name]["latency"]["1"] = {
            "median": sorted(ms)[15], "q1": sorted(ms)[7], "q3": sorted(ms)[22], "n": 30, "ms": ms,
        }  # fmt: skip
    write_record(path, record)
    pair = {"of": "hovit/hovit/latency_1", "to": "hovit/levit_deck/latency_1"}
    assert verdict(plan, root, kind="less", **pair) == "reproduced"
    assert verdict(plan, root, kind="reduction", **pair, reported="5.0") == "reproduced"
    assert verdict(plan, root, kind="reduction", **pair, reported="15.0") == "direction only"
    assert verdict(plan, root, kind="reduction", **pair, reported="-5.0") == "contradicted"


def test_what_is_not_measured_says_why(plan: Plan, root: Path) -> None:
    smoke = load_plan("smoke", ROOT / "config")
    top1 = claim(kind="greater", of="hovit/hovit/top1", to="hovit/levit_deck/top1")
    found = check_claim(Sources(Results(smoke, root), ()), top1, "hovit")
    assert found.verdict == "not measured"
    assert found.why == "no committed results; this run: scale smoke does not check accuracy"
    (root / plan.run("hovit.pets.deck", 0).folder / "record.json").unlink()
    (root / plan.run("hovit.pets.deck", 1).folder / "record.json").unlink()
    found = check_claim(Sources(Results(plan, root), ()), top1, "hovit")
    assert (found.verdict, found.measured) == ("not measured", None)


def pooled(plan: Plan, root: Path, studies: Iterable[Study]) -> float:
    """Half the 95 % interval over two seeds: each row is right in x and x + 1 %, or 100 % twice."""
    rows = [(study, row) for study in studies for row in study.rows]
    runs = {run.id: run for study, row in rows for run in plan.runs_of(study, row)}
    own = (plan.run("hovit.pets.deck").recipe, "pets")
    alike = [run for run in runs.values() if (run.recipe, run.role) == own]
    records = [read_record(root / plan.run(run.id, 0).folder / "record.json") for run in alike]
    varying = sum(record.results["top1"] < 100 for record in records)
    return student(len(alike)) * (0.5 * varying / len(alike)) ** 0.5 / 2**0.5


def test_noise_is_that_of_the_seeds_and_of_their_images(plan: Plan, root: Path) -> None:
    """The variance over random seeds is pooled over the runs with the same recipe and images.

    Of this run, over those of the study; of evidence, over all.
    """
    study, value = plan.study("hovit"), value_of(plan, root, "hovit")
    shutil.copytree(root / "results/runs", root / "results/evidence/test-cpu")
    evidence = Results(plan, root, Path("results/evidence/test-cpu"))
    of_all = evidence.value(study, study.row("hovit"), "top1")
    assert of_all is not None
    assert of_all.seed_noise == pytest.approx(pooled(plan, root, plan.config.studies.values()))
    seeds = pooled(plan, root, [study])
    assert of_all.seed_noise < seeds
    share = value.mean / 100
    images = 196 * (share * (1 - share) / 1100) ** 0.5  # the same 1,100 images for every seed
    assert value.seed_noise == pytest.approx(seeds)
    assert value.noise == pytest.approx((seeds**2 + images**2) ** 0.5)
    for seed, error in enumerate((0.02, 0.04)):
        path = root / plan.run("hovit.pets.deck", seed).folder / "record.json"
        record = read_record(path)
        results = record.results | {"loss_error": error}
        write_record(path, record.model_copy(update={"results": results}))
    value = value_of(plan, root, "hovit", "loss")
    assert value.seed_noise == pytest.approx(0)  # all records have the same loss
    assert value.noise == pytest.approx(1.96 * 0.03)


def test_a_claim_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValidationError):
        claim(kind="value", of="a/b/c")
    with pytest.raises(ValidationError):
        claim(kind="less", of="a/b/c", to="a/b/d", reported="3")
    with pytest.raises(ValidationError):
        claim(kind="ratio", of="a/b/c", reported="3")


def test_claims_are_written_and_counted(plan: Plan, root: Path) -> None:
    verdicts = check_all(load_sources(plan, root))
    line = write_claims(plan, root).splitlines()[0]
    assert line == tally(verdicts)
    written = json.loads((root / "results/claims.json").read_text())
    assert len(written["claims"]) == len(verdicts) > 35
    groups = [part.split(": ") for part in line.split("; ")]
    for total, parts in groups:
        assert sum(map(int, re.findall(r"\d+", parts))) == int(total.split()[0])
    assert sum(int(total.split()[0]) for total, _ in groups) == len(verdicts)


def test_figures_are_drawn_and_the_same_records_give_the_same_bytes(plan: Plan, root: Path) -> None:
    """In another process too: its memory addresses and hashes of strings differ."""
    for name in FIGURES:
        draw(plan, name, root)
        files = [root / f"figures/{name}.{ext}" for ext in ("pdf", "png")]
        before = [file.read_bytes() for file in files]
        assert before[0][:5] == b"%PDF-"
        assert len(before[1]) > 5_000  # photographs are not packed here
        for file in files:
            file.unlink()
        other = start(draw, plan, name, root)
        other.join()
        assert other.exitcode == 0
        for file, content in zip(files, before, strict=True):
            assert file.read_bytes() == content, file.name
    with pytest.raises(HovitError, match="there are training_curves"):
        draw(plan, "nosuch", root)


def test_what_differs_from_the_accepted_verdicts_is_named(root: Path, plan: Plan) -> None:
    config = shutil.copytree(ROOT / "config", root / "config")
    accept(plan, root)
    assert check_accepted(plan, root) == []
    edits = {
        "studies/hovit.yaml": ('"27.47"', '"27.48"', {"hovit/hovit/top1"}),
        "claims/hovit.yaml": ('"44.57"', '"54.57"', {"hovit-faster-size-b1"}),
        "studies/depth.yaml": ('top1: "13.78", ', "", {"depth/blocks_222/top1"}),
    }
    for name, (old, new, named) in edits.items():
        text = (config / name).read_text()
        assert old in text
        (config / name).write_text(text.replace(old, new, 1))
        lines = check_accepted(load_plan("mini", config), root)
        assert {line.split(":")[0] for line in lines} == named
        (config / name).write_text(text)


def test_a_dropped_run_and_a_better_one_turn_a_verdict(plan: Plan, root: Path) -> None:
    accept(plan, root)
    (l_levit,) = plan.runs_of(plan.study("hovit"), plan.study("hovit").row("l_levit_deck"))[:1]
    write_record(root / l_levit.folder / "record.json", train_record(l_levit, 1.0))
    other = plan.run(l_levit.id, 1)
    write_record(root / other.folder / "record.json", train_record(other, 1.0))
    changed = check_accepted(plan, root)
    assert any(line.startswith("launcher-accuracy: contradicted; accepted:") for line in changed)
    for seed in (0, 1):
        (root / plan.run(l_levit.id, seed).folder / "record.json").unlink()
    assert any("not measured; accepted:" in line for line in check_accepted(plan, root))


def test_accepted_verdicts_that_cannot_be_read(plan: Plan, root: Path) -> None:
    with pytest.raises(HovitError, match=r"verdicts\.json: no such file"):
        check_accepted(plan, root)
    write_json(root / ACCEPTED, {"reported": [], "verdicts": {}})
    with pytest.raises(HovitError, match="not a file that `hovit claims --accept` writes"):
        check_accepted(plan, root)


def test_the_committed_verdicts_are_of_this_catalogue(plan: Plan) -> None:
    committed = json.loads((ROOT / ACCEPTED).read_text())
    assert committed["reported"] == reported_numbers(plan.config)
    assert set(committed["verdicts"]) == {
        claim.id for file in plan.config.claims.values() for claim in file.claims
    }


def test_a_ratio_to_nothing_is_not_measured(plan: Plan, root: Path) -> None:
    study = plan.study("hovit")
    record = measure_record(plan, "hovit")
    record.results["rows"]["levit_deck"]["parameters"] = 0
    write_record(root / plan.measure_task(study).path, record)
    claim = Claim(id="r", says="s", place="p", kind="ratio", reported="1",
                  of="hovit/hovit/parameters", to="hovit/levit_deck/parameters")  # fmt: skip
    verdict = check_claim(Sources(Results(plan, root), ()), claim, "hovit")
    assert (verdict.verdict, verdict.why) == ("not measured", "hovit/levit_deck/parameters is 0")
