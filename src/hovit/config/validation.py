"""References between the files of `config/`: every name is defined, and settings fit together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..utils.errors import HovitError, nearest
from .kinds import ANALYSIS_KINDS
from .models import check_arguments, check_model, check_tag, check_values
from .schema import Config, Row, Study, split_ref

Must = Callable[[Any, str, str], None]


def check_references(config: Config, root: Path) -> None:
    """Check all references.

    Args:
        config: all files.
        root: their folder, for messages.

    Raises:
        HovitError: for the first name that is not defined, with its place.
    """

    def must(known: Any, name: str, where: str) -> None:
        if name not in known:
            raise HovitError(
                f"{root}/{where}: {name!r} is not defined{nearest(name, known)}; "
                f"allowed: {', '.join(known)}"
            )

    _check_scales(config, root, must)
    for study in config.studies.values():
        _check_rows(config, root, study, must)
    for analysis in config.analyses.values():
        for row_ref in analysis.of:
            _check_row_ref(config, row_ref, f"analyses/{analysis.id}.yaml: of", must)
        known = {name: [kind] for name, kind in ANALYSIS_KINDS[analysis.kind].args.items()}
        check_values(
            analysis.args, known, f"{root}/analyses/{analysis.id}.yaml: args", analysis.kind
        )
    _check_claims(config, root, must)


def _check_row_ref(config: Config, row_ref: str, where: str, must: Must) -> Row:
    """Check a reference STUDY/ROW; return the row."""
    study_id, row_id = row_ref.split("/")
    must(config.studies, study_id, where)
    must([row.id for row in config.studies[study_id].rows], row_id, where)
    return config.studies[study_id].row(row_id)


def _check_scales(config: Config, root: Path, must: Must) -> None:
    for scale in config.scales.values():
        file = f"scales/{scale.id}.yaml"
        for role, dataset in scale.datasets.items():
            where = f"{file}: datasets.{role}"
            must(config.datasets, dataset, where)
            if (role == "coco") != (config.datasets[dataset].reader == "coco"):
                raise HovitError(f"{root}/{where}: role coco and reader coco require each other")
            if role == "coco" and scale.precision != "32-true":
                raise HovitError(
                    f"{root}/{file}: precision {scale.precision}: detectors train at 32-true only, "
                    "because mixed precision rounds the boxes"
                )
        if scale.photographs:
            must(config.datasets, scale.photographs, f"{file}: photographs")
        for key, recipes in (
            ("epochs", scale.epochs),
            ("pretrained_epochs", scale.pretrained_epochs),
            ("recipe_seeds", scale.recipe_seeds),
            ("batch_sizes", scale.batch_sizes),
            ("lrs", scale.lrs),
            ("ema_decays", scale.ema_decays),
        ):
            for recipe in recipes:
                must(config.recipes, recipe, f"{file}: {key}")
        for name, stand_in in scale.models.items():
            check_model(name, f"{root}/{file}: models.{name}")
            check_model(stand_in.model, f"{root}/{file}: models.{name}.model")
        for name, weights in scale.weights.items():
            if weights.timm:
                check_model(weights.timm, f"{root}/{file}: weights.{name}.timm", tag=True)
            where = f"{file}: weights.{name}.row"
            if weights.row and _check_row_ref(config, weights.row, where, must).pretrained:
                raise HovitError(f"{root}/{where}: {weights.row} itself starts from weights")


def _check_claims(config: Config, root: Path, must: Must) -> None:
    seen: set[str] = set()
    for claims in config.claims.values():
        for i, claim in enumerate(claims.claims):
            where = f"claims/{claims.id}.yaml: claims[{i}]"
            if claim.id in seen:
                raise HovitError(f"{root}/{where}.id: {claim.id!r} is given twice")
            seen.add(claim.id)
            for key, ref in (("of", claim.of), ("to", claim.to)):
                if ref is not None:
                    _check_ref(config, ref, f"{where}.{key}", must)


def _check_ref(config: Config, ref: str, where: str, must: Must) -> None:
    """Check a claim's reference to a number of a row, or of an analysis."""
    analysis_id, study_id, row_id, metric = split_ref(ref)
    row_ref = f"{study_id}/{row_id}"
    if analysis_id:
        must(config.analyses, analysis_id, where)
        must(config.analyses[analysis_id].of, row_ref, where)
        return
    row = _check_row_ref(config, row_ref, where, must)
    must(_claimable(config, config.studies[study_id], row), metric, where)


def _check_rows(config: Config, root: Path, study: Study, must: Must) -> None:
    file = f"studies/{study.id}.yaml"
    must(config.recipes, study.recipe, f"{file}: recipe")
    ids = [row.id for row in study.rows]
    for scale, chosen in study.rows_at.items():
        must(config.scales, scale, f"{file}: rows_at")
        for row_id in chosen:
            must(ids, row_id, f"{file}: rows_at.{scale}")
    for i, row in enumerate(study.rows):
        if row.id in ids[:i]:
            raise HovitError(f"{root}/{file}: rows[{i}].id: {row.id!r} is given twice")
        if row.reported_only and (row.model or not row.reported):
            raise HovitError(
                f"{root}/{file}: rows[{i}].reported_only: requires `reported` and no model"
            )
        if (study.kind == "models" and not row.reported_only) != (row.model is not None):
            raise HovitError(
                f"{root}/{file}: rows[{i}].model: "
                + ("a row of a models study names a model" if not row.model else "not allowed")
            )
        if row.rule:
            must(config.datasets, row.rule, f"{file}: rows[{i}].rule")
        if (row.rule is None) != (row.total is None):
            raise HovitError(f"{root}/{file}: rows[{i}]: `rule` and `total` require each other")
        if row.recipe:
            must(config.recipes, row.recipe, f"{file}: rows[{i}].recipe")
        if config.recipes[row.recipe or study.recipe].frozen_front and not row.pretrained:
            raise HovitError(
                f"{root}/{file}: rows[{i}].pretrained: a recipe with `frozen_front` needs it"
            )
        detects = config.recipes[row.recipe or study.recipe].detection is not None
        if study.trained and row.model and detects != ((row.dataset or study.dataset) == "coco"):
            raise HovitError(
                f"{root}/{file}: rows[{i}]: dataset coco and a recipe with `detection` require "
                "each other"
            )
        if not row.same_as:  # else its own study names the place
            _check_model(config, f"{root}/{file}: rows[{i}]", row)
        if row.trained_as:
            where = f"{file}: rows[{i}].trained_as"
            cited = _check_row_ref(config, row.trained_as, where, must)
            if study.trained:
                raise HovitError(f"{root}/{where}: only in a study that trains nothing")
            if cited.reported_only or not config.studies[row.trained_as.split("/")[0]].trained:
                raise HovitError(f"{root}/{where}: {row.trained_as} is not trained")
        if row.baseline:
            must(ids, row.baseline, f"{file}: rows[{i}].baseline")


def _check_model(config: Config, where: str, row: Row) -> None:
    """Check that the model of a row exists and takes its arguments; also its stand-ins."""
    if row.model is None:
        return
    check_model(row.model, f"{where}.model")
    for model in {row.model, *(scale.model_of(row) for scale in config.scales.values())}:
        check_arguments(model, row.model_args, f"{where}.model_args")
    if row.tag:
        check_tag(row.model, row.tag, f"{where}.tag")


def _claimable(config: Config, study: Study, row: Row) -> list[str]:
    """Numbers of a row that a claim may refer to: metrics, latency by batch, reported numbers."""
    metrics: list[str] = [m for m in study.columns if m != "latency"]
    if "latency" in study.columns:
        timed = [scale for scale in config.scales.values() if "latency" in scale.judges]
        batches = sorted({batch for scale in timed for batch in scale.latency.batches})
        metrics += [f"latency_{batch}" for batch in study.batches or batches]
    if study.kind == "models":
        metrics += ["parameters", "parameters_used", "parameters_unused"]
    return [*dict.fromkeys(metrics), *(f"reported_{name}" for name in row.reported)]
