"""Fixtures for tests that train a small model on real images or read made-up records.

A machine with a GPU may lack packages that only other tests need. `pytest -m gpu` collects there:
test files that import a missing one of OPTIONAL are skipped, and tests by Hypothesis one by one.
"""

import importlib.util
import inspect
import os
import re
import shutil
import sys
from collections.abc import Callable, Generator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

# One thread for each process: `pytest -n` already uses all cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from synthetic import write_all

import hovit.models  # noqa: F401 (registers)
from hovit.config.plan import Plan, load_plan
from hovit.config.runs import Run
from hovit.data.pack import prepare

OPTIONAL = frozenset({
    "dvc", "matplotlib", "moto", "onnx", "onnxruntime", "pycocotools", "scipy", "sklearn",
    "snakemake", "typst",
})  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip a test file that imports a package of OPTIONAL which is missing."""
    report = yield
    if report.failed:
        error = re.search(r"ModuleNotFoundError: No module named '(\w+)", str(report.longrepr))
        if error and error[1] in OPTIONAL:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"needs {error[1]}")
    return report


class MissingHypothesis:
    """Stands for Hypothesis where it is missing: its tests are skipped, the others run."""

    __spec__ = ModuleSpec("hypothesis", None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __or__(self, _: object) -> Any:
        return self

    def __call__(self, *args: Any, **_: Any) -> Any:
        if args and inspect.isfunction(args[0]) and args[0].__name__.startswith("test_"):
            return pytest.mark.skip(reason="needs Hypothesis")(args[0])
        return self


if importlib.util.find_spec("hypothesis") is None:
    sys.modules["hypothesis"] = MissingHypothesis()  # type: ignore[assignment]

ROOT = Path(__file__).parents[1]
SMALL = {"embed_dim": [64, 64, 64], "depth": [1, 1, 1], "drop_rate": 0.3}  # 0.2 million parameters


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, so that parallel workers end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Say where two files differ; pytest's own comparison of long byte strings takes minutes."""
    if not (op == "==" and isinstance(left, bytes) and isinstance(right, bytes)):
        return None
    pairs = enumerate(zip(left, right, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
    parts = [part[at : at + 60] for part in (left, right)]
    return [f"{len(left)} bytes == {len(right)} bytes, equal up to byte {at}", *map(repr, parts)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def plan() -> Plan:
    """The real config at scale smoke."""
    return load_plan("smoke", ROOT / "config")


def small_run(
    plan: Plan, run_id: str = "levit_deck.pets.deck", epochs: int = 2, **changes: Any
) -> Run:
    """A run of the config on 96 digits; its model is a small LeViT with dropout by default."""
    run = plan.run(run_id)
    recipe = run.recipe.model_copy(update={"epochs": epochs, **changes.pop("recipe", {})})
    limit = run.limit.model_copy(update={"train": 96, "val": 40, "test": 50})
    return Run(
        **run.model_dump(exclude={"recipe", "limit", "model_args", *changes}),
        recipe=recipe,
        limit=limit,
        **({"model_args": SMALL} | changes),
    )


@pytest.fixture
def packed(tmp_path: Path, plan: Plan) -> Path:
    """A top folder with the digits packed."""
    pack = plan.run("levit_deck.pets.deck").pack
    prepare(pack, tmp_path, tmp_path / pack.folder)
    return tmp_path


@pytest.fixture(scope="session")
def copy_records(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Plan, Path], Path]:
    """A function that copies made-up records of all tasks of a plan of ROOT into a folder."""
    written: dict[str, Path] = {}  # by scale

    def copy(plan: Plan, target: Path) -> Path:
        scale = plan.scale.id
        if scale not in written:
            written[scale] = tmp_path_factory.mktemp(f"records of {scale}")
            write_all(plan, written[scale])
        return shutil.copytree(written[scale], target, dirs_exist_ok=True)

    return copy


@pytest.fixture
def root(tmp_path: Path, plan: Plan, copy_records: Callable[[Plan, Path], Path]) -> Path:
    """A folder with made-up records of all tasks of the plan."""
    return copy_records(plan, tmp_path)
