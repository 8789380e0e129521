"""Settings, the plan at one scale, and what rules ask it."""

import os
import re
import shlex
import sys
from pathlib import Path

from hovit.config.kinds import ANALYSIS_KINDS
from hovit.config.plan import load_plan
from hovit.report.figures.draw import FIGURES
from hovit.report.metrics import metrics_files
from hovit.utils.errors import HovitError
from hovit.utils.files import digest
from hovit.utils.machine import check_writable, usable_cpus, usable_memory_mb
from snakemake.utils import available_cpu_count

KNOWN = ["scale", "data_root", "weights", "imagenet"]
if unknown := sorted(map(str, config.keys() - set(KNOWN))):
    sys.exit(
        f"error: --config {', '.join(unknown)}: not known; there are {', '.join(KNOWN)}"
    )
SCALE = config.get("scale", "smoke")
DATA_ROOT = str(config.get("data_root", os.getenv("HOVIT_DATA", "data")))
WEIGHTS = config.get("weights") or os.getenv("HOVIT_WEIGHTS")
IMAGENET = config.get("imagenet") or os.getenv("HOVIT_IMAGENET")
try:
    PLAN = load_plan(SCALE, weights_file=WEIGHTS)
    check_writable(".snakemake", "logs", "results")
except HovitError as error:
    sys.exit(f"error: {error}")

# `--cores all` counts the processors of the machine, and profiles/default assumes the memory of a
# typical one. A container may allow less; the limit on memory always leaves enough for one job.
if workflow.resource_settings.cores == available_cpu_count():
    workflow.register_resource("_cores", usable_cpus())
given, usable = workflow.global_resources.get("mem_mb"), usable_memory_mb()
if (
    workflow.local_exec
    and given
    and given.value
    and (usable or given.value) < given.value
):
    workflow.register_resource("mem_mb", max(usable, PLAN.scale.memory_mb))

# Passed in the environment, not as parameters, because the location of files changes no result.
SETTINGS = {
    "HOVIT_DATA": DATA_ROOT,
    "HOVIT_WEIGHTS": str(WEIGHTS or ""),
    "HOVIT_IMAGENET": str(IMAGENET or ""),
    "PATH": os.path.dirname(sys.executable) + os.pathsep + os.getenv("PATH", ""),
}
EXPORTS = " ".join(f"{key}={shlex.quote(value)}" for key, value in SETTINGS.items())
shell.prefix(f"set -euo pipefail; export {EXPORTS}; ")

# Tasks define their records, specs, code hashes and inputs; the rules below only query them.
STUDIES = PLAN.config.studies
TRAIN = {(run.id, str(run.seed)): PLAN.train_task(run) for run in PLAN.all_runs}
MEASURE = {study.id: PLAN.measure_task(study) for study in STUDIES.values()}
EVALUATE = {study.id: PLAN.evaluate_task(study) for study in STUDIES.values()}
ANALYSE = {name: PLAN.analyse_task(a) for name, a in PLAN.config.analyses.items()}
PACKS = PLAN.packs
IN_PLACE = {pack.id for pack in PACKS.values() if pack.in_place}
METRICS = [str(path) for path in metrics_files(PLAN)]
KEPT = PLAN.runs_with_kept_weights
DETECTORS = {run.id for run in PLAN.all_runs if run.is_detector}


def one_of(names):
    """Return a pattern that matches exactly these names."""
    return "|".join(re.escape(name) for name in sorted(set(names))) or "(?!)"


def records(studies):
    """List all records and packs that a report on these studies reads."""
    studies = list(studies)
    files = [task.path for task in PLAN.tasks(studies)]
    for study in studies:
        if study.kind == "data":
            for row in study.rows:
                files += [p.folder / "pack.json" for p in PLAN.packs_of(row.dataset)]
        if IMAGENET:
            evaluated = [EVALUATE[name] for name in (study.id, *study.cites)]
            files += [task.path for task in evaluated if task]
    return sorted(set(map(str, files)))


def analyses(names):
    """List the records of the analyses for which this scale has data."""
    return [ANALYSE[name].path for name in names if ANALYSE[name]]


def imagenet(wildcards):
    if not IMAGENET:
        raise WorkflowError("give --config imagenet=FOLDER (and weights=FOLDER)")
    return []


def timing_threads(threads):
    """Return all cores where a scale checks latency: a measurement has the machine alone."""
    if "latency" not in PLAN.scale.judges:
        return threads
    return (workflow.resource_settings.cores and workflow.cores) or PLAN.scale.threads


def analysis_threads(wildcards):
    """Return the threads of an analysis; one that measures time is a measurement."""
    kind = ANALYSIS_KINDS[PLAN.analysis(wildcards.analysis).kind]
    threads = PLAN.scale.threads
    return timing_threads(threads) if kind.measures_time else threads


def weights_given():
    """Name and size of each weights file; evaluation runs again if they change."""
    found = Path(WEIGHTS).glob("*.safetensors") if WEIGHTS else []
    return sorted((path.name, path.stat().st_size) for path in found)


ALL_RECORDS = records(STUDIES.values())
