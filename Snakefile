"""The DAG of the artifact: data -> train -> measure -> tables, figures, claims, page.

snakemake --cores all results/tables                       everything but the paper, at scale smoke
snakemake --cores all results/runs                         train and measure only; data/packed: decode only
snakemake --cores all results/tables/hovit.md              one table
snakemake --cores all paper/paper.pdf                      the paper and its inputs
snakemake --cores all results/tables --config scale=mini data_root=../shared/data
snakemake --cores all results/tables --config imagenet=/data/imagenet weights=/data/weights
"""

from hovit.pipeline import worker


include: "rules/common.smk"


# Jobs on this machine run as forks of one process that has imported torch once.
onstart:
    if workflow.is_main_process and workflow.local_exec:
        worker.start()


# `snakemake --lint` asks for an environment: the image that envs/Containerfile builds. Without
# `--sdm apptainer`, which has not been tested, jobs run in the environment of Snakemake.
container: "hovit.sif"


wildcard_constraints:
    run="[^/]+",
    seed="[0-9]+",
    study="|".join(STUDIES),
    analysis="|".join(ANALYSE),
    figure="|".join(FIGURES),


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


include: "rules/data.smk"
include: "rules/train.smk"
include: "rules/measure.smk"
include: "rules/report.smk"
