"""Write all reports from the records at hand, without training, measuring or Snakemake."""

import os
from collections.abc import Callable
from pathlib import Path

from ..config.plan import Plan
from .claims.write import write_claims_from
from .figures.draw import FIGURES, draw_from
from .page.write import write_page_from
from .paper.write import write_paper_from
from .sources import load_sources
from .tables.write import write_index, write_table_from

REPORTS = (
    "results/tables/*",
    "results/claims.*",
    "results/index.html",
    "results/paper/*",
    "figures/*.pdf",
    "figures/*.png",
    "paper/paper.pdf",
)


def write_everything(
    plan: Plan, root: Path = Path(), log: Callable[[str], None] = lambda _: None
) -> None:
    """Write tables, figures, claims, page and paper.

    Cells without a record stay empty. `snakemake` still makes the missing records, and then the
    reports.

    Args:
        plan: the plan of the scale whose records count as this run.
        root: top folder of the artifact.
        log: called with one line for each kind of report.
    """
    sources, studies = load_sources(plan, root), plan.config.studies.values()
    for study in studies:
        write_table_from(sources, study, root)
    write_index(plan, root)
    log(f"{len(studies)} tables: results/tables/index.md")
    for name in FIGURES:
        draw_from(sources, name, root)
    log(f"{len(FIGURES)} figures: figures/")
    log(f"claims: results/claims.md: {write_claims_from(sources, root).splitlines()[0]}")
    write_page_from(sources, root)
    log("page: results/index.html")
    write_paper_from(sources, root)
    log("paper: paper/paper.pdf")
    date_before_inputs(root)


def date_before_inputs(root: Path) -> None:
    """Date all reports 1970, so that Snakemake makes what is missing, and then the reports."""
    for pattern in REPORTS:
        for path in root.glob(pattern):
            os.utime(path, (1, 1))  # Snakemake takes 0 for no time
