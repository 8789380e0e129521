"""Figure of test photographs and of the images that the Launcher generates from them."""

from base64 import b64decode
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config.schema import Study
from ..results import Results
from .common import photograph, photographs, say_unmeasured, state

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

SHOWN = (1, 99)  # percentiles of the values that are drawn black and white


def generated_images(results: Results) -> "Canvas":
    """Image that each trained Launcher generates from test photographs.

    Two rows for each Launcher: the generated image, and its difference from the mean over the
    photographs, with its own contrast. The photographs are shown above where they are packed.
    """
    import matplotlib.pyplot as plt

    from . import style

    study = results.plan.study("launcher_imagenet")
    task = results.plan.analyse_task(results.plan.analysis("generated_images"))
    found = results.analysed_rows("generated_images")
    rows = [strip for ref, row in found.items() if task for strip in _strips(study, ref, row)]
    if rows and task is not None:
        ref, row = next(iter(found.items()))
        shown = [photograph(results, task.packs[ref], index) for index in row["images"]]
        rows = ([("test image", shown)] if all(each is not None for each in shown) else []) + rows
    count = max((len(images) for _, images in rows), default=8)
    high = max(1, len(rows))
    size = (style.WIDTH, 0.5 + style.WIDTH / (count + 1) * high)
    canvas, axes = plt.subplots(high, count, figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(False)
        ax.spines[:].set_visible(False)
    if not rows:
        say_unmeasured(axes[0][0])
    for line, (label, images) in zip(axes, rows, strict=False):
        line[0].set_ylabel(label, fontsize=5.5)
        for ax, image in zip(line, images, strict=False):
            ax.imshow(image)
    state(canvas, results, [study], photographs(results, "generated_images"))
    return canvas


def _strips(study: Study, ref: str, row: dict[str, Any]) -> list[tuple[str, Any]]:
    """(label, images) of a Launcher: the generated images, and their difference from the mean."""
    images = upsample(row)
    label = study.row(ref.split("/")[1]).label
    label = label.replace(" (", "\n(").replace(", frozen", ",\nfrozen")
    return [
        (label, stretch(images)),
        (f"minus their mean\n({row['varying']:.1f} % of variance)",
         stretch(images - images.mean(0))),
    ]  # fmt: skip


def upsample(row: dict[str, Any]) -> np.ndarray:
    """The generated images of a record, float [B, H, W, 3].

    Args:
        row: what `hovit.analysis.generated_images` found for a model.
    """
    shape = tuple(row["shape"])
    raw = [np.frombuffer(b64decode(each), np.uint8).reshape(shape) for each in row["small_images"]]
    small = row["low"] + np.stack(raw) / 255 * (row["high"] - row["low"])  # [B, 3, h, w]
    kernel = np.array(row["kernel"])  # [3 in, 3 out, s, s]
    blocks = np.einsum("bkhw,kcij->bhiwjc", small, kernel)  # block (i, j) of each small pixel
    side = kernel.shape[-1]
    size = (len(small), shape[1] * side, shape[2] * side, kernel.shape[1])
    return blocks.reshape(size) + np.array(row["bias"])


def stretch(images: np.ndarray) -> np.ndarray:
    """Map values to 0..1 for display, in the same way for all images."""
    low, high = np.percentile(images, SHOWN)
    return np.clip((images - low) / max(high - low, 1e-12), 0, 1)
