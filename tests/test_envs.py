"""Lock files, conda and container recipes, pyproject.toml and the imports in src/ agree."""

import ast
import re
import sys
import tomllib
from collections import Counter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from hovit.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ["requirements.lock", "bootstrap.lock"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# `lightning` includes Fabric: code may fall back to it where the lock file is not installed.
OPTIONAL = {"lightning"}


def env_text(name: str) -> str:
    return (ROOT / "envs" / name).read_text()


def wanted() -> set[str]:
    """Everything that the project, its extra and its development group name."""
    project = PYPROJECT["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["artifact"]
    return names(lines + PYPROJECT["dependency-groups"]["dev"])


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def locked(name: str) -> list[tuple[Requirement, list[str]]]:
    """Every entry of a lock file, with its hashes."""
    joined = re.sub(r"^\s*#.*\n", "", env_text(name), flags=re.M).replace("\\\n", " ")
    entries = []
    for line in filter(str.strip, joined.splitlines()):
        requirement, *hashes = re.split(r"\s+--hash=", line.strip())
        entries.append((Requirement(requirement), hashes))
    return entries


def versions(name: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for requirement, _ in locked(name):
        found.setdefault(requirement.name, set()).add(str(requirement.specifier))
    return found


def recipe_pythons() -> dict[str, str]:
    """The Python version that each recipe installs."""
    dependencies = yaml.safe_load(env_text("environment.yaml"))["dependencies"]
    conda = [d.removeprefix("python=") for d in dependencies if str(d).startswith("python=")]
    image = re.findall(r"^FROM python:([\d.]+)-slim$", env_text("Containerfile"), flags=re.M)
    assert len(conda) == len(image) == 1
    return {"environment.yaml": conda[0], "Containerfile": image[0]}


def test_every_requirement_is_locked():
    assert wanted() <= versions("requirements.lock").keys()


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_pins_hashes_and_names_no_host(lock):
    assert not re.search(r"https?://", env_text(lock))
    entries = locked(lock)
    assert entries
    for requirement, hashes in entries:
        assert str(requirement.specifier).startswith("=="), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), requirement


def test_bootstrap_is_the_locked_uv_alone():
    uv = {"uv": versions("requirements.lock")["uv"]}
    assert versions("bootstrap.lock") == uv


def test_build_backend_is_locked():
    """The package is built without isolation, so the build backend comes from the lock file."""
    assert set(PYPROJECT["build-system"]["requires"]) <= wanted()


@pytest.mark.parametrize("recipe", ["environment.yaml", "Containerfile"])
def test_recipe_python_is_what_the_lock_was_compiled_for(recipe):
    python = recipe_pythons()[recipe]
    admitted = SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert python in admitted
    # `make lock` compiles for the lowest version allowed
    assert admitted == SpecifierSet(f">={python}")
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    linux = here | {"sys_platform": "linux", "platform_machine": "x86_64"}
    applicable = Counter(
        r.name for r, _ in locked("requirements.lock") if not r.marker or r.marker.evaluate(linux)
    )
    assert wanted() <= applicable.keys()
    assert set(applicable.values()) == {1}


def test_conda_recipe_installs_the_lock_with_hashes():
    dependencies = yaml.safe_load(env_text("environment.yaml"))["dependencies"]
    assert dependencies[1:] == ["pip", {"pip": ["--require-hashes", "-r requirements.lock"]}]


def test_container_recipe_installs_the_locks_with_hashes():
    text = env_text("Containerfile").replace("\\\n", " ")
    installs = [c for c in re.split(r"&&|\n", text) if re.search(r"\bpip (install|sync)\b", c)]
    assert [c.split()[-1] for c in installs] == ["envs/bootstrap.lock", "envs/requirements.lock"]
    assert all("--require-hashes" in c.split() for c in installs)


def test_makefile_installs_the_locks_with_hashes():
    recipe = (ROOT / "Makefile").read_text()
    installs = [c for c in recipe.splitlines() if re.search(r"\bpip (install|sync) .*\.lock", c)]
    assert [c.split()[-1] for c in installs] == ["envs/bootstrap.lock", "envs/requirements.lock"]
    assert all("--require-hashes" in c.split() for c in installs)


def imported_modules(paths: list[Path]) -> dict[str, str]:
    """Every top-level module that these files import, with one file that imports it."""
    found = {}
    for path in sorted(paths):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            found |= {name.partition(".")[0]: str(path.relative_to(ROOT)) for name in names}
    return found


def unnamed(paths: list[Path], requirements: set[str]) -> dict[str, str]:
    """Third-party modules that these files import and no requirement provides."""
    providers = packages_distributions()
    ours = {"hovit"} | OPTIONAL | set(sys.stdlib_module_names)
    third_party = {m: path for m, path in imported_modules(paths).items() if m not in ours}
    assert third_party
    return {
        module: path
        for module, path in third_party.items()
        if not requirements & {canonicalize_name(d) for d in providers.get(module, [])}
    }


def test_every_import_is_a_named_requirement():
    """A module that is only a dependency of another package may disappear with that package."""
    assert not unnamed(list((ROOT / "src").rglob("*.py")), wanted())


def test_models_need_only_the_dependencies_of_the_package():
    """`pip install .` without the extra is enough for `timm.create_model("hovit")`."""
    paths = [
        p for folder in ("models", "attention") for p in (ROOT / "src/hovit" / folder).glob("*.py")
    ]
    assert not unnamed(paths, names(PYPROJECT["project"]["dependencies"]))


def test_the_command_line_names_the_extra_that_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "hovit.cli", raising=False)
    with pytest.raises(SystemExit, match=r"needs typer: .*artifact"):
        main()
