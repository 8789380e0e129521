"""Figure of test photographs and of the images that the Launcher generates from them."""

from base64 import b64decode
from typing import TYPE_CHECKING, Any

import numpy as np

from ..results import Results
from .attention_figures import photographs, say_unmeasured, show_photograph, state

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

SHOWN = (1, 99)  # percentiles of the values that are drawn black and white


def generated_images(results: Results) -> "Canvas":
    """Test photographs, with the images that each trained Launcher generates below them.

    Two rows for each Launcher: the generated image, and its difference from the mean over the
    photographs, with its own contrast.
    """
    import matplotlib.pyplot as plt

    from . import style

    study = results.plan.study("launcher_imagenet")
    task = results.plan.analyse_task(results.plan.analysis("generated_images"))
    found = results.analysed_rows("generated_images")
    count = max((len(row["images"]) for row in found.values()), default=8)
    high = 1 + 2 * len(found)
    size = (style.WIDTH, 0.5 + style.WIDTH / (count + 1) * high)
    canvas, axes = plt.subplots(high, count, figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(False)
        ax.spines[:].set_visible(False)
    if not found or task is None:
        say_unmeasured(axes[0][0])
    for n, (ref, row) in enumerate(found.items()):
        assert task is not None  # a record of it was found
        if n == 0:
            for ax, index in zip(axes[0], row["images"], strict=False):
                show_photograph(ax, results, task.packs[ref], index)
            _label(axes[0][0], "test image")
        images = upsample(row)
        label = (
            study.row(ref.split("/")[1]).label.replace(" (", "\n(").replace(", frozen", ",\nfrozen")
        )
        _label(axes[1 + 2 * n][0], label)
        _label(axes[2 + 2 * n][0], f"minus their mean\n({row['varying']:.1f} % of variance)")
        for line, shown in ((1, images), (2, images - images.mean(0))):
            for ax, image in zip(axes[line + 2 * n], stretch(shown), strict=False):
                ax.imshow(image)
    state(canvas, results, [study], photographs(results, "generated_images"))
    return canvas


def _label(ax: "Axes", text: str) -> None:
    ax.set_ylabel(text, fontsize=5.5)


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
