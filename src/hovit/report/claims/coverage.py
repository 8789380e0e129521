"""The rest of the ledger: what of the seeds is no claim.

A number that a table carries beside ours is a *reported cell*. Counts among them (parameters,
multiply-adds, images) are held against what was counted here; accuracy and times stand beside ours,
and claims compare them. What cannot be checked is listed in the claims' files, with the reason.
"""

from pathlib import Path
from typing import Any

from ...config.plan import Plan
from ...config.schema import Row, Study
from ..results import INEXACT, Results, find_evidence
from ..tables.columns import SCALES, format_printed

REASONS = {
    "data": "needs images or a training that no scale has",
    "hardware": "of a device that is not here",
    "unsaid": "the seed does not say what was done or meant",
    "undone": "could be checked, but no study does",
    "setting": "says how something is built or trained: configuration and tests hold it",
    "others": "about others' work",
    "opinion": "a judgement, an explanation or a wish",
}
ABOUT = (
    "A *reported cell* is a number of a seed that a table shows beside ours. What is *not "
    "checkable* here is listed below, with the reason."
)
COUNTS = (
    "Counted are parameters, multiply-adds and images; these differ from the seed's by more than "
    "one unit of its last digit:"
)


def last_digit(printed: str) -> float:
    """One unit of the last decimal of a printed number; 0 for a whole one."""
    decimals = len(printed.partition("–")[0].partition(".")[2])
    return 10.0**-decimals if decimals else 0.0


def ledger(plan: Plan, root: Path = Path()) -> dict[str, Any]:
    """The reported cells and what is not checkable, as `results/claims.json` has them."""
    files = plan.config.claims.values()
    return {
        "cells": cells(plan, root),
        "not_checkable": [
            {"seed": file.seed} | entry.model_dump()
            for file in files
            for entry in file.not_checkable
        ],
    }


def cells(plan: Plan, root: Path = Path()) -> list[dict[str, Any]]:
    """Every number that a table shows as reported.

    `counted` is what was counted here, in the heading's unit, and `same` whether the two agree to
    one unit of the last printed digit (whole counts exactly); both None for what is trained or
    timed, and in a study that no claim looks at: its records need not be there when claims are
    judged.
    """
    sources = [Results(plan, root), *find_evidence(plan, root)]
    found: list[dict[str, Any]] = []
    for study in plan.config.studies.values():
        for row in study.rows:
            for metric, printed in row.reported.items():
                counted = _counted(sources, study, row, metric) if study in plan.claimed else None
                same = None if counted is None else _same(counted, printed, metric)
                cell = {"cell": f"{study.id}/{row.id}/{metric}", "reported": printed}
                seed = {"seed": study.source.seed}
                found.append(seed | cell | {"counted": counted, "same": same})
    return found


def _counted(sources: list[Results], study: Study, row: Row, metric: str) -> float | None:
    """A count in the heading's unit, by the first that has it; None for what is no count."""
    if metric in INEXACT:
        return None
    values = (results.value(study, row, metric) for results in sources)
    value = next((value for value in values if value), None)
    return value.mean * SCALES.get(metric, 1.0) if value else None


def _same(counted: float, printed: str, metric: str) -> bool:
    unit = last_digit(printed) or float(metric in SCALES)  # millions are rounded, images are not
    return abs(counted - float(printed)) <= unit + 1e-9


def ledger_tally(rest: dict[str, Any]) -> str:
    """How many sentences and numbers are not checkable, and how many reported cells, in a line."""
    counts = [cell["same"] for cell in rest["cells"] if cell["same"] is not None]
    return (
        f"{len(rest['not_checkable'])} not checkable ({by_reason(rest)}); "
        f"{len(rest['cells'])} reported cells, {len(counts)} of them counted here: "
        f"{counts.count(True)} as printed, {counts.count(False)} not"
    )


def by_reason(rest: dict[str, Any]) -> str:
    """The reasons that there are, each with how often."""
    given = [entry["reason"] for entry in rest["not_checkable"]]
    return ", ".join(f"{given.count(name)} {name}" for name in REASONS if name in given)


def ledger_lines(rest: dict[str, Any], seeds: list[str]) -> list[str]:
    """The ledger's part of `results/claims.md`.

    Args:
        rest: what `ledger` gives.
        seeds: each claim's.
    """
    differ = [cell for cell in rest["cells"] if cell["same"] is False]
    lines = ["", "## What else the seeds say", "", ABOUT, ""]
    lines += ["| seed | claims | reported cells | not checkable |", "| :-- | --: | --: | --: |"]
    for seed in dict.fromkeys(seeds):
        parts = [[entry["seed"] for entry in rest[name]] for name in ("cells", "not_checkable")]
        counts = [each.count(seed) for each in (seeds, *parts)]
        lines.append(f"| {seed} | {' | '.join(map(str, counts))} |")
    lines += ["", ledger_tally(rest) + ". " + COUNTS, ""]
    lines += ["| cell | reported | counted |", "| :-- | --: | --: |"]
    lines += [
        f"| `{c['cell']}` | {format_printed(c['reported'])} | {c['counted']:,.6g} |" for c in differ
    ]
    lines += ["", "## Not checkable", ""]
    lines += [f"- *{name}*: {meaning}" for name, meaning in REASONS.items()]
    lines += ["", "| reason | the seed says | place | why |", "| :-- | :-- | :-- | :-- |"]
    for entry in rest["not_checkable"]:
        place = f"{entry['seed']}: {entry['place']}"
        lines.append(f"| {entry['reason']} | {entry['says']} | {place} | {entry['why']} |")
    return lines
