"""Facts that every table states: scale, data, device, seeds, how latency was measured."""

from typing import Any

import pandas as pd

from ...config.metrics import METRICS
from ...config.runs import Run, protocol
from ...config.schema import Recipe, Row, Scale, Study
from ...utils.plural import plural
from ..results import Results

WORKLOADS = {
    "gradients": "forward passes with all gradients",
    "training": "whole training steps (AdamW)",
}
# Identifiers of the protocol in words. Records of the first version hold the words themselves.
PRECISIONS = {"fp32": "fp32, TF32 off"}
SAMPLES = {
    None: "one pass per sample",  # records before the protocol had versions
    "cuda-events-10ms": "a sample is the mean of the passes in 10 ms, after 0.3 s of warm-up",
}
MEMORY = {
    "kept": "freed memory kept, where the C library is glibc",
    "returned": "freed memory returned to the system, as glibc does",
}


def describe(results: Results, study: Study) -> dict[str, str]:
    """The facts about a study's numbers from one source."""
    plan = results.plan
    scale = plan.scale
    facts = {"Scale": f"`{scale.id}`: {scale.title}"}
    if study.kind == "data":
        for row in study.rows:
            if row.dataset in scale.datasets:
                dataset = plan.config.datasets[scale.datasets[row.dataset]]
                facts[row.label] = f"{dataset.title} — {dataset.about}"
        return facts
    models = dict.fromkeys(str(row.model) for row in study.rows if row.model)
    if stand_ins := [_stand_in(scale, model) for model in models if model in scale.models]:
        facts["Models that stand in"] = ", ".join(stand_ins)
    if study.trained:
        if not plan.rows_run(study):
            facts["Data"] = "this scale has no data for this study, so nothing was run"
            return facts
        facts |= _training(results, study)
    return facts | _evaluation(results, study) | _measurement(results, study)


def _stand_in(scale: Scale, model: str) -> str:
    """Which model stands in for one of the paper's, and in what."""
    stand_in = scale.models[model]
    text = f"`{stand_in.model}` for `{model}`"
    return text if stand_in.measured else f"{text} in training (cost and speed are of `{model}`)"


def _training(results: Results, study: Study) -> dict[str, str]:
    """Images, device, commit, recipe and seeds of the trained rows."""
    plan, scale, facts = results.plan, results.plan.scale, {}
    rows = plan.rows_run(study)
    runs = [run for row in rows for run in plan.runs_of(study, row)]
    records = [record for row in rows for _, record in results.trained(study, row)]
    facts["Data"] = "; ".join(dict.fromkeys(_images_of(run) for run in runs))
    if none := {row.dataset or study.dataset for row in study.rows} - {run.role for run in runs}:
        facts["Not run"] = f"{', '.join(sorted(none))}: this scale has no such images"
    if skipped := sum(not study.runs_at(scale, row) for row in study.rows):
        labels = "; ".join(row.label for row in rows)
        facts["Not run"] = f"{plural(skipped, 'row')}; this scale trains and measures only {labels}"
    if records:
        facts["Images"] = _split_counts(results, study, rows)
        if frequent := _most_frequent(results, study, rows):
            facts["Most frequent class"] = frequent
        devices = sorted({str(record.provenance.device) for record in records})
        versions = sorted({r.provenance.versions.get("torch", "?") for r in records})
        facts["Trained on"] = (
            f"{'; '.join(devices)}; {runs[0].precision}, torch {', '.join(versions)}"
        )
        commits = {r.provenance.commit[:10] + " + changes" * r.provenance.dirty for r in records}
        facts["Commit"] = ", ".join(sorted(commits))
    recipes = dict.fromkeys(run.recipe.id for run in runs)
    facts["Recipe"] = "; ".join(_recipe([r for r in runs if r.recipe.id == one]) for one in recipes)
    facts["Seeds"] = _seeds(results, study)
    if any(row.pretrained for row in rows):
        trained = [row for row in rows if results.trained(study, row)]
        started = sorted({results.weights_from(study, row) for row in trained} - {""})
        facts["Pretrained weights from"] = "; ".join(started) or "unknown until a row is trained"
    return facts


def _recipe(runs: list[Run]) -> str:
    """The recipe of a study, and its settings at this scale."""
    recipe = runs[0].recipe
    here = dict.fromkeys(_settings(run.recipe) for run in runs if run.weights is None)
    fine_tuned = dict.fromkeys(_settings(run.recipe) for run in runs if run.weights)
    settings = "; ".join(here or fine_tuned)
    extra = [text for text in fine_tuned if here and text not in here]
    return f"{recipe.title}; here {settings}" + "".join(
        f"; from pretrained weights {text}" for text in extra
    )


def _images_of(run: Run) -> str:
    """The images of a run, and those of the paper that they replace."""
    stands = f"; {run.dataset.relation}" if run.dataset.relation else ""
    return f"{run.dataset.title} — {run.dataset.about}{stands}"


def _split_counts(results: Results, study: Study, rows: list[Row]) -> str:
    """Images of each split and their size; for each dataset, if there are several."""
    counts = {}
    for row in rows:
        for run, record in results.trained(study, row)[:1]:
            splits = (record.results[f"images_{split}"] for split in ("train", "val", "test"))
            counts[run.dataset.title] = " / ".join(f"{n:,}" for n in splits)
    found = [f"{title} {n}" for title, n in counts.items()] if len(counts) > 1 else counts.values()
    size = results.plan.runs_of(study, rows[0])[0].image_size
    return f"{', '.join(found)} (train / validation / test) at {size} px"


def _most_frequent(results: Results, study: Study, rows: list[Row]) -> str:
    """Top-1 of always predicting the most frequent class of the test images, for each dataset."""
    shares = {}
    for row in rows:
        for run, _ in results.trained(study, row)[:1]:
            title = run.dataset.title
            if title not in shares and (table := results.predictions(run)) is not None:
                shares[title] = f"{100 * table['label'].value_counts(normalize=True).max():.1f} %"
    found = [f"{title} {share}" for title, share in shares.items()]
    text = ", ".join(found if len(found) > 1 else shares.values())
    return f"{text} of the test images; a model that always predicts it has this top-1" * bool(text)


def _settings(recipe: Recipe) -> str:
    """Settings that a scale may change."""
    warmup = recipe.warmup_epochs
    epochs = plural(recipe.epochs, "epoch")
    epochs += f" including {warmup:g} of warm-up" if warmup else ""
    ema = f", EMA decay {recipe.ema_decay:g}" if recipe.ema_decay else ""
    return f"{epochs}, batch {recipe.batch_size}, learning rate {recipe.lr:g}{ema}"


def _seeds(results: Results, study: Study) -> str:
    """The seeds that have records, and the rows that have fewer."""
    found = [(row, [run.seed for run, _ in results.trained(study, row)]) for row in study.rows]
    seeds = sorted({seed for _, some in found for seed in some})
    if not seeds:
        return "none trained yet"
    spread = ", mean ± standard deviation" if len(seeds) > 1 else ""
    fewer = [
        f"{row.label} (n = {len(some)})" if some else f"{row.label} (not trained)"
        for row, some in found
        if len(some) < len(seeds) and results.plan.runs_of(study, row)
    ]
    text = f"{', '.join(map(str, seeds))} (n = {len(seeds)}{spread})"
    return f"{text}; fewer for {', '.join(fewer)}" if fewer else text


def _evaluation(results: Results, study: Study) -> dict[str, str]:
    """The images on which given weights were evaluated."""
    record = results.evaluated(study)
    if record is None:
        return {}
    images = record.provenance.dataset or {}
    return {
        "Accuracy": f"given weights, evaluated on {images['images']:,} images of "
        f"{images['classes']:,} classes of ImageNet-1k's validation set (it has 50,000 of 1,000); "
        f"{record.provenance.device}"
    }


def _measurement(results: Results, study: Study) -> dict[str, str]:
    """How latency was measured, and at which size the models were counted."""
    facts = {}
    if latency := _latency(results, study):
        facts["Latency"] = latency
    if "throughput" in study.columns and (rank := _rank_correlation(results, study)):
        facts["Throughput"] = rank
    own_sizes = any(row.image_size for row in study.rows)
    size = "each row's own size" if own_sizes else _pixels(study.image_size)
    if size:
        facts["Counted at"] = f"{size} and {study.num_classes} classes, at every scale"
    return facts


def _latency(results: Results, study: Study) -> str:
    """How latency was measured, from the record itself."""
    measured, device = results.measured(study), results.latency_device(study)
    if study.cites and measured is None and device:
        studies = ", ".join(f"`{name}`" for name in study.cites)
        batches = " and ".join(str(number.batch) for number in results.batches(study))
        return (
            f"{device}, batches {batches}, fp32, from the records of {studies}; a cell is empty "
            "where they have another protocol"
        )
    if measured is None or device is None:
        return ""
    setting = protocol(measured.spec["latency"], device.kind)
    workload = setting.get("workload", "inference")
    parts = [str(device), WORKLOADS.get(workload, ""), timed_size(results, study, setting)]
    if "throughput" in study.columns:
        parts.append(f"images/s at batch {results.throughput_batch(study)}")
    if not study.keep_memory:
        parts.append(MEMORY.get(setting["memory"], setting["memory"]))
    parts.append(PRECISIONS.get(setting["precision"], setting["precision"]))
    parts.append("ONNX Runtime" if workload == "onnx" else "eager")
    parts.append(f"interleaved, median of {setting['rounds']} rounds (spread in the CSV)")
    protocol_id = measured.results.get("protocol")
    parts.append(SAMPLES.get(protocol_id, "") if device.kind == "cuda" else "")
    parts.append(_processes(results, study))
    return f"{', '.join(filter(None, parts))}; × is the ratio to the row's baseline"


def _processes(results: Results, study: Study) -> str:
    """How many processes measured, and how far their medians of one row lie apart."""
    each = [
        batch["processes"]
        for row in results.measured_rows(study).values()
        for batch in row.get("latency", {}).values()
        if "processes" in batch
    ]
    if not each:
        return ""
    spread = max((max(medians) - min(medians)) / min(medians) for medians in each)
    return f"in {len(each[0])} processes, whose medians of a row differ by up to {spread:.0%}"


def timed_size(results: Results, study: Study, setting: Any) -> str:
    """Size of the images that were timed."""
    if not any(row.image_size for row in study.rows):
        return _pixels(setting["image_size"])
    most = results.plan.scale.latency.image_size
    return "each row's own size" + (f", at most {most} px" if most else "")


def timed_pixels(results: Results, study: Study, row: Row) -> str:
    """Size of the images on which one row was timed; "" if it takes none."""
    measured, device = results.measured(study), results.latency_device(study)
    if measured is None or device is None:
        return ""
    setting = protocol(measured.spec["latency"], device.kind)
    most = results.plan.scale.latency.image_size
    if row.image_size:
        return _pixels(min(row.image_size, most or row.image_size))
    return _pixels(setting["image_size"])


def _pixels(size: int | None) -> str:
    return f"{size} px" if size else ""


def _rank_correlation(results: Results, study: Study) -> str:
    """Spearman's rank correlation between reported and measured throughput."""
    found = []
    for metric in ("throughput", "throughput_cpu"):
        pairs = [
            (printed.mean, value.mean)
            for row in study.rows
            if (printed := results.value(study, row, f"reported_{metric}"))
            and (value := results.value(study, row, "throughput"))
        ]
        if len(pairs) >= 3:
            ranks = pd.DataFrame(pairs).rank()
            column = METRICS[metric].heading
            found.append(f"{ranks[0].corr(ranks[1]):.3f} with {column} over {len(pairs)} rows")
    if not found:
        return ""
    return f"rank correlation (Spearman) with the reported numbers: {'; '.join(found)}"
