"""Records: what a run or a measurement leaves, and all that the report reads.

A record is small JSON, written atomically: what was to be done (`spec`, `spec_hash`), what came of
it (`results`), and under which circumstances (`provenance`). The schema has a version, and
`config/schema/record.schema.json` describes it.
"""

import platform
import subprocess
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ..utils.device import Device
from ..utils.errors import HovitError, one_line
from ..utils.files import digest, read_json, write_json
from ..utils.strict import Strict
from ..utils.yaml_file import explain

SCHEMA_VERSION = 1
Kind = Literal["train", "measure", "evaluation", "analysis"]
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "lightning-fabric",
    "onnxruntime",
    "pycocotools",
    "hovit",
)


class Provenance(Strict):
    """The circumstances of a record."""

    made: str  # UTC, ISO 8601
    commit: str
    dirty: bool  # tracked files differed from the commit
    code: str  # sha256 of the sources that can change the result (`hovit.utils.code_hash`)
    versions: dict[str, str]
    python: str
    system: str
    device: Device
    seconds: float  # wall time; of a run over all its sittings, of a measurement of the last
    peak_memory_mb: float
    dataset: dict[str, Any] | None = None  # pack.json


class Record(Strict):
    """One finished run, a study's measurements or evaluation, or an analysis of trained models."""

    schema_version: Literal[1] = 1
    kind: Kind
    id: str
    scale: str
    spec: dict[str, Any]
    spec_hash: str
    results: dict[str, Any]
    provenance: Provenance
    sha256: str = ""  # of all the rest, set when it is written

    def seal(self) -> str:
        """sha256, in hex, of everything but the seal itself."""
        return digest(self.model_dump(mode="json", exclude={"sha256"}))


def write_record(path: Path, record: Record) -> None:
    """Seal a record and write it atomically."""
    write_json(path, record.model_dump(mode="json") | {"sha256": record.seal()})


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        HovitError: if it is missing, not of this schema, or a hash does not match its contents.
    """
    try:
        record = Record.model_validate(read_json(path))
    except ValidationError as error:
        raise explain(error, path, Record) from None
    try:
        spec_hash, seal = digest(record.spec), record.seal()
    except (ValueError, RecursionError) as error:  # too deep
        raise HovitError(f"{path}: not a record ({one_line(error)})") from None
    if spec_hash != record.spec_hash:
        raise HovitError(f"{path}: spec_hash does not match the spec: the record was changed")
    if seal != record.sha256:
        raise HovitError(f"{path}: sha256 does not match the contents: the record was changed")
    return record


@lru_cache
def git_state() -> tuple[str, bool]:
    """(commit, dirty) of the working directory; ("unknown", True) outside a repository.

    dvc.lock does not count: DVC stages it after every `dvc repro`, and it is a result.
    """

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", ":/", ":!/dvc.lock")
        return git("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.SubprocessError):
        return "unknown", True


def make_provenance(
    device: Device,
    seconds: float,
    peak_memory_mb: float,
    code: str,
    dataset: dict[str, Any] | None = None,
) -> Provenance:
    """The circumstances of a record that is written now, by this process."""
    commit, dirty = git_state()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return Provenance(
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit,
        dirty=dirty,
        code=code,
        versions=versions,
        python=platform.python_version(),
        system=platform.platform(),
        device=device,
        seconds=round(seconds, 3),
        peak_memory_mb=round(peak_memory_mb, 1),
        dataset=dataset,
    )
