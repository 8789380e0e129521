"""Describe a run, a study or an analysis, and estimate its cost on this machine.

The estimate divides the multiply-adds of training (three forward passes; one pass over all images
for a frozen front) by a speed measured now, on one model and one batch. It is an order of
magnitude.
"""

import json
import time
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..config.plan import Plan
from ..config.runs import Run
from ..config.schema import Analysis, Row, Study
from ..config.tasks import MeasureTask, TrainTask
from ..measure.cost import fake_model, macs
from ..utils.create_model import create_model
from ..utils.device import describe_device, pick_device, set_threads
from ..utils.plural import plural
from .schedule import split_sizes

PROBE = ("levit_256", 8)  # model and batch that are timed


def show_study(plan: Plan, study: Study) -> str:
    """The rows of a study, what is trained and measured for each, and the cost of training."""
    lines = [f"{study.id}: {study.title}", f"source: {study.source.paper}, {study.source.place}"]
    lines += [f"scale: {plan.scale.id}: {plan.scale.title}", ""]
    for row in study.rows:
        reported = ", ".join(f"{k} {v}" for k, v in row.reported.items())
        lines.append(
            f"  {row.id:<20} {_todo(plan, study, row)}"
            + f"  [reported: {reported}]" * bool(reported)
        )
    lines.append("")
    if study.trained and study.kind == "models":
        lines += _training(plan.needed([study]))
    if task := plan.measure_task(study):
        lines.append(_measuring(task))
    return "\n".join(lines)


def _todo(plan: Plan, study: Study, row: Row) -> str:
    if row.model is None:
        packs = ", ".join(pack.id for pack in plan.packs_of(row.dataset)) if row.dataset else ""
        by = f"the split of {row.rule}" if row.rule else packs
        return f"counted: {by}" if by else "nothing to run: reported numbers only"
    if not study.trained:
        args = "".join(f" {key}={value}" for key, value in row.model_args.items())
        return f"measured: {plan.scale.measured_model(row)}{args}"
    runs = plan.runs_of(study, row)
    if not runs:
        return "nothing to train at this scale"
    return f"{runs[0].id} x {plural(len(runs), 'random seed')}"


def _training(runs: list[Run]) -> list[str]:
    done = sum(TrainTask(run).path.exists() for run in runs)
    line = f"{plural(len(runs), 'run')} (with those that others start from), {done} done"
    return [line, _cost_line(runs)] if runs else [line]


def _measuring(task: MeasureTask) -> str:
    """What `hovit measure` counts and times."""
    spec, study = task.spec, task.study
    done = " (done)" if task.path.exists() else ""
    line = f"measured{done}: parameters and multiply-adds of {plural(len(spec['rows']), 'row')}"
    timing = spec["latency"]
    if timing is None:
        return line
    size = timing["image_size"]
    rows = spec["rows"].values()
    timed = {(r["model"], repr(r["model_args"]), r.get("latency_size", size)) for r in rows}
    sizes = sorted({each for *_, each in timed if each})
    where = [f"at {' and '.join(map(str, sizes))} px"] if sizes else []
    parts = [
        f"{plural(len(timed), 'model')} timed in turn ({study.workload})",
        f"batches {' and '.join(map(str, timing['batches']))}",
        f"{timing['rounds']} rounds after {timing['warmup']} to warm up",
        *where,
        f"{plural(timing['threads'], 'thread')} on a CPU",
    ]
    if card := timing.get("on_gpu"):
        parts += [f"on a GPU batch {card['batches'][0]}, {card['precision']}"]
    return f"{line}; {', '.join(parts)}"


def show_analysis(plan: Plan, analysis: Analysis) -> str:
    """The runs and images of an analysis, its record, and the cost of training."""
    task = plan.analyse_task(analysis)
    runs = task.runs if task else {}
    lines = [f"{analysis.id}: {analysis.title}"]
    lines += [f"source: {analysis.source.paper}, {analysis.source.place}"]
    lines += [f"scale: {plan.scale.id}: {plan.scale.title}", ""]
    for ref in analysis.of:
        what = f"{runs[ref].id} seed {runs[ref].seed}" if ref in runs else \
            "nothing to analyse at this scale"  # fmt: skip
        lines.append(f"  {ref:<28} {what}")
    lines.append("")
    if task:
        packs = {pack.id for pack in task.packs.values()}
        args = "".join(f", {key} {value}" for key, value in analysis.args.items())
        command = f"`hovit analyse {analysis.id} --scale {plan.scale.id}`"
        made = "done" if task.path.exists() else command
        upstream = [plan.upstream(run) for run in runs.values()]
        needed = {(r.id, r.seed): r for r in (*upstream, *runs.values()) if r}
        lines += [f"takes {plural(analysis.images, 'image')} of {', '.join(sorted(packs))}{args}"]
        lines += [f"record: {task.path} ({made})"]
        lines += _training(list(needed.values()))
    return "\n".join(lines)


def show_run(plan: Plan, run: Run) -> str:
    """The settings of a run, the tables that cite it, and its cost."""
    cited = [s.id for s in plan.config.studies.values() if run in plan.needed([s])]
    seeds = ", ".join(map(str, plan.runs[run.id]))
    lines = [
        f"{run.id} (scale {run.scale}, seeds {seeds})",
        f"  model      {run.model} {run.model_args or ''}".rstrip(),
        f"  data       {run.dataset.title}, {run.image_size} px: {run.dataset.about}",
        f"  recipe     {run.recipe.id}: {run.recipe.epochs} epochs, batch {run.recipe.batch_size}, "
        f"{run.recipe.optimizer}, lr {run.recipe.lr:g} {run.recipe.schedule}",
        f"  weights    {run.weights or 'from scratch'}",
        f"  tables     {', '.join(cited)}",
        f"  spec       {run.spec_hash}",
        f"  record     {TrainTask(run).path}",
        f"  {_cost_line([run])}",
    ]
    return "\n".join(lines)


def _cost_line(runs: list[Run]) -> str:
    device = pick_device()
    set_threads(2)
    speed = probe(device)
    total = parameters = 0.0
    for run in runs:
        sizes = split_sizes(run)
        if sizes is None:
            return f"cost: unknown until the images are there (`hovit data {run.pack.id}`)"
        trained, _, of_pack = sizes
        count, once, each = _size(run)
        total += once * of_pack + 3 * each * trained * run.recipe.epochs
        parameters += count
    minutes = total / speed / 60
    return (
        f"cost: about {minutes:,.1f} min of training on {describe_device(device)}, "
        f"{parameters * 4 / 1e9:.2f} GB of weights (estimate: {total / 1e12:,.1f} T multiply-adds "
        f"at {speed / 1e9:,.0f} G/s, as {PROBE[0]} trains here)"
    )


class _Front(nn.Module):
    """The pretrained front of a model, as a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.front_features(x)


def _size(run: Run) -> tuple[int, int, int]:
    """(parameters, multiply-adds for one image once, and in each forward pass of an epoch).

    A frozen front computes its features once.
    """
    if run.recipe.detection:
        from ..detection.model import count_macs, make_backbone, retinanet

        body = make_backbone(run.model, **run.model_args)
        sides = (run.image_size, run.recipe.detection.long_side)
        net: Any = retinanet(body, run.dataset.num_classes, *sides, run.recipe.detection.channels)
        return sum(p.numel() for p in net.parameters()), 0, count_macs(net, *sides)
    args = json.dumps(run.model_args, sort_keys=True)
    count, front, whole = _classifier_size(run.model, args, run.dataset.num_classes, run.image_size)
    once = front if run.recipe.frozen_front else 0
    return count, once, whole - once


@cache
def _classifier_size(model: str, args: str, classes: int, pixels: int) -> tuple[int, int, int]:
    """(parameters, multiply-adds of the front or 0, multiply-adds of the whole model)."""
    with fake_model(model, json.loads(args), classes, pixels) as net:
        count = sum(p.numel() for p in net.parameters())
        front = macs(_Front(net), pixels) if hasattr(net, "front_features") else 0
        return count, front, macs(net, pixels)


def probe(device: torch.device) -> float:
    """Multiply-adds per second of training on this machine, measured on one small batch."""
    name, batch = PROBE
    net = create_model(name, 37, 224).to(device).train()
    x = torch.randn(batch, 3, 224, 224, device=device)
    net(x).sum().backward()  # warm-up
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    net(x).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    return 3 * macs(net, 224) * batch / seconds
