"""Resolve a row of a study into runs: model, data set, recipe and seed at one scale."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.errors import HovitError
from ..utils.files import file_digest
from .runs import Run, Weights
from .schema import Config, Recipe, Row, Scale, Study

# Roles with one random seed: pretraining runs only provide weights; detection papers report one.
ONE_SEED = ("pretrain", "upstream", "coco")


@dataclass(frozen=True)
class Resolver:
    """Resolves rows into runs; each run is resolved once.

    Args:
        config: everything under `config/`.
        scale: the scale.
        weights_file: argument of `--weights`, as in `Plan`.
    """

    config: Config
    scale: Scale
    weights_file: Path | None = None
    _cache: dict[tuple[str, str, int], Run] = field(default_factory=dict, compare=False)
    _sha256: dict[Path, str] = field(default_factory=dict, compare=False)

    def runs_of(self, study: Study, row: Row) -> list[Run]:
        """The runs of a row, one for each seed; none if the scale has no such dataset or row."""
        if ref := row.trained_as or row.same_as:
            study_id, row_id = ref.split("/")
            study = self.config.studies[study_id]
            return self.runs_of(study, study.row(row_id))
        role = row.dataset or study.dataset
        if row.model is None or not study.trained or role not in self.scale.datasets:
            return []
        if not study.runs_at(self.scale, row):
            return []
        count = self.scale.recipe_seeds.get(row.recipe or study.recipe, len(self.scale.seeds))
        seeds = self.scale.seeds[: 1 if role in ONE_SEED else count]
        return [self._run(study, row, seed) for seed in seeds]

    def _run(self, study: Study, row: Row, seed: int) -> Run:
        if (key := (study.id, row.id, seed)) not in self._cache:
            self._cache[key] = self._resolve(study, row, seed)
        return self._cache[key]

    def _resolve(self, study: Study, row: Row, seed: int) -> Run:
        role = row.dataset or study.dataset
        recipe = self.config.recipes[row.recipe or study.recipe]
        stand_in = self.scale.models.get(str(row.model))
        size = min(self.scale.image_size or recipe.image_size, recipe.image_size)
        size = stand_in.image_size if stand_in else size
        model = self.scale.model_of(row)
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
            dataset=self.config.datasets[self.scale.datasets[role]],
            image_size=size,
            recipe=self._scaled(recipe, size, pretrained=row.pretrained is not None),
            limit=self.scale.limit,
            precision=self.scale.precision,
            weights=self._weights(row.pretrained) if row.pretrained else None,
        )

    def _scaled(self, recipe: Recipe, image_size: int, pretrained: bool) -> Recipe:
        """The recipe with this scale's epochs, batch size and learning rate."""
        epochs = self.scale.epochs.get(recipe.id)
        if pretrained:
            epochs = self.scale.pretrained_epochs.get(recipe.id, epochs)
        factor = epochs / recipe.epochs if epochs else self.scale.epoch_factor
        detection = recipe.detection
        if detection:
            milestones = tuple(epoch * factor for epoch in detection.milestones)
            detection = detection.model_copy(update={"milestones": milestones})
        batch_size = self.scale.batch_sizes.get(recipe.id, recipe.batch_size)
        lr = recipe.lr * (batch_size / recipe.batch_size if recipe.scale_lr else 1)
        return recipe.model_copy(
            update={
                "detection": detection,
                "epochs": max(1, round(recipe.epochs * factor)),
                "batch_size": batch_size,
                "lr": self.scale.lrs.get(recipe.id, lr),
                "warmup_epochs": recipe.warmup_epochs * factor,
                "ema_decay": self.scale.ema_decays.get(recipe.id, recipe.ema_decay),
                "image_size": image_size,
            }
        )

    def _weights(self, name: str) -> Weights:
        """The source of the weights of a pretrained model: a file, a run, timm or a package."""
        if path := self._given_file(name):
            if path not in self._sha256:
                self._sha256[path] = file_digest(path)
            return Weights(sha256=self._sha256[path])
        source = self.scale.weights.get(name)
        if source is None:
            raise HovitError(f"config/scales/{self.scale.id}.yaml: weights.{name}: not given")
        if source.timm or source.package:
            return Weights(timm=source.timm, package=source.package)
        study_id, row_id = str(source.row).split("/")
        study = self.config.studies[study_id]
        runs = self.runs_of(study, study.row(row_id))
        if not runs:
            role = study.row(row_id).dataset or study.dataset
            raise HovitError(f"config/scales/{self.scale.id}.yaml: datasets.{role}: not given")
        return Weights(run=runs[0].id, seed=runs[0].seed, spec=runs[0].spec_hash)

    def _given_file(self, name: str) -> Path | None:
        """The file that `--weights` gives for a model; a single file is for ResNet50.

        In a folder, this is NAME.safetensors, or the only file with a tag: NAME.TAG.safetensors.
        """
        given = self.weights_file
        if given is None or not given.is_dir():
            return given if name == "resnet50" else None
        exact = given / f"{name}.safetensors"
        found = [exact] if exact.exists() else sorted(given.glob(f"{name}.*.safetensors"))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise HovitError(f"{given}: several weights of {name} ({names}); name one {exact.name}")
        return found[0] if found else None
