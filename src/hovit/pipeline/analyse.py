"""Run an analysis: load trained models and images, compute, write the record."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..analysis.attention_maps import attention_maps
from ..analysis.generated_images import generated_images
from ..analysis.head_similarity import head_similarity
from ..analysis.kept_patches import kept_patches
from ..analysis.runtime_breakdown import runtime_breakdown
from ..analysis.taylor_pruning import taylor_pruning
from ..config.kinds import ANALYSIS_KINDS
from ..config.runs import Pack, Run
from ..config.tasks import AnalyseTask, TrainTask
from ..data.image_files import open_images
from ..data.loader import to_input
from ..data.split import splits_of
from ..records.record import Record, git_state, write_record
from ..training.checkpoint import load_weights
from ..utils.create_model import create_model
from ..utils.device import describe_device, keep_freed_memory, peak_memory_mb, set_threads
from ..utils.errors import HovitError, one_line
from ..utils.files import file_digest, write_text

FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (
        attention_maps, generated_images, head_similarity, kept_patches, runtime_breakdown,
        taylor_pruning,
    )
}  # fmt: skip


def analyse(task: AnalyseTask, device: torch.device, root: Path = Path()) -> Record:
    """Compute an analysis and write its record.

    Args:
        task: analysis, runs and images.
        device: device to compute on.
        root: top folder of the artifact.

    Raises:
        HovitError: if a run is not trained, its images are not packed, or the analysis does not
            apply to its model.
    """
    begin = time.monotonic()
    git_state()  # the record states the commit at the start
    torch.manual_seed(0)
    keep_freed_memory()  # some kinds measure time
    set_threads(task.scale.threads)
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
    """Results of one row, with the images and weights used."""
    analysis, run = task.analysis, task.runs[ref]
    weights = root / TrainTask(run).weights
    if not weights.exists():
        raise HovitError(f"{weights}: no such file; train {run.id} first")
    model = create_model(run.model, run.dataset.num_classes, run.image_size, **run.model_args)
    model.load_state_dict(load_weights(weights, run.spec_hash))
    pack, count = task.packs[ref], analysis.images
    images, labels, indices = _sample_images(run, pack, "test", count, root)
    inputs, used = [images], {"images": indices}
    if ANALYSIS_KINDS[analysis.kind].uses_training_images:
        train = _sample_images(run, pack, "train", count, root)
        inputs = [*train[:2], images, labels]
        used |= {"train_images": train[2]}
    try:
        on_device = [each.to(device) for each in inputs]
        found = FUNCTIONS[analysis.kind](model.to(device).eval(), *on_device, **analysis.args)
    except ValueError as error:
        raise HovitError(f"analysis {analysis.id}: {ref}: {one_line(error)}") from None
    return found | {"weights_sha256": file_digest(weights)} | used


def to_csv(rows: dict[str, Any]) -> str:
    """Results as CSV, for other programs.

    Each row gives one line with its numbers, then one line per entry of its lists. A flat list is
    one line, in columns 0, 1, 2, ...
    """
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


def _sample_images(
    run: Run, pack: Pack, split: str, count: int, root: Path
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Random images of a split as model input, their labels, and their indices in the pack.

    Random, because a test set can be sorted by class.
    """
    packed = open_images(pack, root / pack.folder)
    splits = splits_of(run, packed) if pack == run.pack else packed.splits
    drawn = np.random.default_rng(0).permutation(splits[split])[:count]
    indices = [int(i) for i in drawn]
    images = to_input(torch.from_numpy(packed.images[indices]), pack.image_size)
    return images, torch.from_numpy(packed.labels[indices]), indices
