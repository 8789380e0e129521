"""What the figures say and show, from made-up records and from evidence."""

import shutil
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure as Canvas
from matplotlib.text import Text

from hovit.config.plan import Plan, load_plan
from hovit.pipeline.evidence import EVIDENCE
from hovit.report.figures import style
from hovit.report.figures.common import write_facts
from hovit.report.figures.draw import FIGURES
from hovit.report.figures.labels import label_points
from hovit.report.results import Results
from hovit.report.sources import load_sources


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan("mini", ROOT / "config")


def drawn(plan: Plan, root: Path, name: str) -> Canvas:
    """A figure, laid out as it is saved."""
    with mpl.rc_context(style.RC):
        figure, sources = FIGURES[name], load_sources(plan, root)
        canvas = figure.plot(sources if figure.all_sources else figure.results(sources))
        canvas.draw_without_rendering()
    plt.close(canvas)
    return canvas


def words(canvas: Canvas) -> str:
    return "\n".join(text.get_text() for text in canvas.findobj(Text))


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed evidence, without packs or runs beside it."""
    root = tmp_path_factory.mktemp("evidence")
    shutil.copytree(ROOT / EVIDENCE, root / EVIDENCE)
    return root


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_says_all_of_what_was_run(evidence: Path, name: str) -> None:
    canvas = drawn(load_plan("smoke", ROOT / "config"), evidence, name)
    (footer,) = [text for text in canvas.texts if text.get_text() == canvas.get_supxlabel()]
    box = footer.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= canvas.bbox.x1
    folders = {path.name for path in (evidence / EVIDENCE).iterdir() if path.is_dir()}
    assert not [folder for folder in folders if folder in words(canvas)]  # `NVIDIA H200` instead


@pytest.mark.parametrize("name", ["attention_maps", "kept_patches"])
def test_photographs_that_are_not_packed_are_left_out(plan: Plan, root: Path, name: str) -> None:
    pictures = sum(len(ax.images) for ax in drawn(plan, root, name).axes)
    folder = root / "data/packed/oxford-iiit-pet-sample-224px"
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", np.zeros((1, 224, 224, 3), np.uint8))
    for other in ("96px", "64px"):
        shutil.copytree(folder, folder.with_name(folder.name.replace("224px", other)))
    canvas = drawn(plan, root, name)
    images = [np.asarray(image.get_array()) for ax in canvas.axes for image in ax.images]
    photographs = [image for image in images if not image.any()]
    assert photographs
    assert len(images) == pictures + len(photographs)


def test_attention_maps_share_one_colour_bar(plan: Plan, root: Path) -> None:
    canvas = drawn(plan, root, "attention_maps")
    (bar,) = [ax for ax in canvas.axes if ax.get_ylabel() == "× uniform attention"]
    norms = {id(image.norm) for ax in canvas.axes if ax is not bar for image in ax.images}
    assert len(norms) == 1


def test_attention_latency_has_dots_on_one_scale(evidence: Path) -> None:
    canvas = drawn(load_plan("smoke", ROOT / "config"), evidence, "attention_latency")
    assert not any(ax.patches for ax in canvas.axes)
    assert len({ax.get_xlim() for ax in canvas.axes}) == 1
    for ax in canvas.axes:
        points = [p for c in ax.containers for p in c[0].get_xydata() if np.isfinite(p).all()]
        assert {round(y) for _, y in points} == {*range(len(ax.get_yticks()))}  # no empty row
        assert len({y for _, y in points}) == len(points)  # no mark behind another
        assert all(ax.get_xlim()[0] < x < ax.get_xlim()[1] for x, _ in points)


def test_the_largest_accuracy_is_inside_the_axis(evidence: Path) -> None:
    canvas = drawn(load_plan("mini", ROOT / "config"), evidence, "five_ideas")
    accuracies = canvas.axes[2].containers[0][0].get_xdata()
    assert np.nanmax(accuracies) < 0.97 * canvas.axes[2].get_xlim()[1]


def test_a_speed_that_is_not_measured_has_no_bar(plan: Plan, tmp_path: Path) -> None:
    canvas = drawn(plan, tmp_path, "skipvit_speed")
    (legend,) = canvas.legends
    assert [text.get_text() for text in legend.get_texts()] == ["poster (Ascend 910A)"]


def test_every_point_of_accuracy_latency_is_in_the_legend(evidence: Path) -> None:
    canvas = drawn(load_plan("smoke", ROOT / "config"), evidence, "accuracy_latency")
    (legend,) = canvas.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert len(named) == len(set(named))
    points = [points.get_label() for ax in canvas.axes for points in ax.containers]
    assert set(points) == set(named)
    assert "HoViT" in named


def test_operators_differ_without_colour(evidence: Path) -> None:
    (ax,) = drawn(load_plan("smoke", ROOT / "config"), evidence, "runtime_breakdown").axes
    looks = [(c[0].get_facecolor(), c[0].get_hatch()) for c in ax.containers]
    assert len(looks) == len(set(looks)) > 4
    assert all(red == green == blue for (red, green, blue, _), _ in looks)


@pytest.mark.parametrize("name", ["attention_maps", "kept_patches", "runtime_breakdown"])
def test_a_picture_that_nothing_was_computed_for_says_so(
    plan: Plan, tmp_path: Path, name: str
) -> None:
    assert "not measured" in words(drawn(plan, tmp_path, name))


def test_kept_patches_show_on_a_white_page(plan: Plan, root: Path) -> None:
    """Kept and left out, with the image and without it, in a frame and with a legend."""
    folder = root / "data/packed/oxford-iiit-pet-sample-224px"
    for packed in (False, True):
        if packed:
            folder.mkdir(parents=True)
            np.save(folder / "images.npy", np.full((1, 224, 224, 3), 7, np.uint8))
        canvas = drawn(plan, root, "kept_patches")
        masks = [ax for ax in canvas.axes if ax.get_title().endswith("after layer 6")]
        assert len(masks) == 2  # of either schedule's one image
        for ax in masks:
            (picture,) = ax.images
            pixels = np.asarray(picture.get_array())
            half = pixels.shape[0] // 2
            kept, out = pixels[0, 0].tolist(), pixels[0, half].tolist()  # "10" over "01"
            assert (pixels[-1, -1].tolist(), pixels[-1, 0].tolist()) == (kept, out)
            assert kept != out
            assert max(kept) < 255
            assert max(out) < 255
            assert (kept == [7, 7, 7]) == packed
            assert ax.axison
            assert all(spine.get_visible() for spine in ax.spines.values())
        labels = {text.get_text() for text in canvas.legends[0].get_texts()}
        assert labels == ({"left out"} if packed else {"left out", "kept"})


def test_every_difference_has_its_interval(evidence: Path) -> None:
    """Of pairs of predictions over the same test images; the baseline has none."""
    plan = load_plan("smoke", ROOT / "config")
    canvas = drawn(plan, evidence, "skipvit_accuracy")
    found = Results(load_plan("mini", ROOT / "config"), evidence, EVIDENCE / "amd-epyc")
    study = found.plan.study("skipvit")
    pairs = {
        row.label: (value.mean, value.noise)
        for row in study.rows
        if (value := found.value(study, row, "top1_difference"))
    }
    bars = {}
    base, *points = canvas.axes[1].containers
    for point in points:
        assert isinstance(point, ErrorbarContainer)
        (line,) = point.lines[2]
        ((_, low), (_, high)) = line.get_segments()[0]
        bars[point.get_label()] = (high + low) / 2, (high - low) / 2
    assert bars.keys() == pairs.keys()
    for label, bar in bars.items():
        assert bar == pytest.approx(pairs[label])
    assert not base.has_yerr
    assert "interval of the difference" in canvas.get_supxlabel()
    assert not any(point.has_yerr for point in canvas.axes[0].containers)


def test_the_figure_names_the_model_that_was_trained(evidence: Path) -> None:
    """ViT-Ti stands in for the poster's ViT-S."""
    canvas = drawn(load_plan("smoke", ROOT / "config"), evidence, "skipvit_accuracy")
    poster, measured = canvas.axes
    for text in (poster.get_xlabel(), poster.get_ylabel()):
        assert "ViT-S" in text
    for text in (measured.get_xlabel(), measured.get_ylabel()):
        assert "ViT-Ti" in text
    assert "ViT" not in "".join(text.get_text() for text in canvas.legends[0].get_texts())
    assert "ViT-Ti stands in for ViT-S" in canvas.get_supxlabel()


def test_a_fact_stays_in_one_line() -> None:
    canvas = plt.figure(figsize=(2, 1))
    facts = ["n = 1 seed", "a half-broken-fact of several words", "the same again"]
    write_facts(canvas, facts, ["a paragraph"])
    lines = canvas.get_supxlabel().split("\n")
    assert len(lines) > 2
    assert lines[-1] == "a paragraph"
    assert [fact for line in lines[:-1] for fact in line.removesuffix(" ·").split(" · ")] == facts
    plt.close(canvas)


def test_labels_overlap_nothing() -> None:
    """Neither each other nor marks and lines, and their own lines cross nothing."""
    canvas, ax = plt.subplots(layout="constrained")
    points = [(0.3 + 0.04 * i, 0.5 + 0.05 * (i % 3)) for i in range(8)]
    for x, y in points:
        ax.errorbar(x, y, 0.05, marker="o")
    ax.plot([0, 1], [0.4, 0.7])
    ax.margins(0.3)
    labels = [(x, y, f"label {i}") for i, (x, y) in enumerate(points)]
    assert label_points(canvas, [(ax, labels)], fontsize=5) == []
    canvas.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without their lines
    line = ax.lines[-1].get_transform().transform(ax.lines[-1].get_xydata())
    along = np.linspace(*line, 500)
    for i, box in enumerate(boxes):
        assert box.count_overlaps(boxes) == 1, i
        assert not box.count_contains(ax.transData.transform(points))
        assert not box.count_contains(along)
    paths = [
        text.arrow_patch.get_transform().transform_path(text.arrow_patch.get_path())
        for text in ax.texts
        if text.arrow_patch
    ]
    assert paths
    for i, path in enumerate(paths):
        assert not any(path.intersects_path(other) for other in paths[:i])
    plt.close(canvas)


def test_a_label_without_room_is_named() -> None:
    canvas, ax = plt.subplots(figsize=(1, 1))
    ax.plot(0, 0, "o")
    labels = [(0.0, 0.0, "a label wider than the panel"), (0.0, 0.0, "b")]
    assert label_points(canvas, [(ax, labels)], fontsize=5) == ["a label wider than the panel"]
    assert [text.get_text() for text in ax.texts] == ["b"]
    plt.close(canvas)


def test_a_fixed_layout_has_round_positions_and_stays() -> None:
    canvas, axes = plt.subplots(2, 2, layout="constrained")
    axes[0, 0].set_ylabel("a long label\nin two lines")
    canvas.supxlabel("note")
    style.fix_layout(canvas)
    before = [ax.get_position().bounds for ax in axes.flat]
    assert before[0][0] != mpl.rcParams["figure.subplot.left"]  # it was laid out
    edges = np.array([ax.get_position().get_points() for ax in axes.flat])
    assert np.array_equal(edges, edges.round(6))
    axes[0, 0].set_ylabel("")
    canvas.draw_without_rendering()
    assert [ax.get_position().bounds for ax in axes.flat] == before
    plt.close(canvas)
