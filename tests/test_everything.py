"""All reports from the committed records alone."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from hovit.config.plan import load_plan
from hovit.report.everything import write_everything
from hovit.report.figures.draw import FIGURES


@pytest.mark.exhaustive
def test_reports_need_no_run(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results/evidence", tmp_path / "results/evidence")
    shutil.copytree(ROOT / "paper", tmp_path / "paper")
    plan = load_plan("smoke", ROOT / "config")
    lines: list[str] = []
    write_everything(plan, tmp_path, lines.append)
    assert len(lines) == 5
    wanted = [f"results/tables/{study}.md" for study in plan.config.studies]
    wanted += [f"figures/{name}.png" for name in FIGURES]
    wanted += ["results/claims.md", "results/index.html", "paper/paper.pdf"]
    assert all((tmp_path / name).stat().st_size for name in wanted)
