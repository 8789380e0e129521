"""Estimate how long studies train on one GPU, from the time of one optimizer step.

A step is assumed to take as long as a LeViT step at batch 32, or longer in proportion to its
multiply-adds if it has more: kernel launches limit small models, and arithmetic limits large ones.
A validation image costs a third of a training image. Start-up time is not included.
"""

import json
from functools import cache
from pathlib import Path

from ..config.plan import Plan
from ..config.runs import Run
from ..measure.cost import cost
from ..utils.errors import HovitError
from ..utils.files import write_text
from ..utils.generated import around
from .schedule import split_sizes

ARTIFACT = Path("ARTIFACT.md")
REFERENCE = ("levit_deck", 37, 224, 32)  # model, classes, pixels, batch
# Milliseconds of the reference step: measured on an NVIDIA H200 by the two committed runs of HoViT
# (317 s for 8,000 steps with validation, while ten processes shared the GPU), and the goal.
MEASURED, GOAL = 4.2, 1.5
# Studies to train in one session, from scratch or including the runs that they start from.
SCRATCH = "`hovit`, the five ideas and `levit_attention`, from scratch"
SCRATCH_STUDIES = (
    "hovit", "conv_stage", "checkerboard", "depth", "conv_shrink", "dropout", "levit_attention",
)  # fmt: skip
STUDIES = ("launcher", "skipvit", "efficientvit_ablation")
NOTE = (
    "An estimate, not a measurement: trainings share one H100 or H200 in bf16, and a step takes "
    "as long as one of LeViT at batch 32, or in proportion to its multiply-adds. {measured} ms "
    "is what ten eager trainings reached together on an H200, {goal} ms is the goal. Runs that "
    "several studies share count in each; pretraining counts where a study needs it. "
    "EfficientViT is bound by memory rather than by arithmetic, so it may take longer."
)


@cache
def _macs(model: str, args: str, classes: int, size: int) -> int:
    return cost(model, json.loads(args), classes, size, backward=False)["macs"]


def macs_of(run: Run) -> int:
    """Multiply-adds of a forward pass of a run's model for one image."""
    args = json.dumps(run.model_args, sort_keys=True)
    return _macs(run.model, args, run.dataset.num_classes, run.image_size)


def run_seconds(run: Run, step_ms: float) -> float:
    """Seconds of one run on the GPU.

    Args:
        run: a classifier's run.
        step_ms: milliseconds of the reference step.

    Raises:
        HovitError: if config does not state the number of images.
    """
    sizes = split_sizes(run)
    if sizes is None:
        raise HovitError(f"config/datasets/{run.dataset.id}.yaml: listed: not given")
    model, classes, pixels, batch = REFERENCE
    reference = 3 * _macs(model, "{}", classes, pixels) * batch
    speed = reference / (step_ms / 1e3)  # multiply-adds per second
    macs, recipe = macs_of(run), run.recipe
    step = max(step_ms / 1e3, 3 * macs * recipe.batch_size / speed)
    validation = max(step / 3 / recipe.batch_size, macs / speed) * sizes[1]
    return recipe.epochs * (sizes[0] // recipe.batch_size * step + validation)


def estimate_table(plan: Plan) -> str:
    """Markdown table of the runs, epochs and minutes of the studies to train first."""
    scratch = [plan.study(name) for name in SCRATCH_STUDIES]
    runs = [run for run in plan.needed(scratch) if run.weights is None and run.role == "pets"]
    rows = [_row(SCRATCH, [run for run in runs if run.model != "resnet50"])]
    rows += [_row(f"`{name}`", plan.needed([plan.study(name)])) for name in STUDIES]
    header = f"| trained on one card | runs | epochs | at {MEASURED} ms | at {GOAL} ms |"
    note = NOTE.format(measured=MEASURED, goal=GOAL)
    return "\n".join([header, "| :-- | --: | --: | --: | --: |", *rows, "", note]) + "\n"


def _row(name: str, runs: list[Run]) -> str:
    epochs = sorted({run.recipe.epochs for run in runs})
    minutes = [sum(run_seconds(run, ms) for run in runs) / 60 for ms in (MEASURED, GOAL)]
    times = " | ".join(f"{each:.0f} min" for each in minutes)
    return f"| {name} | {len(runs)} | {', '.join(map(str, epochs))} | {times} |"


def write_artifact(plan: Plan, root: Path = Path()) -> None:
    """Write the table between its two markers in ARTIFACT.md.

    Raises:
        HovitError: if a marker is missing.
    """
    path = root / ARTIFACT
    text = path.read_text(encoding="utf-8")
    before, after = around(text, "estimate", "hovit estimate", path)
    write_text(path, before + estimate_table(plan) + after)
