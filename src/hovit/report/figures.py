"""The figures: each drawn from records alone, the seed's own points beside ours."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..catalogue import Row, Study
from ..errors import HovitError
from ..files import atomic
from ..plan import Plan
from .tables import baseline_ratio
from .values import Results, Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

FOLDER = Path("figures")
IDEAS = ("conv_stage", "checkerboard", "depth", "conv_shrink", "dropout", "hovit")


@dataclass(frozen=True)
class Figure:
    """What a figure shows, the studies that it reads, and what draws it."""

    title: str
    studies: tuple[str, ...]
    draw: Callable[[Results], "Canvas"]


def draw(plan: Plan, name: str, root: Path = Path()) -> None:
    """Draw a figure to `figures/NAME.pdf` and `.png`; the same records give the same bytes.

    Raises:
        HovitError: if there is no such figure.
    """
    if name not in FIGURES:
        raise HovitError(f"no figure {name!r}; there are {', '.join(FIGURES)}")
    import matplotlib.pyplot as plt

    from . import style

    with plt.rc_context(style.RC):
        canvas = FIGURES[name].draw(Results(plan, root))
        for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
            with atomic(root / FOLDER / f"{name}{suffix}") as path:
                canvas.savefig(path, format=suffix[1:], metadata=metadata)
        plt.close(canvas)


def _state(canvas: "Canvas", results: Results, study: Study) -> None:
    """Say under the figure what was run: scale, data, seeds and device."""
    plan = results.plan
    runs = [run for row in plan.rows_run(study) for run in plan.runs_of(study, row)]
    device = results.latency_device(study)
    parts = [f"scale {plan.scale.id}"]
    if runs:
        parts += [f"{runs[0].dataset.title}, {runs[0].image_size} px"]
        parts += [f"{runs[0].recipe.epochs} epoch{'s' * (runs[0].recipe.epochs > 1)}"]
        parts += [f"n = {len({run.seed for run in runs})} seed(s)"]
    if device:
        parts += [f"latency on {device}"]
    canvas.supxlabel(" · ".join(parts), fontsize=6, color="#555555")


def _spread(value: Value) -> float:
    return value.spread if value.n > 1 else 0.0


def training_curves(results: Results) -> "Canvas":
    """Losses and validation accuracy over the epochs: LeViT and HoViT, with and without Launcher."""
    import matplotlib.pyplot as plt

    from . import style

    study = results.plan.study("hovit")
    canvas, axes = plt.subplots(2, 3, figsize=(style.WIDTH, 4.2), sharex="col")
    columns = (("train_loss", "Training loss"), ("val_loss", "Validation loss"),
               ("val_top1", "Validation top-1, %"))  # fmt: skip
    for line, launched in enumerate((False, True)):
        rows = [r for r in study.rows if str(r.model).startswith("l_") == launched]
        for column, (key, title) in enumerate(columns):
            ax = axes[line][column]
            for row in rows:
                _curve(ax, results, study, row, key)
            ax.set_title(f"{title}{', with the Launcher' * launched}")
            ax.xaxis.get_major_locator().set_params(integer=True)
            if line:
                ax.set_xlabel("Epoch")
        axes[line][0].legend()
    _state(canvas, results, study)
    return canvas


def _curve(ax: "Axes", results: Results, study: Study, row: Row, key: str) -> None:
    """Mean over seeds, and their range as a band."""
    import numpy as np

    histories = [record.results["history"] for _, record in results.trained(study, row)]
    if not histories:
        return
    values = np.array([[epoch[key] for epoch in history] for history in histories])
    epochs = np.arange(1, values.shape[1] + 1)
    many = values.shape[1] > 12
    (line,) = ax.plot(epochs, values.mean(0), label=row.label, markevery=len(epochs) if many else 1)
    if len(values) > 1:
        ax.fill_between(
            epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0
        )


def five_ideas(results: Results) -> "Canvas":
    """Each idea against LeViT: latency as a ratio to its baseline, and accuracy."""
    import matplotlib.pyplot as plt
    import numpy as np

    from . import style

    rows = _idea_rows(results.plan)
    y = np.arange(len(rows))[::-1]
    canvas, (left, right) = plt.subplots(1, 2, figsize=(style.WIDTH, 0.27 * len(rows) + 1.1), sharey=True)  # fmt: skip
    looks: dict[str, dict[str, Any]] = {
        "reported_latency": {"color": style.REPORTED, "marker": "D", "mfc": "white"},
        "latency_1": {"color": style.OURS, "marker": "o"},
        "latency_32": {"color": "#56B4E9", "marker": "s"},
    }
    names = {"reported_latency": "deck (batch not stated)"}
    for metric in ("reported_latency", *results.batches):
        ratios = [baseline_ratio(results, study, row, metric) for study, row in rows]
        label = names.get(metric, f"this run, batch {metric.removeprefix('latency_')}")
        look = looks.get(metric, {"color": "#009E73", "marker": "^"})
        left.plot([r if r else np.nan for r in ratios], y, linestyle="", label=label, **look)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xlabel("Latency, × its baseline (left is faster)")
    for label, metric, look in (
        ("deck", "reported_top1", looks["reported_latency"]),
        ("this run", "top1", looks["latency_1"]),
    ):
        found = [results.value(study, row, metric) for study, row in rows]
        right.errorbar(
            [v.mean if v else np.nan for v in found], y, xerr=[_spread(v) if v else 0 for v in found],
            linestyle="", label=label, **look,
        )  # fmt: skip
    right.set_xlabel("Test top-1, %")
    right.set_xlim(left=0)
    left.set_yticks(y, [row.label for _, row in rows])
    for ax in (left, right):
        ax.grid(axis="x", visible=False)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handletextpad=0.1, columnspacing=0.8)  # fmt: skip
    _state(canvas, results, results.plan.study("hovit"))
    return canvas


def _idea_rows(plan: Plan) -> list[tuple[Study, Row]]:
    """Baselines first, then each idea, without and with the Launcher; every model once."""
    seen: set[str] = set()
    rows = []
    for launched in (False, True):
        for study in (plan.study(name) for name in IDEAS):
            for row in study.rows:
                key = f"{row.model}{row.model_args}"
                if str(row.model).startswith("l_") == launched and key not in seen:
                    seen.add(key)
                    rows.append((study, row))
    return rows


def accuracy_latency(results: Results) -> "Canvas":
    """The family: accuracy against latency, as a ratio to LeViT; the deck's own points beside."""
    import matplotlib.pyplot as plt

    from . import style

    canvas, axes = plt.subplots(1, 2, figsize=(style.WIDTH, 3.3))
    deck = {"color": style.REPORTED, "marker": "D", "mfc": "white", "linestyle": ""}
    ours = {"color": style.OURS, "marker": "o", "linestyle": ""}
    for ax, launched in zip(axes, (False, True), strict=True):
        rows = [(s, r) for s, r in _idea_rows(results.plan)
                if str(r.model).startswith("l_") == launched]  # fmt: skip
        for what, latency, top1, look in (
            ("deck", "reported_latency", "reported_top1", deck),
            (f"this run, batch {results.plan.scale.latency.batches[-1]}", results.batches[-1], "top1", ours),
        ):  # fmt: skip
            points = _points(results, rows, latency, top1)
            ax.plot([p[0] for p in points], [p[1].mean for p in points], label=what, **look)
            for x, value, label in points:
                if _spread(value):
                    ax.errorbar(x, value.mean, _spread(value), color=look["color"], marker="")
                ax.annotate(label, (x, value.mean), (4, 2), textcoords="offset points",
                            fontsize=5.5, color=look["color"])  # fmt: skip
        base = "L_LeViT (deck)" if launched else "LeViT (deck)"
        ax.set_xlabel(f"Latency, × {base}")
        ax.set_title("With the Launcher" if launched else "On its own")
        ax.margins(x=0.22, y=0.1)
        ax.legend()
    axes[0].set_ylabel("Test top-1, %")
    _state(canvas, results, results.plan.study("hovit"))
    return canvas


def _points(
    results: Results, rows: list[tuple[Study, Row]], latency: str, top1: str
) -> list[tuple[float, Value, str]]:
    points = []
    for study, row in rows:
        own = results.value(study, row, latency)
        ratio = baseline_ratio(results, study, row, latency) or (1.0 if own else None)
        value = results.value(study, row, top1)
        if ratio and value:
            points.append((ratio, value, row.label.removeprefix("L_ ")))
    return points


FIGURES = {
    "training_curves": Figure("Training curves of LeViT and HoViT", ("hovit",), training_curves),
    "five_ideas": Figure("The deck's five ideas", IDEAS, five_ideas),
    "accuracy_latency": Figure("Accuracy against latency", IDEAS, accuracy_latency),
}
