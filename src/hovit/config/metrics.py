"""Metrics: the columns of tables, and the numbers that claims and the paper refer to."""

import re
from dataclasses import dataclass
from typing import Literal

MetricKind = Literal["exact", "trained", "timed", "counted"]
# Units after a number in a sentence, with the factor of the metric's heading.
SYMBOLS = {
    "parameters": "parameters", "parameters_m": "M parameters", "parameters_used": "parameters",
    "parameters_unused": "parameters", "part_parameters": "parameters", "macs": "G multiply-adds",
    "activations": "MB", "top1": "%", "top1_per_class": "%", "val_top1": "%", "latency": "ms",
    "captured": "ms", "throughput": "images/s", "throughput_cpu": "images/s",
    "images": "images", "images_train": "images", "images_val": "images",
    "images_test": "images", "gigabytes": "GB",
}  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """One column of a table.

    Args:
        name: its name in `config/studies`.
        heading: column heading, with the unit.
        decimals: digits after the decimal point in a table.
        kind: `exact` depends on the model alone; `trained` needs training; `timed` is a
            time or throughput; `counted` is counted from the images.
        unit: factor from the unit of a record to the unit of the heading.
        is_measured: False if only papers report it.
        derived_from: the metric in the records that it is computed from; empty: itself.
    """

    name: str
    heading: str
    decimals: int
    kind: MetricKind = "exact"
    unit: float = 1.0
    is_measured: bool = True
    derived_from: str = ""

    @property
    def recorded(self) -> str:
        """Name of the metric in records."""
        return self.derived_from or self.name

    @property
    def symbol(self) -> str:
        """Unit after a number in a sentence; "" for none."""
        return SYMBOLS.get(self.name, "")


METRICS = {
    metric.name: metric
    for metric in (
        Metric("parameters", "Parameters", 0),
        Metric("parameters_m", "Parameters, M", 1, unit=1e-6),
        Metric("parameters_unused", "Unused", 0),  # no gradient of the output reaches them
        Metric("parameters_used", "Used", 0),
        Metric("part_parameters", "Of the part", 0),  # of the submodule that a row names
        Metric("macs", "MACs, G", 3, unit=1e-9),  # multiply-adds of one image
        Metric("activations", "Kept for backward, MB", 2, unit=1e-6),  # of one image
        Metric("top1", "Top-1, %", 2, "trained"),
        Metric("top1_interval", "Top-1, 95 % interval", 1, "trained", derived_from="top1"),
        # Mean over classes of the top-1 of each class, from the test predictions.
        Metric("top1_per_class", "Mean per class, %", 2, "trained", derived_from="top1"),
        # Of the row minus its baseline, over the same test images (hovit/report/paired.py).
        Metric("top1_difference", "Top-1 − baseline, points", 1, "trained", derived_from="top1"),
        Metric("top5", "Top-5, %", 2, is_measured=False),
        Metric("loss", "Loss", 4, "trained"),
        Metric("val_top1", "Val top-1, %", 2, "trained"),
        Metric("ap", "AP", 1, "trained"),  # COCO average precision, IoU 0.50 to 0.95
        Metric("ap50", "AP50", 1, "trained"),
        Metric("ap75", "AP75", 1, "trained"),
        Metric("ap_small", "AP small", 1, "trained"),  # objects below 32 x 32 pixels
        Metric("ap_medium", "AP medium", 1, "trained"),
        Metric("ap_large", "AP large", 1, "trained"),  # objects above 96 x 96 pixels
        Metric("latency", "Latency, ms", 2, "timed"),  # of one batch
        Metric("captured", "As a CUDA graph, ms", 2, "timed"),  # if it differs from latency
        Metric("throughput", "Images/s", 1, "timed"),  # at the largest batch measured
        Metric("throughput_cpu", "Images/s, CPU", 1, is_measured=False),
        Metric("images", "Images", 0, "counted"),
        Metric("images_train", "Training", 0, "counted"),
        Metric("images_val", "Validation", 0, "counted"),
        Metric("images_test", "Test", 0, "counted"),
        Metric("gigabytes", "GB", 3, "counted"),
    )
}
PRECISION = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
RATIO_HEADING, RATIO_DECIMALS = "× baseline", 2


@dataclass(frozen=True)
class Quantity:
    """One number of a row: a metric, measured or reported, latency at one batch size.

    Its text is `top1`, `latency_32`, `captured_32` or `reported_top1`.
    """

    metric: Metric
    batch: int | None = None
    reported: bool = False

    def __str__(self) -> str:
        batch = f"_{self.batch}" if self.batch else ""
        return f"{'reported_' * self.reported}{self.metric.name}{batch}"

    @property
    def is_trained(self) -> bool:
        return self.metric.kind == "trained"

    @property
    def is_timed(self) -> bool:
        return self.metric.kind == "timed"

    @property
    def is_counted(self) -> bool:
        return self.metric.kind == "counted"

    @property
    def is_inexact(self) -> bool:
        """Whether it differs from run to run, or from device to device."""
        return self.is_trained or self.is_timed


def quantity(text: str) -> Quantity | None:
    """The quantity of that text; None if there is no such metric."""
    name = text.removeprefix("reported_")
    batch = re.fullmatch(r"(latency|captured)_([1-9][0-9]*)", name)
    metric = METRICS.get(batch[1] if batch else name)
    if metric is None:
        return None
    return Quantity(metric, int(batch[2]) if batch else None, reported=name != text)
