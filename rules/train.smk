"""Training: packed images, and the weights of another run -> record, weights and history."""


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
