"""Given weights on ImageNet's images: known answers, timm's own loader, and what is missing."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from timm import create_model
from timm.data import ImageNetInfo, create_dataset, create_loader, resolve_data_config
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg_value,
    register_model,
)
from torch import nn
from typer.testing import CliRunner

import hovit.models  # noqa: F401 (registers)
from hovit.cli import app
from hovit.config.plan import load_plan
from hovit.config.schema import Study
from hovit.pipeline import evaluate as imagenet
from hovit.pipeline import evidence
from hovit.pipeline.evaluate import evaluate_study, find_images, find_weights
from hovit.records.record import read_record
from hovit.report.explain import explain
from hovit.report.results import Results
from hovit.report.sources import load_sources
from hovit.report.tables.write import write_table
from hovit.utils.code_hash import PACKAGE
from hovit.utils.errors import HovitError

CPU = torch.device("cpu")
COLOURS = {"n01440764": (255, 0, 0), "n02099601": (0, 255, 0), "n03028079": (0, 0, 255)}
INDEX = {name: ImageNetInfo().label_names().index(name) for name in COLOURS}


class MeanColour(nn.Module):
    """Linear in an image's mean colour."""

    def __init__(self, num_classes=1000, in_chans=3):
        super().__init__()
        self.num_classes = num_classes
        self.fc = nn.Linear(in_chans, num_classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


default_cfgs = generate_default_cfgs(
    {
        f"mean_colour{name}": {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3,
                               "crop_pct": 1.0, "classifier": "fc", "first_conv": None}
        for name in ("", "_two")
    }
)  # fmt: skip


@register_model
def mean_colour(pretrained=False, **kwargs):
    return build_model_with_cfg(MeanColour, "mean_colour", pretrained, **kwargs)


@register_model
def mean_colour_two(pretrained=False, **kwargs):
    return build_model_with_cfg(MeanColour, "mean_colour_two", pretrained, **kwargs)


@pytest.fixture
def images(tmp_path):
    """Four images of a colour's class, of which one of the first is of another's colour."""
    root = tmp_path / "imagenet" / "val"
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(4):
            seen = COLOURS["n03028079"] if (name, i) == ("n01440764", 3) else colour
            Image.new("RGB", (40, 30 + i), seen).save(root / name / f"{i}.JPEG")
    return root.parent


@pytest.fixture
def weights(tmp_path):
    """Weights that know the colours' classes; every other class is out of the question."""
    folder = tmp_path / "weights"
    folder.mkdir()
    weight, bias = torch.zeros(1000, 3), torch.full((1000,), -100.0)
    for channel, name in enumerate(COLOURS):
        weight[INDEX[name], channel], bias[INDEX[name]] = 10.0, 0.0
    save_file({"fc.weight": weight, "fc.bias": bias}, folder / "mean_colour.safetensors")
    return folder


def study(*models, **more):
    rows = [{"id": f"r{i}", "label": m} | form(m) for i, m in enumerate(models)]
    source = {"paper": "ours", "place": "a test"}
    return Study.model_validate(
        {"id": "coloured", "title": "t", "source": source, "trained": False, "columns": ["top1"],
         "num_classes": 1000, "rows": rows} | more
    )  # fmt: skip


def form(model):
    if model.startswith("efficientvit"):
        return {"model": "deployed", "model_args": {"of": model}}
    return {"model": model}


@pytest.fixture
def plan():
    return load_plan("smoke", ROOT / "config")


def test_accuracy_is_the_share_of_images_that_the_weights_know(plan, images, weights, tmp_path):
    record = evaluate_study(
        plan.evaluate_task(study("mean_colour")), images, weights, CPU, tmp_path
    )
    row = record.results["rows"]["r0"]
    assert row["top1"] == pytest.approx(100 * 11 / 12)
    assert (row["weights"], row["file"]) == ("mean_colour", "mean_colour.safetensors")
    assert torch.get_num_threads() == plan.scale.threads
    assert (row["top5"], row["images"]) == (100.0, 12)
    assert 0 < row["loss"] < 40
    assert record.provenance.dataset["classes"] == 3
    written = read_record(tmp_path / plan.evaluate_task(study("mean_colour")).path)
    assert written.results == record.results


def test_images_reach_a_model_as_timm_would_bring_them_and_its_deploy_form_agrees(
    plan, images, tmp_path
):
    torch.manual_seed(0)
    model = create_model("efficientvit_m0").eval()
    for path in sorted(images.rglob("*.JPEG")):  # of a size that is scaled and cropped
        Image.effect_noise((260, 240), 90).convert("RGB").save(path)
    save_file(model.state_dict(), tmp_path / "efficientvit_m0.safetensors")
    record = evaluate_study(
        plan.evaluate_task(study("efficientvit_paper_m0")), images, tmp_path, CPU, tmp_path
    )
    dataset = create_dataset("", images, split="validation")
    loader = create_loader(dataset, batch_size=5, use_prefetcher=False, num_workers=0,
                           **{k: v for k, v in resolve_data_config(model=model).items()
                              if k not in ("crop_mode",)})  # fmt: skip
    numbers = [INDEX[name] for name in sorted(COLOURS)]
    losses = []
    with torch.inference_mode():
        for x, y in loader:
            wanted = torch.tensor([numbers[i] for i in y])
            losses.append(nn.functional.cross_entropy(model(x), wanted, reduction="none"))
    row = record.results["rows"]["r0"]
    assert row["loss"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-4)
    assert row["seen_as"]["input_size"] == [3, 224, 224]


def test_rows_without_weights_are_skipped_and_named(plan, images, weights, tmp_path):
    lines = []
    both = study("mean_colour", "mean_colour_two")
    record = evaluate_study(plan.evaluate_task(both), images, weights, CPU, tmp_path, lines.append)
    assert list(record.results["rows"]) == ["r0"]
    assert any(line.startswith("r1: skipped: no weights of mean_colour_two in") for line in lines)
    (weights / "mean_colour.safetensors").unlink()
    record = evaluate_study(plan.evaluate_task(both), images, weights, CPU, tmp_path, lines.append)
    assert list(record.results["rows"]) == ["r0"]  # measured before
    assert lines[-2].endswith("; its earlier result is kept")
    (tmp_path / plan.evaluate_task(both).path).unlink()
    record = evaluate_study(plan.evaluate_task(both), images, weights, CPU, tmp_path, lines.append)
    assert record.results["rows"] == {}
    assert lines[-1].startswith("no weights of any row in")
    with pytest.raises(HovitError, match=r"not a folder; give a folder of MODEL\.safetensors"):
        evaluate_study(plan.evaluate_task(both), images, images / "one.safetensors", CPU, tmp_path)


def test_a_killed_evaluation_goes_on_after_the_last_finished_row(
    plan, images, weights, tmp_path, monkeypatch
):
    both = study("mean_colour", "mean_colour_two")
    content = (weights / "mean_colour.safetensors").read_bytes()
    (weights / "mean_colour_two.safetensors").write_bytes(content)
    calls, real = [], imagenet.evaluate

    def killed(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(imagenet, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_study(plan.evaluate_task(both), images, weights, CPU, tmp_path)
    assert not (tmp_path / plan.evaluate_task(both).path).exists()
    evaluate_study(plan.evaluate_task(both), images, weights, CPU, tmp_path)
    assert len(calls) == 3  # the first row was not done again
    assert len(read_record(tmp_path / plan.evaluate_task(both).path).results["rows"]) == 2
    assert not list(tmp_path.rglob("*.partial.json"))


def test_what_is_not_imagenet_is_refused_in_one_line(plan, images, weights, tmp_path, monkeypatch):
    with pytest.raises(HovitError, match="contains no ImageNet"):
        find_images(tmp_path / "nowhere")
    (images / "val" / "cats").mkdir()
    Image.new("RGB", (8, 8)).save(images / "val" / "cats" / "a.JPEG")
    with pytest.raises(HovitError, match="cats is not a class of ImageNet-1k"):
        find_images(images)
    (images / "val" / "cats" / "a.JPEG").unlink()
    (images / "val" / "cats").rmdir()
    (images / "val" / "n01440764" / "0.JPEG").write_bytes(b"no image")
    for batch in (64, 4):  # 4: read by workers
        monkeypatch.setattr(imagenet, "BATCH", batch)
        with pytest.raises(HovitError, match=r"^\S+/n01440764/0.JPEG: an image cannot be read: \S"):
            evaluate_study(plan.evaluate_task(study("mean_colour")), images, weights, CPU, tmp_path)
    (images / "val" / "n01440764" / "0.JPEG").unlink()
    (images / "val" / "n01440764" / "0.JPEG").symlink_to(tmp_path / "nowhere")
    with pytest.raises(HovitError, match=r"n01440764/0\.JPEG: not a file"):
        evaluate_study(plan.evaluate_task(study("mean_colour")), images, weights, CPU, tmp_path)


def test_hidden_files_of_imagenet_are_skipped(images):
    before = find_images(images).samples
    for name in (".ipynb_checkpoints/0.JPEG", "__MACOSX/0.JPEG", "n01440764/._0.JPEG"):
        (images / "val" / name).parent.mkdir(exist_ok=True)
        (images / "val" / name).write_bytes(b"no image")
    found = find_images(images)
    assert (found.samples, set(found.classes)) == (before, set(COLOURS))


def test_a_small_shared_memory_is_said_and_gives_the_same(
    plan, images, weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(imagenet, "BATCH", 4)
    task = plan.evaluate_task(study("mean_colour"))
    records = []
    for free in (2**40, 0):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        records.append(evaluate_study(task, images, weights, CPU, tmp_path).results)
        said = capsys.readouterr().err
        assert ("loaded without workers" in said) == (not free)
        assert said.count("\n") == (not free)
    assert records[0] == records[1]


def test_weights_whose_outputs_are_not_finite_are_refused(plan, images, weights, tmp_path):
    bad = {"fc.weight": torch.full((1000, 3), torch.nan), "fc.bias": torch.zeros(1000)}
    save_file(bad, weights / "mean_colour.safetensors")
    with pytest.raises(HovitError, match="outputs of the model are not finite"):
        evaluate_study(plan.evaluate_task(study("mean_colour")), images, weights, CPU, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_images_have_the_size_at_which_timm_tests_the_tag(plan, tmp_path):
    row = plan.study("backbones").row("effnet_b3")
    save_file(create_model("efficientnet_b3").state_dict(), tmp_path / "b3.safetensors")
    _, config = imagenet.load_model(row, tmp_path / "b3.safetensors")
    assert (config["input_size"], config["crop_pct"]) == ((3, 320, 320), 1.0)
    swin = plan.study("backbones").row("swin_b")
    assert imagenet.tagged(swin) == "swin_base_patch4_window7_224.ms_in1k"
    (tmp_path / "swin_base_patch4_window7_224.safetensors").touch()
    assert find_weights(imagenet.tagged(swin), tmp_path) is not None


def test_other_weights_are_refused_by_name(plan, images, weights, tmp_path):
    save_file({"fc.weight": torch.zeros(10, 3)}, weights / "mean_colour.safetensors")
    with pytest.raises(HovitError, match="not the weights of mean_colour"):
        evaluate_study(plan.evaluate_task(study("mean_colour")), images, weights, CPU, tmp_path)


def test_only_studies_with_top1_and_without_training_are_evaluated(plan):
    assert plan.evaluate_task(study("mean_colour")).spec["rows"]
    assert plan.evaluate_task(study("mean_colour", columns=["macs"])) is None
    assert plan.evaluate_task(plan.study("hovit")) is None
    with pytest.raises(HovitError, match="hovit: only a study with `trained: false` and `top1`"):
        CliRunner().invoke(app, ["evaluate", "hovit", str(ROOT)], catch_exceptions=False)


def test_weights_by_timms_name_serve_our_model(tmp_path):
    (tmp_path / "efficientvit_m3.safetensors").touch()
    assert find_weights("efficientvit_paper_m3", tmp_path).stem == "efficientvit_m3"
    assert find_weights("efficientvit_paper_m4", tmp_path) is None


def test_without_a_folder_weights_are_timms_from_the_hub(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(imagenet, "download_timm", lambda name: asked.append(name) or tmp_path)
    assert find_weights("efficientvit_paper_m3", None) == tmp_path
    assert find_weights("mobilenetv3_large_075", None) is None  # timm has none
    assert asked == ["efficientvit_paper_m3"]


def test_the_table_shows_it_and_says_of_what_it_is(plan, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").symlink_to(ROOT / "config")
    torch.manual_seed(0)
    weights = create_model("efficientvit_m0").state_dict()
    save_file(weights, tmp_path / "efficientvit_m0.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "hovit", "evaluate", "efficientvit_imagenet", images, "--weights",
         tmp_path], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "m0: top-1" in done.stdout
    assert "m1: skipped" in done.stdout
    table = plan.study("efficientvit_imagenet")
    value = Results(plan, tmp_path).value(table, table.row("m0"), "top1")
    assert value is not None
    assert value.paths == (plan.evaluate_task(table).path,)
    write_table(plan, table, tmp_path)
    text = (tmp_path / "results/tables/efficientvit_imagenet.md").read_text()
    assert f"| EfficientViT-M0 | 63.2 | {value.mean:.1f} |" in text
    assert "given weights, evaluated on 12 images of 3 classes" in text
    assert "imagenet=IMAGENET" in explain(plan, "efficientvit_imagenet", "m0", "top1")
    assert str(plan.evaluate_task(table).path) in explain(
        plan, "efficientvit_imagenet", "m0", "top1"
    )
    assert "hovit evaluate backbones" in explain(plan, "backbones", "deit_b", "top1")


@pytest.mark.slow
def test_snakemake_keeps_the_rows_that_it_evaluated_before(plan, images, tmp_path):
    for name in ("Snakefile", "rules", "profiles", "config", "paper"):
        (tmp_path / name).symlink_to(ROOT / name)
    given = tmp_path / "given"
    given.mkdir()
    target = plan.evaluate_task(plan.study("efficientvit_imagenet")).path
    command = [sys.executable, "-m", "snakemake", "--cores", "1", str(target)]
    settings = ["--config", f"imagenet={images}", f"weights={given}"]
    for model, kept in (("efficientvit_m0", {"m0"}), ("efficientvit_m1", {"m0", "m1"})):
        for earlier in given.iterdir():
            earlier.unlink()
        save_file(create_model(model).state_dict(), given / f"{model}.safetensors")
        done = subprocess.run([*command, *settings], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert read_record(tmp_path / target).results["rows"].keys() == kept


def test_evidence_takes_an_evaluation_by_spec_and_code(plan, images, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "_package_at", lambda root, commit: PACKAGE)
    table = plan.study("efficientvit_imagenet")
    torch.manual_seed(0)
    weights = create_model("efficientvit_m0").state_dict()
    save_file(weights, tmp_path / "efficientvit_m0.safetensors")
    record = evaluate_study(plan.evaluate_task(table), images, tmp_path, CPU, tmp_path)
    path = tmp_path / plan.evaluate_task(table).path
    assert evidence.check({"smoke": plan}, path, ROOT).id == table.id
    place = tmp_path / "results/evidence/test" / evidence.location(record)
    place.parent.mkdir(parents=True)
    place.write_bytes(path.read_bytes())
    assert load_sources(plan, tmp_path).used(table)
    assert evidence.location(record).as_posix() == "smoke/evaluation/efficientvit_imagenet.json"
    one = table.model_copy(update={"rows": table.rows[:1]})  # rows are accepted one by one
    evaluate_study(plan.evaluate_task(one), images, tmp_path, CPU, tmp_path)
    assert evidence.check({"smoke": plan}, path, ROOT).id == table.id
    row = table.rows[0].model_copy(update={"model": "efficientvit_paper_m1"})
    other = table.model_copy(update={"rows": (row,)})
    evaluate_study(plan.evaluate_task(other), images, tmp_path, CPU, tmp_path)
    with pytest.raises(HovitError, match="its spec does not match config"):
        evidence.check({"smoke": plan}, path, ROOT)


def test_every_tag_in_the_catalogue_is_one_that_timm_has_weights_of(plan):
    named = [row for study in plan.config.studies.values() for row in study.rows if row.tag]
    assert named
    for row in named:
        assert get_pretrained_cfg_value(imagenet.tagged(row), "hf_hub_id"), row.id
