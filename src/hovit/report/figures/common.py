"""What figures share: curves over seeds, test photographs, names of sources, the line of facts."""

from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config.runs import Pack
from ...config.schema import Row, Study
from ...utils.plural import plural
from ..claims.compare import ratio_noise
from ..results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

TOP1_BARS = "bars: 95 % interval of each point's top-1, over test images and seeds"
RATIO_BARS = "bars of ratios: ± half the interquartile range over rounds"
SEED_BARS = "bars of accuracies: ± standard deviation over seeds"
CHARACTERS = 20  # of the line of facts, for each inch
MANY_EPOCHS = 12  # a longer curve has one marker


def state(
    canvas: "Canvas", results: Results, studies: list[Study], more: Sequence[str] = ()
) -> None:
    """Write scale, images, device and seeds of each study under the figure."""
    places = dict.fromkeys(results.where(study) for study in studies)
    # A study without times has no number of threads; another study's line says the rest.
    facts = [p for p in places if not any(o != p and o.startswith(p) for o in places)]
    facts += [*more, *seeds(results, studies)]
    if results.problems:
        facts.append(f"{plural(len(results.problems), 'record')} not used: see the tables")
    write_facts(canvas, facts)


def write_facts(canvas: "Canvas", *paragraphs: Sequence[str]) -> None:
    """Write facts under the figure, in as many lines as they need; no line ends within a fact."""
    width = int(canvas.get_figwidth() * CHARACTERS)
    lines = []
    for facts in paragraphs:
        unbroken = [fact.replace(" ", "\u00a0") for fact in facts]
        text = "\u00a0· ".join(unbroken)
        lines += wrap(text, width, break_long_words=False, break_on_hyphens=False)
    text = "\n".join(lines).replace("\u00a0", " ")
    canvas.supxlabel(text, fontsize=5.5, color="#555555")


def seeds(results: Results, studies: list[Study]) -> list[str]:
    """Number of seeds with records: `n = 1 to 3 seeds`; empty if none."""
    rows = [(study, row) for study in studies if study.trained for row in study.rows]
    found = sorted({len(results.trained(study, row)) for study, row in rows} - {0})
    least = f"{found[0]} to " if found and found[0] < found[-1] else ""
    return [f"n = {least}{plural(found[-1], 'seed')}"] if found else []


def ratio_error(results: Results, study: Study, row: Row, metric: str) -> float:
    """Half the interquartile range of the ratios to the baseline over rounds; 0 without rounds."""
    own = results.value(study, row, metric)
    base = results.value(study, study.row(row.baseline), metric) if row.baseline else None
    return ratio_noise(own, base) if own and base and own.samples else 0.0


def source_name(results: Results, study: Study) -> str:
    """Scale and device of committed results (`proxy, NVIDIA H200`), or `this run`."""
    if not results.is_evidence:
        return results.name
    return f"{results.plan.scale.id}, {device_name(results, study)}"


def device_name(results: Results, study: Study) -> str:
    """The device of a study's latencies, or of its training; without either, its folder's name."""
    if timed := results.latency_device(study):
        return timed.name
    trained = (record for row in study.rows for _, record in results.trained(study, row))
    names = sorted({record.provenance.device.name for record in trained})
    return " and ".join(names) or results.base.name


def curve(
    ax: "Axes", results: Results, study: Study, row: Row, key: str, label: str, look: dict[str, Any]
) -> int:
    """Plot a number of each epoch: the mean over seeds, and their range as a band.

    Args:
        ax: the panel.
        results: the source.
        study: the row's study.
        row: the trained row.
        key: name of the number in a record's history.
        label: for the legend.
        look: colour, marker and line.

    Returns:
        the number of epochs; 0 without records.
    """
    histories = [record.results["history"] for _, record in results.trained(study, row)]
    if not histories:
        return 0
    values = np.array([[epoch[key] for epoch in history] for history in histories])
    epochs = np.arange(1, values.shape[1] + 1)
    every = len(epochs) if len(epochs) > MANY_EPOCHS else 1
    ax.plot(epochs, values.mean(0), label=label, markevery=every, **look)
    if len(values) > 1:
        ax.fill_between(
            epochs, values.min(0), values.max(0), color=look["color"], alpha=0.2, linewidth=0
        )
    return len(epochs)


def photograph(results: Results, pack: Pack, index: int) -> "np.ndarray | None":
    """An image of a pack, uint8 [H, W, 3]; None if the images are not here, as with evidence."""
    path = results.packed(pack, "images.npy")
    if path is None:
        return None
    image: np.ndarray = np.load(path, mmap_mode="r")[index]
    return image


def photographs(results: Results, analysis_id: str) -> list[str]:
    """The data set of the photographs, if a figure shows those instead of the images of the run."""
    task = results.plan.analyse_task(results.plan.analysis(analysis_id))
    packs = task.packs.items() if task else ()
    titles = {p.dataset.title for ref, p in packs if task and p.dataset != task.runs[ref].dataset}
    return [f"photographs: {', '.join(sorted(titles))}"] if titles else []


def say_unmeasured(ax: "Axes") -> None:
    """Write `not measured` if no record has the numbers."""
    ax.text(0.5, 0.5, "not measured", ha="center", va="center", transform=ax.transAxes)
