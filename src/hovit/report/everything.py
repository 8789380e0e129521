"""Write all reports from the records at hand, without training, measuring or Snakemake."""

from collections.abc import Callable
from pathlib import Path

from ..config.plan import Plan
from .claims.write import write_claims
from .figures.draw import FIGURES, draw_from
from .page.write import write_page
from .paper.write import write_paper
from .sources import load_sources
from .tables.write import write_index, write_table


def write_everything(
    plan: Plan, root: Path = Path(), log: Callable[[str], None] = lambda _: None
) -> None:
    """Write tables, figures, claims, page and paper.

    Cells without a record say so. Snakemake later writes them again where records are new.

    Args:
        plan: the plan of the scale whose records count as this run.
        root: top folder of the artifact.
        log: called with one line for each kind of report.
    """
    studies = list(plan.config.studies.values())
    for study in studies:
        write_table(plan, study, root)
    write_index(plan, root)
    log(f"{len(studies)} tables: results/tables/index.md")
    sources = load_sources(plan, root)
    for name in FIGURES:
        draw_from(sources, name, root)
    log(f"{len(FIGURES)} figures: figures/")
    log(f"claims: results/claims.md: {write_claims(plan, root).splitlines()[0]}")
    write_page(plan, root)
    log("page: results/index.html")
    write_paper(plan, root)
    log("paper: paper/paper.pdf")
