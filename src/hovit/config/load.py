"""Read and check `config/`."""

from pathlib import Path

from ..utils.errors import HovitError
from ..utils.yaml_file import load_file
from .schema import KINDS, Config, Row, Study
from .validation import check_references


def load_config(root: Path = Path("config")) -> Config:
    """Read and check all of `config/`.

    Raises:
        HovitError: for the first mistake found.
    """
    if not (root / "studies").is_dir():
        raise HovitError(f"{root}: no studies/ in it; run from the top folder of the artifact")
    found = {
        kind: {p.stem: load_file(p, model) for p in sorted((root / kind).glob("*.yaml"))}
        for kind, model in KINDS.items()
    }
    config = with_cited_models(Config(**found), root)
    check_references(config, root)
    return config


def with_cited_models(config: Config, root: Path) -> Config:
    """Fill in the model of each row that names another row (`same_as`).

    Raises:
        HovitError: if the named row does not exist, has no model, or names another row itself.
    """
    studies = {
        study.id: study.model_copy(
            update={"rows": tuple(_cited(config, root, study, row) for row in study.rows)}
        )
        if study.cites
        else study
        for study in config.studies.values()
    }
    return config.model_copy(update={"studies": studies})


def _cited(config: Config, root: Path, study: Study, row: Row) -> Row:
    if row.same_as is None:
        return row
    study_id, row_id = row.same_as.split("/")
    found = [r for s in config.studies.values() if s.id == study_id for r in s.rows]
    cited = next((each for each in found if each.id == row_id), None)
    where = f"{root}/studies/{study.id}.yaml: rows: {row.id}: same_as"
    if cited is None:
        raise HovitError(f"{where}: there is no row {row.same_as}")
    if cited.same_as or cited.model is None or row.model:
        raise HovitError(f"{where}: {row.same_as} must have a model, and this row must not")
    size = cited.image_size or config.studies[study_id].image_size
    own_size = size if size != study.image_size else None
    return row.model_copy(
        update={"model": cited.model, "model_args": cited.model_args, "image_size": own_size}
    )
