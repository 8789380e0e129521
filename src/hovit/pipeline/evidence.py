"""Evidence: records from other machines, committed under `results/evidence/DEVICE/`.

Each record is a copy of the program's own file. `add` takes a record only if it verifies; `verify`
checks all of them again: the seal, the spec against config row by row, the code hash against the
repository's history, and metrics against the predictions. Tables and claims check seal and spec
every time; a test runs `verify` on the committed records.

An archive or a shallow clone lacks the history. There, code hashes are checked against
`results/evidence/code.json`, which `add` writes where the history is complete.
"""

import re
import shutil
import tempfile
import zipfile
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from ..config.plan import Plan
from ..config.runs import DETECTIONS, PREDICTIONS, Run
from ..config.schema import Config
from ..records.evidence import EVIDENCE, FOLDERS, location, records_in, slug
from ..records.predictions import metrics, predictions_digest, read_predictions
from ..records.record import Record, read_record
from ..utils.code_hash import record_code
from ..utils.errors import HovitError
from ..utils.files import atomic, read_json, write_json
from ..utils.git import git, is_repository
from .export import unpack_records

CODE = EVIDENCE / "code.json"  # commit -> code hashes of the records made at it
UNKNOWN = "unknown"  # a commit that a record does not name


def add(config: Config, sources: list[Path], root: Path = Path()) -> list[Path]:
    """Take finished records from another machine's `results/runs`, after verifying each.

    Args:
        config: the specs are checked against it.
        sources: `results/runs` folders, folders inside one, or files of `hovit sweep --export`.
        root: top of the artifact.

    Returns:
        the copies of the records. A record that is already there is not copied again.

    Raises:
        HovitError: for the first record that does not verify; then nothing is copied.
    """
    with tempfile.TemporaryDirectory() as folder:
        folders = _unpack(sources, Path(folder))
        found = []
        for source, unpacked in zip(sources, folders, strict=True):
            if not (records := records_in(unpacked)):
                kinds = ", ".join(f"{kind}/*.json" for kind in FOLDERS)
                raise HovitError(f"{source}: no records in it (record.json, {kinds})")
            found += records
        return _take(config, found, root)


def _unpack(sources: list[Path], folder: Path) -> list[Path]:
    """The sources, with each exported file unpacked into a folder of its own."""
    folders = []
    for index, source in enumerate(sources):
        if source.is_file():
            unpack_records(source, folder / str(index))
            folders.append(folder / str(index))
        else:
            folders.append(source)
    return folders


def _take(config: Config, found: list[Path], root: Path) -> list[Path]:
    """Verify all of these records, then copy those that are not there yet."""
    plans = {name: Plan(config, scale) for name, scale in config.scales.items()}
    new: dict[Path, tuple[Path, Record]] = {}  # by place
    for path in found:
        record = check(plans, path, root)
        place = root / EVIDENCE / slug(record.provenance.device) / location(record)
        other = new[place][0] if place in new else place
        if not other.exists():
            new[place] = path, record
        elif other.read_bytes() != path.read_bytes():
            raise HovitError(f"{path}: {other} is another record of this run; remove one of them")
    taken = []
    for place, (path, record) in new.items():
        if record.kind == "train":
            name = _predictions(record)
            _copy(path.parent / name, place.parent / name)
        _copy(path, place)
        taken.append(place)
    if complete_history(root):
        records = [read_record(path) for path in records_in(root / EVIDENCE)]
        write_json(root / CODE, code_hashes(records))
    return taken


def _copy(source: Path, target: Path) -> None:
    with atomic(target) as temporary:
        shutil.copyfile(source, temporary)


def code_hashes(records: list[Record]) -> dict[str, list[str]]:
    """The code hashes that records state, by commit; `unknown` for records without one."""
    found: dict[str, set[str]] = {}
    for record in records:
        found.setdefault(_known_commit(record), set()).add(record.provenance.code)
    return {commit: sorted(hashes) for commit, hashes in sorted(found.items())}


def verify(config: Config, root: Path = Path()) -> tuple[int, list[str]]:
    """Check all evidence again: (number of records, problems)."""
    paths = records_in(root / EVIDENCE)
    plans = {name: Plan(config, scale) for name, scale in config.scales.items()}
    verified, problems = [], []
    for path in paths:
        try:
            record = check(plans, path, root)
            place = root / EVIDENCE / slug(record.provenance.device) / location(record)
            if place != path:
                raise HovitError(f"{path}: belongs to {place}")
            verified.append(record)
        except HovitError as error:
            problems.append(str(error))
    stated = _stated_hashes(root)
    for commit, hashes in code_hashes(verified).items() if complete_history(root) else ():
        if not set(hashes) <= set(stated.get(commit, [])):
            problems.append(f"{CODE}: out of date; run `hovit evidence add {EVIDENCE}`")
            break
    return len(paths), problems


def check(plans: dict[str, Plan], path: Path, root: Path = Path()) -> Record:
    """Verify one record against its scale's plan: seal, spec, code, predictions.

    A measurement, evaluation or analysis verifies if config still has one of its rows.

    Raises:
        HovitError: with the name of the record and what is wrong with it.
    """
    record = read_record(path)
    if record.scale not in plans:
        raise HovitError(f"{path}: config has no scale {record.scale!r}")
    plan = plans[record.scale]
    if not plan.task_of(record).accepted(record):
        raise HovitError(f"{path}: its spec does not match config")
    _check_code(path, record, root)
    if record.kind == "train" and _predictions(record) == DETECTIONS:
        _check_detections(path, plan.run(record.id, record.spec["seed"]), record, root)
    elif record.kind == "train":
        _check_predictions(path, plan.run(record.id, record.spec["seed"]), record)
    return record


def _predictions(record: Record) -> str:
    """Name of the file from which a run's metrics can be recomputed."""
    return DETECTIONS if record.spec["recipe"].get("detection") else PREDICTIONS


def _check_detections(path: Path, run: Run, record: Record, root: Path) -> None:
    """Recompute AP if this machine has the same annotations; otherwise check the hash only."""
    from ..detection.coco import sample_images
    from ..detection.dataset import evaluation_set
    from ..detection.evaluate import METRICS, detections_digest, evaluate, read_detections

    file = path.parent / DETECTIONS
    detections = read_detections(file)
    if detections_digest(detections) != record.results.get("detections_sha256"):
        raise HovitError(f"{file}: not the detections of {path.name}")
    sha256 = str(record.results.get("annotations_sha256"))
    truth = evaluation_set(run.pack, sha256, root / run.pack.folder)
    if truth is None:
        return
    tested = sample_images(truth.images, run.limit.test, run.dataset.split.seed)
    found = evaluate(truth, detections, [picture.id for picture in tested])
    if found != {name: record.results[name] for name in METRICS if name in record.results}:
        raise HovitError(f"{path}: AP does not match the detections")


def _check_predictions(path: Path, run: Run, record: Record) -> None:
    file = path.parent / PREDICTIONS
    table = read_predictions(file)
    if predictions_digest(table) != record.results.get("predictions_sha256"):
        raise HovitError(f"{file}: not the predictions of {path.name}")
    loss, top1 = metrics(table)
    if (loss, top1) != (record.results.get("loss"), record.results.get("top1")):
        raise HovitError(f"{path}: loss or top1 does not match the predictions")
    if len(table) != record.results.get("images_test") or table["index"].duplicated().any():
        raise HovitError(f"{file}: not one line for each of the test images of {path.name}")
    classes = run.dataset.num_classes
    if not table[["label", "predicted"]].isin(range(classes)).all(axis=None):
        raise HovitError(f"{file}: not all classes are between 0 and {classes - 1}")
    if not _states_best_epoch(record.results):
        raise HovitError(f"{path}: best_epoch or val_top1 does not match its history")


def _states_best_epoch(results: dict[str, Any]) -> bool:
    """Whether `best_epoch` and `val_top1` are those of the best epoch of a well-formed history."""
    try:
        best = max(results["history"], key=lambda epoch: epoch["val_top1"])  # the first of equals
        stated = results["best_epoch"], results["val_top1"]
        return bool(stated == (best["epoch"], best["val_top1"]))
    except (KeyError, TypeError, ValueError):
        return False


def _check_code(path: Path, record: Record, root: Path) -> None:
    """Find the record's code hash in the history, at its commit or, if it names none, at any."""
    code, commit = record.provenance.code, _known_commit(record)
    if not complete_history(root):
        if code not in _stated_hashes(root).get(commit, []):
            raise HovitError(
                f"{path}: the git history is not here, and {CODE} does not list its code hash"
            )
        return
    for one in _history(root) if commit == UNKNOWN else [commit]:
        if record_code(record.kind, record.spec, _package_at(root, one)) == code:
            return
    where = "in any commit" if commit == UNKNOWN else f"at commit {commit[:10]}"
    raise HovitError(f"{path}: its code hash does not match the sources {where}")


def _known_commit(record: Record) -> str:
    """The commit at which a record was made; UNKNOWN if it is not known, or sources had changed."""
    made = record.provenance
    return UNKNOWN if made.dirty else made.commit


def complete_history(root: Path) -> bool:
    """Whether `root` is a git repository with its whole history."""
    return _complete_history(root.resolve())


@lru_cache
def _complete_history(root: Path) -> bool:
    if not is_repository(root):
        return False
    return git(root, "rev-parse", "--is-shallow-repository").decode().strip() == "false"


def _stated_hashes(root: Path) -> dict[str, list[str]]:
    return read_json(root / CODE) if (root / CODE).exists() else {}


@lru_cache
def _history(root: Path) -> list[str]:
    return git(root, "rev-list", "HEAD", "--", "src/hovit").decode().split()


_unpacked: dict[str, tempfile.TemporaryDirectory[str]] = {}


def _package_at(root: Path, commit: str) -> Path:
    """The package's sources at a commit, unpacked in a temporary folder for this process."""
    if commit not in _unpacked:
        if not re.fullmatch(r"[0-9a-f]{7,64}", commit):
            raise HovitError(f"{commit!r} is not a commit")
        content = git(root, "archive", "--format=zip", commit, "src/hovit")
        _unpacked[commit] = tempfile.TemporaryDirectory()
        with zipfile.ZipFile(BytesIO(content)) as archive:
            archive.extractall(_unpacked[commit].name)
    return Path(_unpacked[commit].name) / "src/hovit"
