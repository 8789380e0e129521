"""The DAG of the artifact: data -> train -> measure -> tables, figures, claims, page.

snakemake --cores all results/tables                       everything but the paper, at scale smoke
snakemake --cores all results/runs                         train and measure only; data/packed: decode only
snakemake --cores all results/tables/hovit.md              one table
snakemake --cores all paper/paper.pdf                      the paper and its inputs
snakemake --cores all results/tables --config scale=mini data_root=../shared/data
snakemake --cores all results/tables --config imagenet=/data/imagenet weights=/data/weights
"""

import os
import re
import shlex
import sys
from pathlib import Path

from hovit.config.plan import load_plan
from hovit.pipeline import worker
from hovit.records.evidence import evidence_digest
from hovit.report.figures.draw import FIGURES
from hovit.report.metrics import metrics_files
from hovit.report.page.write import page_code
from hovit.report.paper.write import FILES
from hovit.utils.code_hash import code_hash
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


# Jobs on this machine run as forks of one process that has imported torch once.
onstart:
    if workflow.is_main_process and workflow.local_exec:
        worker.start()


# Tasks define their records, specs, code hashes and inputs; the rules below only query them.
STUDIES = PLAN.config.studies
TRAIN = {(run.id, str(run.seed)): PLAN.train_task(run) for run in PLAN.all_runs}
MEASURE = {study.id: PLAN.measure_task(study) for study in STUDIES.values()}
EVALUATE = {study.id: PLAN.evaluate_task(study) for study in STUDIES.values()}
ANALYSE = {name: PLAN.analyse_task(a) for name, a in PLAN.config.analyses.items()}
PACKS = PLAN.packs
IN_PLACE = {pack.id for pack in PACKS.values() if pack.in_place}
REPORT_CODE = code_hash("report")
EVIDENCE = evidence_digest()
# Reports describe images and recipes, so they depend on these files.
CONFIG = [
    f"config/scales/{SCALE}.yaml",
    *expand("config/datasets/{name}.yaml", name=PLAN.config.datasets),
    *expand("config/recipes/{name}.yaml", name=PLAN.config.recipes),
]
PAPER = sorted(
    str(path)
    for pattern in ("*.typ", "sections/*.typ", "*.bib", "*.yaml")
    for path in Path("paper").glob(pattern)
)
METRICS = [str(path) for path in metrics_files(PLAN)]
KEPT = PLAN.runs_with_kept_weights
DETECTORS = {run.id for run in PLAN.all_runs if run.is_detector}


# The image that envs/Containerfile builds; used only with `--sdm apptainer`.
container: "hovit.sif"


wildcard_constraints:
    run="[^/]+",
    seed="[0-9]+",
    study="|".join(STUDIES),
    analysis="|".join(ANALYSE),
    figure="|".join(FIGURES),


def one_of(names):
    """Return a pattern that matches exactly these names."""
    return "|".join(re.escape(name) for name in sorted(set(names))) or "(?!)"


rule all_tables:
    name:
        "results/tables"
    input:
        expand("results/tables/{study}.{ext}", study=STUDIES, ext=["csv", "md", "tex"]),
        expand("figures/{figure}.{ext}", figure=FIGURES, ext=["pdf", "png"]),
        "results/tables/index.md",
        "results/claims.json",
        "results/claims.md",
        "results/index.html",
        METRICS,


def records(studies):
    """List all records and packs that a report on these studies reads."""
    studies = list(studies)
    files = [task.path for task in PLAN.tasks(studies)]
    for study in studies:
        if study.kind == "data":
            for row in study.rows:
                files += [p.folder / "pack.json" for p in PLAN.packs_of(row.dataset)]
        if IMAGENET and EVALUATE[study.id]:
            files.append(EVALUATE[study.id].path)
    return sorted(set(map(str, files)))


def analyses(names):
    """List the records of the analyses for which this scale has data."""
    return [ANALYSE[name].path for name in names if ANALYSE[name]]


ALL_RECORDS = records(STUDIES.values())


rule all_data:
    name:
        "data/packed"
    input:
        expand("data/packed/{pack}/pack.json", pack=PACKS),


rule all_runs:
    name:
        "results/runs"
    input:
        ALL_RECORDS,
        analyses(ANALYSE),


rule data:
    output:
        "data/packed/{pack}/pack.json",
        "data/packed/{pack}/images.npy",
        "data/packed/{pack}/manifest.csv",
    log:
        "logs/data/{pack}.log",
    wildcard_constraints:
        pack=one_of(PACKS.keys() - IN_PLACE),
    threads: 2
    params:
        spec=lambda w: PACKS[w.pack].spec_hash,
        code=code_hash("data"),
    shell:
        "python -m hovit data {wildcards.pack} > {log} 2>&1"


# COCO and ImageNet are read in place: the rule checks them and computes a fingerprint.
use rule data as data_in_place with:
    output:
        "data/packed/{pack}/pack.json",
        "data/packed/{pack}/manifest.csv",
    wildcard_constraints:
        pack=one_of(IN_PLACE),
    params:
        spec=lambda w: PACKS[w.pack].spec_hash,
        code=lambda w: code_hash(
            "data" if PACKS[w.pack].dataset.reads_files else "detection"
        ),


# state.safetensors and best-N.safetensors are not declared, so that a killed run resumes from them.
rule train:
    input:
        lambda w: TRAIN[w.run, w.seed].inputs,
    output:
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/record.json",
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/weights.safetensors",
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/history.csv",
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/predictions.csv.gz",
    log:
        f"logs/train/{SCALE}/{{run}}/seed{{seed}}.log",
    wildcard_constraints:
        run=one_of(KEPT - DETECTORS),
    priority: lambda w: 1 if w.run in PLAN.upstreams else 0
    threads: PLAN.scale.threads
    resources:
        gpu=1,
        gpu_mb=PLAN.scale.gpu_memory_mb,
        mem_mb=PLAN.scale.memory_mb,
    params:
        scale=SCALE,
        spec=lambda w: TRAIN[w.run, w.seed].spec_hash,
        code=lambda w: TRAIN[w.run, w.seed].code,
    shell:
        "python -m hovit train {wildcards.run} --seed {wildcards.seed} --scale {params.scale}"
        " --threads {threads} > {log:q} 2>&1"


# A scale may delete weights that nothing reads.
use rule train as train_and_forget with:
    output:
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/record.json",
        temp(f"results/runs/{SCALE}/{{run}}/seed{{seed}}/weights.safetensors"),
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/history.csv",
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/predictions.csv.gz",
    wildcard_constraints:
        run=one_of(PLAN.runs.keys() - KEPT),


use rule train as train_detector with:
    output:
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/record.json",
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/weights.safetensors",
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/history.csv",
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/detections.json.gz",
    wildcard_constraints:
        run=one_of(DETECTORS),


# A measurement uses the machine alone: all cores and the GPU. At a scale that does not check
# latency, it shares the cores.
ALL_CORES = (workflow.resource_settings.cores and workflow.cores) or PLAN.scale.threads


rule measure:
    output:
        f"results/runs/{SCALE}/measure/{{study}}.json",
    log:
        f"logs/measure/{SCALE}/{{study}}.log",
    threads: ALL_CORES if "latency" in PLAN.scale.judges else PLAN.scale.latency.threads
    resources:
        gpu=1,
        gpu_mb=PLAN.scale.gpu_memory_mb,
        mem_mb=PLAN.scale.memory_mb,
    params:
        scale=SCALE,
        spec=lambda w: MEASURE[w.study].spec_hash,
        code=lambda w: MEASURE[w.study].code,
    shell:
        "python -m hovit measure {wildcards.study} --scale {params.scale} > {log} 2>&1"


def imagenet(wildcards):
    if not IMAGENET:
        raise WorkflowError("give --config imagenet=FOLDER (and weights=FOLDER)")
    return []


def weights_given():
    """Name and size of each weights file; evaluation runs again if they change."""
    found = Path(WEIGHTS).glob("*.safetensors") if WEIGHTS else []
    return sorted((path.name, path.stat().st_size) for path in found)


# Runs only with --config imagenet=FOLDER.
rule evaluate:
    input:
        imagenet,
    output:
        f"results/runs/{SCALE}/evaluation/{{study}}.json",
    log:
        f"logs/evaluate/{SCALE}/{{study}}.log",
    threads: PLAN.scale.threads
    resources:
        gpu=1,
        gpu_mb=PLAN.scale.gpu_memory_mb,
        mem_mb=PLAN.scale.memory_mb,
    params:
        scale=SCALE,
        spec=lambda w: EVALUATE[w.study].spec_hash,
        code=lambda w: EVALUATE[w.study].code,
        weights=digest([IMAGENET, weights_given()]),
    shell:
        "python -m hovit evaluate {wildcards.study} --scale {params.scale} > {log} 2>&1"


rule analyse:
    input:
        lambda w: ANALYSE[w.analysis].inputs,
    output:
        f"results/runs/{SCALE}/analysis/{{analysis}}.json",
        f"results/runs/{SCALE}/analysis/{{analysis}}.csv",
    log:
        f"logs/analyse/{SCALE}/{{analysis}}.log",
    threads: PLAN.scale.threads
    resources:
        gpu=1,
        gpu_mb=PLAN.scale.gpu_memory_mb,
        mem_mb=PLAN.scale.memory_mb,
    params:
        scale=SCALE,
        spec=lambda w: ANALYSE[w.analysis].spec_hash,
        code=lambda w: ANALYSE[w.analysis].code,
    shell:
        "python -m hovit analyse {wildcards.analysis} --scale {params.scale} > {log} 2>&1"


rule table:
    input:
        lambda w: records([STUDIES[w.study]]),
        CONFIG,
        study="config/studies/{study}.yaml",
    output:
        multiext("results/tables/{study}", ".csv", ".md", ".tex"),
    log:
        "logs/table/{study}.log",
    params:
        scale=SCALE,
        code=REPORT_CODE,
        evidence=EVIDENCE,
    shell:
        "python -m hovit table {wildcards.study} --scale {params.scale} > {log} 2>&1"


rule figure:
    input:
        lambda w: records([STUDIES[name] for name in FIGURES[w.figure].studies]),
        lambda w: expand("config/studies/{study}.yaml", study=FIGURES[w.figure].studies),
        lambda w: analyses(FIGURES[w.figure].analyses),
        CONFIG,
    output:
        multiext("figures/{figure}", ".pdf", ".png"),
    log:
        "logs/figure/{figure}.log",
    params:
        scale=SCALE,
        code=REPORT_CODE,
        evidence=EVIDENCE,
    shell:
        "python -m hovit figure {wildcards.figure} --scale {params.scale} > {log} 2>&1"


rule judge:
    input:
        lambda w: records(PLAN.claimed),
        analyses(PLAN.claimed_analyses),
        expand("config/studies/{study}.yaml", study=STUDIES),
        expand("config/claims/{claims}.yaml", claims=PLAN.config.claims),
        CONFIG,
    output:
        "results/claims.json",
        "results/claims.md",
    log:
        "logs/judge.log",
    params:
        scale=SCALE,
        code=REPORT_CODE,
        evidence=EVIDENCE,
    shell:
        "python -m hovit claims --scale {params.scale} > {log} 2>&1"


# Prints the tally; fails if a verdict differs from results/verdicts.json.
rule claims:
    input:
        "results/claims.json",
    log:
        "logs/claims.log",
    params:
        scale=SCALE,
    shell:
        "python -m hovit claims --check --scale {params.scale} 2>&1 | tee {log}"


rule index:
    input:
        expand("results/tables/{study}.csv", study=STUDIES),
    output:
        "results/tables/index.md",
    log:
        "logs/index.log",
    params:
        scale=SCALE,
        code=REPORT_CODE,
    shell:
        "python -m hovit index --scale {params.scale} > {log} 2>&1"


rule paper:
    input:
        ALL_RECORDS,
        expand("figures/{figure}.pdf", figure=FIGURES),
        expand("config/studies/{study}.yaml", study=STUDIES),
        expand("config/claims/{claims}.yaml", claims=PLAN.config.claims),
        CONFIG,
        PAPER,
    output:
        "paper/paper.pdf",
        expand("results/paper/{name}.json", name=FILES),
    log:
        "logs/paper.log",
    params:
        scale=SCALE,
        code=REPORT_CODE,
        evidence=EVIDENCE,
    shell:
        "python -m hovit paper --scale {params.scale} > {log} 2>&1"


rule metrics:
    input:
        ALL_RECORDS,
        "results/claims.json",
    output:
        METRICS,
    log:
        "logs/metrics.log",
    params:
        scale=SCALE,
        code=REPORT_CODE,
    shell:
        "python -m hovit metrics --scale {params.scale} > {log} 2>&1"


rule page:
    input:
        ALL_RECORDS,
        analyses(ANALYSE),
        expand("config/studies/{study}.yaml", study=STUDIES),
        expand("config/claims/{claims}.yaml", claims=PLAN.config.claims),
        expand("config/analyses/{name}.yaml", name=ANALYSE),
        CONFIG,
    output:
        "results/index.html",
    log:
        "logs/page.log",
    params:
        scale=SCALE,
        code=page_code(),
        evidence=EVIDENCE,
    shell:
        "python -m hovit page --scale {params.scale} > {log} 2>&1"
