"""The plan: what the catalogue comes to at one scale. Runs, their files, and how they depend.

Snakemake's DAG, `hovit sweep` and the report all read this; it imports no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .catalogue import (
    Analysis,
    Catalogue,
    Dataset,
    Limit,
    Recipe,
    Row,
    Scale,
    Strict,
    Study,
    load_catalogue,
    split_ref,
)
from .errors import HovitError
from .files import digest, file_digest
from .sources import training_code

RUNS = Path("results/runs")
PREDICTIONS, DETECTIONS = "predictions.csv.gz", "detections.json.gz"
PICTURES = ("attention_maps", "kept_patches")  # analyses that show an image beside what they find
KEPT = "freed memory kept, where the C library is glibc"
HANDED_BACK = "freed memory handed back, as glibc does"
PRETRAINING = ("pretrain", "upstream")  # roles of what others start from: one seed is enough


class Weights(Strict):
    """Where pretrained weights come from: exactly one of a run, timm's hub, a file."""

    run: str | None = None
    seed: int = 0
    spec: str | None = None  # that run's spec hash
    timm: str | None = None
    sha256: str | None = None  # of the file that --weights named

    def __str__(self) -> str:
        if self.run:
            return f"run {self.run}"
        return f"timm {self.timm}" if self.timm else f"file with sha256 {(self.sha256 or '')[:12]}"


class Run(Strict):
    """One model x dataset x recipe x seed. What decides the result is its spec."""

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
        """Where it leaves its files, from the top of the artifact."""
        return RUNS / self.scale / self.id / f"seed{self.seed}"

    @property
    def spec(self) -> dict[str, Any]:
        """All that decides the result; titles and the scale's name do not."""
        spec = self.model_dump(mode="json", exclude={"id", "scale", "role"})
        for part in ("dataset", "recipe"):
            for key in ("id", "title", "about", "stands_for"):
                spec[part].pop(key, None)
        del spec["recipe"]["scale_lr"]  # lr is as scaled
        if not self.detects:
            del spec["recipe"]["detection"]
        return spec

    @property
    def spec_hash(self) -> str:
        return digest(self.spec)

    @property
    def detects(self) -> bool:
        """Whether objects are detected, and not images classified."""
        return self.recipe.detection is not None

    @property
    def code(self) -> str:
        """The hash of the sources that can change the result."""
        return training_code(self.spec)

    @property
    def pack(self) -> "Pack":
        return Pack(self.dataset, self.image_size)


@dataclass(frozen=True)
class Pack:
    """One dataset, decoded once at one size."""

    dataset: Dataset
    image_size: int

    @property
    def id(self) -> str:
        return f"{self.dataset.id}-{self.image_size}px"

    @property
    def folder(self) -> Path:
        return Path("data/packed") / self.id

    @property
    def spec_hash(self) -> str:
        spec = self.dataset.model_dump(mode="json", exclude={"id", "title", "about", "stands_for"})
        return digest(spec | {"image_size": self.image_size})


@dataclass(frozen=True)
class Plan:
    """The catalogue at one scale.

    Args:
        catalogue: all of `config/`.
        scale: the scale.
        weights_file: what `--weights` names: ResNet50's weights, or a folder of NAME.safetensors,
            each in the place of the scale's own for the pretrained model of that name.
    """

    catalogue: Catalogue
    scale: Scale
    weights_file: Path | None = None
    _runs: dict[tuple[str, str, int], Run] = field(default_factory=dict, compare=False, repr=False)
    _sha256: dict[Path, str] = field(default_factory=dict, compare=False, repr=False)

    def study(self, study_id: str) -> Study:
        """The study of that id.

        Raises:
            HovitError: if the catalogue has none.
        """
        try:
            return self.catalogue.studies[study_id]
        except KeyError:
            known = ", ".join(self.catalogue.studies)
            raise HovitError(
                f"no study {study_id!r} in config/studies; there are {known}"
            ) from None

    def runs_of(self, study: Study, row: Row) -> list[Run]:
        """A row's runs, one a seed; none if the scale has no such dataset."""
        role = row.dataset or study.dataset
        if row.model is None or not study.trained or role not in self.scale.datasets:
            return []
        # Of what takes a day, too, one: as detection's papers have it.
        seeds = self.scale.seeds[:1] if role in (*PRETRAINING, "coco") else self.scale.seeds
        return [self._run(study, row, seed) for seed in seeds]

    def _run(self, study: Study, row: Row, seed: int) -> Run:
        if (key := (study.id, row.id, seed)) not in self._runs:
            self._runs[key] = self._resolve(study, row, seed)
        return self._runs[key]

    def _resolve(self, study: Study, row: Row, seed: int) -> Run:
        role = row.dataset or study.dataset
        recipe = self.catalogue.recipes[row.recipe or study.recipe]
        epochs = self.scale.epochs.get(recipe.id)
        factor = epochs / recipe.epochs if epochs else self.scale.epoch_factor
        size = min(self.scale.image_size or recipe.image_size, recipe.image_size)
        model = str(row.model)
        if stand_in := self.scale.models.get(model):
            model, size = stand_in.model, stand_in.image_size
        detection = recipe.detection
        if detection:
            milestones = tuple(epoch * factor for epoch in detection.milestones)
            detection = detection.model_copy(update={"milestones": milestones})
        batch_size = self.scale.batch_sizes.get(recipe.id, recipe.batch_size)
        lr = recipe.lr * (batch_size / recipe.batch_size if recipe.scale_lr else 1)
        scaled = recipe.model_copy(
            update={
                "detection": detection,
                "epochs": max(1, round(recipe.epochs * factor)),
                "batch_size": batch_size,
                "lr": self.scale.lrs.get(recipe.id, lr),
                "warmup_epochs": recipe.warmup_epochs * factor,
                "image_size": size,
            }
        )
        args = "".join(f"-{key}={value}" for key, value in sorted(row.model_args.items()))
        init = "-pretrained" if row.pretrained and not model.startswith("l_") else ""
        name = re.sub(r"[^A-Za-z0-9_.=-]", "_", f"{model}{args}{init}")
        return Run(
            id=f"{name}.{role}.{recipe.id}",
            scale=self.scale.id,
            role=role,
            seed=seed,
            model=model,
            model_args=row.model_args,
            dataset=self.catalogue.datasets[self.scale.datasets[role]],
            image_size=size,
            recipe=scaled,
            limit=self.scale.limit,
            precision=self.scale.precision,
            weights=self._weights(row.pretrained) if row.pretrained else None,
        )

    def _given(self, name: str) -> Path | None:
        """The file that `--weights` has for a pretrained model; one file alone is ResNet50's."""
        given = self.weights_file
        if given is None or not given.is_dir():
            return given if name == "resnet50" else None
        path = given / f"{name}.safetensors"
        return path if path.exists() else None

    def _weights(self, name: str) -> Weights:
        if path := self._given(name):
            if path not in self._sha256:
                self._sha256[path] = file_digest(path)
            return Weights(sha256=self._sha256[path])
        source = self.scale.weights.get(name)
        if source is None:
            raise HovitError(f"config/scales/{self.scale.id}.yaml: weights.{name}: not given")
        if source.timm:
            return Weights(timm=source.timm)
        study_id, row_id = str(source.row).split("/")
        study = self.study(study_id)
        runs = self.runs_of(study, study.row(row_id))
        if not runs:
            role = study.row(row_id).dataset or study.dataset
            raise HovitError(f"config/scales/{self.scale.id}.yaml: datasets.{role}: not given")
        return Weights(run=runs[0].id, seed=runs[0].seed, spec=runs[0].spec_hash)

    @cached_property
    def runs(self) -> dict[str, dict[int, Run]]:
        """Every run of the scale: id -> seed -> run. One that several tables cite stands once.

        Raises:
            HovitError: if two rows give one id to different runs.
        """
        found: dict[str, dict[int, Run]] = {}
        for study in self.catalogue.studies.values():
            for row in study.rows:
                for run in self.runs_of(study, row):
                    other = found.setdefault(run.id, {}).setdefault(run.seed, run)
                    if other.spec_hash != run.spec_hash:
                        raise HovitError(
                            f"config/studies/{study.id}.yaml: row {row.id}: run {run.id} is "
                            "defined otherwise by another row already"
                        )
        return found

    def run(self, run_id: str, seed: int | None = None) -> Run:
        """The run of that id.

        Raises:
            HovitError: if no study defines it.
        """
        seeds = self.runs.get(run_id)
        if seeds is None:
            raise HovitError(
                f"no study defines a run {run_id!r} at scale {self.scale.id} (see `hovit list`)"
            )
        if seed is None:
            seed = next(iter(seeds))
        if seed not in seeds:
            allowed = ", ".join(map(str, seeds))
            raise HovitError(f"run {run_id} has no seed {seed} at scale {self.scale.id}: {allowed}")
        return seeds[seed]

    def upstream(self, run: Run) -> Run | None:
        """The run whose weights this one starts from, if it does."""
        if run.weights and run.weights.run:
            return self.run(run.weights.run, run.weights.seed)
        return None

    def rows_run(self, study: Study) -> list[Row]:
        """The study's rows that are measured at this scale, and trained if any of it is."""
        if study.kind == "models" and not study.trained:
            return list(study.rows)
        return [row for row in study.rows if self.runs_of(study, row)]

    def needed(self, studies: list[Study]) -> list[Run]:
        """All runs of these studies, those that others start from first."""
        wanted = [r for s in studies for row in s.rows for r in self.runs_of(s, row)]
        first = [self.upstream(run) for run in wanted]
        unique = {(run.id, run.seed): run for run in [*first, *wanted] if run}
        return list(unique.values())

    @cached_property
    def upstreams(self) -> set[str]:
        """The runs that others start from."""
        every = [run for seeds in self.runs.values() for run in seeds.values()]
        return {run.weights.run for run in every if run.weights and run.weights.run}

    @cached_property
    def read(self) -> set[str]:
        """The runs whose weights others start from, or an analysis looks into."""
        every = self.catalogue.analyses.values()
        analysed = {run.id for each in every for run in self.analysed_runs(each).values()}
        return self.upstreams | analysed

    @cached_property
    def claimed(self) -> list[Study]:
        """The studies that claims look at."""
        return [self.study(name) for name in sorted({split_ref(ref)[1] for ref in self._refs})]

    @cached_property
    def claimed_analyses(self) -> list[str]:
        """The analyses that claims look at."""
        return sorted({split_ref(ref)[0] for ref in self._refs} - {""})

    @property
    def _refs(self) -> list[str]:
        files = self.catalogue.claims.values()
        both = [ref for file in files for claim in file.claims for ref in (claim.of, claim.to)]
        return [ref for ref in both if ref]

    def packs_of(self, role: str | None) -> list[Pack]:
        """The packs that this role comes to at this scale."""
        every = [run for seeds in self.runs.values() for run in seeds.values()]
        found = {run.pack.id: run.pack for run in every if run.role == role}
        return list(found.values())

    def models(self, study: Study) -> list[str]:
        """The models of a study."""
        return sorted({self.model_of(row) for row in study.rows if row.model})

    def model_of(self, row: Row) -> str:
        """What is trained and timed for a row at this scale: its model, or its stand-in."""
        stand_in = self.scale.models.get(str(row.model))
        return stand_in.model if stand_in else str(row.model)

    def measure_spec(self, study: Study) -> dict[str, Any]:
        """All that decides what is measured for a study."""
        latency = self.scale.latency.model_dump(mode="json")
        if study.batches:
            latency["batches"] = list(study.batches)
        timed = {"latency", "throughput"} & set(study.columns)
        latency["image_size"] = self._timed_size(study.image_size)
        latency["precision"] = "fp32, TF32 off"
        latency["memory"] = KEPT if study.keep_memory else HANDED_BACK
        if study.threads:
            latency["threads"] = study.threads
        if study.workload != "inference":
            latency["workload"] = study.workload
        if study.on_gpu:
            on_gpu = study.on_gpu
            latency["on_gpu"] = {"batches": [on_gpu.batch], "precision": on_gpu.precision}
        return {
            "study": study.id,
            "num_classes": study.num_classes,
            "image_size": study.image_size,
            "latency": latency if timed else None,
            "rows": {row.id: self._measured_row(row) for row in study.rows if row.model},
        }

    def _measured_row(self, row: Row) -> dict[str, Any]:
        spec = {"model": self.model_of(row), "model_args": row.model_args, "part": row.part}
        if row.image_size is None:
            return spec
        return spec | {
            "image_size": row.image_size,
            "latency_size": self._timed_size(row.image_size),
        }

    def _timed_size(self, size: int | None) -> int | None:
        """The size at which latency is measured at this scale, for models made for `size`."""
        most = self.scale.latency.image_size
        return min(most, size) if most and size else size

    def measured(self, study: Study) -> Path:
        """The record of a study's parameters, multiply-adds and latency."""
        return RUNS / self.scale.id / "measure" / f"{study.id}.json"

    def evaluation_spec(self, study: Study) -> dict[str, Any]:
        """Which rows of a study that trains nothing are evaluated, given weights and ImageNet."""
        evaluated = not study.trained and "top1" in study.columns
        rows = [row for row in study.rows if row.model] if evaluated else []
        found = {
            row.id: {"model": row.model, "model_args": row.model_args, "tag": row.tag}
            for row in rows
        }
        return {"study": study.id, "dataset": "ImageNet-1k, validation images", "rows": found}

    def evaluated(self, study: Study) -> Path:
        """The record of given weights' accuracy on ImageNet."""
        return RUNS / self.scale.id / "evaluation" / f"{study.id}.json"

    def analysis(self, analysis_id: str) -> Analysis:
        """The analysis of that id.

        Raises:
            HovitError: if the catalogue has none.
        """
        try:
            return self.catalogue.analyses[analysis_id]
        except KeyError:
            known = ", ".join(self.catalogue.analyses)
            raise HovitError(
                f"no analysis {analysis_id!r} in config/analyses; there are {known}"
            ) from None

    def analysed_runs(self, analysis: Analysis) -> dict[str, Run]:
        """The run that stands for each row of an analysis; fewer, if the scale has no such data."""
        found = {}
        for ref in analysis.of:
            study_id, row_id = ref.split("/")
            study = self.study(study_id)
            if runs := self.runs_of(study, study.row(row_id)):
                found[ref] = runs[0]
        return found

    def analysis_pack(self, analysis: Analysis, run: Run) -> Pack:
        """The images on which a run is analysed: its own, or in a picture the scale's photographs.

        An analysis that takes classes, too, or whose numbers stand for the run's data has its own.
        """
        if self.scale.photographs is None or analysis.kind not in PICTURES:
            return run.pack
        return Pack(self.catalogue.datasets[self.scale.photographs], run.image_size)

    @cached_property
    def packs(self) -> dict[str, Pack]:
        """Every pack of the scale: id -> pack."""
        found = [run.pack for seeds in self.runs.values() for run in seeds.values()]
        for analysis in self.catalogue.analyses.values():
            runs = self.analysed_runs(analysis).values()
            found += [self.analysis_pack(analysis, run) for run in runs]
        return {pack.id: pack for pack in found}

    def analysis_spec(self, analysis: Analysis) -> dict[str, Any]:
        """All that decides what an analysis finds."""
        runs = self.analysed_runs(analysis)
        packs = {ref: self.analysis_pack(analysis, run) for ref, run in runs.items()}
        others = {ref: p.spec_hash for ref, p in packs.items() if p != runs[ref].pack}
        return ({"photographs": others} if others else {}) | {
            "kind": analysis.kind,
            "images": analysis.images,
            "args": analysis.args,
            "runs": {ref: run.spec_hash for ref, run in runs.items()},
            "models": {ref: run.model for ref, run in runs.items()},
        }

    def analysed(self, analysis: Analysis) -> Path:
        """The record of an analysis."""
        return RUNS / self.scale.id / "analysis" / f"{analysis.id}.json"


def protocol(settings: Mapping[str, Any], device: str) -> Mapping[str, Any]:
    """A study's latency settings on a kind of device, `cpu` or `cuda`.

    On a card, what the study says of it (`on_gpu`: batches and precision) takes the others' place.
    """
    return {**settings, **(settings.get("on_gpu", {}) if device == "cuda" else {})}


def load_plan(
    scale: str = "smoke", root: Path = Path("config"), weights_file: str | Path | None = None
) -> Plan:
    """Read `config/` and resolve it at `scale`.

    Raises:
        HovitError: for a mistake in `config/`, an unknown scale, or unreadable weights.
    """
    catalogue = load_catalogue(root)
    if scale not in catalogue.scales:
        known = ", ".join(catalogue.scales)
        raise HovitError(f"no scale {scale!r} in {root}/scales; there are {known}")
    path = Path(weights_file) if weights_file else None
    if path is not None and path.suffix != ".safetensors" and not path.is_dir():
        raise HovitError(
            f"{path}: weights must be a .safetensors file, or a folder of them (pickles are not "
            "opened)"
        )
    plan = Plan(catalogue, catalogue.scales[scale], path)
    plan.runs  # noqa: B018 (resolves and checks every run now)
    return plan


def all_packs(root: Path = Path("config")) -> dict[str, Pack]:
    """The packs of every scale: id -> pack."""
    catalogue = load_catalogue(root)
    plans = [Plan(catalogue, scale) for scale in catalogue.scales.values()]
    return {pack.id: pack for plan in plans for pack in plan.packs.values()}
