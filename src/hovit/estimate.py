"""What a run or a study will do, and about what it costs on this machine.

The estimate is training's multiply-adds (three times a forward pass's) over a speed measured here
and now, on one model and one batch: an order of magnitude, not a promise.
"""

import time
from typing import Any

import torch

from .catalogue import Study
from .device import describe_device, pick_device
from .errors import HovitError
from .factory import create_model
from .files import read_json
from .measure.cost import macs
from .plan import Plan, Run
from .splits import split_sizes

PROBE = ("levit_256", 8)  # model and batch whose speed stands for all


def show_study(plan: Plan, study: Study) -> str:
    """The study's rows, what is trained for them, and the cost of it all."""
    lines = [f"{study.id}: {study.title}", f"seed: {study.source.seed}, {study.source.place}"]
    lines += [f"scale: {plan.scale.id}: {plan.scale.title}", ""]
    for row in study.rows:
        runs = plan.runs_of(study, row)
        what = f"{runs[0].id} x {len(runs)} seed(s)" if runs else "nothing to train at this scale"
        reported = ", ".join(f"{k} {v}" for k, v in row.reported.items())
        lines.append(f"  {row.id:<20} {what}" + f"  [reported: {reported}]" * bool(reported))
    needed = plan.needed([study])
    done = sum((run.folder / "record.json").exists() for run in needed)
    lines += ["", f"{len(needed)} runs (with those that others start from), {done} done"]
    if needed:
        lines.append(_cost_line(needed))
    return "\n".join(lines)


def show_run(plan: Plan, run: Run) -> str:
    """All that decides a run, the tables that cite it, and its cost."""
    cited = [s.id for s in plan.catalogue.studies.values() if run in plan.needed([s])]
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
        f"  record     {run.folder / 'record.json'}",
        f"  {_cost_line([run])}",
    ]
    return "\n".join(lines)


def _cost_line(runs: list[Run]) -> str:
    device = pick_device()
    torch.set_num_threads(2)
    speed = probe(device)
    total = parameters = 0.0
    for run in runs:
        images = _images(run)
        if images is None:
            return f"cost: unknown until the images are there (`hovit data {run.pack.id}`)"
        count, each = _size(run)
        total += 3 * each * images * run.recipe.epochs
        parameters += count
    minutes = total / speed / 60
    return (
        f"cost: about {minutes:,.1f} min of training on {describe_device(device)}, "
        f"{parameters * 4 / 1e9:.2f} GB of weights (estimate: {total / 1e12:,.1f} T multiply-adds "
        f"at {speed / 1e9:,.0f} G/s, as {PROBE[0]} trains here)"
    )


def _size(run: Run) -> tuple[int, int]:
    """(parameters, multiply-adds of a forward pass for one image)."""
    if run.recipe.detection:
        from .detection.model import count_macs, make_backbone, retinanet

        body = make_backbone(run.model, **run.model_args)
        sides = (run.image_size, run.recipe.detection.long_side)
        net: Any = retinanet(body, run.dataset.num_classes, *sides, run.recipe.detection.channels)
        each = count_macs(net, *sides)
    else:
        net = create_model(run.model, run.dataset.num_classes, run.image_size, **run.model_args)
        each = macs(net, run.image_size)
    return sum(p.numel() for p in net.parameters()), each


def _images(run: Run) -> int | None:
    """Training images of a run, if its data are packed or the catalogue says how many there are."""
    path = run.pack.folder / "pack.json"
    if not path.exists():
        if run.dataset.images is None:
            return None
        images = split_sizes(run.dataset.images, run.dataset.split)[0]
        return min(images, run.limit.train or images)
    try:
        images = int(read_json(path)["images"]["train"])
    except (KeyError, TypeError, ValueError):
        raise HovitError(f"{path}: not a pack's; delete it") from None
    return min(images, run.limit.train or images)


def probe(device: torch.device) -> float:
    """Multiply-adds a second of training here, measured on one small batch."""
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
