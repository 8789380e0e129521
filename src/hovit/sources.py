"""Which of our own source files can change a result, and their common hash.

A model's record depends on its architecture's file and on what that imports, on training and on
data; not on the report, and not on other architectures. Comments, docstrings and blank lines do
not count.
"""

import ast
import hashlib
import io
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

from .files import digest

PACKAGE = Path(__file__).parent


@cache
def code_hash(purpose: str, model: str = "", package: Path = PACKAGE) -> str:
    """sha256, in hex, of the sources behind data, a model's training or measuring, or the report.

    Args:
        purpose: `data`, `training`, `detection`, `measure`, `evaluation`, `analysis` or `report`.
        model: a registered name, for all but data and the report.
        package: the folder of the package, this one's unless told.
    """
    start = {package / f"{purpose}/{name}.py" for name in ENTRIES[purpose]}
    total = hashlib.sha256()
    for path in sorted(_closure(start | _architectures(model, package), package)):
        total.update(path.relative_to(package).as_posix().encode())
        total.update(_meaning(path).encode())
    return total.hexdigest()


def training_code(spec: dict[str, Any], package: Path = PACKAGE) -> str:
    """The hash of the sources behind a run: a classifier's, or a detector's."""
    purpose = "detection" if spec["recipe"].get("detection") else "training"
    return code_hash(purpose, spec["model"], package)


def analysis_code(spec: dict[str, Any], package: Path = PACKAGE) -> str:
    """The hash of the sources behind an analysis: its own, and its models'."""
    models = sorted(set(spec["models"].values()))
    return digest([code_hash("analysis", model, package) for model in models])


ENTRIES = {
    "data": ("pack", "readers"),
    "training": ("loop",),
    "detection": ("train",),
    "measure": ("cost", "latency", "study"),
    "evaluation": ("imagenet",),
    "analysis": ("run",),
    "report": ("tables", "figures", "claims", "paper"),
}
# What these decide stands in a record by itself: the spec, the images' fingerprint, the device.
INDIRECT = {
    "catalogue.py", "references.py", "reading.py", "plan.py", "records.py", "sources.py",
    "errors.py", "files.py", "device.py", "splits.py", "readers.py", "pack.py", "predictions.py",
}  # fmt: skip


def _architectures(model: str, package: Path) -> set[Path]:
    """Files under models/ that register this name, or build it as part of another (`l_*`)."""
    names = {model, model.removeprefix("l_")}
    found = set()
    for path in (package / "models").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if names & defined or (model.startswith("l_") and path.stem == "launcher"):
            found.add(path)
    return found


def _closure(start: set[Path], package: Path) -> set[Path]:
    """These files and all of ours that they import; the Launcher's siblings are not its parts."""
    found: set[Path] = set()
    todo = list(start)
    while todo:
        path = todo.pop()
        if path in found or (path.name in INDIRECT and path not in start):
            continue
        found.add(path)
        if path.stem != "launcher":
            todo += _imports(path, package)
    return found


@cache
def _imports(path: Path, package: Path) -> list[Path]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1]
            target = base.joinpath(*(node.module or "").split("."))
            found += [target.with_suffix(".py")]
            found += [(target / alias.name).with_suffix(".py") for alias in node.names]
    return [p for p in found if p.is_file() and package in p.parents]


@cache
def _meaning(path: Path) -> str:
    """The file's lines without docstrings, comments and blank lines; alike in every Python."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                first, last = value.lineno - 1, value.end_lineno or value.lineno
                lines[first:last] = [""] * (last - first)
    return "\n".join(line.rstrip() for line in lines if line.strip())
