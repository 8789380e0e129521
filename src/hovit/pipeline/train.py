"""Prepare images and train runs, for classifiers and detectors alike."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.runs import Pack, Run
from ..records.record import Record

if TYPE_CHECKING:
    from ..training.trainer import Options


def prepare_pack(pack: Pack, data_root: Path, folder: Path | None = None) -> dict[str, Any]:
    """Pack a dataset, or check a COCO folder, and return pack.json.

    Raises:
        HovitError: naming the file that is missing or invalid.
    """
    if pack.dataset.reader == "coco":
        from ..detection.dataset import prepare
    elif pack.dataset.reads_files:
        from ..data.image_files import prepare
    else:
        from ..data.pack import prepare
    return prepare(pack, data_root, folder)


def train_run(
    run: Run, fabric: Any, root: Path = Path(), options: "Options | None" = None
) -> Record:
    """Train one run and return its record.

    Raises:
        HovitError, OutOfTime: as `hovit.training.classification.train`.
    """
    if run.is_detector:
        from ..training.detection import train
    else:
        from ..training.classification import train
    return train(run, fabric, root, options)


def format_results(results: dict[str, Any]) -> str:
    """One line with the main metrics of a training record."""
    if "detections" in results:
        return f"AP {results.get('ap', 0):.1f}, AP50 {results.get('ap50', 0):.1f}"
    return f"top-1 {results['top1']:.2f} %, loss {results['loss']:.4f}"


def format_epoch(entry: dict[str, float]) -> str:
    """One line with the metrics of a finished epoch."""
    text = f"train {entry['train_loss']:.4f}"
    if "val_top1" in entry:
        text += f", val {entry['val_loss']:.4f}, top-1 {entry['val_top1']:.2f} %"
    return text
