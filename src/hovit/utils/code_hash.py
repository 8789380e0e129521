"""Hash of the source files that can change a result.

A training record depends on the model's file and its imports, on the training code and on the
data code. It does not depend on reports or on other architectures. Comments, docstrings and blank
lines do not count.
"""

import ast
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
# Purpose -> the files at which its sources start. `entry_points` reads this from other commits.
ENTRIES = {
    "data": ("data/pack.py", "data/readers.py", "data/image_files.py"),
    "training": ("training/classification.py",),
    "detection": ("training/detection.py",),
    "measure": ("measure/cost.py", "measure/latency.py", "pipeline/measure.py"),
    "evaluation": ("pipeline/evaluate.py",),
    "analysis": ("pipeline/analyse.py",),
    "report": (
        "report/tables/write.py",
        "report/figures/draw.py",
        "report/claims/write.py",
        "report/paper/write.py",
        "report/metrics.py",
        "config/kinds.py",
        "config/metrics.py",
        "config/plan.py",
        "config/runs.py",
        "config/schema.py",
        "config/tasks.py",
        "records/evidence.py",
        "records/predictions.py",
        "records/record.py",
    ),
    "page": (
        "report/page/write.py",
        "config/kinds.py",
        "config/metrics.py",
        "config/plan.py",
        "config/runs.py",
        "config/schema.py",
        "config/tasks.py",
        "records/evidence.py",
        "records/predictions.py",
        "records/record.py",
    ),
}
# Files and folders that other parts of a record account for: the spec, the fingerprint of the
# images, the device. They count only where a purpose starts at them: a report has no spec.
INDIRECT = (
    "config/",
    "records/",
    "utils/errors.py",
    "utils/files.py",
    "utils/git.py",
    "utils/strict.py",
    "utils/yaml_file.py",
    "utils/device.py",
    "utils/code_hash.py",
    "data/readers.py",
    "data/pack.py",
)
# Model -> its argument that names the model that it builds. `record_code` also reads this from
# other commits; older ones do not have it.
BUILDS = {"deployed": "of"}
LAUNCHER = ("launcher", "front")  # files of every model `l_*`
# A string, which may contain "#", or a comment; much faster than `tokenize`. An f-string must not
# repeat its own quotes inside: Python 3.11 does not allow it, and this expression would misread it.
STRING_OR_COMMENT = re.compile(r"""(\"{3}|'{3}|["'])(?:\\.|(?!\1)[^\\])*\1|(#[^\n]*)""", re.DOTALL)


def code_hash(purpose: str, model: str = "", package: Path = PACKAGE) -> str:
    """sha256, in hex, of the sources behind one purpose and one model.

    Args:
        purpose: a key of ENTRIES.
        model: registered name; not needed for data and reports.
        package: folder of the package. Another commit's package brings its own entry points.
    """
    return _hash(purpose, (model,), package)


def joint_code_hash(purpose: str, models: list[str], package: Path = PACKAGE) -> str:
    """sha256, in hex, over the code hashes of several models."""
    text = ",".join(f'"{code_hash(purpose, model, package)}"' for model in models)
    return hashlib.sha256(f"[{text}]".encode()).hexdigest()


def record_code(kind: str, spec: dict[str, Any], package: Path = PACKAGE) -> str:
    """The code hash of a record of this kind and spec.

    Args:
        kind: `train`, `measure`, `evaluation` or `analysis`.
        spec: the record's spec.
        package: folder of the package.
    """
    if kind == "train":
        purpose = "detection" if spec["recipe"].get("detection") else "training"
        return code_hash(purpose, spec["model"], package)
    if kind == "analysis":
        return joint_code_hash("analysis", sorted(set(spec["models"].values())), package)
    builds = _built_models(package)
    models = {row["model"] for row in spec["rows"].values()}
    models |= {
        row["model_args"][builds[row["model"]]]
        for row in spec["rows"].values()
        if row["model"] in builds
    }
    return joint_code_hash(kind, sorted(models), package)


@cache
def _built_models(package: Path) -> dict[str, str]:
    """BUILDS of a package, as its own source file states it."""
    path = package / "utils/code_hash.py"
    return _constants(path).get("BUILDS", {}) if path.is_file() else {}


@cache
def _hash(purpose: str, models: tuple[str, ...], package: Path) -> str:
    entries, indirect = entry_points(package)
    start = {package / name for name in entries[purpose]}
    for model in models:
        start |= _architectures(model, package)
    total = hashlib.sha256()
    for path in sorted(_closure(start, indirect, package)):
        total.update(path.relative_to(package).as_posix().encode())
        total.update(_read(path).code.encode())
    return total.hexdigest()


@cache
def entry_points(package: Path) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """ENTRIES and INDIRECT of a package, as its own source file states them.

    The first commits keep them in `sources.py`, with names relative to the purpose's folder.
    """
    path, early = package / "utils/code_hash.py", package / "sources.py"
    if path.is_file():
        found = _constants(path)
        return found["ENTRIES"], found["INDIRECT"]
    found = _constants(early)
    entries = {
        purpose: tuple(f"{purpose}/{name}.py" for name in names)
        for purpose, names in found["ENTRIES"].items()
    }
    return entries, tuple(sorted(found["INDIRECT"]))


def _constants(path: Path) -> dict[str, Any]:
    """The literal values of a file's top-level constants."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:  # not a literal
                continue
    return found


def _architectures(model: str, package: Path) -> set[Path]:
    """Files under models/ that register this name, or build it as part of another (`l_*`)."""
    names = {model, model.removeprefix("l_")}
    launched = model.startswith("l_")
    return {
        path
        for path in (package / "models").glob("*.py")
        if names & _read(path).functions or (launched and path.stem in LAUNCHER)
    }


def _closure(start: set[Path], indirect: tuple[str, ...], package: Path) -> set[Path]:
    """These files and all files of the package that they import.

    The Launcher's imports do not count, except its base class: it builds any registered backbone by
    name.
    """
    found: set[Path] = set()
    todo = list(start)
    while todo:
        path = todo.pop()
        if path in found or (path not in start and _is_indirect(path, indirect, package)):
            continue
        found.add(path)
        if path.stem != "launcher":
            todo += _imports(path, package)
    return found


def _is_indirect(path: Path, indirect: tuple[str, ...], package: Path) -> bool:
    name = path.relative_to(package).as_posix()
    return path.name in indirect or any(
        name.startswith(entry) if entry.endswith("/") else name == entry for entry in indirect
    )


@cache
def _imports(path: Path, package: Path) -> tuple[Path, ...]:
    """Files of the package that a file imports."""
    found = []
    for level, module, names in _read(path).imports:
        target = path.parents[level - 1].joinpath(*module.split("."))
        found += [target.with_suffix(".py")]
        found += [(target / name).with_suffix(".py") for name in names]
    return tuple(p for p in found if p.is_file() and package in p.parents)


@dataclass(frozen=True)
class Source:
    """Contents of a source file that matter for hashes.

    Args:
        code: its lines without docstrings, comments and blank lines; equal in all Python versions.
        imports: (level, module, names) of each relative import.
        functions: names of the functions defined at its top level.
    """

    code: str
    imports: tuple[tuple[int, str, tuple[str, ...]], ...]
    functions: frozenset[str]


@cache
def _read(path: Path) -> Source:
    return _parse(path.read_text(encoding="utf-8"))


# By content: the packages of two commits share most files.
@cache
def _parse(text: str) -> Source:
    tree = ast.parse(text)
    nodes = list(_statements(tree))
    return Source(
        code=_code(text, nodes),
        imports=tuple(
            (node.level, node.module or "", tuple(alias.name for alias in node.names))
            for node in nodes
            if isinstance(node, ast.ImportFrom) and node.level
        ),
        functions=frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef)),
    )


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """This node and all statements inside, without their expressions."""
    yield node
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        children = getattr(node, field, None)
        for child in children if isinstance(children, list) else ():
            yield from _statements(child)


def _code(text: str, nodes: list[ast.AST]) -> str:
    """The lines of a file without docstrings, comments and blank lines."""
    lines = STRING_OR_COMMENT.sub(lambda m: "" if m[2] else m[0], text).splitlines()
    for node in nodes:
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                first, last = value.lineno - 1, value.end_lineno or value.lineno
                lines[first:last] = [""] * (last - first)
    return "\n".join(line.rstrip() for line in lines if line.strip())
