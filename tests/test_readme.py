"""README's results are what the committed evidence says."""

import fnmatch
import re
import shutil
from io import BytesIO, StringIO
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

from hovit.config.plan import load_plan
from hovit.records.evidence import EVIDENCE
from hovit.report.abbreviations import spelled_out
from hovit.report.claims.coverage import coverage
from hovit.report.figures.draw import FIGURES
from hovit.report.figures.thumbnails import (
    LIMIT,
    THUMBNAILS,
    WIDTHS,
    committed,
    figures_section,
    thumbnail,
    write_thumbnails,
)
from hovit.report.readme import (
    COMMAND,
    DRAWN,
    FINDINGS,
    HEADLINES,
    PARTS,
    PICTURE,
    README,
    evidence_alone,
    findings_section,
    picture,
)
from hovit.report.readme import write_readme as write
from hovit.report.sources import Sources, load_sources
from hovit.report.tables.columns import MISCOUNTED, MISCOUNTED_NOTE, make_table
from hovit.report.tables.write import to_csv
from hovit.utils.errors import HovitError
from hovit.utils.generated import around, marks

FILES = {file for file, _ in PARTS.values()}


@pytest.fixture(scope="module")
def sources() -> Sources:
    return evidence_alone(load_plan("smoke", ROOT / "config"), ROOT)


@pytest.mark.parametrize("part", PARTS)
def test_readme_is_what_the_evidence_says(part: str, sources: Sources) -> None:
    """If this fails, `hovit readme` writes it again."""
    file, section = PARTS[part]
    whole = (ROOT / file).read_text()
    before, after = around(whole, part, COMMAND, file)
    text = whole.removeprefix(before).removesuffix(after)
    assert text == section(sources)


def test_every_finding_has_its_numbers(sources: Sources) -> None:
    text = findings_section(sources)
    assert text.count("<sub>") == len(FINDINGS)
    assert "not measured" not in text
    assert "{" not in text


def assert_same_picture(kept: Path, drawn: bytes) -> None:
    """Equal size and pixels; another processor may round a few, and a mark has more."""
    images = [matplotlib.image.imread(file, format="png") for file in (kept, BytesIO(drawn))]
    assert images[0].shape == images[1].shape
    other = (np.abs(images[0] - images[1]) > 0.2).any(axis=-1)
    assert other.sum() < 20


def test_its_picture_too(sources: Sources) -> None:
    assert_same_picture(ROOT / PICTURE, picture(sources))


@pytest.mark.parametrize("name", FIGURES)
def test_thumbnails_are_what_the_evidence_says(name: str, sources: Sources) -> None:
    file = ROOT / THUMBNAILS / f"{name}.png"
    if committed(FIGURES[name], sources):
        assert_same_picture(file, thumbnail(sources, name))
        assert file.stat().st_size <= LIMIT
    else:
        assert not file.exists()


def test_thumbnails_are_few_and_small() -> None:
    files = list((ROOT / THUMBNAILS).iterdir())
    assert {file.stem for file in files} <= FIGURES.keys()
    assert sum(file.stat().st_size for file in files) <= 400_000
    assert {Image.open(file).width for file in files} <= set(WIDTHS)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder with the evidence of one scale, which has one figure."""
    place = EVIDENCE / "amd-epyc/photographs"
    shutil.copytree(ROOT / place, tmp_path / place)
    return tmp_path


def test_a_figure_without_committed_results_has_no_thumbnail(photographs: Path) -> None:
    sources = evidence_alone(load_plan("smoke", ROOT / "config"), photographs)
    (photographs / THUMBNAILS).mkdir(parents=True)
    (photographs / THUMBNAILS / "attention_maps.png").write_bytes(b"of an earlier config")
    write_thumbnails(sources, photographs)
    assert [p.name for p in (photographs / THUMBNAILS).iterdir()] == ["generated_images.png"]
    lines = [line for line in figures_section(sources).splitlines() if "snakemake" in line]
    without = [line for line in lines if line.startswith("| no committed results | ")]
    assert len(without) == len(lines) - 1 == len(FIGURES) - 1
    assert not any("drawn from" in line for line in without)


def test_packed_images_of_this_machine_are_not_in_a_thumbnail(photographs: Path) -> None:
    plan = load_plan("smoke", ROOT / "config")
    before = thumbnail(evidence_alone(plan, photographs), "generated_images")
    task = load_plan("photographs", ROOT / "config").analyse_task(plan.analysis("generated_images"))
    assert task is not None
    for pack in task.packs.values():
        (photographs / pack.folder).mkdir(parents=True, exist_ok=True)
        np.save(photographs / pack.folder / "images.npy", np.zeros((1033, 8, 8, 3), np.uint8))
    assert thumbnail(evidence_alone(plan, photographs), "generated_images") == before
    assert thumbnail(load_sources(plan, photographs), "generated_images") != before


def test_results_readme_lists_all_outputs() -> None:
    """The ignored files of .gitignore, and all that git tracks."""
    text = (ROOT / "results/README.md").read_text()
    cells = re.findall(r"^\| (`.*?) \|", text, flags=re.M)
    names = {name for cell in cells for name in re.findall("`([^`]+)`", cell)}
    listed = {name.split("/")[0] for name in names if not name.startswith("../")}
    lines = (ROOT / ".gitignore").read_text().splitlines()
    ignored = [x.removeprefix("/results/").rstrip("/") for x in lines if x.startswith("/results/")]
    assert all(fnmatch.filter(listed, pattern) for pattern in ignored)

    def tracked(names: set[str]) -> set[str]:
        return {name for name in names if not any(fnmatch.fnmatch(name, p) for p in ignored)}

    found = {path.name for path in (ROOT / "results").iterdir()}
    assert tracked(listed) == tracked(found) - {"README.md"}


def test_every_headline_is_a_claim_and_what_is_drawn_is_a_ratio() -> None:
    files = load_plan("smoke", ROOT / "config").config.claims.values()
    claims = {claim.id: claim for file in files for claim in file.claims}
    assert set(HEADLINES) <= set(claims)
    assert {claims[name].kind for name in DRAWN} <= {"ratio", "reduction"}


def test_a_readme_without_the_marks_is_refused(tmp_path: Path) -> None:
    for file in FILES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("# Another title\n")
    with pytest.raises(HovitError, match="needs the lines <!-- findings"):
        write(load_plan("smoke", ROOT / "config"), tmp_path)
    assert (tmp_path / README).read_text() == "# Another title\n"


def test_without_evidence_it_says_so(tmp_path: Path) -> None:
    for file in FILES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        own = [part for part, (place, _) in PARTS.items() if place == file]
        (tmp_path / file).write_text("".join(line for part in own for line in marks(part, COMMAND)))
    with pytest.raises(HovitError, match="no evidence for README's table of results"):
        write(load_plan("smoke", ROOT / "config"), tmp_path)


def test_the_shares_of_breeds_in_the_text_are_those_of_the_test_images(sources: Sources) -> None:
    """The finding, the note of the table and the model cards state them."""
    results = next(r for r in sources.evidence if r.plan.scale.id == "photographs")
    study = results.plan.study("launcher_imagenet")
    counts = {
        (len(labels), int(labels.value_counts()[:3].sum()), int(labels.value_counts().max()))
        for row in study.rows
        for run, _ in results.trained(study, row)
        if (table := results.predictions(run)) is not None
        for labels in [table["label"]]
    }
    ((images, three, most),) = counts  # of every seed
    share = f"has a top-1 of {100 * most / images:.1f} %"
    finding = FINDINGS[4]
    assert f"({images} test images for each seed; {three} of them show three" in finding
    assert share in finding
    (note,) = [note for note in study.notes if "not balanced" in note]
    assert f"Of {images} test images, {three} show these three breeds" in note
    assert share in note
    assert share in (ROOT / "src/hovit/models/README.md").read_text()


def test_tables_count_without_a_run_of_this_machine(sources: Sources) -> None:
    study = sources.plan.study("skipvit")
    table = make_table(study, sources)
    column = next(c for c in table.columns if c.heading == "MACs, G" and c.kind == "evidence")
    assert all(cell.endswith(MISCOUNTED) for cell in column.cells)  # ViT-S is counted on an H200
    assert table.footnotes == {MISCOUNTED: MISCOUNTED_NOTE}
    lines = pd.read_csv(StringIO(to_csv(sources, table, {})))
    row = lines.set_index("row").loc["vit"]
    assert 4 < row["macs"] < 5  # in G, as in the heading
    assert MISCOUNTED_NOTE.lower() in row["macs_from"]
    family = make_table(sources.plan.study("efficientvit_family"), sources)
    assert {"Parameters, M", "MACs, G"} <= {
        c.heading for c in family.columns if c.kind != "reported"
    }


def test_a_count_without_fused_attention_is_not_compared_with_the_paper(sources: Sources) -> None:
    found = {cell["cell"]: cell for cell in coverage(sources)["cells"]}
    assert found["backbones/deit_s/macs"]["counted"] == pytest.approx(4.6, abs=0.05)


def test_abbreviations_are_spelled_out_where_they_occur() -> None:
    assert spelled_out(["L_LeViT + GLA", "LeViT"]) == "GLA: gated linear attention"
    assert spelled_out(["LeViT"]) == ""
