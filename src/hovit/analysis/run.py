"""Run an analysis of the catalogue: load trained models and images, compute, leave a record."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..catalogue import Analysis
from ..data.loader import to_input
from ..data.pack import open_pack
from ..device import describe_device, peak_memory_mb
from ..errors import HovitError, one_line
from ..factory import create_model
from ..files import digest, file_digest
from ..plan import Plan, Run
from ..records import Record, make_provenance, write_record
from ..sources import analysis_code
from ..training.checkpoint import load_weights
from .attention_maps import attention_maps
from .kept_patches import kept_patches

KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "attention_maps": attention_maps,
    "kept_patches": kept_patches,
}


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
    rows: dict[str, Any] = {}
    for ref, run in plan.analysed_runs(analysis).items():
        weights = root / run.folder / "weights.safetensors"
        if not weights.exists():
            raise HovitError(f"{weights}: not there: train {run.id} first")
        net = create_model(run.model, run.dataset.num_classes, run.image_size, **run.model_args)
        net.load_state_dict(load_weights(weights))
        images, indices = _images(run, analysis.images, root)
        try:
            found = KINDS[analysis.kind](net.to(device).eval(), images.to(device), **analysis.args)
        except ValueError as error:
            raise HovitError(f"analysis {analysis.id}: {ref}: {one_line(error)}") from None
        rows[ref] = found | {"weights_sha256": file_digest(weights), "images": indices}
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
    write_record(root / plan.analysed(analysis), record)
    return record


def _images(run: Run, count: int, root: Path) -> tuple[torch.Tensor, list[int]]:
    """The first test images of a run, as its model takes them, and their places in the pack."""
    packed = open_pack(run.pack, root / run.pack.folder)
    indices = [int(i) for i in packed.splits["test"][:count]]
    return to_input(torch.from_numpy(packed.images[indices]), run.image_size), indices
