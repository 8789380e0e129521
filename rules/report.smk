"""Reports: records -> tables, figures, claims, metrics, page and paper."""

from hovit.records.evidence import evidence_digest
from hovit.report.page.write import page_code
from hovit.report.paper.write import FILES
from hovit.utils.code_hash import code_hash

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
