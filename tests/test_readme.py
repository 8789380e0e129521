"""README's results are what the committed evidence says."""

from io import BytesIO
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT

from hovit.config.plan import load_plan
from hovit.report.readme import (
    ARTIFACT,
    COMMAND,
    DRAWN,
    FINDINGS,
    HEADLINES,
    PARTS,
    PICTURE,
    README,
    findings_section,
    picture,
)
from hovit.report.readme import write_readme as write
from hovit.report.sources import load_sources
from hovit.utils.errors import HovitError
from hovit.utils.generated import around, marks


@pytest.mark.parametrize("part", PARTS)
def test_readme_is_what_the_evidence_says(part: str) -> None:
    """If this fails, `hovit readme` writes it again."""
    file, section = PARTS[part]
    whole = (ROOT / file).read_text()
    before, after = around(whole, part, COMMAND, file)
    text = whole.removeprefix(before).removesuffix(after)
    assert text == section(load_sources(load_plan("smoke", ROOT / "config"), ROOT))


def test_every_finding_has_its_numbers() -> None:
    text = findings_section(load_sources(load_plan("smoke", ROOT / "config"), ROOT))
    assert text.count("<sub>") == len(FINDINGS)
    assert "not measured" not in text
    assert "{" not in text


def test_its_picture_too() -> None:
    drawn = matplotlib.image.imread(
        BytesIO(picture(load_sources(load_plan("smoke", ROOT / "config"), ROOT))), format="png"
    )
    kept = matplotlib.image.imread(ROOT / PICTURE)
    assert kept.shape == drawn.shape
    other = (np.abs(kept - drawn) > 0.2).any(axis=-1)
    assert other.sum() < 20  # pixels; a mark is larger, and another processor may round a few


def test_every_headline_is_a_claim_and_what_is_drawn_is_a_ratio() -> None:
    files = load_plan("smoke", ROOT / "config").config.claims.values()
    claims = {claim.id: claim for file in files for claim in file.claims}
    assert set(HEADLINES) <= set(claims)
    assert {claims[name].kind for name in DRAWN} <= {"ratio", "reduction"}


def test_a_readme_without_the_marks_is_refused(tmp_path: Path) -> None:
    for file in (README, ARTIFACT):
        (tmp_path / file).write_text("# Another title\n")
    with pytest.raises(HovitError, match="needs the lines <!-- findings"):
        write(load_plan("smoke", ROOT / "config"), tmp_path)
    assert (tmp_path / README).read_text() == "# Another title\n"


def test_without_evidence_it_says_so(tmp_path: Path) -> None:
    for file in (README, ARTIFACT):
        own = [part for part, (place, _) in PARTS.items() if place == file]
        (tmp_path / file).write_text("".join(line for part in own for line in marks(part, COMMAND)))
    with pytest.raises(HovitError, match="no evidence for README's table of results"):
        write(load_plan("smoke", ROOT / "config"), tmp_path)
