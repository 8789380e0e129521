"""Runs (a model, a recipe and a random seed) and packs (decoded images)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..utils.files import digest
from ..utils.strict import InSpec
from .schema import Dataset, Limit, Recipe, WeightsPackage

RUNS = Path("results/runs")
PREDICTIONS, DETECTIONS = "predictions.csv.gz", "detections.json.gz"


class Weights(InSpec):
    """The source of pretrained weights: exactly one of a run, timm's hub, a package, a file."""

    always = frozenset({"run", "seed", "spec", "timm", "sha256"})

    run: str | None = None
    seed: int = 0
    spec: str | None = None  # spec hash of that run
    timm: str | None = None
    sha256: str | None = None  # of the file that --weights names
    package: WeightsPackage | None = None

    def __str__(self) -> str:
        if self.run:
            return f"run {self.run}"
        if self.package:
            return f"package {self.package}"
        return f"timm {self.timm}" if self.timm else f"file with sha256 {(self.sha256 or '')[:12]}"


class Run(InSpec):
    """One model x dataset x recipe x random seed."""

    always = frozenset(
        {"seed", "model", "model_args", "dataset", "image_size", "recipe", "limit", "precision"}
        | {"weights"}
    )
    never = frozenset({"id", "scale", "role"})

    id: str
    scale: str
    role: str
    seed: int
    model: str
    model_args: dict[str, Any]
    dataset: Dataset
    image_size: int
    recipe: Recipe
    limit: Limit
    precision: str
    weights: Weights | None

    @property
    def folder(self) -> Path:
        """Folder of its files, relative to the top folder of the artifact."""
        return RUNS / self.scale / self.id / f"seed{self.seed}"

    @property
    def spec_hash(self) -> str:
        """sha256 of the spec."""
        return digest(self.to_spec())

    @property
    def is_detector(self) -> bool:
        """Whether the run trains an object detector rather than a classifier."""
        return self.recipe.detection is not None

    @property
    def pack(self) -> "Pack":
        """The images it trains on."""
        return Pack(self.dataset, self.image_size)


@dataclass(frozen=True)
class Pack:
    """One dataset, decoded once at one size."""

    dataset: Dataset
    image_size: int

    @property
    def id(self) -> str:
        """Name of its folder."""
        return f"{self.dataset.id}-{self.image_size}px"

    @property
    def folder(self) -> Path:
        """Folder of its files, relative to the top folder of the artifact."""
        return Path("data/packed") / self.id

    @property
    def in_place(self) -> bool:
        """Whether images are read from the original files; the pack only lists them."""
        return self.dataset.reads_files or self.dataset.reader == "coco"

    @cached_property
    def spec_hash(self) -> str:
        """sha256 of the dataset spec and the image size."""
        return digest(self.dataset.to_spec() | {"image_size": self.image_size})

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that a run reads: packed images, or the list of images that are read in place."""
        images = "manifest.csv" if self.in_place else "images.npy"
        return self.folder / "pack.json", self.folder / images


def protocol(settings: Mapping[str, Any], device: str) -> Mapping[str, Any]:
    """Return the latency settings for a kind of device, `cpu` or `cuda`.

    On a GPU, `on_gpu` (batches and precision) replaces the general settings.
    """
    return {**settings, **(settings.get("on_gpu", {}) if device == "cuda" else {})}
