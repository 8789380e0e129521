"""A study's table: CSV for programs, Markdown for people, LaTeX (booktabs) for the paper."""

from pathlib import Path

import pandas as pd

from ...config.plan import Plan
from ...config.runs import Run, protocol
from ...config.schema import Recipe, Row, Study
from ...utils.files import write_text
from ..results import INEXACT, Results, evidence_for, find_evidence, plural
from .columns import HEADINGS, Column, columns_of
from .latex import to_latex

TABLES = Path("results/tables")


def describe(results: Results, study: Study) -> dict[str, str]:
    """What every table states: scale, data, device, seeds, what models started from."""
    plan = results.plan
    scale = plan.scale
    lines = {"Scale": f"`{scale.id}`: {scale.title}"}
    if study.kind == "data":
        for row in study.rows:
            if row.dataset in scale.datasets:
                dataset = plan.config.datasets[scale.datasets[row.dataset]]
                lines[row.label] = f"{dataset.title} — {dataset.about}"
        return lines
    instead = {str(row.model): scale.model_of(row) for row in study.rows if row.model}
    if stand_ins := [f"`{new}` for `{old}`" for old, new in instead.items() if old != new]:
        lines["Models that stand in"] = ", ".join(stand_ins)
    if study.trained:
        if not plan.rows_run(study):
            lines["Data"] = "this scale has none for this study, so nothing was run"
            return lines
        lines |= _training(results, study)
    return lines | _evaluating(results, study) | _measuring(results, study)


def _training(results: Results, study: Study) -> dict[str, str]:
    """Images, device, commit, recipe and seeds of what was trained."""
    plan, lines = results.plan, {}
    rows = plan.rows_run(study)
    runs = [run for row in rows for run in plan.runs_of(study, row)]
    trained = [record for row in rows for _, record in results.trained(study, row)]
    lines["Data"] = "; ".join(dict.fromkeys(_images_of(run) for run in runs))
    if none := {row.dataset or study.dataset for row in study.rows} - {run.role for run in runs}:
        lines["Not run"] = f"{', '.join(sorted(none))}: this scale has no such images"
    if trained:
        lines["Images"] = _image_counts(results, study, rows)
        devices = sorted({str(record.provenance.device) for record in trained})
        versions = sorted({r.provenance.versions.get("torch", "?") for r in trained})
        lines["Trained on"] = (
            f"{'; '.join(devices)}; {runs[0].precision}, torch {', '.join(versions)}"
        )
        commits = sorted(
            {
                r.provenance.commit[:10] + (" + changes" if r.provenance.dirty else "")
                for r in trained
            }
        )
        lines["Commit"] = ", ".join(commits)
    lines["Recipe"] = f"{runs[0].recipe.title}; here {_here(runs[0].recipe)}"
    lines["Seeds"] = _seeds(results, study)
    if any(row.pretrained for row in rows):
        with_records = [row for row in rows if results.trained(study, row)]
        started = sorted({results.weights_from(study, row) for row in with_records} - {""})
        lines["Pretrained weights from"] = "; ".join(started) or "no row was trained yet"
    return lines


def _evaluating(results: Results, study: Study) -> dict[str, str]:
    """On which images given weights were evaluated."""
    record = None if study.trained else results.evaluated(study)
    if record is None:
        return {}
    images = record.provenance.dataset or {}
    return {
        "Accuracy": f"evaluated of given weights on {images['images']:,} images of "
        f"{images['classes']:,} classes of ImageNet-1k's validation set (it has 50,000 of 1,000); "
        f"{record.provenance.device}"
    }


def _here(recipe: Recipe) -> str:
    """What a scale may set otherwise than the recipe's title says."""
    warmup = recipe.warmup_epochs
    epochs = plural(recipe.epochs, "epoch")
    epochs += f", of which the first {warmup:g} for warm-up" if warmup else ""
    return f"{epochs}, batch {recipe.batch_size}, learning rate {recipe.lr:g}"


def _images_of(run: Run) -> str:
    """What a run's images are, and whose they stand for."""
    stands = f"; stands in for {run.dataset.stands_for}" if run.dataset.stands_for else ""
    return f"{run.dataset.title} — {run.dataset.about}{stands}"


def _image_counts(results: Results, study: Study, rows: list[Row]) -> str:
    """Images of each split and their size; for each dataset, if there are several."""
    counts = {}
    for row in rows:
        for run, record in results.trained(study, row)[:1]:
            splits = (record.results[f"images_{split}"] for split in ("train", "val", "test"))
            counts[run.dataset.title] = " / ".join(f"{n:,}" for n in splits)
    found = [f"{title} {n}" for title, n in counts.items()] if len(counts) > 1 else counts.values()
    size = results.plan.runs_of(study, rows[0])[0].image_size
    return f"{', '.join(found)} (train / validation / test) at {size} px"


WORKLOADS = {
    "gradients": "forward passes with all gradients, ",
    "training": "whole training steps (AdamW), ",
}


def _measuring(results: Results, study: Study) -> dict[str, str]:
    """How latency was measured, and at what size the models were counted."""
    lines = {}
    measured, device = results.measured(study), results.latency_device(study)
    own = any(row.image_size for row in study.rows)
    if measured and device:
        setting = protocol(measured.spec["latency"], device.kind)
        size = "the row's own size" if own else _pixels(setting["image_size"])
        if own and (most := results.plan.scale.latency.image_size):
            size += f", {most} px at most"
        size += ", " if size else ""
        if "throughput" in study.columns:
            size += f"images/s at batch {results.throughput_batch(study)}, "
        if not study.keep_memory:
            size += f"{setting['memory']}, "
        what = WORKLOADS.get(study.workload, "")
        how = "ONNX Runtime" if study.workload == "onnx" else "eager"
        lines["Latency"] = (
            f"{device}; {what}{size}{setting['precision']}, {how}, interleaved, "
            f"median of {setting['rounds']} rounds (spread in the CSV); × is the ratio to the "
            "row's baseline"
        )
    if "throughput" in study.columns and (rank := _rank_correlation(results, study)):
        lines["Throughput"] = rank
    size = "the row's own size" if own else _pixels(study.image_size)
    if size:
        lines["Counted at"] = f"{size} and {study.num_classes} classes, whatever the scale"
    return lines


def _pixels(size: int | None) -> str:
    return f"{size} px" if size else ""


def _rank_correlation(results: Results, study: Study) -> str:
    """Of each throughput reported with the one measured, over the rows that have both."""
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
            column = HEADINGS[metric][0]
            found.append(f"{ranks[0].corr(ranks[1]):.3f} with {column} over {len(pairs)} rows")
    if not found:
        return ""
    return f"rank correlation (Spearman) with the reported: {'; '.join(found)}"


def _seeds(results: Results, study: Study) -> str:
    """The seeds that there are records of, and which rows have fewer."""
    found = [(row, [run.seed for run, _ in results.trained(study, row)]) for row in study.rows]
    seeds = sorted({seed for _, some in found for seed in some})
    if not seeds:
        return "none trained yet"
    spread = ", mean ± standard deviation" if len(seeds) > 1 else ""
    short = [
        f"{row.label} n = {len(some)}"
        for row, some in found
        if len(some) < len(seeds) and results.plan.runs_of(study, row)
    ]
    text = f"{', '.join(map(str, seeds))} (n = {len(seeds)}{spread})"
    return f"{text}; but {', '.join(short)}" if short else text


def write_table(plan: Plan, study: Study, root: Path = Path()) -> None:
    """Write `results/tables/STUDY.csv`, `.md` and `.tex`.

    A record that cannot be used is named in the table and left out.

    Raises:
        HovitError: if latencies come from two devices.
    """
    results = Results(plan, root)
    evidence = evidence_for(study, find_evidence(plan, root))
    columns = columns_of(study, [evidence, results] if evidence else [results])
    about = describe(results, study)
    if evidence:
        facts = describe(evidence, study)
        about["Evidence"] = "; ".join(f"{key.lower()}: {text}" for key, text in facts.items())
        about["Evidence lies in"] = f"`{evidence.base / evidence.plan.scale.id}`"
    problems = results.problems + (evidence.problems if evidence else [])
    if problems:
        about["Not used"] = "; ".join(dict.fromkeys(problems))
    stem = root / TABLES / study.id
    write_text(stem.with_suffix(".csv"), to_csv(results, evidence, study, about))
    write_text(stem.with_suffix(".md"), to_markdown(study, columns, about))
    write_text(stem.with_suffix(".tex"), to_latex(study, columns, about))


def to_csv(results: Results, evidence: Results | None, study: Study, about: dict[str, str]) -> str:
    """One line a row, plain numbers: reported, value, spread and n of every metric.

    Evidence has the same columns again, with `evidence_` before their names.
    """
    lines = []
    for row in study.rows:
        runs = results.plan.runs_of(study, row)
        line: dict[str, object] = {
            "row": row.id,
            "label": row.label,
            "model": row.model or "",
            "run": runs[0].id if runs else "",
            "ours": row.ours,
            "weights": results.weights_from(study, row),
        }
        for metric in study.columns:
            line[f"{metric}_reported"] = row.reported.get(metric, "")
            for source in (evidence, results):
                if source and (source is results or metric in INEXACT):
                    line |= _numbers(source, study, row, metric)
        for name in ("Scale", "Data", "Trained on", "Seeds", "Latency", "Commit", "Evidence"):
            line[name.lower().replace(" ", "_")] = about.get(name, "")
        lines.append(line)
    return pd.DataFrame(lines).to_csv(index=False)


def _numbers(results: Results, study: Study, row: Row, metric: str) -> dict[str, object]:
    before = "evidence_" if results.is_evidence else ""
    numbers: dict[str, object] = {}
    for name in results.batches(study) if metric == "latency" else [metric]:
        value = results.value(study, row, name)
        whole = value is not None and metric not in INEXACT | {"gigabytes"}
        numbers[before + name] = value and (int(value.mean) if whole else value.mean)
        if value and value.n > 1:
            spread = "iqr" if metric in ("latency", "throughput") else "sd"
            numbers |= {f"{before}{name}_{spread}": value.spread, f"{before}{name}_n": value.n}
    return numbers


def to_markdown(study: Study, columns: list[Column], about: dict[str, str]) -> str:
    """The table, and under it what it is."""
    header = ["", *(f"{c.heading}<br>{c.source}" for c in columns)]
    align = [":--", *("--:" for _ in columns)]
    body = [
        [row.label + (" †" if row.ours else ""), *(c.cells[i] for c in columns)]
        for i, row in enumerate(study.rows)
    ]
    table = ["| " + " | ".join(line) + " |" for line in (header, align, *body)]
    facts = [f"- **{key}**: {text}" for key, text in about.items()]
    notes = [f"- {note}" for note in study.notes]
    notes += [f"- {row.label}: {row.note}" for row in study.rows if row.note]
    if any(row.ours for row in study.rows):
        notes.append("- † ours: the seed has no such row.")
    source = f"Seed: {study.source.seed}, {study.source.place}."
    return "\n".join([f"# {study.title}", "", source, "", *table, "", *facts, "", *notes, ""])


def write_index(plan: Plan, root: Path = Path()) -> None:
    """Write `results/tables/index.md`: every table, its source, its scale and its figures."""
    from ..figures.draw import FIGURES

    lines = [
        "# Tables",
        "",
        f"Scale `{plan.scale.id}`: {plan.scale.title}.",
        "",
        "| table | what | seed | files | figures |",
        "| :-- | :-- | :-- | :-- | :-- |",
    ]
    for study in plan.config.studies.values():
        files = " ".join(f"[{ext}]({study.id}.{ext})" for ext in ("md", "csv", "tex"))
        figures = " ".join(
            f"[{name}](../../figures/{name}.png)"
            for name, figure in FIGURES.items()
            if study.id in figure.studies
        )
        source = f"{study.source.seed}: {study.source.place}"
        lines.append(f"| `{study.id}` | {study.title} | {source} | {files} | {figures} |")
    lines += ["", "The seeds' claims, judged by these records: [claims.md](../claims.md).", ""]
    write_text(root / TABLES / "index.md", "\n".join(lines))
