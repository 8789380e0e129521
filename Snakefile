"""The only DAG: data -> train -> measure -> tables, figures, claims, page.

snakemake --cores all results/tables                       everything, at scale smoke
snakemake --cores all results/runs                         train and measure only; data/packed: decode only
snakemake --cores all results/tables/hovit.md              one table
snakemake --cores all paper/paper.pdf                      the paper, with all that it reads
snakemake --cores all results/tables --config scale=mini data_root=../shared/data
snakemake --cores all results/tables --config imagenet=/data/imagenet weights=/data/weights
"""

import os
import re
import shlex
import sys
from pathlib import Path

from hovit.errors import HovitError
from hovit.evidence import evidence_digest
from hovit.files import digest
from hovit.plan import load_plan
from hovit.report.figures import FIGURES
from hovit.report.metrics import metrics_files
from hovit.report.page import page_code
from hovit.report.paper import FILES
from hovit.sources import analysis_code, code_hash

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
except HovitError as error:
    sys.exit(f"error: {error}")

# By the environment and not as parameters: where files lie changes no result.
SETTINGS = {
    "HOVIT_DATA": DATA_ROOT,
    "HOVIT_WEIGHTS": str(WEIGHTS or ""),
    "HOVIT_IMAGENET": str(IMAGENET or ""),
    "PATH": os.path.dirname(sys.executable) + os.pathsep + os.getenv("PATH", ""),
}
EXPORTS = " ".join(f"{key}={shlex.quote(value)}" for key, value in SETTINGS.items())
shell.prefix(f"set -euo pipefail; export {EXPORTS}; ")

RUNS = [run for seeds in PLAN.runs.values() for run in seeds.values()]
PACKS = PLAN.packs
# Packs whose images stay where they are.
COCO = {run.pack.id for run in RUNS if run.detects}
STUDIES = PLAN.catalogue.studies
EVIDENCE = evidence_digest()
# What a report says of images and recipes.
CONFIG = [
    f"config/scales/{SCALE}.yaml",
    *expand("config/datasets/{name}.yaml", name=PLAN.catalogue.datasets),
    *expand("config/recipes/{name}.yaml", name=PLAN.catalogue.recipes),
]
PAPER = sorted(
    str(path)
    for pattern in ("*.typ", "sections/*.typ", "*.bib", "*.yaml")
    for path in Path("paper").glob(pattern)
)
METRICS = [str(path) for path in metrics_files(PLAN)]
# Whose weights stay.
KEPT = {
    run.id
    for run in RUNS
    if PLAN.scale.keep_weights or run.detects or run.id in PLAN.read
}


# The image that envs/Containerfile builds; used only with `--sdm apptainer`.
container: "hovit.sif"


wildcard_constraints:
    run="[^/]+",
    seed="[0-9]+",
    study="|".join(STUDIES),
    analysis="|".join(PLAN.catalogue.analyses),
    figure="|".join(FIGURES),


def one_of(names):
    """A pattern for these names alone; for none, one that matches nothing."""
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


def run_of(wildcards):
    return PLAN.run(wildcards.run, int(wildcards.seed))


def pretrained(wildcards):
    upstream = PLAN.upstream(run_of(wildcards))
    return [upstream.folder / "weights.safetensors"] if upstream else []


def records(studies):
    """Everything that a report on these studies reads."""
    files = []
    for study in studies:
        for row in study.rows:
            runs = PLAN.runs_of(study, row)
            files += [run.folder / "record.json" for run in runs]
            upstream = [PLAN.upstream(run) for run in runs]
            files += [run.folder / "record.json" for run in upstream if run]
            role = row.dataset if study.kind == "data" else None
            files += [p.folder / "pack.json" for p in PLAN.packs_of(role)]
        if PLAN.rows_run(study):
            files.append(PLAN.measured(study))
        if IMAGENET and PLAN.evaluation_spec(study)["rows"]:
            files.append(PLAN.evaluated(study))
    return sorted(set(map(str, files)))


def analyses(names):
    """The records of those analyses that this scale has the data for."""
    found = [PLAN.analysis(name) for name in names]
    return [PLAN.analysed(each) for each in found if PLAN.analysed_runs(each)]


rule all_data:
    name:
        "data/packed"
    input:
        expand("data/packed/{pack}/pack.json", pack=PACKS),


rule all_runs:
    name:
        "results/runs"
    input:
        records(STUDIES.values()),
        analyses(PLAN.catalogue.analyses),


rule data:
    output:
        "data/packed/{pack}/pack.json",
        "data/packed/{pack}/images.npy",
        "data/packed/{pack}/manifest.csv",
    log:
        "logs/data/{pack}.log",
    wildcard_constraints:
        pack=one_of(PACKS.keys() - COCO),
    threads: 2
    params:
        spec=lambda w: PACKS[w.pack].spec_hash,
        code=code_hash("data"),
    shell:
        "python -m hovit data {wildcards.pack} > {log} 2>&1"


# COCO's images stay where they are: they are looked through, and named by a fingerprint.
use rule data as data_coco with:
    output:
        "data/packed/{pack}/pack.json",
        "data/packed/{pack}/manifest.csv",
    wildcard_constraints:
        pack=one_of(COCO),
    params:
        spec=lambda w: PACKS[w.pack].spec_hash,
        code=code_hash("detection"),


# state.safetensors and best-N.safetensors are not declared: a killed run goes on from them.
rule train:
    input:
        pack=lambda w: run_of(w).pack.folder / "pack.json",
        images=lambda w: run_of(w).pack.folder / "images.npy",
        weights=pretrained,
    output:
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/record.json",
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/weights.safetensors",
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/history.csv",
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/predictions.csv.gz",
    log:
        f"logs/train/{SCALE}/{{run}}/seed{{seed}}.log",
    wildcard_constraints:
        run=one_of(run.id for run in RUNS if not run.detects and run.id in KEPT),
    priority: lambda w: 1 if w.run in PLAN.upstreams else 0
    threads: PLAN.scale.threads
    resources:
        gpu=1,
        gpu_mb=PLAN.scale.gpu_memory_mb,
        mem_mb=PLAN.scale.memory_mb,
    params:
        scale=SCALE,
        spec=lambda w: run_of(w).spec_hash,
        code=lambda w: run_of(w).code,
    shell:
        "python -m hovit train {wildcards.run} --seed {wildcards.seed} --scale {params.scale}"
        " --threads {threads} > {log:q} 2>&1"


# The scale keeps no weights that nothing reads.
use rule train as train_and_forget with:
    output:
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/record.json",
        temp(f"results/runs/{SCALE}/{{run}}/seed{{seed}}/weights.safetensors"),
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/history.csv",
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/predictions.csv.gz",
    wildcard_constraints:
        run=one_of(run.id for run in RUNS if run.id not in KEPT),


use rule train as train_detector with:
    input:
        pack=lambda w: run_of(w).pack.folder / "pack.json",
        manifest=lambda w: run_of(w).pack.folder / "manifest.csv",
        weights=pretrained,
    output:
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/record.json",
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/weights.safetensors",
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/history.csv",
        f"results/runs/{SCALE}/{{run}}/seed{{seed}}/detections.json.gz",
    wildcard_constraints:
        run=one_of(run.id for run in RUNS if run.detects),


# Latency wants the machine for itself: all cores, and the card.
rule measure:
    output:
        f"results/runs/{SCALE}/measure/{{study}}.json",
    log:
        f"logs/measure/{SCALE}/{{study}}.log",
    threads: workflow.resource_settings.cores or PLAN.scale.threads
    resources:
        gpu=1,
        gpu_mb=PLAN.scale.gpu_memory_mb,
        mem_mb=PLAN.scale.memory_mb,
    params:
        scale=SCALE,
        spec=lambda w: digest(PLAN.measure_spec(STUDIES[w.study])),
        code=lambda w: digest(
            [code_hash("measure", model) for model in PLAN.models(STUDIES[w.study])]
        ),
    shell:
        "python -m hovit measure {wildcards.study} --scale {params.scale} > {log} 2>&1"


def imagenet(wildcards):
    if not IMAGENET:
        raise WorkflowError("give --config imagenet=FOLDER (and weights=FOLDER)")
    return []


def weights_given():
    """Name and size of each file of weights: what evaluation must follow."""
    found = Path(WEIGHTS).glob("*.safetensors") if WEIGHTS else []
    return sorted((path.name, path.stat().st_size) for path in found)


# Asked for only where ImageNet is given.
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
        spec=lambda w: digest(PLAN.evaluation_spec(STUDIES[w.study])),
        code=code_hash("evaluation"),
        weights=digest([IMAGENET, weights_given()]),
    shell:
        "python -m hovit evaluate {wildcards.study} --scale {params.scale} > {log} 2>&1"


rule analyse:
    input:
        lambda w: [
            run.folder / name
            for run in PLAN.analysed_runs(PLAN.analysis(w.analysis)).values()
            for name in ("weights.safetensors", "record.json")
        ],
        lambda w: [
            PLAN.analysis_pack(PLAN.analysis(w.analysis), run).folder / "images.npy"
            for run in PLAN.analysed_runs(PLAN.analysis(w.analysis)).values()
        ],
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
        spec=lambda w: digest(PLAN.analysis_spec(PLAN.analysis(w.analysis))),
        code=lambda w: analysis_code(PLAN.analysis_spec(PLAN.analysis(w.analysis))),
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
        code=code_hash("report"),
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
        code=code_hash("report"),
        evidence=EVIDENCE,
    shell:
        "python -m hovit figure {wildcards.figure} --scale {params.scale} > {log} 2>&1"


rule judge:
    input:
        lambda w: records(PLAN.claimed),
        analyses(PLAN.claimed_analyses),
        expand("config/studies/{study}.yaml", study=STUDIES),
        expand("config/claims/{claims}.yaml", claims=PLAN.catalogue.claims),
        CONFIG,
    output:
        "results/claims.json",
        "results/claims.md",
    log:
        "logs/judge.log",
    params:
        scale=SCALE,
        code=code_hash("report"),
        evidence=EVIDENCE,
    shell:
        "python -m hovit claims --scale {params.scale} > {log} 2>&1"


# Prints the tally; fails if a verdict is other than the one in results/verdicts.json.
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
        code=code_hash("report"),
    shell:
        "python -m hovit index --scale {params.scale} > {log} 2>&1"


rule paper:
    input:
        records(STUDIES.values()),
        expand("figures/{figure}.pdf", figure=FIGURES),
        expand("config/studies/{study}.yaml", study=STUDIES),
        expand("config/claims/{claims}.yaml", claims=PLAN.catalogue.claims),
        CONFIG,
        PAPER,
    output:
        "paper/paper.pdf",
        expand("results/paper/{name}.json", name=FILES),
    log:
        "logs/paper.log",
    params:
        scale=SCALE,
        code=code_hash("report"),
        evidence=EVIDENCE,
    shell:
        "python -m hovit paper --scale {params.scale} > {log} 2>&1"


rule metrics:
    input:
        records(STUDIES.values()),
        "results/claims.json",
    output:
        METRICS,
    log:
        "logs/metrics.log",
    params:
        scale=SCALE,
        code=code_hash("report"),
    shell:
        "python -m hovit metrics --scale {params.scale} > {log} 2>&1"


rule page:
    input:
        records(STUDIES.values()),
        analyses(PLAN.catalogue.analyses),
        expand("config/studies/{study}.yaml", study=STUDIES),
        expand("config/claims/{claims}.yaml", claims=PLAN.catalogue.claims),
        expand("config/analyses/{name}.yaml", name=PLAN.catalogue.analyses),
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
