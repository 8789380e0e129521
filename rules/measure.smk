"""Measurements, evaluation on ImageNet and analyses of trained models -> records."""


rule measure:
    output:
        f"results/runs/{SCALE}/measure/{{study}}.json",
    log:
        f"logs/measure/{SCALE}/{{study}}.log",
    threads: timing_threads(PLAN.scale.latency.threads)
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


# Runs only with --config imagenet=FOLDER.
rule evaluate:
    input:
        imagenet,
    output:
        update(f"results/runs/{SCALE}/evaluation/{{study}}.json"),  # keeps rows without weights
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
    threads: analysis_threads
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
