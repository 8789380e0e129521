"""Which edits make a run's record out of date: those that can change its result, and no others."""

import ast
import io
import shutil
import tokenize
from pathlib import Path

import pytest

from hovit.utils.code_hash import (
    PACKAGE,
    STRING_OR_COMMENT,
    _hash,
    _imports,
    _parse,
    _read,
    _statements,
    code_hash,
    entry_points,
    record_code,
)

HOVIT, LEVIT, LOOP = "models/hovit.py", "models/levit_layers.py", "training/classification.py"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the sources that may be edited."""
    shutil.copytree(PACKAGE, tmp_path / "hovit", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "hovit"


def hashes(package: Path) -> dict[str, str]:
    for cached in (_hash, _imports, _read, entry_points):
        cached.cache_clear()
    models = ("hovit", "l_hovit", "levit_deck", "resnet50")
    found = {model: code_hash("training", model, package) for model in models}
    return found | {"measure": code_hash("measure", "hovit", package)}


def changed(package: Path, file: str, old: str, new: str) -> set[str]:
    before = hashes(package)
    text = (package / file).read_text()
    assert old in text
    (package / file).write_text(text.replace(old, new, 1))
    after = hashes(package)
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("config/metrics.py", "RATIO_DECIMALS = ", "RATIO_DECIMALS = 1 + "),
        ("config/schema.py", "{'part of' if", "{'one of' if"),
        ("report/number.py", "return", "yield"),
        ("records/predictions.py", "100.0 *", "1.0 *"),
    ],
)
def test_what_a_report_shows_is_in_its_hash(package: Path, file: str, old: str, new: str) -> None:
    def reports() -> list[str]:
        hashes(package)  # clears the caches
        return [code_hash(purpose, package=package) for purpose in ("report", "page")]

    before, text = reports(), (package / file).read_text()
    assert old in text
    (package / file).write_text(text.replace(old, new, 1))
    assert all(old != new for old, new in zip(before, reports(), strict=True))


def test_a_copy_hashes_alike(package: Path) -> None:
    assert hashes(package) == hashes(PACKAGE)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        (HOVIT, '"""HoViT', '"""The HoViT'),
        (LEVIT, "# [B, H*W, C] -> [B, H*W, C]", "# same shape"),
        (LOOP, "EVAL_BATCH = 64", "EVAL_BATCH = 64  # images\n"),
        ("report/tables/columns.py", "NOTHING = ", "NOTHING_AT_ALL = "),
        ("data/readers.py", "DOWNLOAD_TIMEOUT = 30", "DOWNLOAD_TIMEOUT = 31"),
    ],
)
def test_what_changes_no_result_changes_no_hash(
    package: Path, file: str, old: str, new: str
) -> None:
    assert changed(package, file, old, new) == set()


def test_an_architecture_is_its_own_and_its_users_affair(package: Path) -> None:
    assert changed(package, HOVIT, "(2, 2, 1)", "(2, 3, 1)") == {"hovit", "l_hovit", "measure"}
    assert changed(package, LEVIT, "HEAD_DIM = 64", "HEAD_DIM = 32") == {
        "hovit", "l_hovit", "levit_deck", "measure",
    }  # fmt: skip
    assert changed(package, "models/launcher.py", "kernel_size=4", "kernel_size=2") == {"l_hovit"}


def test_the_loop_is_everyones_and_latency_is_measurings(package: Path) -> None:
    everyone = {"hovit", "l_hovit", "levit_deck", "resnet50"}
    assert changed(package, LOOP, "EVAL_BATCH = 64", "EVAL_BATCH = 32") == everyone
    assert changed(package, "measure/latency.py", "* 1e3", "* 1e6") == {"measure"}


def test_a_new_model_changes_nobody(package: Path) -> None:
    before = hashes(package)
    (package / "models/new.py").write_text("def new_model():\n    return 1\n")
    assert hashes(package) == before


TRICKY = r'''"""A docstring, which goes."""
a = "# no comment"  # a comment
b = '"' + "\"# no comment"  # "a" comment
c = r"\\"  # after a raw string
d = """kept # text \""" still
  # more text
"""
e = f"{a!r:>{3}} # {d['key']}"  # it's a comment with one quote


def f():  # comment
    "A docstring # of two"
    return ""  # comment
'''


def test_comments_and_statements_are_those_of_python() -> None:
    sources = [path.read_text() for path in (*PACKAGE.rglob("*.py"), Path(__file__))]
    for source in (TRICKY, *sources):
        lines = source.splitlines()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
        found = STRING_OR_COMMENT.sub(lambda m: "" if m[2] else m[0], source)
        assert found.splitlines() == lines
        tree = ast.parse(source)
        kinds = (ast.mod, ast.stmt, ast.ExceptHandler, ast.match_case)
        expected = [id(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        assert sorted(map(id, _statements(tree))) == sorted(expected)
    code = _parse(TRICKY).code
    assert code.count("#") == 5
    assert "docstring" not in code


def test_a_deployed_model_is_hashed_with_the_model_that_it_builds(package: Path) -> None:
    args = {"of": "efficientvit_paper_m5", "by": "folding"}
    spec = {"rows": {"m5": {"model": "deployed", "model_args": args}}}
    found = set()
    for file, line in (("models/efficientvit.py", ""), ("models/efficientvit.py", "\nX = 1\n"),
                       ("models/hovit.py", "\nX = 1\n")):  # fmt: skip
        path = package / file
        path.write_text(path.read_text() + line)
        hashes(package)  # clears the caches
        found.add((record_code("measure", spec, package), record_code("evaluation", spec, package)))
    assert len(found) == 2
