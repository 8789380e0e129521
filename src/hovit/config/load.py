"""Read and check `config/`."""

from pathlib import Path

from ..utils.errors import HovitError
from ..utils.yaml_file import load_file
from .schema import KINDS, Config
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
    config = Config(**found)
    check_references(config, root)
    return config
