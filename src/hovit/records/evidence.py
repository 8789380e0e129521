"""Where evidence lies: records made on other machines, under `results/evidence/DEVICE/`."""

import re
from pathlib import Path

from ..utils.device import Device
from ..utils.files import digest, file_digest
from .record import Record

EVIDENCE = Path("results/evidence")
FOLDERS = ("measure", "evaluation", "analysis")  # records that are files of such a folder


def evidence_digest(root: Path = Path()) -> str:
    """sha256, in hex, over all evidence: reports depend on it besides the runs.

    Paired comparisons also read the predictions, which lie beside the record of a run.
    """
    paths = set(records_in(root / EVIDENCE))
    for folder in [path.parent for path in paths if path.name == "record.json"]:
        paths |= set(folder.glob("[!.]*"))
    return digest({path.relative_to(root).as_posix(): file_digest(path) for path in paths})


def slug(device: Device) -> str:
    """Folder name of a device: `amd-epyc`, `nvidia-h100`."""
    return re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")


def records_in(folder: Path) -> list[Path]:
    """The records under a folder."""
    files = [path for name in FOLDERS for path in folder.rglob(f"{name}/*.json")]
    finished = [path for path in files if not path.name.endswith(".partial.json")]
    return sorted([*folder.rglob("record.json"), *finished])


def location(record: Record) -> Path:
    """Place of a record below `results/runs`, or below the folder of a device's evidence."""
    if record.kind != "train":
        return Path(record.scale) / record.kind / f"{record.id}.json"
    return Path(record.scale) / record.id / f"seed{record.spec['seed']}" / "record.json"
