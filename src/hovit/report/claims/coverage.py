"""Coverage of the papers: reported cells, and statements that cannot be checked.

A *reported cell* is a number of a paper that a table shows. Reported counts (parameters,
multiply-adds, images) are compared with the counts here; claims compare accuracies and times. The
files in config/claims list every statement that cannot be checked, with the reason.
"""

from typing import Any

from ...config.metrics import quantity
from ...config.schema import Row, Study
from ..number import significant
from ..sources import Sources, is_miscounted
from ..tables.columns import format_printed
from .compare import last_digit, printed_range

REASONS = {
    "data": "needs images or training that no record has",
    "hardware": "about a device that is not available here",
    "unsaid": "the paper does not say what was done or meant",
    "undone": "could be checked, but no study checks it",
    "setting": "describes how something is built or trained; configuration and tests cover it",
    "others": "about the work of others",
    "opinion": "an opinion, an explanation or a proposal",
}
ABOUT = (
    "A *reported cell* is a number of a paper that a table shows. Statements that are *not "
    "checkable* are listed below, with the reason."
)
COUNTS = (
    "Parameters, multiply-adds and images are counted. The following counts differ from the paper "
    "by more than one unit of the last printed digit; errata are listed above:"
)


def coverage(sources: Sources) -> dict[str, Any]:
    """The reported cells and the statements that cannot be checked, as `results/claims.json`."""
    return {
        "cells": cells(sources),
        "not_checkable": [
            {"paper": file.paper} | entry.model_dump()
            for file in sources.plan.config.claims.values()
            for entry in file.not_checkable
        ],
    }


def cells(sources: Sources) -> list[dict[str, Any]]:
    """Every number that a table shows as reported.

    `counted` is the count here, in the unit of the heading, and `same` states whether both agree to
    one unit of the last printed digit (exactly for whole counts). Both are None for numbers that
    are trained or timed, and for studies that no claim refers to, because their records may not
    exist when claims are checked. `erratum` marks cells that a claim lists as errata.
    """
    found: list[dict[str, Any]] = []
    claimed = {study.id for study in sources.plan.claimed}
    errata = {
        claim.of
        for file in sources.plan.config.claims.values()
        for claim in file.claims
        if claim.group == "errata" and claim.kind == "value"
    }
    for study in sources.plan.config.studies.values():
        for row in study.rows:
            for metric, printed in row.reported.items():
                counted = _counted(sources, study, row, metric) if study.id in claimed else None
                same = None if counted is None else _same(counted, printed, metric)
                ref = f"{study.id}/{row.id}/{metric}"
                cell = {"paper": study.source.paper, "cell": ref, "reported": printed}
                found.append(cell | {"counted": counted, "same": same, "erratum": ref in errata})
    return found


def _counted(sources: Sources, study: Study, row: Row, metric: str) -> float | None:
    """A count in the unit of the heading; None if inexact, or only counted wrongly."""
    number = quantity(metric)
    if number is None or number.is_inexact:
        return None
    cell = sources.count(study, row, number)
    if cell is None or is_miscounted(*cell, number):
        return None
    return cell[1].mean * number.metric.unit


def _same(counted: float, printed: str, metric: str) -> bool:
    number = quantity(metric)
    rounded = number is not None and number.metric.unit != 1.0  # millions are, images are not
    unit = last_digit(printed) or float(rounded)
    low, high = printed_range(printed)
    return low - unit - 1e-9 <= counted <= high + unit + 1e-9


def coverage_tally(rest: dict[str, Any]) -> str:
    """The number of uncheckable statements and of reported cells, in one line."""
    counted = [cell for cell in rest["cells"] if cell["same"] is not None]
    counts = [cell["same"] for cell in counted if not cell["erratum"]]
    return (
        f"{len(rest['not_checkable'])} not checkable ({by_reason(rest)}); "
        f"{len(rest['cells'])} reported numbers, {len(counted)} of them counts: "
        f"{counts.count(True)} equal, {counts.count(False)} different, "
        f"{len(counted) - len(counts)} errata"
    )


def by_reason(rest: dict[str, Any]) -> str:
    """List each reason with the number of its statements."""
    given = [entry["reason"] for entry in rest["not_checkable"]]
    return ", ".join(f"{given.count(name)} {name}" for name in REASONS if name in given)


def coverage_lines(rest: dict[str, Any], papers: list[str]) -> list[str]:
    """The coverage section of `results/claims.md`.

    Args:
        rest: from `coverage`.
        papers: the paper of each claim.
    """
    differ = [cell for cell in rest["cells"] if cell["same"] is False and not cell["erratum"]]
    lines = ["", "## Coverage of the papers", "", ABOUT, ""]
    lines += ["| paper | claims | reported cells | not checkable |", "| :-- | --: | --: | --: |"]
    for paper in dict.fromkeys([*papers, *(cell["paper"] for cell in rest["cells"])]):
        parts = [[entry["paper"] for entry in rest[name]] for name in ("cells", "not_checkable")]
        counts = [each.count(paper) for each in (papers, *parts)]
        lines.append(f"| {paper} | {' | '.join(map(str, counts))} |")
    lines += ["", coverage_tally(rest) + ". " + COUNTS, ""]
    lines += ["| cell | reported | counted |", "| :-- | --: | --: |"]
    lines += [
        f"| `{c['cell']}` | {format_printed(c['reported'])} | {significant(c['counted'])} |"
        for c in differ
    ]
    lines += ["", "## Not checkable", ""]
    lines += [f"- *{name}*: {meaning}" for name, meaning in REASONS.items()]
    lines += ["", "| reason | statement | place | why |", "| :-- | :-- | :-- | :-- |"]
    for entry in rest["not_checkable"]:
        place = f"{entry['paper']}: {entry['place']}"
        lines.append(f"| {entry['reason']} | {entry['says']} | {place} | {entry['why']} |")
    return lines
