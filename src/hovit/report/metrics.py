"""Files for `dvc metrics` and `dvc plots`: one JSON for each run, the claims' tally, histories."""

import csv
import io
from pathlib import Path

from ..config.metrics import PRECISION
from ..config.plan import Plan
from ..config.runs import Run
from ..records.record import read_record
from ..utils.files import read_json, write_json, write_text
from .claims.check import ERRATA, GROUPS, VERDICTS

METRICS = Path("results/metrics")
SHOWN = ("top1", "loss", "val_top1", "best_epoch", *PRECISION)


def metrics_files(plan: Plan) -> list[Path]:
    """Every file that `write_metrics` writes, from the top of the artifact."""
    folder = METRICS / plan.scale.id
    runs = [folder / f"{_name(run)}.json" for run in plan.all_runs]
    return [folder / "claims.json", *runs, METRICS / f"{plan.scale.id}.csv"]


def write_metrics(plan: Plan, root: Path = Path()) -> None:
    """Write all of them from this run's records and `results/claims.json`."""
    claims, *files, histories = [root / path for path in metrics_files(plan)]
    found = read_json(root / "results/claims.json")["claims"]
    verdicts = {group: [c["verdict"] for c in found if c["group"] == group] for group in GROUPS}
    tallies = {
        group: {name.replace(" ", "_"): names.count(name) for name in (*VERDICTS, *ERRATA)}
        for group, names in verdicts.items()
    }
    write_json(claims, tallies)
    rows = []
    for run, file in zip(plan.all_runs, files, strict=True):
        results = read_record(root / plan.train_task(run).path).results
        write_json(file, {name: results[name] for name in SHOWN if name in results})
        rows += [{"run": _name(run)} | entry for entry in results["history"]]
    table = io.StringIO()
    names = dict.fromkeys(["run", *(name for row in rows for name in row)])
    writer = csv.DictWriter(table, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(histories, table.getvalue())


def _name(run: Run) -> str:
    return f"{run.id}.seed{run.seed}"
