"""Records: the small JSON files that tasks write and reports read.

A record holds what was to be done (`spec`, `spec_hash`), the outcome (`results`) and the
circumstances (`provenance`). It is written atomically. `config/schema/record.schema.json` describes
it; the schema has a version.
"""

import platform
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ..utils.device import Device
from ..utils.errors import HovitError, one_line
from ..utils.files import digest, read_json, write_json
from ..utils.git import git, is_repository
from ..utils.strict import Strict
from ..utils.yaml_file import explain

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
    """Circumstances under which a record was made."""

    made: str  # UTC, ISO 8601
    commit: str
    dirty: bool  # tracked files differed from the commit
    code: str  # sha256 of the sources that can change the result (`utils.code_hash`)
    versions: dict[str, str]
    python: str
    system: str
    device: Device
    seconds: float  # wall time; for a resumed run the sum, for a measurement the last part
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
    sha256: str = ""  # seal over all other fields, set on writing

    def seal(self) -> str:
        """sha256, in hex, of all other fields."""
        return digest(self.model_dump(mode="json", exclude={"sha256"}))


def write_record(path: Path, record: Record) -> None:
    """Seal a record and write it atomically."""
    write_json(path, record.model_dump(mode="json") | {"sha256": record.seal()})


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        HovitError: if it is missing, does not fit the schema, or a hash does not match.
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
def git_state(root: Path = Path()) -> tuple[str, bool]:
    """(commit, dirty) of the artifact; ("unknown", True) if it is not a git repository itself.

    A change of dvc.lock does not count: DVC stages it after every `dvc repro`, as a result.

    Args:
        root: top folder of the artifact.
    """
    if not is_repository(root):
        return "unknown", True
    try:
        changed = git(root, "status", "--porcelain", "-uno", ":/", ":!/dvc.lock")
        return git(root, "rev-parse", "HEAD").decode().strip(), bool(changed.strip())
    except HovitError:  # a repository without a commit
        return "unknown", True


@lru_cache
def installed_versions() -> dict[str, str]:
    """Version of each of `PACKAGES` that is installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def make_provenance(
    device: Device,
    seconds: float,
    peak_memory_mb: float,
    code: str,
    dataset: dict[str, Any] | None = None,
) -> Provenance:
    """Provenance of a record that this process writes now."""
    commit, dirty = git_state()
    return Provenance(
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit,
        dirty=dirty,
        code=code,
        versions=installed_versions(),
        python=platform.python_version(),
        system=platform.platform(),
        device=device,
        seconds=round(seconds, 3),
        peak_memory_mb=round(peak_memory_mb, 1),
        dataset=dataset,
    )
