"""Run an analysis of the config: load trained models and images, compute, leave a record."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..analysis.attention_maps import attention_maps
from ..analysis.head_similarity import head_similarity
from ..analysis.kept_patches import kept_patches
from ..analysis.runtime_breakdown import runtime_breakdown
from ..analysis.taylor_pruning import taylor_pruning
from ..config.kinds import ANALYSIS_KINDS
from ..config.runs import Pack
from ..config.tasks import AnalyseTask, TrainTask
from ..data.loader import to_input
from ..data.pack import open_pack
from ..records.record import Record, write_record
from ..training.checkpoint import load_weights
from ..utils.create_model import create_model
from ..utils.device import describe_device, keep_freed_memory, peak_memory_mb
from ..utils.errors import HovitError, one_line
from ..utils.files import file_digest, write_text

FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "attention_maps": attention_maps,
    "head_similarity": head_similarity,
    "kept_patches": kept_patches,
    "runtime_breakdown": runtime_breakdown,
    "taylor_pruning": taylor_pruning,
}


def analyse(task: AnalyseTask, device: torch.device, root: Path = Path()) -> Record:
    """Compute an analysis and write its record.

    Args:
        task: what to compute, from which runs, on which images.
        device: where.
        root: top folder of the artifact.

    Raises:
        HovitError: if a run is not trained yet, its images are not packed, or the analysis does
            not fit its model.
    """
    begin = time.monotonic()
    torch.manual_seed(0)
    keep_freed_memory()  # some kinds measure times
    torch.set_num_threads(task.scale.threads)
    rows = {ref: _analyse_row(task, ref, device, root) for ref in task.runs}
    seconds = time.monotonic() - begin
    record = task.make_record(
        {"rows": rows}, describe_device(device), seconds, peak_memory_mb(device)
    )
    path = root / task.path
    write_text(path.with_suffix(".csv"), to_csv(rows))
    write_record(path, record)
    return record


def _analyse_row(task: AnalyseTask, ref: str, device: torch.device, root: Path) -> dict[str, Any]:
    """What the analysis finds for one row, with the images and weights that it used."""
    analysis, run = task.analysis, task.runs[ref]
    weights = root / TrainTask(run).weights
    if not weights.exists():
        raise HovitError(f"{weights}: no such file; train {run.id} first")
    model = create_model(run.model, run.dataset.num_classes, run.image_size, **run.model_args)
    model.load_state_dict(load_weights(weights))
    images, labels, indices = _images(task.packs[ref], "test", analysis.images, root)
    inputs, used = [images], {"images": indices}
    if ANALYSIS_KINDS[analysis.kind].uses_training_images:
        shown, classes, train_indices = _images(task.packs[ref], "train", analysis.images, root)
        inputs, used = [shown, classes, images, labels], used | {"train_images": train_indices}
    try:
        on_device = [each.to(device) for each in inputs]
        found = FUNCTIONS[analysis.kind](model.to(device).eval(), *on_device, **analysis.args)
    except ValueError as error:
        raise HovitError(f"analysis {analysis.id}: {ref}: {one_line(error)}") from None
    return found | {"weights_sha256": file_digest(weights)} | used


def to_csv(rows: dict[str, Any]) -> str:
    """What an analysis found, for other programs: for each row of it a line of its numbers, then
    one for each line of its lists (a flat list is one line), in columns 0, 1, 2 ..."""
    lines: list[dict[str, Any]] = []
    for ref, found in rows.items():
        lists = {k: v for k, v in found.items() if isinstance(v, list) and "images" not in k}
        numbers = {k: v for k, v in found.items() if isinstance(v, int | float)}
        lines.append({"row": ref, "what": "all"} | numbers)
        for name, each in lists.items():
            nested = any(isinstance(line, dict | list) for line in each)
            for line in each if nested else [each]:
                pairs = line.items() if isinstance(line, dict) else enumerate(line)
                lines.append({"row": ref, "what": name} | {str(k): v for k, v in pairs})
    return pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")


def _images(
    pack: Pack, split: str, count: int, root: Path
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Some images of a split, as a model takes them, their classes and places in the pack.

    A draw, as a source's own test set lies class by class.
    """
    packed = open_pack(pack, root / pack.folder)
    drawn = np.random.default_rng(0).permutation(packed.splits[split])[:count]
    indices = [int(i) for i in drawn]
    images = to_input(torch.from_numpy(packed.images[indices]), pack.image_size)
    return images, torch.from_numpy(packed.labels[indices]), indices
