"""Test predictions, from which the metrics of a record can be recomputed."""

import gzip
import hashlib
from pathlib import Path

import pandas as pd

from ..utils.errors import HovitError, one_line
from ..utils.files import atomic

COLUMNS = ["index", "label", "predicted", "loss"]
KEY = COLUMNS[:2]  # the image and its class


def metrics(predictions: pd.DataFrame) -> tuple[float, float]:
    """Mean loss and top-1 in percent of a table with one row per image."""
    return (
        float(predictions["loss"].mean()),
        100.0 * float((predictions["label"] == predictions["predicted"]).mean()),
    )


def right_by_class(predictions: pd.DataFrame) -> pd.DataFrame:
    """For each class (`label`) the number of test images and how many of them are `right`."""
    right = (predictions["label"] == predictions["predicted"]).to_frame("right")
    return right.groupby(predictions["label"]).agg(images=("right", "size"), right=("right", "sum"))


def predictions_digest(predictions: pd.DataFrame) -> str:
    """sha256 in hex of the predictions as CSV."""
    return hashlib.sha256(predictions.to_csv(index=False).encode()).hexdigest()


def write_predictions(path: Path, predictions: pd.DataFrame) -> None:
    """Write predictions as gzipped CSV, atomically. Equal tables give equal bytes."""
    with atomic(path) as temporary:
        content = predictions.to_csv(index=False).encode()
        temporary.write_bytes(gzip.compress(content, mtime=0))  # no time, no file name


def read_predictions(path: Path) -> pd.DataFrame:
    """Read predictions.

    Raises:
        HovitError: if the file is missing, damaged, or not a table of predictions.
    """
    try:
        table = pd.read_csv(path, compression="gzip", dtype=str)
        if list(table.columns) != COLUMNS or not len(table):
            raise HovitError(f"{path}: not predictions: columns must be {', '.join(COLUMNS)}")
        # Read as text first: some versions of pandas drop digits when they parse floats.
        return table.astype(dict.fromkeys(COLUMNS[:3], "int64") | {"loss": "float64"})
    except HovitError:
        raise
    except Exception as error:  # gzip, zlib, CSV and encodings raise different types
        raise HovitError(f"{path}: not readable as predictions ({one_line(error)})") from None
