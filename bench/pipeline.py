"""CPU and wall time of the last `make tables` by rule, from the records of Snakemake and its jobs.

python bench/pipeline.py                       print a Markdown table for this checkout
python bench/pipeline.py --json now.json       also write the numbers to a file
python bench/pipeline.py --before then.json    also show the numbers of an earlier run

Wall time is from .snakemake/metadata; CPU time (user + sys) is the last line of each job's log,
which the pipeline's worker writes. The CPU time of Snakemake itself is not included; `time make
tables` gives the total. Jobs run in parallel, so the sum of wall times exceeds that of the run.
"""

import argparse
import json
import re
import signal
from pathlib import Path
from typing import Any

CPU_LINE = re.compile(r"cpu (\d+\.\d+) s\s*\Z")
WORKER = "(imports, once)"
Figures = dict[str, dict[str, float]]


def jobs(root: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The record of each finished job: (rule, first log) -> metadata of one of its outputs."""
    found = {}
    for path in (root / ".snakemake/metadata").rglob("*"):
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.get("endtime") and record.get("log"):
                found[record["rule"], record["log"][0]] = record
    return found


def cpu_seconds(log: Path) -> float | None:
    """The CPU time in the last line of a job's log, if there is one."""
    if not log.is_file():
        return None
    found = CPU_LINE.search(log.read_text(encoding="utf-8", errors="replace"))
    return float(found[1]) if found else None


def figures(root: Path) -> Figures:
    """Jobs, CPU and wall seconds by rule; `unknown` are the jobs whose log gives no CPU time."""
    found: Figures = {}
    for (rule, log), record in jobs(root).items():
        name = rule.split("_")[0]  # train_and_forget and train_detector train
        row = found.setdefault(name, {"jobs": 0, "cpu": 0.0, "wall": 0.0, "unknown": 0})
        seconds = cpu_seconds(root / log)
        row["jobs"] += 1
        row["wall"] += record["endtime"] - record["starttime"]
        row["cpu"] += seconds or 0.0
        row["unknown"] += seconds is None
    imports = cpu_seconds(root / "logs/worker.log")
    if imports is not None:
        found[WORKER] = {"jobs": 1, "cpu": imports, "wall": imports, "unknown": 0}
    return found


def slowest(root: Path, count: int) -> list[tuple[float, str]]:
    """The jobs that took the most CPU time."""
    timed = [(cpu_seconds(root / log) or 0.0, log) for _, log in jobs(root)]
    return sorted(timed, reverse=True)[:count]


def table(now: Figures, before: Figures | None = None) -> str:
    """The numbers as Markdown, with the most CPU time first."""
    sides = [now] if before is None else [before, now]
    names = sorted(
        {name for side in sides for name in side},
        key=lambda name: -max(side.get(name, {}).get("cpu", 0) for side in sides),
    )
    head = ["rule"] + ["jobs", "CPU s", "wall s"] * len(sides)
    lines = ["| " + " | ".join(head) + " |", "| :-- |" + " --: |" * (len(head) - 1)]
    for name in [*names, "all"]:
        cells = [name]
        for side in sides:
            chosen = list(side.values()) if name == "all" else [side[name]] * (name in side)
            cells += [_cell(chosen, key) for key in ("jobs", "cpu", "wall")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(rows: list[dict[str, float]], key: str) -> str:
    if not rows or (key == "cpu" and all(row["unknown"] == row["jobs"] for row in rows)):
        return "–"
    return f"{sum(row[key] for row in rows):,.0f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(), help="top folder of a checkout")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--before", type=Path, help="numbers of an earlier run")
    parser.add_argument("--slowest", type=int, default=10, help="number of slowest jobs to list")
    args = parser.parse_args()
    now = figures(args.root)
    if not now:
        raise SystemExit(
            f"error: {args.root / '.snakemake/metadata'}: no finished job; make tables"
        )
    before = json.loads(args.before.read_text(encoding="utf-8")) if args.before else None
    print(table(now, before))
    if unknown := sum(int(row["unknown"]) for row in now.values()):
        print(f"\n{unknown} jobs ran without the worker, and their CPU time is not known")
    print(
        "\n"
        + "\n".join(f"{cpu:8.1f} s CPU  {log}" for cpu, log in slowest(args.root, args.slowest))
    )
    if args.json:
        args.json.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when piped to `head`
    main()
