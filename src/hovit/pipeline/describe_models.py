"""Describe the models that this project registers with timm, for the model cards."""

import inspect
import sys
from typing import Any

import timm

import hovit.models

from ..measure.cost import cost
from ..models.front import ModelName


def registered_models() -> dict[str, list[str]]:
    """Module of `hovit.models` -> the models that it registers, in the order of its variants."""
    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        package, _, module = timm.model_entrypoint(name).__module__.rpartition(".")
        if package == hovit.models.__name__:
            found.setdefault(module, []).append(name)
    for module, names in found.items():
        names.sort(key=list(sys.modules[f"{hovit.models.__name__}.{module}"].default_cfgs).index)
    return found


def describe_model(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """Input, parameters and multiply-adds of a model, with timm's default image size and classes.

    Args:
        name: a registered model.
        args: arguments of the model.

    Returns:
        `input_size`, `mean` and `std`, if the model takes images, and what
        `hovit.measure.cost.cost` returns. Empty for a model that needs the name of another one.

    Raises:
        HovitError: for arguments that the model does not take.
    """
    parameters = inspect.signature(timm.model_entrypoint(name), eval_str=True).parameters.values()
    if any(p.annotation == ModelName and not args.get(p.name, p.default) for p in parameters):
        return {}
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    counts = cost(name, args, cfg.num_classes, cfg.input_size[-1])
    if cfg.first_conv is None:
        return counts
    return {"input_size": cfg.input_size, "mean": cfg.mean, "std": cfg.std} | counts
