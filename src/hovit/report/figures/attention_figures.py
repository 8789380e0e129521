"""Figures on attention variants: training curves, latency, and growth with the number of tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config.runs import Pack
from ...config.schema import Row, Study
from ..claims.compare import ratio_noise
from ..record_source import plural
from ..results import Results
from ..tables.columns import baseline_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

LOSSES = {"train_loss": "training", "val_loss": "validation"}
LENGTH_FORMS = {"dot": "dot product (SDPA)", "jaccard": "Jaccard", "focused": "focused",
                "gated": "gated, chunks"}  # fmt: skip


def attention_curves(results: Results) -> "Canvas":
    """Training and validation loss of every attention variant, in LeViT and in Swin."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    from . import style

    studies = [results.plan.study(name) for name in ("levit_attention", "swin_similarity")]
    cells = [(study, _rows(results, study)) for study in studies]
    cells = [(s, [r for r in rows if results.trained(s, r)] or rows) for s, rows in cells]
    lines = [(s, rows[i : i + 4]) for s, rows in cells for i in range(0, len(rows), 4)]
    canvas, axes = plt.subplots(
        len(lines), 4, figsize=(style.WIDTH, 1.7 * len(lines)), sharex=True, squeeze=False
    )
    for (study, rows), line in zip(lines, axes, strict=True):
        for ax, row in zip(line, rows, strict=False):
            histories = [record.results["history"] for _, record in results.trained(study, row)]
            for i, (key, name) in enumerate(LOSSES.items()):
                values = np.array([[epoch[key] for epoch in h] for h in histories])
                if values.size:
                    epochs = np.arange(1, values.shape[1] + 1)
                    ax.plot(epochs, values.mean(0), label=name, **style.look(i))
                    ax.fill_between(epochs, values.min(0), values.max(0), alpha=0.2, lw=0)
            ax.set_title(row.label)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            ax.sharey(line[0])
        for ax in line[len(rows) :]:
            ax.set_visible(False)
        line[0].set_ylabel("Loss")
    for ax in axes[-1]:
        ax.set_xlabel("Epoch")
    handles, labels = axes[0][0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=2)
    state(canvas, results, studies)
    return canvas


def _rows(results: Results, study: Study) -> list[Row]:
    """The rows of attention variants and of the attention that they replace."""
    return [r for r in study.rows if r.model not in ("levit_deck_fixed", "levit_256")]


def attention_latency(results: Results) -> "Canvas":
    """Latency of each attention relative to dot-product attention, in models and alone.

    Error bars: half the inter-quartile range of the rounds' ratios.
    """
    import matplotlib.pyplot as plt

    from . import style

    studies = [
        results.plan.study(name)
        for name in ("levit_attention", "swin_similarity", "attention_speed")
    ]
    canvas, axes = plt.subplots(
        1, 3, figsize=(style.WIDTH, 3.6), gridspec_kw={"width_ratios": [1, 1, 1.2]}
    )
    titles = ("In LeViT", "In Swin (CIFAR-10)", "Attention alone")
    for ax, study, title in zip(axes, studies, titles, strict=True):
        _bars(ax, results, study, [row for row in _rows(results, study) if row.baseline])
        ax.set_title(title)
        ax.set_xlabel("Latency, relative to dot product")
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=3)
    state(canvas, results, studies)
    return canvas


def _bars(ax: "Axes", results: Results, study: Study, rows: list[Row]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    from . import style

    metrics = ["reported_latency", *map(str, results.batches(study))]
    looks: dict[str, dict[str, Any]] = {
        "reported_latency": {
            "color": style.REPORTED,
            "label": "deck (batch not stated)",
            "hatch": "//",
        },
    }
    shades = (style.OURS, "#56B4E9", "#009E73")
    height, most = 0.8 / len(metrics), 1.0
    for i, metric in enumerate(metrics):
        look = looks.get(metric) or {
            "color": shades[(i - 1) % 3],
            "label": f"{results.name}, batch {metric.removeprefix('latency_')}",
        }
        ratios = [baseline_ratio(results, study, row, metric) or 0.0 for row in rows]
        errors = [ratio_error(results, study, row, metric) for row in rows]
        most = max(most, *ratios)
        at = [n + (i - (len(metrics) - 1) / 2) * height for n in range(len(rows))]
        ax.barh(at, ratios, height, xerr=errors, error_kw={"elinewidth": 0.7}, **look)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [_short(row.label) for row in rows], fontsize=5.5)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    if most > 2:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(NullLocator())


def ratio_error(results: Results, study: Study, row: Row, metric: str) -> float:
    """Half the inter-quartile range of the ratios to the baseline over rounds; 0 without rounds."""
    own = results.value(study, row, metric)
    base = results.value(study, study.row(row.baseline), metric) if row.baseline else None
    return ratio_noise(own, base) if own and base and own.samples else 0.0


def _short(label: str) -> str:
    return label.replace("LeViT + ", "").replace("Swin + ", "").replace(" tokens", "")


def attention_length(results: Results) -> "Canvas":
    """Time and memory of one image by the number of tokens."""
    import matplotlib.pyplot as plt

    from . import style

    study = results.plan.study("attention_length")
    metric = results.batches(study)[0]
    canvas, axes = plt.subplots(1, 2, figsize=(style.WIDTH * 0.75, 2.6))
    for i, (form, label) in enumerate(LENGTH_FORMS.items()):
        rows = [row for row in study.rows if row.id.startswith(f"{form}_")]
        for ax, name, scale in ((axes[0], metric, 1.0), (axes[1], "activations", 1e-6)):
            points = [
                (int(row.id.rpartition("_")[2]), value.mean * scale)
                for row in rows
                if (value := results.value(study, row, name))
            ]
            if points:
                ax.plot(*zip(*points, strict=True), label=label, **style.look(i))
    for ax, title in zip(axes, ("Latency, ms", "Kept for backward, MB"), strict=True):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("Tokens")
        ax.set_ylabel(title)
    axes[0].legend()
    state(canvas, results, [study])
    return canvas


def attention_maps(results: Results) -> "Canvas":
    """One test image, and the attention of its middle token in each trained variant."""
    import matplotlib.pyplot as plt

    from . import style

    study, analysis = results.plan.study("levit_attention"), results.plan.analysis("attention_maps")
    found = results.analysed_rows("attention_maps")
    canvas, axes = plt.subplots(1, len(found) + 1, figsize=(style.WIDTH, 1.6), squeeze=False)
    for ax in axes[0]:
        ax.set_axis_off()
    for ax, (ref, row) in zip(axes[0][1:], found.items(), strict=True):
        ax.imshow(row["map"], cmap="magma", vmin=0)
        height, width = len(row["map"]), len(row["map"][0])
        ax.plot(width // 2, height // 2, marker="+", color="white", markersize=5, linestyle="")
        label = study.row(ref.split("/")[1]).label.replace("LeViT + ", "")
        ax.set_title(f"{label}\nentropy {row['entropy']:.2f}", fontsize=5.5)
    if found:
        ref, row = next(iter(found.items()))
        task = results.plan.analyse_task(analysis)
        assert task is not None  # a record of it was found
        pack, index = task.packs[ref], row["images"][0]
        if show_photograph(axes[0][0], results, pack, index) is not None:
            axes[0][0].set_title("test image", fontsize=5.5)
        tokens = len(row["map"]) * len(row["map"][0])
        canvas.suptitle(
            f"entropy in nats; flat over {tokens} tokens it is {np.log(tokens):.2f}", fontsize=6
        )
    else:
        say_unmeasured(axes[0][0])
    state(canvas, results, [study], photographs(results, "attention_maps"))
    return canvas


def show_photograph(ax: "Axes", results: Results, pack: Pack, index: int) -> "np.ndarray | None":
    """Show and return the image of an analysis; write a note if it is not packed here."""
    path = results.root / pack.folder / "images.npy"
    if not path.exists():  # evidence comes without its images
        words = f"image {index} of\n{pack.dataset.title}:\nnot packed here"
        ax.text(0.5, 0.5, words, ha="center", va="center", fontsize=5.5, transform=ax.transAxes)
        return None
    image: np.ndarray = np.load(path, mmap_mode="r")[index]
    ax.imshow(image)
    return image


def say_unmeasured(ax: "Axes") -> None:
    """Write `not measured` if no record has the numbers."""
    ax.text(0.5, 0.5, "not measured", ha="center", va="center", transform=ax.transAxes)


def seeds(results: Results, studies: list[Study]) -> list[str]:
    """Number of seeds with records: `n = 1 to 3 seeds`; empty if none."""
    rows = [(study, row) for study in studies if study.trained for row in study.rows]
    found = sorted({len(results.trained(study, row)) for study, row in rows} - {0})
    least = f"{found[0]} to " if found and found[0] < found[-1] else ""
    return [f"n = {least}{plural(found[-1], 'seed')}"] if found else []


def photographs(results: Results, analysis_id: str) -> list[str]:
    """The data set of the photographs, if a figure shows those instead of the images of the run."""
    task = results.plan.analyse_task(results.plan.analysis(analysis_id))
    packs = task.packs.items() if task else ()
    titles = {p.dataset.title for ref, p in packs if task and p.dataset != task.runs[ref].dataset}
    return [f"photographs: {', '.join(sorted(titles))}"] if titles else []


TOP1_BARS = "bars: 95 % interval of each point's top-1, over test images and seeds"


def state(
    canvas: "Canvas", results: Results, studies: list[Study], more: Sequence[str] = ()
) -> None:
    """Write scale, images, device and seeds of each study under the figure."""
    facts = [*dict.fromkeys(results.where(study) for study in studies), *more]
    facts += seeds(results, studies)
    if results.problems:
        facts.append(f"{plural(len(results.problems), 'record')} not used: see the tables")
    canvas.supxlabel(" · ".join(facts), fontsize=5.5, color="#555555", wrap=True)
