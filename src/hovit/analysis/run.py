"""Run an analysis of the catalogue: load trained models and images, compute, leave a record."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..catalogue import Analysis
from ..data.loader import to_input
from ..data.pack import open_pack
from ..device import describe_device, keep_freed_memory, peak_memory_mb
from ..errors import HovitError, one_line
from ..factory import create_model
from ..files import digest, file_digest, write_text
from ..plan import Pack, Plan
from ..records import Record, make_provenance, write_record
from ..sources import analysis_code
from ..training.checkpoint import load_weights
from .attention_maps import attention_maps
from .head_similarity import head_similarity
from .kept_patches import kept_patches
from .runtime_breakdown import runtime_breakdown
from .taylor_pruning import taylor_pruning

KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "attention_maps": attention_maps,
    "head_similarity": head_similarity,
    "kept_patches": kept_patches,
    "runtime_breakdown": runtime_breakdown,
    "taylor_pruning": taylor_pruning,
}
RANKING = ("taylor_pruning",)  # kinds that take training images and classes, then test ones


def analyse(plan: Plan, analysis: Analysis, device: torch.device, root: Path = Path()) -> Record:
    """Compute an analysis and write its record.

    Args:
        plan: the catalogue at a scale.
        analysis: what to compute, of which rows' runs.
        device: where.
        root: top of the artifact.

    Raises:
        HovitError: if a run was not trained yet, its images are not packed, or it cannot be
            analysed so.
    """
    begin = time.monotonic()
    torch.manual_seed(0)
    keep_freed_memory()  # some kinds tell times
    torch.set_num_threads(plan.scale.threads)
    rows: dict[str, Any] = {}
    for ref, run in plan.analysed_runs(analysis).items():
        weights = root / run.folder / "weights.safetensors"
        if not weights.exists():
            raise HovitError(f"{weights}: not there: train {run.id} first")
        net = create_model(run.model, run.dataset.num_classes, run.image_size, **run.model_args)
        net.load_state_dict(load_weights(weights))
        pack = plan.analysis_pack(analysis, run)
        images, labels, indices = _images(pack, "test", analysis.images, root)
        inputs, used = [images], {"images": indices}
        if analysis.kind in RANKING:
            ranked, classes, indices = _images(pack, "train", analysis.images, root)
            inputs, used = [ranked, classes, images, labels], used | {"train_images": indices}
        try:
            on_device = [each.to(device) for each in inputs]
            found = KINDS[analysis.kind](net.to(device).eval(), *on_device, **analysis.args)
        except ValueError as error:
            raise HovitError(f"analysis {analysis.id}: {ref}: {one_line(error)}") from None
        rows[ref] = found | {"weights_sha256": file_digest(weights)} | used
    spec = plan.analysis_spec(analysis)
    record = Record(
        kind="analysis",
        id=analysis.id,
        scale=plan.scale.id,
        spec=spec,
        spec_hash=digest(spec),
        results={"rows": rows},
        provenance=make_provenance(
            describe_device(device),
            time.monotonic() - begin,
            peak_memory_mb(device),
            analysis_code(spec),
        ),
    )
    path = root / plan.analysed(analysis)
    write_text(path.with_suffix(".csv"), to_csv(rows))
    write_record(path, record)
    return record


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
