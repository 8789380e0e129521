"""Which package may import which, by reading src/; and that reading results needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hovit
from hovit.utils import yaml_file

SRC = Path(hovit.__file__).parent
TORCH = {"torch", "torchvision", "timm", "lightning", "lightning_fabric"}


def imports(src: Path) -> dict[str, set[str]]:
    """Module -> all that it imports, anywhere in it: `models.hovit` of ours, `torch` of others."""
    modules = {}
    for path in src.rglob("*.py"):
        name = path.relative_to(src).with_suffix("").as_posix().replace("/", ".")
        modules[name.removesuffix("__init__").removesuffix(".")] = path
    found = {}
    for module, path in modules.items():
        package = path.parent.relative_to(src).parts
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
                base = ".".join(filter(None, (base, node.module)))
                targets = [".".join(filter(None, (base, alias.name))) for alias in node.names]
                targets = [f"hovit.{t}" for t in targets] if node.level else targets
            else:
                continue
            for target in targets:
                if target.partition(".")[0] != "hovit":
                    found[module].add(target.partition(".")[0])
                    continue
                ours = target.removeprefix("hovit").removeprefix(".")
                while ours not in modules:  # a name in a module
                    ours = ours.rpartition(".")[0]
                found[module].add(ours)
    return found


def of(package: str, graph: dict[str, set[str]]) -> set[str]:
    """The modules of a package, or the module itself."""
    return {m for m in graph if m == package or m.startswith(f"{package}.")}


def reaches(package: str, graph: dict[str, set[str]], transitive: bool) -> set[str]:
    """What a package imports; of ours by first name, so that `data.pack` is `data`."""
    todo, found = of(package, graph), set()
    seen = set(todo)
    while todo:
        targets = graph[todo.pop()]
        found |= targets
        if transitive:
            todo |= (targets & graph.keys()) - seen
            seen |= todo
    return {m.partition(".")[0] for m in found - {""}} - {package}


# Package -> the packages that it may import. Imports go up this table only, so there is no cycle.
ALLOWED: dict[str, set[str]] = {
    "utils": set(),
    "records": {"utils"},
    "config": {"records", "utils"},
    "attention": set(),
    "models": {"attention"},
    "data": {"config", "utils"},
    "measure": {"utils"},
    "detection": {"config", "data", "measure", "utils"},
    "analysis": {"attention", "measure", "models", "utils"},
    "training": {"config", "data", "detection", "records", "utils"},
    "pipeline": {
        "analysis", "attention", "config", "data", "detection", "measure", "models", "records",
        "training", "utils",
    },
    "report": {"config", "records", "utils"},
}  # fmt: skip
WITHOUT_TORCH = ("records", "config", "report")


def ours(names: set[str]) -> set[str]:
    return names & {path.name for path in SRC.iterdir() if path.is_dir()}


def test_the_table_names_every_package_in_order() -> None:
    packages = {path.parent.name for path in SRC.glob("*/__init__.py")}
    assert packages == set(ALLOWED)
    names = list(ALLOWED)
    for name, allowed in ALLOWED.items():
        assert allowed <= set(names[: names.index(name)])


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    graph = imports(SRC)
    assert of(package, graph)
    found = reaches(package, graph, transitive=False)
    assert ours(found) <= ALLOWED[package]
    if package in WITHOUT_TORCH:
        assert not found & TORCH


def test_a_hole_would_be_seen(tmp_path):
    """Direct, relative, inside a function, through another module: each is found."""
    for name, text in {
        "__init__": "",
        "report/__init__": "",
        "report/a": "def f():\n    from ..helper import g",
        "report/b": "from .. import models",
        "report/c": "import hovit.data.pack as p",
        "report/d": "from hovit import measure",
        "helper": "from torch.nn import Module",
        "models/__init__": "",
        "data/__init__": "",
        "data/pack": "from . import sibling",
        "data/sibling": "import timm.data",
        "measure": "",
    }.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    graph = imports(tmp_path)
    assert reaches("report", graph, False) == {"helper", "models", "data", "measure"}
    assert reaches("report", graph, True) == {
        "helper", "models", "data", "measure", "torch", "timm"
    }  # fmt: skip


def test_listing_planning_and_reporting_load_no_torch():
    reports = [m for m in imports(SRC) if m == "report" or m.startswith("report.")]
    assert len(reports) > 3
    names = ["config.plan", "records.record", "utils.code_hash", "cli", *reports]
    code = "\n".join(f"import hovit.{name}" for name in names)
    code += f"\nimport sys; print(sorted({TORCH} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def test_nothing_is_unpickled():
    for module, targets in imports(SRC).items():
        assert not targets & PICKLES, module
    loads = []
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                where = f"{path.relative_to(SRC)}:{node.lineno}: {called}"
                assert called not in ("eval", "exec", "load_state_dict_from_url"), where
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if called == "torch.load":  # the weights of a package, once, without code
                    assert path == SRC / "training/pretrained.py", where
                    assert keywords.get("weights_only") == "True", where
                    loads.append(where)
                assert keywords.get("allow_pickle", "False") == "False", where
            elif isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert "load" not in {alias.name for alias in node.names}, path
    assert len(loads) == 1


def test_yaml_is_read_by_the_safe_loader():
    safe = (yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    assert issubclass(yaml_file._UniqueKeys, safe)
    calls = [
        (path.name, ast.unparse(node))
        for path in SRC.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("yaml.")
        and "load" in ast.unparse(node.func)
    ]  # fmt: skip
    assert calls
    assert all(text.endswith("_UniqueKeys)") for _, text in calls), calls
