"""The image that the Launcher generates: its record repeats it, and the figure shows it."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from synthetic import analysis_record
from test_figures import drawn, words

import hovit.models  # noqa: F401 (registers)
from hovit.analysis.generated_images import generated_images
from hovit.config.plan import load_plan
from hovit.data.pack import Pack, prepare
from hovit.pipeline.analyse import to_csv
from hovit.records.record import write_record
from hovit.report.figures.launcher_figures import stretch, upsample


def launcher() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "l_hovit", front="test_efficientnet", num_classes=5, img_size=64,
        embed_dim=(64, 64, 64), depth=(1, 1, 1),
    ).eval()  # fmt: skip


def test_the_record_repeats_the_generated_images() -> None:
    model, x = launcher(), torch.randn(3, 3, 64, 64)
    found = generated_images(model, x)
    assert found["shape"] == [3, 16, 16]
    with torch.no_grad():
        wanted = model.generate_image(x).permute(0, 2, 3, 1).numpy()
    given = upsample(found)
    assert given.shape == wanted.shape == (3, 64, 64, 3)
    step = (found["high"] - found["low"]) / 255  # of the 8 bits in the record
    most = np.abs(np.array(found["kernel"])).sum(0).max() * step
    assert np.abs(given - wanted).max() < most
    assert np.abs(given - wanted).max() < 0.02 * np.ptp(wanted)


def test_varying_is_the_share_of_variance_between_images() -> None:
    model = launcher()
    one = torch.randn(1, 3, 64, 64)
    assert generated_images(model, one.expand(4, -1, -1, -1))["varying"] == 0
    torch.nn.init.zeros_(model.to_image.bias)
    some = generated_images(model, torch.randn(4, 3, 64, 64))["varying"]
    with torch.no_grad():
        images = model.generate_image(torch.randn(4, 3, 64, 64))
        model.to_image.bias.copy_(100 * torch.randn_like(model.to_image.bias))
        biased = generated_images(model, torch.randn(4, 3, 64, 64))["varying"]
    assert images.std() > 0
    assert 0 <= biased < 0.01 < some <= 100


def test_a_model_without_a_launcher_is_refused() -> None:
    model = timm.create_model("hovit", num_classes=5)
    with pytest.raises(ValueError, match="no Launcher that generates an image"):
        generated_images(model, torch.zeros(1, 3, 64, 64))


def test_the_csv_has_numbers_and_no_pixels() -> None:
    text = to_csv({"a/b": generated_images(launcher(), torch.randn(2, 3, 64, 64))})
    assert text.startswith("row,what,low,high,varying")
    assert "small_images" not in text
    assert len(text) < 5000


def test_contrast_leaves_out_extremes() -> None:
    values = np.linspace(0, 100, 101).reshape(1, 101, 1, 1)
    shown = stretch(values)
    assert (shown.min(), shown.max()) == (0, 1)
    assert shown[0, 50, 0, 0] == pytest.approx(0.5)
    assert shown[0, 0, 0, 0] == shown[0, 1, 0, 0] == 0
    assert np.isfinite(stretch(np.zeros((1, 2, 2, 3)))).all()


def test_the_figure_shows_photographs_and_generated_images(tmp_path: Path) -> None:
    plan = load_plan("smoke", ROOT / "config")
    assert "not measured" in words(drawn(plan, tmp_path, "generated_images"))
    record = analysis_record(plan, "generated_images")
    write_record(tmp_path / plan.analyse_task(plan.analysis("generated_images")).path, record)
    canvas = drawn(plan, tmp_path, "generated_images")
    assert "L_HoViT,\nfrozen" in words(canvas)
    assert sum(bool(ax.images) for ax in canvas.axes) == 4  # no photograph: none is packed
    pack: Pack = plan.run("levit_deck.pets.deck").pack
    prepare(pack, tmp_path, tmp_path / pack.folder)
    canvas = drawn(plan, tmp_path, "generated_images")
    assert "photographs:" not in words(canvas)  # the images of the runs themselves
    assert sum(bool(ax.images) for ax in canvas.axes) == 5  # 1 photograph, 2 models x 2 rows
