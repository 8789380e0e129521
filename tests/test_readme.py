"""README's results are what the committed evidence says."""

from io import BytesIO
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT

from hovit.config.plan import load_plan
from hovit.report.readme import (
    BEGIN,
    DRAWN,
    END,
    HEADLINES,
    PICTURE,
    README,
    picture,
    results_section,
)
from hovit.report.readme import write_readme as write
from hovit.report.sources import load_sources
from hovit.utils.errors import HovitError


def test_readme_is_what_the_evidence_says() -> None:
    """If this fails, `hovit readme` writes it again."""
    text = (ROOT / README).read_text()
    part = text.split(BEGIN)[1].split(END)[0]
    assert part == results_section(load_sources(load_plan("smoke", ROOT / "config"), ROOT))


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
    (tmp_path / README).write_text("# Ours\n")
    with pytest.raises(HovitError, match="needs the lines <!-- results"):
        write(load_plan("smoke", ROOT / "config"), tmp_path)
    assert (tmp_path / README).read_text() == "# Ours\n"


def test_without_evidence_it_says_so(tmp_path: Path) -> None:
    (tmp_path / README).write_text(BEGIN + END)
    with pytest.raises(HovitError, match="no evidence for README's table of results"):
        write(load_plan("smoke", ROOT / "config"), tmp_path)
