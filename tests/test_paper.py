"""The paper from made-up records: the same bytes twice, no typed number, a record for each cell."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typst
import yaml
from conftest import ROOT
from synthetic import write_all

from hovit.config.plan import Plan, load_plan
from hovit.report.figures.draw import FIGURES
from hovit.report.paper.variables import (
    MISSING,
    VARIABLES,
    Variable,
    by_scale,
    load_variables,
    resolve,
)
from hovit.report.paper.write import FILES, OUT, PDF, TEXT, compile_text, write_paper
from hovit.report.sources import load_sources
from hovit.report.tables.columns import NOTHING
from hovit.utils.errors import HovitError
from hovit.utils.files import write_json

# What may stand in the text as digits: names, and sizes of an architecture or a protocol.
ALLOWED = (
    "ViT-S/16", "ResNet50", "CIFAR-100", "CIFAR-10", "LeViT-256", "EfficientViT-M4",
    "MobileNetV3-Large", "MobileNetV2", "EfficientNet-B0", "EfficientNet-Lite0", "V100",
    "1 × 1", "2,048 numbers", "49 tokens", "196 tokens", "batch 1", "batch 32", "batch 256",
    "7 : 1.5 : 1.5", "6(55%)+11", "95 % interval",
)  # fmt: skip
CALLS = (
    "v|at|more|known|difference|claim|result|reported|study|plot|see|present|measured|verdict-table|"
    "label|bibliography"
)
CALL = re.compile(rf'#?\b(?:{CALLS})\((?:[^()"]|"[^"]*")*\)')
CHOICE = re.compile(r'#by-verdict\("[\w-]+"')  # not what it chooses from: that is text
NAMES = re.compile(r"@[\w-]+|<[\w-]+>")
LENGTHS = re.compile(r"\b\d+(?:\.\d+)?(?:pt|em|mm|fr)\b|\bwidth: \d+%")
WORDS = re.compile(r"\b(?:\w+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand)\b")


def texts(root: Path = ROOT) -> dict[str, str]:
    """The text's files, all but the library that sets it."""
    files = [root / "paper/paper.typ", *sorted((root / "paper/sections").glob("*.typ"))]
    return {path.name: path.read_text(encoding="utf-8") for path in files}


def typed(text: str) -> list[str]:
    """The lines in which a number stands that no variable made."""
    text = re.sub(r"^\s*(?://|#set|#show|#import|#include|#counter).*$", "", text, flags=re.M)
    for pattern in (CHOICE, CALL, NAMES, LENGTHS):
        text = pattern.sub("", text)
    text = re.sub(r'"[a-z0-9]+(?:-[a-z0-9]+)+"', "", text)  # ids of claims
    for name in ALLOWED:
        text = re.sub(rf"(?<!\d){re.escape(name)}(?!\w)".replace(r"\ ", r"\s"), "", text)
    return [line for line in text.splitlines() if re.search(r"\d", line) or WORDS.search(line)]


def used(text: str, function: str) -> list[str]:
    calls = re.findall(rf'#?\b{function}\(((?:[^()"]|"[^"]*")*)\)', text)
    return [name for call in calls for name in re.findall(r'"([^"]+)"', call)]


@pytest.fixture(scope="module")
def smoke() -> Plan:
    return load_plan("smoke", ROOT / "config")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, smoke: Plan) -> Path:
    """The paper at scale smoke, with evidence of scale mini."""
    root = tmp_path_factory.mktemp("paper")
    shutil.copytree(ROOT / "paper", root / "paper", ignore=shutil.ignore_patterns("*.pdf"))
    write_all(smoke, root)
    mini = Plan(smoke.config, smoke.config.scales["mini"])
    write_all(mini, root, "results/evidence/test-cpu")
    write_paper(smoke, root)
    return root


def read(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / OUT / f"{name}.json").read_text(encoding="utf-8"))
    return found


def test_the_same_records_give_the_same_bytes(made: Path, smoke: Plan) -> None:
    files = [PDF, *(OUT / f"{name}.json" for name in FILES)]
    before = {file: (made / file).read_bytes() for file in files}
    assert before[PDF].startswith(b"%PDF-")
    assert b"/CreationDate" not in before[PDF]
    for file in files:
        (made / file).unlink()
    write_paper(smoke, made)
    for file in files:
        assert (made / file).read_bytes() == before[file], file


def test_no_number_is_typed() -> None:
    for name, text in texts().items():
        assert not typed(text), name


@pytest.mark.parametrize(
    "line",
    [
        "HoViT saves 60.7 % of them.",
        'It takes #v("gated-ratio") times, or 2 times.',
        "in thirty-two images",
        '"between 50 % and 60 %"',
        "batch 132",
        '#by-verdict("a-b32", contradicted: [by 3 %])',
    ],
)
def test_a_typed_number_would_be_seen(line: str) -> None:
    text = texts()["findings.typ"]
    assert not typed(text)
    assert typed(f"{text}\n{line}\n") == [CALL.sub("", CHOICE.sub("", line))]


def test_no_semicolon_is_lost() -> None:
    """Typst takes a semicolon after an expression as the end of the expression, not as text."""
    lost = re.compile(r'#[A-Za-z][\w.-]*(?:\((?:[^()"]|"[^"]*")*\))?;')
    assert lost.search('#at("hovit-ratio"); near one')
    assert not lost.search(r'#at("hovit-ratio")\; near one')
    for name, text in {**texts(), "lib.typ": (ROOT / "paper/lib.typ").read_text("utf-8")}.items():
        assert not lost.findall(text), name


def test_every_variable_is_used_and_of_the_catalogue(made: Path, smoke: Plan) -> None:
    names = {name for text in texts().values() for name in used(text, "(?:v|at)")}
    variables = load_variables(ROOT)
    assert names - read(made, "variables").keys() == set()
    assert variables.keys() - names == set()
    for name, variable in variables.items():
        assert variable.of.split("/")[0] in smoke.config.studies, name


def test_a_trained_or_timed_number_says_where_it_is_from(made: Path) -> None:
    """Scale, images and n stand in the paragraph; in the table of variables too."""
    variables = read(made, "variables")
    inexact = {name for name, entry in variables.items() if entry["inexact"]}
    assert len(inexact) > 30
    for name in inexact:
        assert "scale mini" in variables[name]["where"], name
        assert "n = " in variables[name]["where"] or "round" in variables[name]["where"], name
        assert variables[name]["device"] == "Test CPU, 2 threads", name
    for file, text in texts().items():
        for paragraph in re.split(r"\n\s*\n", text):
            silent = inexact & set(used(paragraph, "v")) - set(used(paragraph, "at"))
            assert not silent, (file, silent)


def test_smoke_gives_the_text_no_accuracy_and_no_time(
    made: Path, smoke: Plan, tmp_path: Path
) -> None:
    shutil.copytree(made / "results/runs", tmp_path / "results/runs")
    sources = by_scale(load_sources(smoke, tmp_path))
    got = {n: resolve(sources, n, variable) for n, variable in load_variables(ROOT).items()}
    assert got["levit-parameters"]["text"] == "1,000"
    assert got["levit-parameters"]["records"] == ["results/runs/smoke/measure/hovit.json"]
    assert got["hovit-top1"]["text"] == got["hovit-faster-one"]["text"] == MISSING
    assert got["hovit-top1"]["why"] == "scale smoke does not check accuracy"
    assert not any(entry["inexact"] for entry in got.values())


def test_nothing_measured_is_said_and_not_an_error(smoke: Plan, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "paper", tmp_path / "paper")
    write_paper(smoke, tmp_path)
    assert read(tmp_path, "variables")["hovit-parameters"]["text"] == MISSING
    assert (tmp_path / PDF).stat().st_size > 10_000
    assert "tab-hovit" in labels(tmp_path)  # with the numbers of the deck
    assert "tab-attention_models" not in labels(tmp_path)  # without a number


def test_every_cell_has_its_record_in_the_appendix(made: Path) -> None:
    tables = read(made, "tables")
    assert "#source-tables()" in texts()["appendix.typ"]
    cells = 0
    for study, table in tables.items():
        for j, column in enumerate(table["columns"]):
            name = f"{column['heading']} ({', '.join(column['source'])}): "
            groups = [
                group for group in table["sources"]
                if any(line.startswith(name) for line in group["columns"])
            ]  # fmt: skip
            for i, row in enumerate(table["rows"]):
                records = {path for o in table["origins"][j][i] for path in o["records"]}
                assert bool(records) == (row["cells"][j] != NOTHING), (study, name, row["label"])
                printed = [
                    set(entry["records"]) for group in groups for entry in group["records"]
                    if not entry["rows"] or row["label"] in entry["rows"]
                ]  # fmt: skip
                assert not records or records in printed, (study, name, row["label"])
                for path in records:
                    assert (made / path).exists() or (ROOT / path).exists(), path
                cells += bool(records)
    assert cells == read(made, "variables")["cells"]["value"] > 500


def test_a_cell_and_its_records_agree(made: Path) -> None:
    """One cell by hand: HoViT's accuracy, mean of the evidence's two seeds."""
    table = read(made, "tables")["hovit"]
    heads = [(c["heading"], *c["source"]) for c in table["columns"]]
    j = heads.index(("Top-1, %", "mini"))
    i = [row["label"] for row in table["rows"]].index("HoViT")
    (origin,) = table["origins"][j][i]
    values = [json.loads((made / path).read_text())["results"]["top1"] for path in
              origin["records"]]  # fmt: skip
    assert len(values) == 2
    assert table["rows"][i]["cells"][j].startswith(f"{sum(values) / 2:.2f} ± ")
    assert origin["field"] == "results.top1"
    assert ("Top-1, %", "smoke") not in heads


def test_every_table_and_figure_of_the_catalogue_is_there(made: Path, smoke: Plan) -> None:
    """By a section, or after them: a study that no text knows stands too."""
    assert read(made, "tables").keys() == smoke.config.studies.keys()
    assert labels(made) >= {f"tab-{study}" for study in smoke.config.studies}
    assert labels(made) >= {f"fig-{figure}" for figure in FIGURES}
    tables = read(made, "tables")
    newcomer = tables["depth"] | {"title": "A newcomer"}
    try:
        write_json(made / OUT / "tables.json", tables | {"newcomer": newcomer})
        assert "tab-newcomer" in labels(made)
    finally:
        write_json(made / OUT / "tables.json", tables)


def labels(root: Path) -> set[str]:
    """Of the paper's tables and figures."""
    found = typst.query(root / TEXT, "figure", field="label", root=root, ignore_system_fonts=True)
    return {label.strip("<>") for label in json.loads(found)}


def test_an_unknown_variable_is_one_line(made: Path, tmp_path: Path) -> None:
    for part in ("paper", "results/paper"):
        shutil.copytree(made / part, tmp_path / part)
    with open(tmp_path / "paper/sections/limits.typ", "a", encoding="utf-8") as file:
        file.write('\n#v("nonsense")\n')
    with pytest.raises(HovitError, match=r"^paper/paper\.typ: unknown variable nonsense: .*$"):
        compile_text(tmp_path)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"of": "hovit/nobody/top1"}, "config has no hovit/nobody/top1"),
        ({"of": "hovit/hovit/beauty"}, "config has no hovit/hovit/beauty"),
        ({"of": "hovit/hovit/top1", "kind": "ratio"}, "`to` belongs to every kind but `value`"),
        ({"of": "hovit"}, "of"),
    ],
)
def test_a_wrong_variable_is_one_line(
    smoke: Plan, tmp_path: Path, entry: dict[str, str], said: str
) -> None:
    (tmp_path / "paper").mkdir()
    (tmp_path / VARIABLES).write_text(yaml.safe_dump({"variables": {"wrong": entry}}))

    def resolve_all() -> None:
        for name, variable in load_variables(tmp_path).items():
            resolve(by_scale(load_sources(smoke, tmp_path)), name, variable)

    with pytest.raises(HovitError, match=re.escape(said)) as caught:
        resolve_all()
    assert "\n" not in str(caught.value)
    assert "wrong" in str(caught.value)


def test_a_study_that_is_not_there_is_not_measured(smoke: Plan, tmp_path: Path) -> None:
    found = resolve(by_scale(load_sources(smoke, tmp_path)), "x", Variable(of="tomorrow/row/top1"))
    assert (found["text"], found["why"]) == (MISSING, "no study tomorrow in config/studies")
