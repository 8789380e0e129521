"""timm's `build_model_with_cfg` with a place for local weights."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from timm.models import build_model_with_cfg, get_pretrained_cfg

WEIGHTS_VARIABLE = "HOVIT_WEIGHTS"


def build_model(
    model_cls: Callable[..., Any], variant: str, pretrained: bool, **kwargs: Any
) -> Any:
    """Build a registered model. With `pretrained`, look for its weights on this machine first.

    No weights of the models of this project are published. `pretrained=True` therefore reads
    `VARIANT.safetensors` in the folder that the environment variable HOVIT_WEIGHTS names, such as
    a copy of a run's `weights.safetensors`. As in timm, the classifier is not loaded if
    `num_classes` differs from that of the file. `pretrained_cfg_overlay={"file": PATH}` and
    `checkpoint_path=PATH` of `timm.create_model` work, too.

    Args:
        model_cls: class or function that builds the model.
        variant: registered name.
        pretrained: load weights.
        kwargs: as of `timm.models.build_model_with_cfg`.

    Raises:
        RuntimeError: if there are no weights; the message says how to get them.
    """
    if pretrained and not kwargs.get("pretrained_cfg") and not kwargs.get("pretrained_cfg_overlay"):
        kwargs["pretrained_cfg_overlay"] = _local_weights(variant)
    return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)


def _local_weights(variant: str) -> dict[str, Any]:
    """Entries of timm's pretrained configuration for a local file; none if a hub has weights."""
    cfg = get_pretrained_cfg(variant)
    assert cfg is not None
    given = os.environ.get(WEIGHTS_VARIABLE)
    path = Path(given) / f"{variant}.safetensors" if given else None
    if path and path.is_file():
        heads = cfg.classifier if isinstance(cfg.classifier, tuple) else (cfg.classifier,)
        with safe_open(path, "pt") as file:
            found = {
                file.get_slice(key).get_shape()[0]
                for key in file.keys()  # noqa: SIM118 (not a dict)
                if key in {f"{head}.bias" for head in heads}
            }
        return {"file": str(path)} | ({"num_classes": found.pop()} if found else {})
    if cfg.has_weights:
        return {}
    raise RuntimeError(
        f"{variant}: no pretrained weights are published. Train the model with `hovit train` "
        f"(`hovit list --runs` lists the runs), copy the run's weights.safetensors to "
        f"FOLDER/{variant}.safetensors, and set {WEIGHTS_VARIABLE}=FOLDER"
    )
