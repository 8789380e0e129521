"""CONTRIBUTING is true: each change, made on a copy, touches the files that its section names."""

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from hovit.config.plan import load_plan
from hovit.data.pack import prepare
from hovit.report.model_cards import COMMAND
from hovit.training.checkpoint import save_weights
from hovit.utils.create_model import create_model
from hovit.utils.generated import marks

TOP = ("src", "config", "dvc.yaml", "figures")


def listed_files(section: str) -> list[str]:
    """The paths that a section of CONTRIBUTING names; its placeholders as `*`."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (found,) = re.findall(rf"^## {re.escape(section)}\n\nFiles: (.*)$", text, flags=re.M)
    return [re.sub(r"[A-Z]{3,}", "*", name) for name in re.findall(r"`([^`]+)`", found)]


class Copy:
    """A copy of the artifact's code, config and thumbnails that may be changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ignore = shutil.ignore_patterns("*.pyc.*")  # bytecode that another process is writing
        for name in ("src", "config"):  # bytecode stays valid, because copies keep their times
            shutil.copytree(ROOT / name, root / name, ignore=ignore)
        shutil.copytree(ROOT / "figures/thumbnails", root / "figures/thumbnails")
        for name in ("dvc.yaml", "figures/README.md"):
            shutil.copyfile(ROOT / name, root / name)
        self.before = self.files()

    def files(self) -> dict[str, str]:
        """Path -> sha256 of each file in TOP."""
        paths = [p for name in TOP for p in (self.root / name, *(self.root / name).rglob("*"))]
        return {
            path.relative_to(self.root).as_posix(): sha256(path.read_bytes()).hexdigest()
            for path in paths
            if path.is_file() and "__pycache__" not in path.parts
        }

    def write(self, file: str, text: str) -> None:
        assert not (self.root / file).exists(), file
        (self.root / file).write_text(text)

    def edit(self, file: str, old: str, new: str) -> None:
        """Replace a text that occurs once."""
        text = (self.root / file).read_text()
        assert text.count(old) == 1, f"{file}: {old!r} occurs {text.count(old)} times"
        (self.root / file).write_text(text.replace(old, new))

    def append(self, file: str, text: str) -> None:
        (self.root / file).write_text((self.root / file).read_text() + text)

    def run(self, *args: str) -> str:
        """Run Python in the copy, with the copy's package; its standard output."""
        done = subprocess.run(
            [sys.executable, *args], cwd=self.root, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(self.root / "src")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def hovit(self, *args: str) -> str:
        return self.run("-m", "hovit", *args)

    def changes_what(self, section: str) -> None:
        """The files that differ from the original are those that the section names."""
        after = self.files()
        touched = {name for name in after if after[name] != self.before.get(name)}
        listed = listed_files(section)
        assert all(any(fnmatch(name, pattern) for pattern in listed) for name in touched), touched
        assert all(any(fnmatch(name, pattern) for name in touched) for pattern in listed), touched


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def specs(copy: Copy) -> dict[str, str]:
    """Run and seed -> spec hash, at scale smoke."""
    plan = load_plan("smoke", copy.root / "config")
    return {f"{run.id}/{run.seed}": run.spec_hash for run in plan.all_runs}


ROW = """  - id: another
    label: "Another row"
    model: levit_deck
    model_args: {drop_rate: 0.25}
    ours: true
"""
ANOTHER = "levit_deck-drop_rate=0.25.pets.deck/0"
DIGITS = "{pets: digits, cifar10: digits"


def study(model: str, columns: str = "[parameters, macs]", more: str = "trained: false\n") -> str:
    """A study of one row, in a file `another.yaml`."""
    return f"""id: another
title: "Another study"
source: {{paper: ours, place: "a test"}}
image_size: 64
columns: {columns}
{more}rows:
  - id: only
    label: "The only row"
    model: {model}
    ours: true
"""


def test_a_row_is_one_file_and_leaves_every_other_run_alone(copy: Copy) -> None:
    before = specs(copy)
    copy.append("config/studies/hovit.yaml", ROW)
    copy.changes_what("Add a row to a table")
    after = specs(copy)
    assert after.keys() - before.keys() == {ANOTHER}
    assert {name: after[name] for name in before} == before
    copy.hovit("table", "hovit")
    assert "Another row" in (copy.root / "results/tables/hovit.md").read_text()


def images(root: Path) -> None:
    """Two classes of five images, as an ImageFolder tree."""
    for label in ("cat", "dog"):
        (root / "photos" / label).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(
                root / f"photos/{label}/{i}.png"
            )


PHOTOS = """id: photos
title: "Photos"
about: "ten images"
stands_for: "Oxford-IIIT Pet"
reader: {reader}
files: [photos]
num_classes: 2
split: {{train: 0.6, val: 0.2}}
"""


def test_a_dataset_in_an_existing_role_is_two_files(copy: Copy) -> None:
    images(copy.root)
    copy.write("config/datasets/photos.yaml", PHOTOS.format(reader="image_folder"))
    copy.edit("config/scales/smoke.yaml", DIGITS, "{pets: photos, cifar10: digits")
    copy.changes_what("Add a dataset in an existing role")
    said = copy.hovit("data", "photos-64px", "--data-root", ".")
    assert "photos-64px: 6 / 2 / 2 images" in said
    assert re.search(r"hovit\.pets\.deck .* photos-64px", copy.hovit("list", "--runs"))


def test_a_role(copy: Copy) -> None:
    copy.edit("src/hovit/config/schema.py", '"coco", "pretrain"', '"coco", "faces", "pretrain"')
    copy.hovit("schema")
    copy.edit("config/scales/smoke.yaml", DIGITS, "{faces: digits, pets: digits, cifar10: digits")
    copy.changes_what("Add a role")
    copy.write("config/studies/another.yaml", study("hovit", "[top1]", "dataset: faces\n"))
    assert re.search(r"hovit\.faces\.deck .* digits-64px +another", copy.hovit("list", "--runs"))
    copy.hovit("table", "another")
    assert ".faces." not in copy.hovit(
        "list", "--runs", "--scale", "mini"
    )  # which has no such images


def test_a_reader(copy: Copy) -> None:
    images(copy.root)
    copy.edit(
        "src/hovit/data/readers.py",
        'READERS: dict[str, Callable[[Dataset, Path], list[Item]]] = {\n',
        '''def _by_name(dataset: Dataset, data_root: Path) -> list[Item]:
    paths = sorted((data_root / dataset.files[0]).rglob("*.png"))
    return [Item(str(p), p.parent.name, lambda p=p: Image.open(p)) for p in paths]


READERS: dict[str, Callable[[Dataset, Path], list[Item]]] = {
    "by_name": _by_name,
''',
    )  # fmt: skip
    copy.edit(
        "src/hovit/config/schema.py",
        '        "image_folder",',
        '        "image_folder",\n        "by_name",',
    )
    copy.hovit("schema")
    copy.changes_what("Add a reader")
    copy.write("config/datasets/photos.yaml", PHOTOS.format(reader="by_name"))
    copy.edit("config/scales/smoke.yaml", DIGITS, "{pets: photos, cifar10: digits")
    assert "photos-64px: 6 / 2 / 2 images" in copy.hovit("data", "photos-64px", "--data-root", ".")


def test_a_scale_is_one_file(copy: Copy) -> None:
    smoke = (copy.root / "config/scales/smoke.yaml").read_text()
    copy.write("config/scales/tiny.yaml", smoke.replace("id: smoke", "id: tiny"))
    copy.changes_what("Add a scale")
    assert "runs at scale tiny" in copy.hovit("list", "--scale", "tiny")


def test_a_recipe(copy: Copy) -> None:
    deck = (copy.root / "config/recipes/deck.yaml").read_text()
    copy.write("config/recipes/another.yaml", deck.replace("id: deck", "id: another"))
    params = "      - config/recipes/deck.yaml:\n"
    copy.edit("dvc.yaml", params, params.replace("deck", "another") + params)
    copy.changes_what("Add a recipe")
    copy.write("config/studies/another.yaml", study("hovit", "[top1]", "recipe: another\n"))
    assert "hovit.pets.another" in copy.hovit("list", "--runs")


MODEL = '''"""A linear classifier of mean colours."""

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class Another(nn.Module):
    def __init__(self, num_classes: int = 37, in_chans: int = 3, **kwargs: object) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, in_chans
        self.head = nn.Linear(in_chans, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.head = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs({"another": {"input_size": (3, 64, 64), "classifier": "head"}})


@register_model
def another(pretrained: bool = False, **kwargs: object) -> Another:
    return build_model_with_cfg(Another, "another", pretrained, **kwargs)
'''


def measured(copy: Copy) -> dict[str, dict[str, float]]:
    """Measure the study `another`: the results by row."""
    copy.hovit("measure", "another", "--accelerator", "cpu")
    record = json.loads((copy.root / "results/runs/smoke/measure/another.json").read_text())
    return record["results"]["rows"]  # type: ignore[no-any-return]


CARD = """
## Another

{}{}"""
WRITE_CARDS = """
from hovit.config.plan import load_plan
from hovit.pipeline.describe_models import describe_model, registered_models
from hovit.report.model_cards import write_cards
from hovit.report.sources import load_sources

models = {"another": registered_models()["another"]}
write_cards(load_sources(load_plan()), models, describe_model)
"""


def test_a_model_is_four_files(copy: Copy) -> None:
    copy.write("src/hovit/models/another.py", MODEL)
    copy.edit(
        "src/hovit/models/__init__.py", "from . import (\n", "from . import (\n    another,\n"
    )
    copy.edit("src/hovit/models/__init__.py", "__all__ = [\n", '__all__ = [\n    "another",\n')
    copy.hovit("schema")
    copy.append("src/hovit/models/README.md", CARD.format(*marks("another", COMMAND)))
    copy.run("-c", WRITE_CARDS)  # as `hovit readme` does, but for one card
    assert "| `another` | 0.00 M |" in (copy.root / "src/hovit/models/README.md").read_text()
    copy.changes_what("Add a model")
    copy.write("config/studies/another.yaml", study("another"))
    assert measured(copy)["only"]["parameters"] == 3 * 37 + 37
    copy.hovit("table", "another")
    assert "148" in (copy.root / "results/tables/another.md").read_text()


def test_an_attention_form_is_three_files(copy: Copy) -> None:
    modules = "src/hovit/attention/modules.py"
    copy.edit("src/hovit/attention/forms.py", "ATTENTION_FORMS = {\n",
              'ATTENTION_FORMS = {\n    "mean": AttentionForm(softmax=False),\n')  # fmt: skip
    copy.edit(
        modules,
        "def check_attention(",
        '''class MeanAttention(nn.Module):
    """The mean of all values, times a learned gain."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, size: Size, bias: Tensor | None = None
    ) -> Tensor:
        return v.mean(1, keepdim=True).expand_as(v) * self.gain


def check_attention(''',
    )
    copy.edit(modules, '    if name == "focused":\n',
              '    if name == "mean":\n        return MeanAttention(dim, heads)\n'
              '    if name == "focused":\n')  # fmt: skip
    copy.hovit("schema")
    copy.changes_what("Add an attention form")
    args = "model_args: {attention: mean}"
    row = f"  - {{id: mean, label: Mean, model: levit_deck, {args}, ours: true}}\n"
    copy.write("config/studies/another.yaml", study("levit_deck") + row)
    found = measured(copy)
    gains = 3 * 256 + 3 * 384 + 2 * 512  # one for each channel of each block
    assert found["mean"]["parameters"] == found["only"]["parameters"] + gains


def test_a_study_is_one_file(copy: Copy) -> None:
    copy.write("config/studies/another.yaml", study("hovit", "[parameters, top1]", ""))
    copy.changes_what("Add a study")
    listed = copy.hovit("list", "--runs")
    assert re.search(r"another +1 row   Another study", listed)
    assert re.search(r"hovit\.pets\.deck .*\banother\b", listed)
    copy.hovit("table", "another")
    assert "The only row" in (copy.root / "results/tables/another.csv").read_text()


ANALYSIS = """id: another
title: "Another analysis"
source: {{paper: ours, place: "a test"}}
kind: {kind}
of: [hovit/hovit]
images: 2
"""


def analysed(copy: Copy) -> dict[str, object]:
    """Run the analysis `another` of an untrained HoViT: what it finds for its row."""
    run = load_plan("smoke", ROOT / "config").run("hovit.pets.deck")
    prepare(run.pack, Path(), copy.root / run.pack.folder)
    model = create_model(run.model, run.dataset.num_classes, run.image_size)
    save_weights(copy.root / run.folder / "weights.safetensors", model)
    copy.hovit("analyse", "another", "--accelerator", "cpu")
    record = json.loads((copy.root / "results/runs/smoke/analysis/another.json").read_text())
    return record["results"]["rows"]["hovit/hovit"]


def test_an_analysis_is_one_file(copy: Copy) -> None:
    copy.write("config/analyses/another.yaml", ANALYSIS.format(kind="attention_maps"))
    copy.changes_what("Add an analysis")
    assert re.search(r"another +1 row   Another analysis", copy.hovit("list", "--runs"))
    assert len(analysed(copy)["map"]) > 0  # type: ignore[arg-type]


def test_a_kind_of_analysis(copy: Copy) -> None:
    copy.write(
        "src/hovit/analysis/largest_weight.py",
        '"""Largest absolute weight of a model."""\n\n\ndef largest_weight(model, images):\n'
        '    return {"largest": max(float(p.abs().max()) for p in model.parameters())}\n',
    )
    analyse = "src/hovit/pipeline/analyse.py"
    copy.edit(analyse, "from ..analysis.runtime_breakdown",
              "from ..analysis.largest_weight import largest_weight\n"
              "from ..analysis.runtime_breakdown")  # fmt: skip
    copy.edit(analyse, "kept_patches, runtime", "kept_patches, largest_weight, runtime")
    copy.edit("src/hovit/config/kinds.py", '    "taylor_pruning": ',
              '    "largest_weight": AnalysisKind(),\n    "taylor_pruning": ')  # fmt: skip
    copy.hovit("schema")
    copy.changes_what("Add a kind of analysis")
    copy.write("config/analyses/another.yaml", ANALYSIS.format(kind="largest_weight"))
    assert analysed(copy)["largest"] > 0  # type: ignore[operator]


def test_a_figure(copy: Copy) -> None:
    copy.edit(
        "src/hovit/report/figures/draw.py",
        "FIGURES = {\n",
        """def another(results: Results) -> "Canvas":
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots()
    rows = results.plan.study("hovit").rows
    axes.bar([row.label for row in rows], [len(row.reported) for row in rows])
    return canvas


FIGURES = {
    "another": Figure("Another figure", ("hovit",), another, ("top1",)),
""",
    )
    plots = "  - figures/five_ideas.png\n"
    copy.edit("dvc.yaml", plots, plots.replace("five_ideas", "another") + plots)
    outs = "      - figures/five_ideas.png:\n          persist: true\n"
    copy.edit("dvc.yaml", outs, outs.replace("five_ideas", "another") + outs)
    outs = outs.replace("png", "pdf")
    copy.edit("dvc.yaml", outs, outs.replace("five_ideas", "another") + outs)
    for name in ("README.md", "ARTIFACT.md"):
        shutil.copyfile(ROOT / name, copy.root / name)
    (copy.root / "results").mkdir()
    (copy.root / "results/evidence").symlink_to(ROOT / "results/evidence")
    # As `hovit readme`, but without the model cards, which take half a minute.
    copy.run(
        "-c",
        "from hovit.config.plan import load_plan; from hovit.report.readme import write_readme; "
        "write_readme(load_plan())",
    )
    copy.changes_what("Add a figure")
    copy.hovit("figure", "another")
    files = {p.name for p in (copy.root / "figures").iterdir() if p.is_file()}
    assert files == {"README.md", "another.pdf", "another.png"}


def test_every_section_with_files_is_tested() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    sections = re.findall(r"^## (.*)\n\nFiles: ", text, flags=re.M)
    used = re.findall(r'changes_what\("(.*)"\)', Path(__file__).read_text())
    assert sorted(used) == sorted(sections)
    for section in sections:
        for name in listed_files(section):
            assert "*" in name or (ROOT / name).is_file(), f"{section}: {name}"
