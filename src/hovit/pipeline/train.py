"""The two kinds of run, images classified and objects detected: which code does which."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.runs import Pack, Run
from ..records.record import Record

if TYPE_CHECKING:
    from ..training.trainer import Options


def prepare_pack(pack: Pack, data_root: Path, folder: Path | None = None) -> dict[str, Any]:
    """Pack a dataset, or check a folder of COCO's; give its pack.json.

    Raises:
        HovitError: naming what is missing or not as it should be.
    """
    if pack.dataset.reader == "coco":
        from ..detection.folder import prepare
    else:
        from ..data.pack import prepare
    return prepare(pack, data_root, folder)


def train_run(
    run: Run, fabric: Any, root: Path = Path(), options: "Options | None" = None
) -> Record:
    """Train one run to its record.

    Raises:
        HovitError, OutOfTime: as `hovit.training.classification.train` does.
    """
    if run.is_detector:
        from ..training.detection import train
    else:
        from ..training.classification import train
    return train(run, fabric, root, options)


def outcome(results: dict[str, Any]) -> str:
    """A record's main numbers, in words."""
    if "detections" in results:
        return f"AP {results.get('ap', 0):.1f}, AP50 {results.get('ap50', 0):.1f}"
    return f"top-1 {results['top1']:.2f} %, loss {results['loss']:.4f}"


def progress(entry: dict[str, float]) -> str:
    """A finished epoch's numbers, in words."""
    text = f"train {entry['train_loss']:.4f}"
    if "val_top1" in entry:
        text += f", val {entry['val_loss']:.4f}, top-1 {entry['val_top1']:.2f} %"
    return text
